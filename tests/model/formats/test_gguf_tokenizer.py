"""BOS of a GGUF file's tokenizer: where the file, or llama.cpp for its kind, begins texts with it."""

from typing import Any

import pytest

from lockstep.data.tokenizer import Tokenizer
from lockstep.model.formats.gguf_tokenizer import tokenizer_files

BEGIN = {"tokenizer.ggml.bos_token_id": 0}


@pytest.mark.parametrize(
    ("pre", "said", "expected"),
    [
        ("gpt-2", {}, []),
        ("gpt-2", BEGIN, []),
        ("gpt-2", BEGIN | {"tokenizer.ggml.add_bos_token": True}, [0]),
        ("gpt-2", {"tokenizer.ggml.add_bos_token": True}, []),
        ("qwen2", BEGIN | {"tokenizer.ggml.add_bos_token": False}, []),
        ("llama-bpe", BEGIN, [0]),
        ("llama-bpe", BEGIN | {"tokenizer.ggml.add_bos_token": False}, []),
    ],
)
def test_a_text_begins_with_bos_where_the_file_wants_it(pre: str, said: dict[str, Any], expected: list[int]) -> None:
    tokens = ["<s>", "c", "a", "t"]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 1, 1, 1],
        "tokenizer.ggml.merges": [],
    } | said
    made = Tokenizer(tokenizer_files(lambda key, *default: values.get(key, *default)))
    assert made.encode_prompt("cat") == [*expected, 1, 2, 3]
    assert made.encode_prompt("<s>cat") == [0, 1, 2, 3]
    assert made.encode("cat") == [1, 2, 3]
