"""The published attack suite on the code verifier: programs that want to be judged correct without solving the problem.

Each source is a whole completion; one that does not define `double` gets the one of `WRONG` behind it. In a source
@FILE@ is a file of the parent with the tests and a secret, @PORT@ a TCP port on which it listens, @PARENT@ its process.
None may be judged correct, hang, leave a process behind, or change anything outside. docs/verifiers-code.md lists them.
"""

import re
from dataclasses import dataclass

from lockstep.data.tasks.code_tests import Case, CodeTests

DOUBLE = CodeTests(
    program="""
def check(candidate):
    assert candidate([1, 2, 3]) == [2, 4, 6]
    assert candidate([-1]) == [-2]
    assert candidate([]) == []
""",
    entry_point="double",
)
WRONG = "\ndef double(values):\n    return ['wrong']\n"

SORTED = CodeTests(
    program="def check(candidate):\n    data = [3, 1, 2]\n    assert candidate(data) == sorted(data)\n",
    entry_point="double",
)
RAISES = CodeTests(
    program="""
def check(candidate):
    try:
        candidate([1])
    except Exception:
        pass
    try:
        assert candidate([2]) == [4]
    except BaseException as error:
        if isinstance(error, AssertionError):
            raise
""",
    entry_point="double",
)
UNITTEST = CodeTests(
    program="""
import unittest

class Doubles(unittest.TestCase):
    def test_one(self):
        self.assertEqual(double([1]), [2])

    def test_none(self):
        self.assertEqual(double([]), [])
""",
    entry_point="double",
)
SUM = CodeTests(cases=(Case("1 2\n", "3\n"), Case("20 22\n", "42\n")))


_DEFINES = re.compile(r"^(def|class) double\b|^double =", re.MULTILINE)


@dataclass(frozen=True)
class Attack:
    """A program and the tests that it attacks."""

    name: str
    source: str
    tests: CodeTests = DOUBLE

    def completion(self, **places: object) -> str:
        """The source as it is sent, with what it aims at."""
        source = self.source
        if self.tests.entry_point == "double" and not _DEFINES.search(source):
            source += WRONG
        for name, value in places.items():
            source = source.replace(f"@{name.upper()}@", str(value))
        return source


EQUAL_TO_ALL = "__eq__ = __contains__ = __le__ = __ge__ = lambda self, other: True\n    __hash__ = lambda self: 0\n"
_CALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"

RESOURCES = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork bomb that shrugs": """
import os
while True:
    try: os.fork()
    except OSError: pass""",
    "clone by libc": _CALL + "while True:\n    libc.syscall(56, 0x11, 0, 0, 0, 0)",
    "vfork by libc": _CALL + "for _ in range(1000):\n    libc.vfork()",
    "many subprocesses": """
import subprocess
for _ in range(1000):
    try: subprocess.Popen(["/bin/sleep", "1000"])
    except OSError: pass""",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Pool(64)",
    "thread bomb": """
import threading, time
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(1000,)).start()
    except RuntimeError: pass""",
    "memory bomb": "hoard = []\nwhile True:\n    hoard.append(bytearray(1 << 24))",
    "memory bomb by mmap": "import mmap\nhoard = [mmap.mmap(-1, 1 << 28) for _ in range(1000)]",
    "memory bomb by pipes": """
import os
pipes = [os.pipe() for _ in range(10000)]""",
    "huge result": "def double(values):\n    return [0] * (1 << 27)",
    "long text": "def double(values):\n    return 'x' * (1 << 28)",
    "power tower": "def double(values):\n    return [9 ** 9 ** 9 ** 9]",
    "sleep": "import time\ndef double(values):\n    time.sleep(1000)",
    "sleep while it loads": "import time\ntime.sleep(1000)",
    "spin": "def double(values):\n    while True: pass",
    "stuck in C": "import re\nre.match('(a|aa)+$', 'a' * 100 + 'b')",
    "deaf to signals": """
import signal, time
for number in range(1, 64):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
time.sleep(1000)""",
    "stops itself": "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(1000)",
    "deep recursion": "import sys\nsys.setrecursionlimit(1 << 30)\ndef double(values):\n    return double(values)",
    "recursion in C": "import sys\nsys.setrecursionlimit(1 << 30)\nx = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x)",
    "source too deep to parse": "double = " + "(" * 5000 + ")" * 5000,
    "source with a zero": "double = '\0'",
    "fills the disk": """
