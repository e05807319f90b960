"""Separates what a reasoning model thinks from what it answers, by the marks that models put around their thoughts."""

_TAGS = ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")
_MARKS = (
    *[(f"<{tag}>", f"</{tag}>") for tag in _TAGS],
    ("[think]", "[/think]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|start_thinking|>", "<|end_thinking|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("<|channel|>commentary", "<|channel|>final<|message|>"),
)
"""Begin and end of thoughts, in lower case: of DeepSeek, Qwen, EXAONE, Seed, Mistral, Kimi, Cohere, Gemma, gpt-oss."""


def after_thoughts(response: str) -> str | None:
    """What follows the last thought; None where a thought has begun and not ended, so that no answer was given.

    A thought may lack its begin, because chat templates put that into the prompt.
    """
    text = response.lower()
    if len(text) != len(response):  # some capitals have two small letters
        text = response
    start = 0
    for begin, end in _MARKS:
        closed = text.rfind(end)
        if text.rfind(begin) > closed:
            return None
        start = max(start, closed + len(end)) if closed >= 0 else start
    return response[start:]
