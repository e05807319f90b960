"""The comparison of rollout engines: all do the same work, and those that training needs as well run it."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_peers import PEERS, Environments, Runner, table

from rollout_engines.child import speed
from rollout_engines.work import ALONE, REPEATS, lengths, work

REQUESTS, VOCABULARY = 4, 301


def runner(folder: Path, model: Path, passes: int = 0) -> Runner:
    args = Namespace(
        vllm_python=Path(sys.executable),
        openvino_python=Path(sys.executable),
        model=str(model),
        dtype="float32",
        requests=REQUESTS,
        threads=1,
        passes=passes,
    )
    return Runner(Environments(args, folder), args)


def report(batch: float, new: int = 5056) -> dict[str, object]:
    tokens = {"batch": [[4544, new]], "alone": [[30, 64]]}
    versions = {"torch": "2.13.0"}
    return {"speeds": {"batch": batch, "alone": 10.0}, "tokens": tokens, "versions": versions, "allocator": "own"}


@given(st.integers(0, 6))
def test_no_two_prompts_begin_alike_and_each_kind_of_work_is_done_on_new_ones(power: int) -> None:
    count = 2**power
    made = work(49152, count)
    prompts = [tuple(each["prompt"]) for times in made.values() for asked in times for each in asked]
    assert len({tokens[:4] for tokens in prompts}) == len(prompts) == 2 * count + 3
    assert {kind: len(times) for kind, times in made.items()} == REPEATS
    for asked in made["batch"]:
        assert [(len(each["prompt"]), each["new"]) for each in asked] == lengths(count)
    assert {(len(each["prompt"]), each["new"]) for (each,) in made["alone"]} == {(30, ALONE)}
    assert work(49152, count) == made


def test_the_batch_has_64_requests_of_all_lengths() -> None:
    prompts, new = zip(*lengths(64), strict=True)
    assert sorted(prompts) == [*range(8, 136, 2)]
    assert sorted(new) == [*range(16, 144, 2)]


def test_an_engine_that_draws_other_numbers_of_tokens_has_no_speed() -> None:
    asked = work(VOCABULARY, REQUESTS)["batch"][0]
    with pytest.raises(SystemExit, match="other work"):
        speed(lambda asked: [[0] * (each["new"] - 1) for each in asked], asked)
    assert speed(lambda asked: [[0] * each["new"] for each in asked], asked) > 0


def test_the_table_has_medians_and_says_what_does_not_run() -> None:
    failed = {"failed": "no such attention (exit code 1)"}
    lines = table({"vllm": [report(100), report(300), report(250)], "transformers": [failed]}, 64)
    assert lines[2] == "| vLLM, compiled | 250 (100 to 300) | 10 (10 to 10) | own | torch 2.13.0 |"
    assert lines[3] == (
        "| transformers, continuous batching | does not run: no such attention (exit code 1) |  |  |  |"
    )


def test_speeds_of_different_work_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different work"):
        table({"vllm": [report(100)], "openvino": [report(100, new=5000)]}, 64)


def test_all_are_given_the_same_work(tmp_path: Path, tiny_folder: Path) -> None:
    run = runner(tmp_path, tiny_folder)
    jobs = [run.job(peer) for peer in PEERS.values() if peer.format != "openvino"]
    assert all(job | {"model": "", "settings": {}} == jobs[0] | {"model": "", "settings": {}} for job in jobs)
    assert {job["model"] for job in jobs} == {str(run.environments.lockstep), str(run.environments.huggingface)}


@pytest.mark.exhaustive
def test_engines_do_the_work_that_they_are_given(tmp_path: Path, tiny_folder: Path) -> None:
    run = runner(tmp_path, tiny_folder, passes=2)
    found = {name: run.child(PEERS[name], "own") for name in ("lockstep", "transformers", "transformers-generate")}
    asked = {
        kind: [[sum(len(each["prompt"]) for each in one), sum(each["new"] for each in one)] for one in times]
        for kind, times in run.work.items()
    }
    for name, said in found.items():
        assert said.get("tokens") == asked, (name, said)
        assert min(said["speeds"].values()) > 0
        assert ("passes" in said) is (name == "lockstep")
    assert all(each["bound"] > 0 < each["speed"] for each in found["lockstep"]["passes"].values())
    named = {name: [said | {"allocator": "own"}] for name, said in found.items()}
    assert [line.split(" | ")[0] for line in table(named, REQUESTS)[2:]] == [f"| {PEERS[name].title}" for name in found]


def test_an_engine_that_is_not_there_is_named_in_one_sentence(tmp_path: Path, tiny_folder: Path) -> None:
    said = runner(tmp_path, tiny_folder).child(PEERS["vllm"], "own")
    assert said == {"failed": "ModuleNotFoundError: No module named 'vllm' (exit code 1)"}