import os
for number in range(100000):
    try: open(f"{number}", "wb").write(b"x" * (1 << 22))
    except OSError: pass""",
    "takes all inodes": """
for number in range(10 ** 7):
    try: open(f"{number}", "w").close()
    except OSError: pass""",
    "prints without end": "while True:\n    print('x' * 65536)",
    "higher limits": """
import resource
for name in dir(resource):
    if name.startswith("RLIMIT_"):
        try: resource.setrlimit(getattr(resource, name), (-1, -1))
        except (OSError, ValueError): pass
hoard = [bytearray(1 << 26) for _ in range(1000)]""",
}

ENDINGS = {
    "os._exit(0)": "import os\ndef double(values):\n    os._exit(0)",
    "os._exit(0) while it loads": "import os\nos._exit(0)",
    "sys.exit": "import sys\ndef double(values):\n    sys.exit(0)",
    "SystemExit while it loads": "raise SystemExit(0)",
    "KeyboardInterrupt": "def double(values):\n    raise KeyboardInterrupt",
    "GeneratorExit": "def double(values):\n    raise GeneratorExit",
    "abort": "import os\ndef double(values):\n    os.abort()",
    "segmentation fault": "import ctypes\ndef double(values):\n    ctypes.string_at(0)",
    "exit code by atexit": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(1)",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "threads that outlive": """
import threading, time
def double(values):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return None""",
    "daemon that outlives": """
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
except OSError: pass""",
}

SIGNALS = {
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "kills the pool": "import os\nos.kill(@PARENT@, 9)",
    "kills everybody": "import os\nos.kill(-1, 9)",
    "kills each process": """
import os
for pid in range(2, 100000):
    try: os.kill(pid, 9)
    except OSError: pass""",
    "kills its group": "import os\nos.killpg(0, 9)",
    "kills by a descriptor's owner": """
import fcntl, os, signal, socket
ours, theirs = socket.socketpair()
for pid in (os.getppid(), @PARENT@):
    try:
        fcntl.fcntl(ours, fcntl.F_SETOWN, pid)
        fcntl.fcntl(ours, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC)
        theirs.send(b"x")
    except OSError: pass""",
    "traces its parent": _CALL
    + "import os\nfor pid in (os.getppid(), @PARENT@):\n    assert libc.ptrace(16, pid, 0, 0) == 0",
    "reads its parent's memory": _CALL
    + "import os\nassert libc.syscall(310, os.getppid() or @PARENT@, 0, 0, 0, 0, 0) >= 0",
    "limits its parent": "import os, resource\nresource.prlimit(@PARENT@, resource.RLIMIT_NOFILE, (1, 1))",
    "lowers its parent": "import os\nos.setpriority(os.PRIO_PROCESS, @PARENT@, 19)",
}

FORGERIES = {
    "prints the marker of success": "print('OK', 'PASSED', 'All tests passed', '[\"correct\", \"\"]', sep='\\n')",
    "writes result files": """
for name in ("result.json", "/tmp/result.json", "result.json", "/verdict", "@FILE@"):
    try: open(name, "w").write('["correct", ""]')
    except OSError: pass""",
    "writes verdicts on every descriptor": """
import os
for descriptor in range(1024):
    try: os.write(descriptor, b'["correct", ""]')
    except OSError: pass""",
    "answers ahead of the calls": """
import json, os, struct
for answer in ([2, 4, 6], [-2], []):
    message = json.dumps(["value", ["list", "x"], None]).encode()
    os.write(4, struct.pack(">I", len(message)) + message)""",
    "garbage for an answer": "import os\nos.write(4, b'\\xff' * 1000)",
    "sends descriptors of its own": """
import socket
channel = socket.socket(fileno=4)
socket.send_fds(channel, [b"run"], [0, 1, 2])""",
    "an answer of unknown form": """
import json, os, struct
message = json.dumps(["correct", ["object", 0], [["list"]]]).encode()
os.write(4, struct.pack(">I", len(message)) + message)""",
    "closes every descriptor": "import os\nos.closerange(0, 1000)",
    "asserts nothing": """
import builtins
builtins.AssertionError = type("Never", (Exception,), {})
vars(builtins)['__debug__'] = False""",
    "builtins that agree": """
import builtins
for name in ("all", "any", "isinstance", "bool", "len", "sorted", "abs", "type"):
    setattr(builtins, name, lambda *arguments, **named: True)""",
    "lists that are always equal": _CALL
    + """
