"""A completion that an engine cannot compute is asked for once more, and is ungradable then; all others go on."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.rl.collector.collector import Collector
from lockstep.rl.collector.supervisor import FAILURES
from lockstep.rl.remote import gather
from lockstep.rl.rollout.config import RolloutConfig, SamplingParams
from lockstep.rl.rollout.loading import to_lockstep
from lockstep.rl.rollout.output_processor import CompletionFailed
from lockstep.rl.types import Prompt
from lockstep.rl.verdict import Outcome
from lockstep.rl.workers.worker_groups import RolloutGroup
from tests.rl.conftest import Actors

SPOILT = 300
"""A token whose embedding is not a number."""
SAMPLING = SamplingParams(max_new_tokens=4, logit_bias={SPOILT: -1000.0})


@pytest.fixture(scope="module")
def spoilt(actors: Actors, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutGroup]:
    """Two engines over a model with a token that spoils what it is in."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("spoilt") / "model"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][SPOILT] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    group = RolloutGroup(RolloutConfig(workers=2, sequences=4, length=64), threads=1)
    gather(group.start(to_lockstep(str(folder), tmp_path_factory.mktemp("converted")), "float32"))
    yield group
    for team in range(2):
        group.end(team)


def prompts(*spoils: bool) -> dict[int, Prompt]:
    return {n: Prompt(n, "", (5, SPOILT if bad else 6, 7 + n), "4") for n, bad in enumerate(spoils)}


def test_others_go_on_and_get_what_they_get_without_it(actors: Actors, spoilt: RolloutGroup) -> None:
    collector = Collector(actors.policy, spoilt, actors.verifiers)
    found = {}
    for spoils in ((False, True, False), (False, False, False)):
        collector.ask(prompts(*spoils), SAMPLING, samples=2, seed=3)
        found[spoils[1]] = [collector.take(group) for group in range(3)]
        collector.drop()
    for group in (0, 2):
        assert [j.rollout.tokens for j in found[True][group]] == [j.rollout.tokens for j in found[False][group]]
        assert all(j.verdict.outcome is not Outcome.ungradable for j in found[True][group])
    assert [judged.rollout.sample for judged in found[True][1]] == [2, 3]
    for judged in found[True][1]:
        assert judged.verdict.outcome is Outcome.ungradable
        assert judged.verdict.reason.startswith("it could not be written, twice: ")
        assert (judged.rollout.tokens, judged.rollout.finish_reason) == ((), "error")


def test_engines_that_compute_nothing_but_failures_end_the_run(actors: Actors, spoilt: RolloutGroup) -> None:
    collector = Collector(actors.policy, spoilt, actors.verifiers)
    collector.ask(prompts(True), SAMPLING, samples=FAILURES + 1, seed=3)
    with pytest.raises(
        CompletionFailed, match=r"completion \d cannot be written, nor can those before it: .*not number"
    ):
        collector.take(0)
    collector.drop()
