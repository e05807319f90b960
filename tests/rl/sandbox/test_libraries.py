"""Programs and tests import the libraries that a pool offers, and nothing that lies beside them."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lockstep.data.tasks.code_tests import CodeTests
from lockstep.rl.sandbox.distributions import LibraryError, located
from lockstep.rl.sandbox.isolation import NOTHING
from lockstep.rl.sandbox.libraries import LibraryFinder, mentioned, module_name
from lockstep.rl.verdict import Outcome
from lockstep.rl.verifiers.code_pool import CodePool


def test_a_library_is_found_with_what_it_needs() -> None:
    found = located(["numpy"])
    assert str(Path(np.__file__).parent) in found
    assert all(Path(path).exists() for path in found)
    assert {Path(path).name for path in located(["sympy"])} >= {"sympy", "mpmath"}
    assert located(["numpy", "NumPy"]) == found
    assert located([]) == ()


def test_a_library_that_is_not_installed_is_named() -> None:
    with pytest.raises(LibraryError, match="'no-such-library', which is not installed here"):
        CodePool(1, requires=NOTHING, libraries=["numpy", "no-such-library"])


def test_the_finder_finds_what_it_was_given_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given_here").mkdir()
    (tmp_path / "given_here" / "__init__.py").write_text("from given_here import part")
    (tmp_path / "given_here" / "part.py").write_text("x = 1")
    (tmp_path / "beside_it.py").write_text("x = 2")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, LibraryFinder([str(tmp_path / "given_here")])])
    assert importlib.import_module("given_here").part.x == 1
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("beside_it")


def test_a_source_mentions_what_it_imports() -> None:
    offered = set(map(module_name, ["/x/numpy", "/x/numpy.libs", "/x/six.py", "/x/sympy"]))
    assert mentioned("import numpy as np\n    from six.moves import y\nsympy = 1", offered) == ["numpy", "six"]
    assert mentioned(json.dumps({"test": "\nimport numpy\nfrom six import x"}), offered) == ["numpy", "six"]


FOUND = {
    "numpy": (
        "import numpy as np\ndef f(x): return np.cumsum(x)",
        "import numpy as np\nassert f([1, 2]).tolist() == [1, 3]",
    ),
    "numbers of numpy": (
        "import numpy as np\ndef f(x): return {np.int64(1): np.float64(x), 'b': np.bool_(1)}",
        "assert f(0.5) == {1: 0.5, 'b': True} and type(f(1)['b']) is bool",
    ),
    "arrays change in place": (
        "def f(x): x *= 2",
        "import numpy as np\na = np.ones(3)\nf(a)\nassert a.tolist() == [2, 2, 2]",
    ),
    "products of matrices": (
        "import numpy as np\ndef f(n): return float(np.linalg.det(np.eye(n) @ np.eye(n)))",
        "assert abs(f(200) - 1) < 1e-9",
    ),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[CodePool]:
    with CodePool(1, requires=NOTHING) as pool:
        yield pool


@pytest.mark.parametrize("name", FOUND)
def test_programs_and_tests_use_numpy(pool: CodePool, name: str) -> None:
    program, tests = FOUND[name]
    [verdict] = pool.grade([(program, CodeTests(tests, "f"))])
    assert (verdict.outcome, verdict.reason) == (Outcome.correct, "")


@pytest.mark.parametrize("name", ["torch", "hypothesis", "pydantic"])
def test_nothing_else_can_be_imported(pool: CodePool, name: str) -> None:
    program = f"def f():\n    import numpy, {name}\n    return 1"
    with CodePool(1, requires=NOTHING, uses=NOTHING) as plain:
        verdicts = [one.grade([(program, CodeTests("assert f() == 1", "f"))])[0] for one in (pool, plain)]
    assert [verdict.outcome for verdict in verdicts] == [Outcome.incorrect] * 2
    assert all(f"No module named '{name}'" in verdict.reason for verdict in verdicts)


def test_a_pool_that_offers_nothing_has_python_alone() -> None:
    with CodePool(1, requires=NOTHING, libraries=()) as pool:
        [verdict] = pool.grade([("def f(): return 1", CodeTests("import numpy\nassert f() == 1", "f"))])
    assert verdict.outcome is Outcome.ungradable
    assert "No module named 'numpy'" in verdict.reason
