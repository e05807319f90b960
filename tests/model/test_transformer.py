"""Our block against the Llama of `transformers`, on random weights, at one and two tensor ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lockstep.distributed.layout import Layout
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.attention.packed import DocumentAttention
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
from lockstep.model.layers.logprobs import local_logits
from lockstep.model.loading import build, transformer_of
from lockstep.model.transformer import Transformer
from lockstep.model.weights.names import logical_tensors
from lockstep.model.weights.sharding import padded_vocabulary


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; the untied one has a head of its own, as many key-value heads as heads, and an even vocabulary."""
    if request.param == "tied":
        return tiny_folder
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rms_norm_eps=1e-3,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # scales of 1 would hide a norm that is left out
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    folder = tmp_path_factory.mktemp("untied") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens_of(lengths: list[int], vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocabulary, (n,), generator=generator) for n in lengths]


def logits(transformer: Transformer, tokens: Tensor, positions: Tensor, documents: list[list[int]]) -> Tensor:
    """[T, vocabulary], gathered from all tensor ranks."""
    groups = transformer.groups
    hidden = transformer(tokens, positions, DocumentAttention(documents, tokens.device))[:, 0]
    weight = transformer.head_weight
    part = local_logits(hidden, weight, groups.tensor_rank * weight.shape[0], transformer.model.vocabulary)
    parts = [torch.empty_like(part) for _ in range(groups.layout.tensor)]
    dist.all_gather(parts, part, group=groups.tensor)
    return torch.cat(parts, dim=1)[:, : transformer.model.vocabulary]


def traced_graphs(groups: Groups, folder: Path) -> tuple[list[int], bool]:
    """Graphs that torch.compile has made after each of some rows; and whether attention's class is as it was."""
    source = HuggingFaceFolder(folder)
    transformer = transformer_of(build(source.config, groups, torch.float32, source))
    before, graphs, counts = DocumentAttention.__call__, [0], []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs[0] += 1
        return graph.forward

    transformer.compile_blocks(backend)
    for documents in ([[5], [7]], [[3, 4, 2], [6]], [[9, 1, 1, 1]], [[2], [3], [4], [5]], [[20, 3]]):
        total = sum(map(sum, documents))
        tokens = torch.arange(total) % source.config.vocabulary
        logits(transformer, tokens, torch.arange(total), documents)
        counts.append(graphs[0])
    return counts, DocumentAttention.__call__ is before


def test_compiling_blocks_changes_no_class_and_traces_no_attention(worlds: RankPool, folder: Path) -> None:
    """Rows of other documents need no new graphs: what is traced does not depend on them."""
    (counts, unchanged), *_ = worlds.run(Layout(), traced_graphs, folder)
    assert unchanged
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * 4


@torch.no_grad()
def packed_and_alone(groups: Groups, folder: Path, lengths: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of documents in one row, and of each in a row of its own."""
    source = HuggingFaceFolder(folder)
    transformer = transformer_of(build(source.config, groups, torch.float32, source))
    texts = tokens_of(lengths, source.config.vocabulary)
    positions = [torch.arange(len(t)) for t in texts]
    packed = logits(transformer, torch.cat(texts), torch.cat(positions), [[n] for n in lengths])
    alone = [logits(transformer, t, p, [[len(t)]]) for t, p in zip(texts, positions, strict=True)]
    return packed.numpy(), [a.numpy() for a in alone]


LENGTHS = [17, 1, 60, 5]


@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_equal_those_of_transformers(
    tensor: int, folder: Path, reference: LlamaForCausalLM, worlds: RankPool
) -> None:
    ranks = worlds.run(Layout(tensor=tensor), packed_and_alone, folder, LENGTHS)
    texts = tokens_of(LENGTHS, reference.config.vocab_size)
    with torch.no_grad():
        expected = [reference(t[None]).logits[0].numpy() for t in texts]
    assert max(np.abs(e).max() for e in expected) > 1
    for packed, alone in ranks:
        for found, wanted in zip(alone, expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(packed, np.concatenate(expected), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_branches_of_a_document_equal_separate_texts(folder: Path, groups: Groups) -> None:
    source = HuggingFaceFolder(folder)
    transformer = transformer_of(build(source.config, groups, torch.float32, source))
    prompt, *branches = tokens_of([11, 4, 9], source.config.vocabulary)
    positions = torch.cat([torch.arange(11), torch.arange(4) + 11, torch.arange(9) + 11])
    tree = logits(transformer, torch.cat([prompt, *branches]), positions, [[11, 4, 9]])
    for start, branch in ((11, branches[0]), (15, branches[1])):
        text = torch.cat([prompt, branch])
        whole = logits(transformer, text, torch.arange(len(text)), [[len(text)]])
        torch.testing.assert_close(tree[start : start + len(branch)], whole[11:], rtol=1e-5, atol=1e-5)


def test_parameters_are_counted_without_building_the_model(folder: Path, reference: LlamaForCausalLM) -> None:
    config = HuggingFaceFolder(folder).config
    assert config.parameters == reference.num_parameters()
    assert config.parameters == sum(int(np.prod(shape)) for shape in logical_tensors(config).values())


@pytest.mark.parametrize(("vocabulary", "tensor", "rows"), [(301, 1, 301), (301, 2, 302), (300, 4, 300), (3, 8, 8)])
def test_a_vocabulary_is_padded_to_divide(vocabulary: int, tensor: int, rows: int) -> None:
    assert padded_vocabulary(vocabulary, tensor) == rows
