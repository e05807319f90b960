"""Runs a program that reads standard input and prints, within a bound on what it prints."""

import os
import selectors
from dataclasses import dataclass

from lockstep.rl.sandbox.harness.runs import Runs

SHOWN = 200
"""Characters of a value in a verdict's reason."""
_PIECE = 1 << 16


@dataclass(frozen=True)
class Observation:
    """What a program printed, and how it failed, as "ended with exit code 1 …"; empty where it did not."""

    output: str
    problem: str = ""


def observe(stdin: str, runs: Runs) -> Observation:
    """Runs the program on this input; returns what it printed. More than `runs.longest` bytes of output end it."""
    pipes = [os.pipe() for _ in range(3)]
    (input_read, input_write), (output_read, output_write), (errors_read, errors_write) = pipes
    given = stdin.encode()
    runs.clock.begin()
    ended = runs.start([input_read, output_write, errors_write])
    for descriptor in (input_read, output_write, errors_write):
        os.close(descriptor)
    output, errors = _converse(input_write, given, (output_read, errors_read), runs.longest)
    problem = "" if len(output) > runs.longest else ended()
    runs.clock.end()
    printed = output.decode(errors="replace")
    if len(output) > runs.longest:
        return Observation(printed, f"printed more than {runs.longest} bytes")
    if problem:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        return Observation(printed, f"{problem} {''.join(last)}"[:SHOWN].strip())
    return Observation(printed)


def _converse(stdin: int, text: bytes, outputs: tuple[int, int], longest: int) -> tuple[bytes, bytes]:
    """Writes the input while it reads both outputs, until they close or one is over the longest. Closes all three."""
    collected = {descriptor: bytearray() for descriptor in outputs}
    with selectors.DefaultSelector() as selector:
        os.set_blocking(stdin, False)
        selector.register(stdin, selectors.EVENT_WRITE)
        for descriptor in outputs:
            selector.register(descriptor, selectors.EVENT_READ)
        while set(outputs) & set(selector.get_map()):
            for key, _ in selector.select():
                if key.fd == stdin:
                    text = _written(stdin, text)
                    done = not text
                else:
                    piece = os.read(key.fd, _PIECE)
                    collected[key.fd] += piece
                    done = not piece or len(collected[key.fd]) > longest
                if done:
                    selector.unregister(key.fd)
                    os.close(key.fd)
        for key in list(selector.get_map().values()):
            os.close(key.fd)
    return bytes(collected[outputs[0]]), bytes(collected[outputs[1]])


def _written(stdin: int, text: bytes) -> bytes:
    """What is left to write; nothing if nobody reads."""
    try:
        return text[os.write(stdin, text[:_PIECE]) :] if text else b""
    except BrokenPipeError:
        return b""
