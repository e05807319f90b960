"""Where compiled kernels come from, and how many threads share their lists."""

import ctypes
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lockstep.model.ops.cpu import kernels, library
from lockstep.model.ops.cpu.jobs import JobList, NormJob

FP32 = torch.float32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing loaded; compilers are spared the time to make libraries fast."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", ("-std=gnu11", "-shared", "-fPIC"))
    library.library_of.cache_clear()
    yield tmp_path / "lockstep"
    library.library_of.cache_clear()


def compiled(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def planted(folder: Path) -> None:
    """What another user put in place of the library: a file that cannot be loaded, so that loading it would show."""
    (path,) = compiled(folder)
    path.unlink()
    path.write_bytes(b"another's")


def test_libraries_are_kept_where_only_their_user_writes(cache: Path) -> None:
    before = os.umask(0o002)
    try:
        assert library.library_of(FP32) is not None
    finally:
        os.umask(before)
    (path,) = compiled(cache)
    assert (stat.S_IMODE(cache.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (0o700, 0o700)
    written = path.stat().st_mtime_ns
    library.library_of.cache_clear()
    assert library.library_of(FP32) is not None
    assert path.stat().st_mtime_ns == written, "it was compiled again"


@pytest.mark.parametrize("kind", ["another's", "writable", "link"])
def test_a_library_that_others_may_have_written_is_not_loaded(cache: Path, kind: str, tmp_path: Path) -> None:
    library.library_of(FP32)
    (path,) = compiled(cache)
    planted(cache)
    if kind == "another's":
        if os.getuid():
            pytest.skip("files can be given away by root alone")
        os.chown(path, 12345, 12345)
    elif kind == "writable":
        path.chmod(0o666)
    else:
        (tmp_path / "elsewhere.so").write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere.so")
    library.library_of.cache_clear()
    assert library.library_of(FP32) is not None
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert not path.is_symlink()


@pytest.mark.parametrize("kind", ["another's", "no home", "file"])
def test_without_a_folder_of_ones_own_a_library_serves_its_process(
    cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "another's":
        if os.getuid():
            pytest.skip("folders can be given away by root alone")
        cache.mkdir()
        os.chown(cache, 12345, 12345)
    elif kind == "file":
        cache.write_text("")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 54321)  # for which there is no entry in the list of users
    assert library.library_of(FP32) is not None
    assert not caplog.records
    assert not (cache.is_dir() and compiled(cache))


def test_without_a_compiler_the_kept_library_is_taken_and_none_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        library.library_of(FP32)
        monkeypatch.setenv("CC", "no-such-compiler")
        library.library_of.cache_clear()
        assert library.library_of(FP32) is not None
        assert not caplog.records
        for path in compiled(cache):
            path.unlink()
        library.library_of.cache_clear()
        assert library.library_of(FP32) is None
    assert "no C compiler" in caplog.text
    assert "float32" in caplog.text


def test_a_compiler_may_be_given_with_flags(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -pipe")
    assert library.library_of(FP32) is not None


def test_a_compiler_that_fails_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "cc --no-such-flag")
    with caplog.at_level(logging.WARNING):
        assert library.library_of(FP32) is None
    assert "no-such-flag" in caplog.text


def test_lists_end_though_fewer_threads_come_than_were_asked_for() -> None:
    """As with OMP_DYNAMIC or OMP_THREAD_LIMIT: threads that wait for others that never come would wait for ever."""
    openmp = library._openmp()
    assert openmp is not None
    x, weight = torch.randn(64, 256), torch.randn(256)
    out = torch.empty_like(x)
    jobs = JobList(FP32)
    for _ in range(2):
        job = NormJob(width=256, x=x.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), eps=1e-5)
        jobs.add("norm", job)
    before = torch.get_num_threads()
    openmp.omp_set_dynamic(ctypes.c_int(1))
    try:
        torch.set_num_threads(16 * (os.cpu_count() or 1))
        jobs.run(64)
    finally:
        openmp.omp_set_dynamic(ctypes.c_int(0))
        torch.set_num_threads(before)
    assert torch.equal(out, kernels.rms_norm(x, weight, 1e-5))
