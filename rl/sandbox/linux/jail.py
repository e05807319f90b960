"""Isolates processes: a root file system with Python alone, then Landlock, seccomp and rlimits for each process."""

import fcntl
import math
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lockstep.rl.sandbox.isolation import Isolation, SandboxLimits
from lockstep.rl.sandbox.linux import libc
from lockstep.rl.sandbox.linux.seccomp import filter_program

_FOLDERS = "/work"
FOLDER = f"{_FOLDERS}/program"
"""Landlock allows what lies beneath the first, so that the second may be replaced."""
_ROOT = "/proc"
"""Where the new root is put together; that it hides the old /proc meanwhile does not matter."""
_NOBODY = 65534
_INSIDE_USER = 1
_NAMESPACES = libc.NEW_USER | libc.NEW_MOUNTS | libc.NEW_PIDS | libc.NEW_NET | libc.NEW_IPC | libc.NEW_NAME
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_OPEN_FILES = 64
_OUTER_PROCESSES = 4
"""Processes of the sandbox that run as the same user as a program."""
_READ_AND_WRITE = 0b110
_READ = 0b1101
"""Landlock: execute, read files, read folders (linux/landlock.h)."""
_FILE_ACCESSES = {1: 13, 2: 14, 3: 15, 5: 16}
"""Number of file accesses from a version on."""


def unshare_all(ready: int, go: int) -> None:
    """Moves this process into new namespaces, and its next child into a new process tree; its parent maps the users.

    ready, go: descriptors on which this process says that it waits, and is told to go on.
    """
    libc.unshare(_NAMESPACES)
    os.write(ready, b"u")
    if os.read(go, 1) != b"m":
        raise OSError("the parent could not map users into the namespace")


