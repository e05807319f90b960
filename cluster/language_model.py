"""A language model that is opened in this process to generate text: what `lockstep.load` returns."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from lockstep.cluster.generation import Answerer, Question, conversation, sampling_of
from lockstep.data.tokenizer import Tokenizer
from lockstep.distributed.world.groups import has_joined
from lockstep.model.config import ModelConfig
from lockstep.rl.rollout.config import EngineConfig
from lockstep.rl.rollout.engine import RolloutEngine
from lockstep.rl.rollout.loading import open_engine


class ModelIsOpen(ValueError):
    """Another model is open in this process."""


def load(
    checkpoint: Path | str, *, dtype: str = "bfloat16", cache_gib: float = 1.0, sequences: int = 64
) -> "LanguageModel":
    """Open a language model to generate text in this process.

    Args:
        checkpoint: a run, a checkpoint of any format or its URL, a Hugging Face folder or Hub name, or a .gguf file.
        dtype: bfloat16 or float32.
        cache_gib: GiB for keys and values, taken as they are needed.
        sequences: completions that are computed at the same time.

    Raises:
        ModelIsOpen: a process can have one model open at a time.
        ValueError: one sentence on what cannot be opened.
    """
    if has_joined():
        raise ModelIsOpen("a model is open in this process already: close it, or open this one in another process")
    with ExitStack() as stack:
        config = EngineConfig(sequences=sequences, cache_gib=cache_gib)
        engine, tokenizer = stack.enter_context(open_engine(str(checkpoint), dtype, config))
        return LanguageModel(engine, tokenizer, stack.pop_all())


class LanguageModel:
    """A checkpoint that generates text; made by `load`, and closed by `close` or at the end of a `with` block.

    Sampling parameters are those of `SamplingParams`: temperature (0 by default), top_k, top_p, max_new_tokens (128 by
    default), stop and so on.
    """

    def __init__(self, engine: RolloutEngine, tokenizer: Tokenizer, opened: ExitStack) -> None:
        """Use `load`; `opened` is what `close` closes."""
        self.tokenizer = tokenizer
        self._engine, self._opened = engine, opened

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self._engine.transformer.model

    @overload
    def generate(
        self, prompts: str, *, raw: bool = False, system: str | None = None, seed: int = 0, **sampling: Any
    ) -> str: ...

    @overload
    def generate(
        self, prompts: Sequence[str], *, raw: bool = False, system: str | None = None, seed: int = 0, **sampling: Any
    ) -> list[str]: ...

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        raw: bool = False,
        system: str | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> str | list[str]:
        """Answer a prompt, or several at the same time; an answer for each, in their order.

        Args:
            raw: continue the text as it is, without a chat template.
            system: a message that stands before all others in the chat template.

        Raises:
            ValueError: for a sampling parameter that is not allowed, a prompt that is too long, or a model without a
                chat template.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        questions = [_question(prompt, raw, system) for prompt in several]
        rows = self._answerer(seed, sampling).rows(questions, samples=1)
        texts = [str(row["completions"][0]["text"]) for row in rows]
        return texts[0] if isinstance(prompts, str) else texts

    def stream(
        self, prompt: str, *, raw: bool = False, system: str | None = None, seed: int = 0, **sampling: Any
    ) -> Iterator[str]:
        """Answer a prompt in pieces, as they are generated; arguments and errors are those of `generate`."""
        question, answerer = _question(prompt, raw, system), self._answerer(seed, sampling)
        yield from answerer.stream(answerer.tokens(question), sampling=answerer.sampling_of(question))

    def close(self) -> None:
        """Give the model's memory back; the object is of no use afterwards."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answerer(self, seed: int, sampling: Mapping[str, Any]) -> Answerer:
        return Answerer(self._engine, self.tokenizer, sampling_of(**sampling), seed)


def _question(prompt: str, raw: bool, system: str | None) -> Question:
    return Question({"prompt": prompt}, () if raw else conversation(prompt, system), prompt)
