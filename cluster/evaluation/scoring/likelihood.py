"""Log-likelihoods of continuations of given tokens by the trainer's forward pass, packed, in any layout.

What evaluation harnesses call `loglikelihood`: pairs of context and continuation go in, and of each come the
log-probabilities of its tokens and whether greedy decoding would write it.
"""

import tempfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lockstep.data.batch import Floats, Ints, TokenBatch
from lockstep.data.packing import rows_for_ranks
from lockstep.distributed.checkpoint.storage import Storage
from lockstep.distributed.layout import Layout
from lockstep.distributed.pipeline import Stage, run_forward
from lockstep.distributed.world.groups import Groups
from lockstep.distributed.world.rank_pool import RankPool
from lockstep.model.config import ModelConfig, Numerics
from lockstep.model.formats.lockstep import read_language_model
from lockstep.model.layers.logprobs import CHUNKS, local_logits, reduced
from lockstep.model.loading import DTYPES, build, transformer_of
from lockstep.model.training.config import row_rules
from lockstep.model.training.device_batch import DeviceRows, longest_document
from lockstep.model.training.forward import scorer, whole_row
from lockstep.rl.algorithms.estimates import columns, of_completions

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens that are given, one or more, and those that continue them."""
Scores = tuple[Ints, Floats, Floats]
"""Numbers of tokens in a batch, their log-probabilities, and 1 where a token is the likeliest."""

ROW_TOKENS = 2048
"""Of a packed row."""
BATCH_ROWS = 8
"""Rows of a data rank that are computed before their scores are handed out."""
TIMEOUT_S = 7 * 86400.0
"""Of all batches together, in which a large file may take days; a rank that raises or dies is seen at once."""
_POLL_S = 0.02


@dataclass(frozen=True)
class Likelihood:
    """Log-probabilities of a continuation's tokens in nats, [C], and whether each is the likeliest one, [C]."""

    logp: Floats
    likeliest: NDArray[np.bool_]

    @property
    def total(self) -> float:
        """log p(continuation | context), summed in float64."""
        return float(self.logp.sum(dtype=np.float64))

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding writes the continuation: lm-eval's `is_greedy`."""
        return bool(self.likeliest.all())


@dataclass(frozen=True)
class Scoring:
    """How likelihoods are computed: layout, dtype and numerics."""

    layout: Layout = field(default_factory=Layout)
    dtype: str = "bfloat16"
    numerics: Numerics = "fast"
    row_tokens: int = ROW_TOKENS


def likelihoods(
    checkpoint: Path | Storage, pairs: Sequence[Pair], scoring: Scoring
) -> Generator[Likelihood, None, None]:
    """Log-likelihoods of continuations, as `loglikelihood` of lm-eval; yields one for each pair, in order.

    Ranks of the layout are started on this machine, load a checkpoint of ours once and compute batches of packed rows;
    what a batch holds is yielded as soon as all of it is there.

    Args:
        pairs: (context, continuation) in tokens below the model's vocabulary, together at most one more than its
            context; a continuation may be empty, a context may not.

    Raises:
        WorldFailed: a rank raised; the message holds its traceback.
    """
    if not pairs:
        return
    batches = _batches(pairs, scoring.row_tokens * BATCH_ROWS * scoring.layout.replicas)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(1) as thread,
        RankPool(TIMEOUT_S) as worlds,
    ):
        spool = Path(folder)
        running = thread.submit(worlds.run, scoring.layout, _score_batches, checkpoint, scoring, batches, spool)
        for index, batch in enumerate(batches):
            paths = [_spooled(spool, index, replica) for replica in range(scoring.layout.replicas)]
            yield from _of_pairs(batch, [_awaited(path, running) for path in paths])
        running.result()


def _spooled(spool: Path, index: int, replica: int) -> Path:
    """Where a data rank leaves the scores of a batch."""
    return spool / f"{index}-{replica}.npz"


def _awaited(path: Path, running: "Future[Any]") -> Scores:
    """The scores in a file, once it is there; what ended the ranks before is raised."""
    while not path.exists():
        if wait([running], timeout=_POLL_S).done and not path.exists():
            running.result()
            raise AssertionError(f"ranks ended without {path.name}")
    with np.load(path) as file:
        scores = file["numbers"], file["logp"], file["likeliest"]
    path.unlink()
    return scores


def _leave(scores: Scores, path: Path) -> None:
    """Write scores to a file that is whole as soon as it is there."""
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.savez(file, numbers=scores[0], logp=scores[1], likeliest=scores[2])
    unfinished.rename(path)