def map_users(pid: int) -> None:
    """Maps this user to 0 in the user namespace of process pid; for root also nobody, as whom programs then run."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        with suppress(OSError):
            _write_maps(pid, f"0 0 1\n{_INSIDE_USER} {_NOBODY} 1", f"0 {group} 1\n{_INSIDE_USER} {_NOBODY} 1")
            return
    with suppress(OSError):
        Path(f"/proc/{pid}/setgroups").write_text("deny")
    _write_maps(pid, f"0 {user} 1", f"0 {group} 1")


def _write_maps(pid: int, users: str, groups: str) -> None:
    Path(f"/proc/{pid}/uid_map").write_text(users)
    Path(f"/proc/{pid}/gid_map").write_text(groups)


def build_root(folder_bytes: int, libraries: Sequence[str]) -> None:
    """Makes a new root: Python's and other libraries, read-only, three devices and an empty folder to write.

    Args:
        libraries: files and folders to be found where they lie outside.
    """
    libc.mount("none", "/", flags=libc.RECURSIVE | libc.PRIVATE)
    sources = _library_folders()
    hidden = [path for source in sources for path in source.glob("python*/*-packages")]
    hidden += [path for source in sources for path in source.glob("*-packages")]
    libc.mount("sandbox", _ROOT, "tmpfs", libc.NO_SUID, "size=1m,nr_inodes=4k,mode=755")
    for source in sources:
        _bind(str(source), libc.READ_ONLY | libc.NO_SUID | libc.NO_DEVICES)
    for path in hidden:
        libc.mount("sandbox", _ROOT + str(path), "tmpfs", libc.NO_SUID, "size=64k,nr_inodes=1k,mode=755")
    for library in libraries:
        _bind(library, libc.READ_ONLY | libc.NO_SUID | libc.NO_DEVICES)
    for path in hidden:
        libc.protect_mount(_ROOT + str(path), libc.READ_ONLY)
    for device in _DEVICES:
        _bind(device, libc.NO_SUID)
    os.makedirs(_ROOT + FOLDER)
    os.makedirs(_ROOT + "/old")
    libc.pivot_root(_ROOT, _ROOT + "/old")
    os.chdir("/")
    libc.unmount("/old")
    os.rmdir("/old")
    libc.protect_mount("/", libc.READ_ONLY)
    renew_folder(folder_bytes, first=True)


def _library_folders() -> list[Path]:
    """Where Python and the libraries that it loads lie, none inside another."""
    names = [os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib", *_LIBRARIES]
    found = {Path(os.path.abspath(name)) for name in names if os.path.isdir(name)}
    return sorted(path for path in found if not set(path.parents) & found)


def _bind(source: str, attributes: int) -> None:
    target = _ROOT + source
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    libc.mount(os.path.realpath(source), target, flags=libc.BIND | libc.RECURSIVE)
    libc.protect_mount(target, attributes, recursive=True)


def renew_folder(folder_bytes: int, first: bool = False) -> None:
    """Replaces the folder of programs by an empty one, unless it is empty already."""
    if not first:
        status = os.stat(FOLDER)
        if not os.listdir(FOLDER) and status.st_mode & 0o7777 == 0o777:
            return
        libc.unmount(FOLDER)
    options = f"size={folder_bytes},nr_inodes=1k,mode=777"
    libc.mount("program", FOLDER, "tmpfs", libc.NO_SUID | libc.NO_DEVICES, options)


def landlock_rules(private_root: bool, libraries: Sequence[str]) -> int | None:
    """A descriptor of a Landlock ruleset for programs; None where the kernel has no Landlock."""
    version = libc.landlock_version()
    if version == 0:
        return None
    count = max(number for since, number in _FILE_ACCESSES.items() if since <= version)
    files = (1 << count) - 1
    ruleset = libc.landlock_ruleset(files, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    for path in ["/"] if private_root else [*map(str, _library_folders()), *filter(os.path.isdir, libraries)]:
        libc.landlock_allow(ruleset, path, _READ)
    libc.landlock_allow(ruleset, os.devnull, _READ_AND_WRITE)
    if private_root:
        libc.landlock_allow(ruleset, _FOLDERS, files)
    return ruleset


class Jail:
    """Restrictions that each forked process applies to itself before it runs any untrusted code."""

    def __init__(self, wanted: Isolation, limits: SandboxLimits, libraries: Sequence[str]) -> None:
        """
        Args:
            wanted: whose `namespaces` says whether this process is in namespaces already.
            libraries: files and folders that may be read.
        """
        self._limits = limits
        self._rules = landlock_rules(wanted.namespaces, libraries) if wanted.landlock else None
        self._filters = {files: filter_program(files) if wanted.seccomp else None for files in (True, False)}
        self.active = replace(wanted, seccomp=self._filters[True] is not None, landlock=self._rules is not None)

    def enter(self, descriptors: list[int], seconds: float, writes: bool) -> None:
        """Restricts this process for good.

        Args:
            descriptors: become 0, 1, 2 …, all others are closed.
            seconds: on a processor, after which the kernel ends it where the zygote has not.
            writes: allows the folder.
        """
        writes = writes and self.active.namespaces
        os.chdir(FOLDER if writes else "/")
        _keep_only(descriptors + ([] if self._rules is None else [self._rules]))
        self._limit(seconds, writes)
        if self.active.namespaces:
            _become_nobody()
        libc.drop_capabilities()
        libc.die_with_parent(signal.SIGKILL)
        libc.gain_nothing()
        if self._rules is not None:
            libc.landlock_enforce(len(descriptors))
            os.close(len(descriptors))
        if rules := self._filters[writes]:
            libc.install_filter(rules)

    def _limit(self, seconds: float, writes: bool) -> None:
        limits = self._limits
        values = {
            resource.RLIMIT_CPU: math.ceil(seconds) + 1,
            resource.RLIMIT_AS: limits.memory_bytes,
            resource.RLIMIT_FSIZE: limits.folder_bytes if writes else 0,
            resource.RLIMIT_NOFILE: _OPEN_FILES,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        if self.active.namespaces:  # elsewhere all processes of the user count, on the whole machine
            values[resource.RLIMIT_NPROC] = _OUTER_PROCESSES + limits.threads
        for name, value in values.items():
            resource.setrlimit(name, (value, value))


def _keep_only(descriptors: list[int]) -> None:
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _OPEN_FILES) for descriptor in descriptors]
    for place, descriptor in enumerate(high):
        os.dup2(descriptor, place)
    os.closerange(len(high), resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _become_nobody() -> None:
    """Root's programs run as nobody, where the namespace has one; elsewhere there is one user only."""
    with suppress(OSError):
        os.setgroups([])
        os.setresgid(_INSIDE_USER, _INSIDE_USER, _INSIDE_USER)
        os.setresuid(_INSIDE_USER, _INSIDE_USER, _INSIDE_USER)
