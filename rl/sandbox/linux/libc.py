"""Linux system calls that Python 3.11 has no functions for, by ctypes. A failure is an OSError that names the call."""

import ctypes
import os
import platform
import struct
from functools import cache

NEW_MOUNTS, NEW_GROUPS, NEW_NAME, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NET = 0x10000000, 0x20000000, 0x40000000

BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 1 << 18
NO_SUID, NO_DEVICES = 2, 4
READ_ONLY = 1
"""In mount_setattr(2); so are the two above."""

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_AT_FDCWD, _AT_RECURSIVE, _DETACH = -100, 0x8000, 2
_PDEATHSIG, _SUBREAPER, _NO_NEW_PRIVILEGES, _DUMPABLE = 1, 36, 38, 4
_CAPABILITIES_V3 = 0x20080522


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(name: str, result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(name: str, number: int, *arguments: object) -> int:
    return _checked(name, _libc().syscall(ctypes.c_long(number), *arguments))


def unshare(flags: int) -> None:
    """unshare(2): moves this process into new namespaces."""
    _checked("unshare", _libc().unshare(flags))


def join(namespace: int, kind: int) -> None:
    """setns(2): moves this process, or its children, into the namespace of a descriptor."""
    _checked("setns", _libc().setns(namespace, kind))


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2): mounts a file system, or binds a path, at a target."""
    texts = [text.encode() or None for text in (source, target, kind, options)]
    outcome = _libc().mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _checked(f"mount of {source} at {target}", outcome)


def protect_mount(target: str, attributes: int, recursive: bool = False) -> None:
    """mount_setattr(2): adds attributes to a mount, and to those below it."""
    values = struct.pack("=QQQQ", attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    path, size = target.encode(), ctypes.c_size_t(len(values))
    _syscall(f"mount_setattr of {target}", _MOUNT_SETATTR, _AT_FDCWD, path, flags, values, size)


def unmount(target: str) -> None:
    """umount2(2) with MNT_DETACH: what is still in use is unmounted when its last user is done."""
    _checked(f"umount of {target}", _libc().umount2(target.encode(), _DETACH))


def pivot_root(root: str, old: str) -> None:
    """pivot_root(2): makes `root` the root file system and puts the previous one at `old`."""
    _syscall("pivot_root", _PIVOT_ROOT[platform.machine()], root.encode(), old.encode())


def die_with_parent(signal: int) -> None:
    """prctl(PR_SET_PDEATHSIG): get `signal` when the parent thread ends; set it after any change of user."""
    _prctl("prctl(PDEATHSIG)", _PDEATHSIG, signal)


def adopt_orphans() -> None:
    """prctl(PR_SET_CHILD_SUBREAPER): orphans below this process become its children."""
    _prctl("prctl(SUBREAPER)", _SUBREAPER, 1)


def gain_nothing() -> None:
    """prctl(PR_SET_NO_NEW_PRIVS): nothing executed from now on gains privileges."""
    _prctl("prctl(NO_NEW_PRIVS)", _NO_NEW_PRIVILEGES, 1)


def hide_memory() -> None:
    """prctl(PR_SET_DUMPABLE, 0): processes of the same user can neither trace this one nor read its memory."""
    _prctl("prctl(DUMPABLE)", _DUMPABLE, 0)


def _prctl(name: str, option: int, value: int) -> None:
    _checked(name, _libc().prctl(option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0))))


def drop_capabilities() -> None:
    """capset(2): gives up all capabilities."""
    header, nothing = struct.pack("=Ii", _CAPABILITIES_V3, 0), struct.pack("=6I", *[0] * 6)
    _checked("capset", _libc().capset(header, nothing))


def landlock_version() -> int:
    """Landlock's ABI version; 0 where the kernel has none."""
    return max(0, int(_libc().syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), 1)))


def landlock_ruleset(files: int, network: int, scopes: int) -> int:
    """landlock_create_ruleset(2): a descriptor of a ruleset that handles these accesses, closed on exec."""
    handled = struct.pack("=QQQ", files, network, scopes)
    size = 24 if scopes else 16 if network else 8
    return _syscall("landlock_create_ruleset", _CREATE_RULESET, handled, ctypes.c_size_t(size), 0)


def landlock_allow(ruleset: int, path: str, accesses: int) -> None:
    """landlock_add_rule(2): allows accesses beneath a path."""
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _syscall(f"landlock rule for {path}", _ADD_RULE, ruleset, 1, struct.pack("=Qi", accesses, folder), 0)
    finally:
        os.close(folder)


def landlock_enforce(ruleset: int) -> None:
    """landlock_restrict_self(2): this process and its children have the accesses of the ruleset and no others."""
    _syscall("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)


def install_filter(program: bytes) -> None:
    """Installs a seccomp filter (an array of struct sock_filter) for this process and its children, for good."""
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _checked("prctl(SECCOMP)", _libc().prctl(22, ctypes.c_ulong(2), header))
