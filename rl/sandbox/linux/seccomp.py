"""A seccomp filter for untrusted programs: an allow-list of system calls, so that unknown ones are refused.

Everything else fails with EPERM, which Python turns into an exception, so that an odd but honest program fails with a
reason. Threads may start, processes may not: `clone` needs CLONE_THREAD, and `clone3`, whose flags a filter cannot
read, does not exist (ENOSYS), for which libc falls back to `clone`. A foreign architecture's call ends the process.
"""

import errno
import os
import platform
import struct

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: numbers on x86_64 and aarch64 (asm/unistd_64.h, asm-generic/unistd.h); None where the machine lacks it
_ALWAYS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "close": (3, 57),
    "close_range": (436, 436),
    "lseek": (8, 62),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "getdents": (78, None),
    "getdents64": (217, 61),
    "umask": (95, 166),
    "sendfile": (40, 71),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "alarm": (37, None),
    "pause": (34, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getcpu": (309, 168),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126),
    "getpriority": (140, 141),
    "getrlimit": (97, 163),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrandom": (318, 278),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create": (213, None),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd": (284, None),
    "eventfd2": (290, 19),
    "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86),
    "timerfd_gettime": (287, 87),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "getsockopt": (55, 209),
    "setsockopt": (54, 208),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "wait4": (61, 260),
    "waitid": (247, 95),
    "capget": (125, 90),
}
# what changes files, beside opening them for it
_FILES: dict[str, tuple[int | None, int | None]] = {
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "utimensat": (280, 88),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "copy_file_range": (326, 285),
    "flock": (73, 32),
}
_OPEN: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None),
    "openat": (257, 56),
}
# clone 56 220
# clone3 435 435
# ioctl 16 29
# prlimit64 302 261
_CONDITIONAL = {
    "clone": (56, 220),
    "ioctl": (16, 29),
    "fcntl": (72, 25),
    "prlimit64": (302, 261),
    "socketpair": (53, 199),
}
_CLONE3 = 435

_CLONE_THREAD = 0x10000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_TERMINAL_QUERIES = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
_DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
"""Duplication, flags and locks; not the owner and the signal of a descriptor, by which a process can be killed."""

_LOAD, _AND, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, value: struct sock_filter of linux/filter.h."""


def filter_program(files: bool) -> bytes | None:
    """The BPF program for this machine, with or without calls that change files; None for an unknown architecture."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return None
    column = list(_ARCHITECTURES).index(machine)
    allowed = {**_ALWAYS, **_FILES, **_OPEN} if files else _ALWAYS
    numbers = [pair[column] for pair in allowed.values()]
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NUMBER)]
    for number in numbers:
        program += [] if number is None else _where(number, [(_RETURN, 0, 0, _ALLOW)])
    for name, check in _checks(files).items():
        number = {**_CONDITIONAL, **_OPEN}[name][column]
        program += [] if number is None else _where(number, check)
    program += _where(_CLONE3, [(_RETURN, 0, 0, _REFUSE | errno.ENOSYS)])
    program += [(_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _checks(files: bool) -> dict[str, list[Instruction]]:
    """What the arguments of some calls must be; each list ends by returning."""
    opening = {} if files else {"open": _no_bits(1, _WRITES), "openat": _no_bits(2, _WRITES)}
    return {
        "clone": [_argument(0), (_ANY_BIT, 1, 0, _CLONE_THREAD), *_refused(), (_RETURN, 0, 0, _ALLOW)],
        "ioctl": _one_of(1, _TERMINAL_QUERIES),
        "fcntl": _one_of(1, _DESCRIPTOR_COMMANDS),
        "prlimit64": _one_of(0, (0,)),
        "socketpair": _one_of(1, (1,), mask=0xF),
        **opening,
    }


def _where(number: int, block: list[Instruction]) -> list[Instruction]:
    return [(_EQUAL, 0, len(block), number), *block]


def _argument(index: int) -> Instruction:
    """Loads the low half of an argument; the calls that are checked read no more of it."""
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)


def _refused() -> list[Instruction]:
    return [(_RETURN, 0, 0, _REFUSE | errno.EPERM)]


def _one_of(index: int, values: tuple[int, ...], mask: int = 0xFFFFFFFF) -> list[Instruction]:
    tests = [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [_argument(index), (_AND, 0, 0, mask), *tests, *_refused(), (_RETURN, 0, 0, _ALLOW)]


def _no_bits(index: int, bits: int) -> list[Instruction]:
    return [_argument(index), (_ANY_BIT, 1, 0, bits), (_RETURN, 0, 0, _ALLOW), *_refused()]