def _batches(pairs: Sequence[Pair], tokens: int) -> list[list[Pair]]:
    """Pairs in order, in batches of about so many tokens."""
    batches: list[list[Pair]] = []
    room = 0
    for context, continuation in pairs:
        length = len(context) + len(continuation)
        if not batches or length > room:
            batches.append([])
            room = tokens
        batches[-1].append((context, continuation))
        room -= length
    return batches


def _of_pairs(batch: Sequence[Pair], scores: Sequence[Scores]) -> Iterator[Likelihood]:
    lengths = [len(continuation) for _, continuation in batch]
    logp = columns([(numbers, each) for numbers, each, _ in scores], lengths)
    likeliest = columns([(numbers, each) for numbers, _, each in scores], lengths)
    for each, greedy in zip(logp, likeliest, strict=True):
        yield Likelihood(each, greedy > 0)


def _score_batches(
    groups: Groups, checkpoint: Path | Storage, scoring: Scoring, batches: Sequence[Sequence[Pair]], spool: Path
) -> None:
    """Score batches of pairs; the body of every rank. The last stage's first ranks leave the scores in a folder."""
    model, weights, _ = read_language_model(checkpoint)
    stage = build(model, groups, DTYPES[scoring.dtype], weights, scoring.numerics)
    speaks = groups.is_last_stage and groups.tensor_rank == groups.context_rank == 0
    for index, batch in enumerate(batches):
        scores = score_pairs(stage, groups, batch, scoring.row_tokens)
        if speaks:
            _leave(scores, _spooled(spool, index, groups.data_rank))


def score_pairs(stage: Stage, groups: Groups, pairs: Sequence[Pair], row_tokens: int = ROW_TOKENS) -> Scores:
    """Score this data rank's share of pairs, packed as in training; called by all ranks of a layout together.

    Returns:
        Numbers of tokens, which count through all continuations in order, with their scores; nothing on all but the
        last pipeline stage.
    """
    model: ModelConfig = transformer_of(stage).model
    rows = rows_for_ranks(of_completions(pairs), row_rules(groups.layout, row_tokens, model))[groups.data_rank]
    found = _scores(stage, groups, rows)
    numbers = np.concatenate([np.zeros(0, np.int64), *(row.numbers for row, _ in zip(rows, found, strict=False))])
    logp, likeliest = np.concatenate([np.zeros((2, 0), np.float32), *found], axis=1)
    return numbers, logp, likeliest


@torch.no_grad()
def _scores(stage: Stage, groups: Groups, rows: Sequence[TokenBatch]) -> list[Floats]:
    """Log-probability of each row's targets and whether they are the likeliest tokens, [2, K]."""
    forward = scorer(groups, 1.0, scores_of=greedy_scores)
    found = run_forward(stage, DeviceRows(stage, groups, rows), forward, tokens=longest_document(rows))
    return [
        torch.stack([whole_row(row, each, groups) for each in scores]).numpy(force=True)
        for row, scores in zip(rows, found, strict=False)
    ]


def greedy_scores(
    hidden_KD: Tensor,
    weight_VD: Tensor,
    targets_K: Tensor,
    *,
    vocabulary: int,
    group: dist.ProcessGroup,
    temperature: float,
    cap: float | None,
    numerics: Numerics,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets, [K], the bits of `token_scores`, and 1 where a target is the likeliest token, [K].

    Both come out of the same logits. Of tokens with equal logits, as bfloat16 has many, the lowest id is the likeliest,
    whatever the layout. There are no gradients; arguments are those of `token_scores`.
    """
    assert not entropy
    first, size = group.rank() * weight_VD.shape[0], CHUNKS[numerics]
    tokens_V = torch.arange(first, first + weight_VD.shape[0], device=targets_K.device)
    logp, beaten = [], []
    for hidden, targets in zip(hidden_KD.split(size), targets_K.split(size), strict=True):
        chunk = local_logits(hidden, weight_VD, first, vocabulary, cap, numerics)
        log_sum, at_target = reduced(chunk, targets - first, temperature, group, numerics)
        own = (at_target * temperature).to(chunk.dtype)[:, None]
        logp.append(at_target - log_sum)
        beaten.append(((chunk > own) | ((chunk == own) & (tokens_V < targets[:, None]))).any(1).float())
    whole = torch.cat(beaten)
    if group.size() > 1:
        dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
    return torch.cat(logp), 1 - whole
