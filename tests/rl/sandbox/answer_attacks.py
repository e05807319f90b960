"""The part of the attack suite that aims at tests by what a program answers, raises, or leaves undone."""

from lockstep.data.tasks.code_tests import CodeTests
from tests.rl.sandbox.attacks import EQUAL_TO_ALL, VALUES, Attack, named

LOOP = CodeTests(
    program="""
inputs, wanted = [[1], [2, 3], []], [[2], [4, 6], []]
for got, want in zip(map(double, inputs), wanted):
    assert got == want
for got, want in zip((double(one) for one in inputs), wanted):
    assert got == want
results = iter(lambda: double([1]), [2])
assert not list(results)
""",
    entry_point="double",
)
EACH = CodeTests(
    program="""
assert sum(one for one in double([1, 2])) == 6
assert [one for one in double([])] == []
""",
    entry_point="double",
)
COUNT = CodeTests(
    program="total = 0\nfor _ in range(double([1])):\n    total += 1\nassert total == 2\n", entry_point="double"
)
MATH = CodeTests(
    program="assert math.isclose(double(0.5), 1.0)\nassert isclose(double(0.1), 0.2)\n", entry_point="double"
)
METHOD = CodeTests(program="candidate = Solution().double\nassert candidate([1]) == [2]\n")
IMPORTED = CodeTests(program="from solution import double\n\ndef test_double():\n    assert double([1]) == [2]\n")
PYTEST = CodeTests(
    program="""
import pytest

@pytest.mark.parametrize("given, wanted", [([1], [2]), ([], [])])
def test_double(given, wanted):
    assert double(given) == wanted

def test_close():
    assert double([0.1]) == pytest.approx([0.2])
    assert double([0.1]) == [pytest.approx(0.2)]

def test_raises():
    with pytest.raises(TypeError):
        double(None)
""",
    entry_point="double",
)
NUMPY = CodeTests(
    program="""
import numpy as np

def check(candidate):
    assert np.allclose(candidate([1.0, 2.0]), [2.0, 4.0])
    np.testing.assert_allclose(candidate(np.array([0.5, 1.5])), np.array([1.0, 3.0]))
    assert np.array_equal(candidate(np.arange(3)), [0, 2, 4])
""",
    entry_point="double",
)

COMPARISONS = {
    "all comparisons": """
class Yes:
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __contains__ = lambda self, other: True
    __bool__ = lambda self: True
    __hash__ = lambda self: 0
    __sub__ = __rsub__ = __add__ = __radd__ = __abs__ = lambda self, *other: 0
    __float__ = lambda self: 2.0
    __index__ = __int__ = __len__ = lambda self: 3
def double(values):
    return Yes()""",
    "a float equal to everything": f"""
class Yes(float):
    {EQUAL_TO_ALL}
def double(values):
    return [Yes(2), Yes(4)]""",
    "a tuple that lies about its items": """
class Lie(list):
    def __iter__(self): return iter([2, 4, 6])
    def __getitem__(self, place): return 2 * place + 2
    def __len__(self): return 3
    def __eq__(self, other): return True
def double(values):
    return Lie()""",
    "a dict that has every key": """
class All(dict):
    def __missing__(self, key): return key
    def __contains__(self, key): return True
    def __eq__(self, other): return True
def double(values):
    return All()""",
    "a string that changes": """
class Text(str):
    def __eq__(self, other): return True
    def __str__(self): return '[2, 4, 6]'
    __repr__ = __format__ = lambda self, *other: '[2, 4, 6]'
    __hash__ = str.__hash__
def double(values):
    return Text()""",
    "a class with the face of another": """
import collections
class Lie(collections.UserList):
    @property
    def __class__(self): return list
    def __eq__(self, other): return True
def double(values):
    return Lie(values)""",
    "a metaclass that agrees": """
class Meta(type):
    def __instancecheck__(self, other): return True
    __subclasscheck__ = __instancecheck__
    def __eq__(self, other): return True
    __hash__ = type.__hash__
class double(metaclass=Meta):
    def __new__(self, values): return self""",
    "attributes of every name": """
class Any:
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __eq__(self, other): return True
    def __iter__(self): return iter([self] * 3)
double = Any()""",
    "an array of objects": """
import numpy
class Yes:
    def __eq__(self, other): return True
def double(values):
    return numpy.array([Yes()] * len(values), dtype=object)""",
    "an array that agrees": """
import numpy
class Yes(numpy.ndarray):
    def __eq__(self, other): return True
    def __array_function__(self, *given): return True
    __array_ufunc__ = __array_function__
def double(values):
    return numpy.zeros(len(values)).view(Yes)""",
}

