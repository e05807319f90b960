"""Value heads: parity with transformers' classifiers, with one process, and with rollouts' order of sums."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, Qwen2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lockstep.data.batch import Sample, sample
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.checkpoint.manager import Checkpoint
from lockstep.distributed.checkpoint.saver import Saver
from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, Numerics, UnknownModel, describe
from lockstep.model.formats.huggingface.families.registry import FAMILIES, Family, from_huggingface, to_huggingface
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder, read_words
from lockstep.model.formats.huggingface.writer import write
from lockstep.model.loading import build, transformer_of
from lockstep.model.objectives.objective import LossInputs
from lockstep.model.training.config import OptimizerConfig, row_rules
from lockstep.model.training.trainer import Trainer
from lockstep.model.weights.names import HEAD, VALUE, logical_tensors
from tests.distributed.test_parity import global_batch

TEXTS = [[5, 9, 2, 7, 7, 1], [5, 9, 3], [11]]


def squared_error(values_K: Tensor, columns: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Of values from the column of advantages."""
    loss = (columns.weight * (values_K - columns.advantage).square()).sum()
    return loss, {"loss": loss}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of `transformers` with one label."""
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[request.param]
    config = kind(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=request.param == "qwen2",
        num_labels=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier") / "model"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def score_samples(texts: list[list[int]]) -> list[Sample]:
    """Samples of which only what follows a text weighs something: its predictor is the last token of the text."""
    return [sample(t[:1], [*t[1:], 0], weight=np.eye(len(t), dtype=np.float32)[-1]) for t in texts]


def last_scores(groups: Groups, folder: Path) -> list[float]:
    source = HuggingFaceFolder(folder)
    trainer = Trainer(build(source.config, groups, torch.float32, source), groups, OptimizerConfig())
    rows = [rows_for_ranks(score_samples([text]), row_rules(groups.layout, 64))[0][0] for text in TEXTS]
    return [float(value) for values in trainer.score(rows) for value in values]


def expected_scores(folder: Path) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [float(model(torch.tensor([text])).logits) for text in TEXTS]


def test_scores_equal_those_of_transformers_both_ways(classifier: Path, groups: Groups, tmp_path: Path) -> None:
    source = HuggingFaceFolder(classifier)
    assert source.config.head == "value"
    expected = expected_scores(classifier)
    assert max(map(abs, expected)) > 0.1
    np.testing.assert_allclose(last_scores(groups, classifier), expected, rtol=1e-4, atol=1e-5)
    write(tmp_path / "written", source.config, source, {})
    for name, tensor in load_file(classifier / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "written" / "model.safetensors")[name], tensor), name
    np.testing.assert_allclose(expected_scores(tmp_path / "written"), expected, rtol=1e-5)


def test_a_classifier_of_several_labels_is_refused(classifier: Path) -> None:
    words = read_words(classifier)
    with pytest.raises(UnknownModel, match="num_labels=3, where a value head has one"):
        from_huggingface(words | {"id2label": {"0": "A", "1": "B", "2": "C"}})
    with pytest.raises(UnknownModel, match="num_labels=2"):
        from_huggingface({key: value for key, value in words.items() if key != "id2label"})


@pytest.mark.parametrize(("kind", "family"), FAMILIES.items())
def test_every_family_has_a_classifier_in_transformers(kind: str, family: Family) -> None:
    assert family.architecture_of("value") == MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[kind]


def test_a_value_head_is_said_in_words_and_read_again(tiny_folder: Path) -> None:
    model = HuggingFaceFolder(tiny_folder).config.with_head("value")
    assert from_huggingface(to_huggingface(model, "float32")) == model


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_head_is_not_held(tied: bool, tiny_folder: Path, groups: Groups) -> None:
    source = HuggingFaceFolder(tiny_folder)
    given = source.config.model_copy(update={"tied": tied})
    transformer = transformer_of(build(given, groups, torch.float32, source, head="value"))
    model = transformer.model
    names = logical_tensors(model)
    assert VALUE in names
    assert HEAD not in names
    assert sum(p.numel() for p in transformer.parameters()) == model.parameters
    assert model.parameters == sum(int(np.prod(shape)) for shape in names.values())
    assert not transformer.head_weight.any()


def test_a_value_head_has_no_logits_to_go_back_to(tiny_folder: Path) -> None:
    model = HuggingFaceFolder(tiny_folder).config
    with pytest.raises(UnknownModel, match="has no logits"):
        model.with_head("value").with_head("vocabulary")
    with pytest.raises(ValueError, match="shares nothing with the embedding"):
        ModelConfig(**model.model_dump() | {"head": "value"})


Outcome = tuple[list[tuple[float, float]], list[Any]]


def learn_values(groups: Groups, folder: Path, numerics: Numerics = "fast") -> Outcome:
    """Losses and norms of a critic's first steps from a language model's checkpoint, and its values afterwards."""
    source = HuggingFaceFolder(folder)
    stage = build(source.config, groups, torch.float32, source, numerics, head="value")
    trainer = Trainer(stage, groups, OptimizerConfig(learning_rate=1e-3))
    rules = row_rules(groups.layout, 64)
    history = []
    for step in range(3):
        rows = rows_for_ranks(global_batch(source.config.vocabulary, step % 2), rules)[groups.data_rank]
        result = trainer.step(rows, squared_error, 1e-3)
        history.append((result.values["loss"], result.grad_norm))
    rows = rows_for_ranks(global_batch(source.config.vocabulary, 0), row_rules(groups.layout, 64))[0]
    return history, [values.numpy() for values in trainer.score(rows)]


@pytest.fixture(scope="module")
def alone(worlds: RankPool, tiny_folder: Path) -> Outcome:
    return worlds.run(Layout(), learn_values, tiny_folder)[0]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, sequence=True),
        Layout(pipeline=2),
        Layout(context=2),
        Layout(data=2, zero=0),
        Layout(data=2, zero=2),
        Layout(data=2, zero=3),
    ],
    ids=str,
)
def test_a_layout_learns_the_same_values(layout: Layout, alone: Outcome, worlds: RankPool, tiny_folder: Path) -> None:
    assert alone[0][0][0] > alone[0][2][0]
    for history, _ in worlds.run(layout, learn_values, tiny_folder):
        np.testing.assert_allclose(history, alone[0], rtol=2e-5)


def values_of_texts(groups: Groups, folder: Path, together: bool) -> list[float]:
    """Exact values at the last tokens of texts, in one row or in a row each."""
    source = HuggingFaceFolder(folder)
    stage = build(source.config, groups, torch.bfloat16, source, "exact")
    trainer = Trainer(stage, groups, OptimizerConfig())
    samples = score_samples([t for t in TEXTS if len(t) > 1])
    rules = row_rules(groups.layout, 64)
    rows = [rows_for_ranks(part, rules)[0][0] for part in ([samples] if together else [[s] for s in samples])]
    return [float(value) for values in trainer.score(rows) for value in values]


def test_exact_values_do_not_depend_on_the_row(classifier: Path, groups: Groups) -> None:
    assert values_of_texts(groups, classifier, True) == values_of_texts(groups, classifier, False)


def save_and_load(groups: Groups, folder: Path, to: Path) -> None:
    """A critic's checkpoint has its head, and the optimizer's state for it."""
    source = HuggingFaceFolder(folder)
    trainer = Trainer(build(source.config, groups, torch.float32, source, head="value"), groups, OptimizerConfig())
    rows = rows_for_ranks(global_batch(source.config.vocabulary, 0), row_rules(groups.layout, 64))[groups.data_rank]
    trainer.step(rows, squared_error, 1e-3)
    before = [values.numpy() for values in trainer.score(rows)]
    barrier = torch.distributed.barrier
    saver = Saver(to, rank=groups.rank, ranks=groups.layout.processes, barrier=barrier)
    said = describe(trainer.transformer.model, groups.layout) | {"updates": 1}
    saver.save(1, trainer.chunks(state=True), said, {})
    saver.close()
    saved = Checkpoint(to)
    again = Trainer(
        build(ModelConfig(**saved.manifest["model"]), groups, torch.float32, saved), groups, OptimizerConfig()
    )
    again.restore(saved)
    for found, expected in zip(again.score(rows), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_critic_is_saved_with_its_head(worlds: RankPool, tiny_folder: Path, tmp_path: Path) -> None:
    worlds.run(Layout(pipeline=2), save_and_load, tiny_folder, tmp_path)
    saved = Checkpoint(tmp_path)
    assert saved.tensors.keys() >= {VALUE, f"exp_avg/{VALUE}"}
    assert HEAD not in saved.tensors