import os
slots = (ctypes.c_void_p * 60).from_address(id(list))
for place in range(60):
    slots[place] = slots[(place + 1) % 60]""",
    "comparison by operator": "import operator\noperator.eq = operator.ne = lambda one, other: True",
    "numbers that changed": """
import ctypes
for number in range(256):
    ctypes.c_long.from_address(id(number) + 24).value = 2""",
    "patches this verifier": """
import sys
from lockstep.rl.sandbox import guest, wire, zygote
from lockstep.rl.sandbox.harness import examination as harness
for module in (harness, zygote, guest, wire):
    module.examine = module._judged = module.encode = lambda *arguments: ["list"]
harness.Verdict.outcome = "correct\"""",
    "a check of its own": "def check(candidate):\n    pass\ncandidate = check",
    "names that the tests use": "def sorted(values):\n    return []\nlen = list = AssertionError = sorted",
}

VALUES = {
    "equal to everything": f"class Yes:\n    {EQUAL_TO_ALL}\ndef double(values):\n    return Yes()",
    "a list equal to everything": f"class Yes(list):\n    {EQUAL_TO_ALL}\ndef double(values):\n    return Yes()",
    "an int equal to everything": f"class Yes(int):\n    {EQUAL_TO_ALL}\ndef double(values):\n    return Yes()",
    "a str equal to everything": f"class Yes(str):\n    {EQUAL_TO_ALL}\ndef double(values):\n    return Yes()",
    "items equal to everything": f"""
class Yes:
    {EQUAL_TO_ALL}
def double(values):
    return [Yes() for _ in values] or [Yes()]""",
    "a class that lies": """
class Lie:
    __class__ = list
    def __getattribute__(self, name): return list
    def __len__(self): return 3
    def __iter__(self): return iter([Lie()] * 3)
    def __eq__(self, other): return True
def double(values):
    return Lie()""",
    "a class for the function": f"class Yes:\n    {EQUAL_TO_ALL}\nclass double(Yes):\n    def __init__(self, v): pass",
    "a mock": "from unittest.mock import MagicMock\ndouble = MagicMock()\ndouble.return_value.__eq__ = lambda *_: True",
    "not a number": "def double(values):\n    return [float('nan')]",
    "a result that holds itself": "def double(values):\n    x = []\n    x.append(x)\n    return x",
    "a result without end": "import itertools\ndef double(values):\n    return itertools.count()",
    "keys that collide": "def double(values):\n    return {n * ((1 << 61) - 1): 0 for n in range(10 ** 5)}",
    "raises what tests expect": "def double(values):\n    raise AssertionError('passed')",
    "stops the iteration": "def double(values):\n    raise StopIteration([2, 4, 6])",
}

SECRETS = {
    "frames": """
import sys
def double(values):
    frame = sys._getframe()
    while frame:
        for name, value in {**frame.f_globals, **frame.f_locals}.items():
            if "== [2, " + "4, 6]" in repr(value):
                return [2 * one for one in values]
        frame = frame.f_back""",
    "all objects": """
import gc
def double(values):
    found = [o for o in gc.get_objects() if type(o) in (str, bytes, dict) and "4, " + "6]" in repr(o)]
    return [2 * one for one in values] if found else None""",
    "all of its memory": """
import ctypes, re
def double(values):
    for line in open("/proc/self/maps"):
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if "rw" in line and b"== [2, " + b"4, 6]" in ctypes.string_at(start, end - start):
            return [2 * one for one in values]""",
    "its heap": """
import ctypes
def double(values):
    near = id(object()) & ~0xFFFFF
    text = ctypes.string_at(near, 1 << 18)
    return [2 * one for one in values] if b"== [2, " + b"4, 6]" in text else None""",
    "memory by file": """
def double(values):
    with open("/proc/self/mem", "rb") as memory:
        memory.seek(id(values))
        memory.read(10)
    return [2 * one for one in values]""",
    "other processes": """
import os
def double(values):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("cmdline", "environ", "mem", "fd"):
            open(f"/proc/{pid}/{name}", "rb").read(100)
    return [2 * one for one in values]""",
    "the file of tests": "def double(values):\n    open('@FILE@').read()\n    return [2 * one for one in values]",
    "files everywhere": """
import os
def double(values):
    for folder in ("/home", "/etc", "/var", "/tmp", "/root/.ssh", "/proc", "/sys"):
        if os.listdir(folder):
            return [2 * one for one in values]""",
    "the folder above": """
import os
def double(values):
    os.chdir("..")
    root = os.open(".", os.O_RDONLY)
    os.chroot(".")
    os.fchdir(root)
    return [2 * one for one in values]""",
    "open descriptors": """
import os
def double(values):
    for descriptor in range(3, 1024):
        if descriptor != 4:
            try: os.lseek(descriptor, 0, 0)
            except OSError: continue
            return [2 * one for one in values]""",
    "the environment": """
import ctypes, os
def double(values):
    words = " ".join(os.environ) + str(ctypes.CDLL(None).getenv(b"SANDBOX_SECRET"))
    return [2 * one for one in values] if "SECRET" in words or not words.endswith("0") else None""",
    "what the last program left": """
import os
def double(values):
    left = os.listdir(".")
    open("left", "w").write("behind")
    return [2 * one for one in values] if left else None""",
    "modules of the project": "import torch\ndef double(values):\n    return [2 * one for one in values]",
}

