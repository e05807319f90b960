"""What every engine does with a request: refuses one that cannot run, and says when its completion ends."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from lockstep.rl.rollout.config import with_stop_tokens
from lockstep.rl.rollout.detokenizer import StopStrings
from lockstep.rl.rollout.protocol import PromptTooLong, Request


def check_request(request: Request, *, length: int, vocabulary: int, ends: Collection[int]) -> None:
    """Refuse a request that does not fit the model.

    Args:
        length: tokens that prompt and completion together may have.
        ends: tokens that end its completion.

    Raises:
        PromptTooLong: when prompt and completion are longer.
        ValueError: when the prompt is empty, a token is not in the vocabulary, none may be drawn first, or a
            grammar comes with a length.
    """
    new, prompt = request.new, len(request.tokens)
    if not prompt:
        raise ValueError("a prompt without tokens has no next token: give at least one, for example the text's begin")
    if request.on_overflow != "roll" and prompt + new > length:
        raise PromptTooLong(
            f"a prompt of {prompt} tokens and {new} new ones need a context of {prompt + new}, "
            f"and rollouts have {length}"
        )
    if request.grammar is not None and (request.sampling.min_new_tokens or request.sampling.exact_lengths):
        raise ValueError("a grammar says where its completion may end: leave min_new_tokens and exact_lengths out")
    named = (*request.tokens, *request.sampling.stop_tokens, *request.sampling.logit_bias)
    strange = next((t for t in named if not 0 <= t < vocabulary), None)
    if strange is not None:
        raise ValueError(f"there is no token {strange}: the vocabulary has 0 … {vocabulary - 1}")
    if request.sampling.min_new_tokens and len({*ends}) == vocabulary:
        raise ValueError(f"all {vocabulary} tokens end a completion, which then has no first one: name fewer")


def fitted(request: Request, length: int) -> Request:
    """The request with what its `on_overflow` leaves of a prompt that is too long, its last tokens.

    Args:
        length: tokens that prompt and completion together may have, or those of a window that rolls.

    Raises:
        PromptTooLong: where a completion leaves no room for a token of a prompt that may be cut.
        ValueError: for a prompt that would lose tokens whose log-probabilities are asked for.
    """
    prompt, new = len(request.tokens), request.new
    if request.on_overflow == "error" or prompt + new <= length:
        return request
    kept = length - new if request.on_overflow == "truncate" else length
    if kept < 1:
        raise PromptTooLong(
            f"{new} new tokens leave no room for a prompt in a context of {length}: ask for fewer than {length}, or "
            "use on_overflow=roll"
        )
    if prompt > kept and request.prompt_logprobs is not None:
        raise ValueError(
            f"a prompt of {prompt} tokens whose log-probabilities are asked for cannot lose its first "
            f"{prompt - kept}: give a shorter one"
        )
    return replace(request, tokens=request.tokens[-kept:])


def prepared(
    request: Request, running: Collection[str | int], special: Mapping[int, str], decode: Callable[[list[int]], str]
) -> tuple[Request, StopStrings | None]:
    """The request with the special tokens that its stop strings name, and what finds its stop strings.

    Raises:
        ValueError: when a running request has the same key.
    """
    if request.key in running:
        raise ValueError(f"a request with the key {request.key!r} is running already: give each a key of its own")
    request = replace(request, sampling=with_stop_tokens(request.sampling, special))
    return request, StopStrings(request.sampling.stop, decode) if request.sampling.stop else None


def finish_reason(
    request: Request, tokens: Sequence[int], stops: StopStrings | None, ends: Collection[int]
) -> str | None:
    """Why a completion ends with its last token (see `TokenOutput`), or None where it goes on; called after each."""
    sampling, written = request.sampling, len(tokens)
    if sampling.exact_lengths:
        wanted = sampling.exact_lengths[request.sample % len(sampling.exact_lengths)]
        return "length" if written >= wanted else None
    stopped = stops is not None and stops.found(tokens)
    if written >= sampling.min_new_tokens and (stopped or tokens[-1] in ends):
        return "stop"
    return "length" if written >= sampling.max_new_tokens else None
