"""The filter of system calls decides as it says."""

import os
import platform
import struct

import pytest

from lockstep.rl.sandbox.linux.seccomp import filter_program


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
@pytest.mark.parametrize(
    ("call", "arguments", "allowed"),
    [
        ("write", (1, 1, 0, 0), True),
        ("clone thread", (56, 0x10000, 0, 0), True),
        ("clone process", (56, 0x11, 0, 0), False),
        ("clone3", (435, 0, 0, 0), False),
        ("open to read", (257, 0, 0, os.O_RDONLY), True),
        ("open to write", (257, 0, 0, os.O_WRONLY), False),
        ("open to create", (257, 0, 0, os.O_CREAT), False),
        ("unlink", (87, 0, 0, 0), False),
        ("own limits", (302, 0, 0, 0), True),
        ("others' limits", (302, 7, 0, 0), False),
        ("stream pair", (53, 1, 0x80001, 0), True),
        ("datagram pair", (53, 1, 2, 0), False),
        ("duplicate", (72, 1, 1030, 0), True),
        ("set owner", (72, 1, 8, 0), False),
        ("kill", (62, 1, 9, 0), False),
        ("x32", (0x40000001, 1, 0, 0), False),
    ],
)
def test_the_filter_decides_as_it_says(call: str, arguments: tuple[int, int, int, int], allowed: bool) -> None:
    """An interpreter of the filter's five instructions, with the data that the kernel gives them."""
    program = filter_program(files=False)
    assert program is not None
    number, *values = arguments
    data = struct.pack("=IIQ6Q", number, 0xC000003E, 0, *values, 0, 0, 0)
    assert (run_filter(program, data) == 0x7FFF0000) is allowed
    foreign = struct.pack("=IIQ6Q", number, 0x40000003, 0, *values, 0, 0, 0)
    assert run_filter(program, foreign) == 0x80000000


def run_filter(program: bytes, data: bytes) -> int:
    instructions = list(struct.iter_unpack("=HBBI", program))
    place = register = 0
    while True:
        code, yes, no, value = instructions[place]
        place += 1
        match code:
            case 0x20:
                (register,) = struct.unpack_from("=I", data, value)
            case 0x54:
                register &= value
            case 0x15:
                place += yes if register == value else no
            case 0x45:
                place += yes if register & value else no
            case 0x06:
                return int(value)