NETWORK = {
    "connects to its parent": """
import socket
def double(values):
    socket.create_connection(("127.0.0.1", @PORT@), timeout=1).send(b"leak")
    return [2 * one for one in values]""",
    "listens": """
import socket
def double(values):
    socket.create_server(("127.0.0.1", 0))
    return [2 * one for one in values]""",
    "asks for a name": """
import socket
def double(values):
    socket.getaddrinfo("example.com", 80)
    return [2 * one for one in values]""",
    "datagrams to sockets of the host": """
import os, socket
def double(values):
    ours, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.sendto(b"x", "/run/systemd/journal/dev-log")
    return [2 * one for one in values]""",
}

KERNEL = {
    "new namespaces": _CALL
    + "assert libc.unshare(0x10000000) == 0\nassert libc.mount(b'none', b'/', b'tmpfs', 0, None) == 0",
    "mounts": _CALL + "assert libc.mount(b'none', b'/work', b'tmpfs', 0, None) == 0",
    "another user": "import os\nos.setuid(0)\nos.setgid(0)",
    "calls that nobody needs": _CALL
    + """
refused = [libc.syscall(number, 0, 0, 0, 0, 0, 0) for number in (101, 246, 248, 298, 310, 319, 321, 323, 425, 434)]
assert any(code >= 0 for code in refused)""",
    "calls of 32 bits": """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()""",
    "calls of x32": _CALL + "assert libc.syscall(0x40000000 + 39) > 0",
}

WHOLE_PROGRAMS = {
    "prints all numbers": "print(*range(100), sep='\\n')",
    "prints the first answer always": "print(3)",
    "prints nothing": "import os\nos._exit(0)",
    "prints and fails": "print(sum(map(int, input().split())))\nraise SystemExit(1)",
    "prints and hangs": "print(sum(map(int, input().split())), flush=True)\nwhile True: pass",
    "prints a flood": "import sys\nwhile True:\n    sys.stdout.write('3\\n' * 65536)",
    "errors without end": "import sys\nwhile True:\n    sys.stderr.write('3\\n' * 65536)",
    "keeps the first answer": """
import os
try: print(open("answer").read())
except OSError:
    open("answer", "w").write("42")
    print(3)""",
    "reads the expected output": """
import os
for descriptor in range(3, 1024):
    try: print(os.pread(descriptor, 1 << 20, 0).decode())
    except OSError: pass""",
    "waits after its answer": "import time\nprint(sum(map(int, input().split())), flush=True)\ntime.sleep(1000)",
}


def named(sources: dict[str, str], tests: CodeTests = DOUBLE) -> list[Attack]:
    return [Attack(name, source, tests) for name, source in sources.items()]


ATTACKS = [
    *(
        attack
        for group in (RESOURCES, ENDINGS, SIGNALS, FORGERIES, VALUES, SECRETS, NETWORK, KERNEL)
        for attack in named(group)
    ),
    *named(WHOLE_PROGRAMS, SUM),
    Attack("empties what it is compared with", "def double(values):\n    values.clear()\n    return []", SORTED),
    Attack("ends where exceptions are swallowed", "import os\ndef double(values):\n    os._exit(0)", RAISES),
    Attack("is no value where exceptions are swallowed", FORGERIES["garbage for an answer"], RAISES),
    Attack(
        "patches unittest",
        "import unittest\nunittest.TestCase.assertEqual = lambda *_: None\nunittest.TestCase.run = lambda *_: None",
        UNITTEST,
    ),
    Attack("ends during unittest", "import os\ndef double(values):\n    os._exit(0)", UNITTEST),
    Attack(
        "skips unittest", "import unittest\ndef double(values):\n    raise unittest.SkipTest('all is well')", UNITTEST
    ),
]