STEERING = {
    "StopIteration": "def double(values):\n    raise StopIteration",
    "a kind of StopIteration": "class Stop(StopIteration): pass\ndef double(values):\n    raise Stop([2])",
    "StopAsyncIteration": "def double(values):\n    raise StopAsyncIteration",
    "the end of an empty iterator": "def double(values):\n    return next(iter([]))",
    "GeneratorExit in a loop": "def double(values):\n    raise GeneratorExit",
    "a kind of BaseException": "class Quiet(BaseException): pass\ndef double(values):\n    raise Quiet",
    "exit": "def double(values):\n    exit()",
    "quit": "def double(values):\n    quit(0)",
    "an error of its own making": """
import json, os, struct
def double(values):
    message = json.dumps(["raised", "StopIteration", [], ""]).encode()
    os.write(4, struct.pack(">I", len(message)) + message)""",
    "an end of its own making": """
import json, os, struct
def double(values):
    message = json.dumps(["raised", "GeneratorExit", [], ""]).encode()
    os.write(4, struct.pack(">I", len(message)) + message)""",
    "a warning for an error": """
import warnings
warnings.simplefilter('error')
def double(values):
    warnings.warn('x')""",
    "a group of exceptions": "def double(values):\n    raise BaseExceptionGroup('x', [GeneratorExit()])",
    "an exception that raises when it is read": """
class Odd(Exception):
    def __str__(self): raise StopIteration
    args = property(lambda self: 1 / 0)
def double(values):
    raise Odd""",
    "an exit from a thread": """
import os, threading
def double(values):
    threading.Timer(0.05, os._exit, [0]).start()
    threading.Event().wait()""",
    "an exit as soon as it is loaded": """
import os, threading
threading.Thread(target=os._exit, args=[0]).start()""",
}

LAZY = {
    "a generator without end": "def double(values):\n    while True:\n        yield 0",
    "a count without end": "import itertools\ndef double(values):\n    return itertools.count()",
    "a range without end": "def double(values):\n    return range(1 << 60)",
    "a range of its own making": """
import json, os, struct
def double(values):
    message = json.dumps(["value", ["range", 0, 1 << 60, 1], None]).encode()
    os.write(4, struct.pack(">I", len(message)) + message)""",
    "an iterator that sleeps": """
import time
def double(values):
    while True:
        time.sleep(0.01)
        yield 0""",
    "an object that iterates over itself": """
class Self:
    def __iter__(self): return self
    def __next__(self): return self
def double(values):
    return Self()""",
    "an iterator that ends at once and claims a sum": """
class Lazy:
    def __iter__(self): raise StopIteration
    def __len__(self): raise StopIteration
def double(values):
    return Lazy()""",
    "an iterator that is no iterator": """
class No:
    def __iter__(self): return 6
def double(values):
    return No()""",
    "a map": "def double(values):\n    return map(lambda one: one, [1])",
    "items by place without end": """
class Places:
    def __getitem__(self, place): return 0
def double(values):
    return Places()""",
}

HUGE = {
    "a huge number": "def double(values):\n    return 10 ** 15",
    "a range": "def double(values):\n    return range(5)",
    "a huge Decimal": "from decimal import Decimal\ndef double(values):\n    return Decimal('1e999999999')",
}

IMPOSTORS = {
    "a module of its own": """
class math:
    isclose = staticmethod(lambda *given, **named: True)
isclose = math.isclose""",
    "a function for a module": "import math\nmath.isclose = isclose = lambda *given, **named: True",
}

LACKING = {
    "nothing": "",
    "a number for the class": "Solution = 5",
    "text for the class": "Solution = 'Solution'",
    "another class": "class Solutions:\n    def double(self, values): return [2]",
    "a class without the method": "class Solution:\n    pass",
    "a comment": "# class Solution: the rest follows",
    "no Python": "Solution is to double",
}

SLEEPING = {
    "sleeps little by little": "import time\ndef double(values):\n    while True:\n        time.sleep(0.001)",
    "sleeps and works": """
import time
def double(values):
    while True:
        time.sleep(0.05)
        sum(range(10000))""",
    "waits for a lock": "import threading\ndef double(values):\n    threading.Semaphore(0).acquire()",
    "waits for what nobody writes": "import os\ndef double(values):\n    os.read(os.pipe()[0], 1)",
    "answers drop by drop": """
import os, time
def double(values):
    os.write(4, b'\\0')
    while True:
        time.sleep(0.2)""",
}

ANSWER_ATTACKS = [
    *named(COMPARISONS),
    *named(STEERING, LOOP),
    *named(LAZY, EACH),
    *named(HUGE, COUNT),
    *named(IMPOSTORS, MATH),
    *named(LACKING, METHOD),
    *named(SLEEPING),
    *(Attack(f"{name}, for NumPy", source, NUMPY) for name, source in COMPARISONS.items()),
    *(Attack(f"{name}, for pytest", source, PYTEST) for name, source in (VALUES | COMPARISONS).items()),
    Attack(
        "patches pytest", "import pytest\npytest.approx = lambda *given: None\npytest.main = lambda *given: 0", PYTEST
    ),
    Attack("skips as pytest does", "import pytest\ndef double(values):\n    pytest.skip('all is well')", PYTEST),
    Attack("lacks what is imported", "def other(values):\n    return [2]", IMPORTED),
    Attack(
        "patches NumPy",
        "import numpy\nnumpy.allclose = numpy.array_equal = lambda *given, **named: True\n"
        "numpy.testing.assert_allclose = lambda *given, **named: None\ndef double(values):\n    return [7, 7, 7]",
        NUMPY,
    ),
    Attack("has a function of Python's alone", "", CodeTests("assert gcd(4, 6) == 2", "gcd")),
    Attack("has a class of Python's alone", "", CodeTests("assert Counter('aa') == {'a': 2}")),
]
