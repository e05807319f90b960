"""Lines that are scored, lines that are refused, and what is scored of a line."""

import json
from pathlib import Path

import pytest

from lockstep.cluster.evaluation.scoring.texts import BadText, parts_of, read_document, read_texts, utf8_bytes
from lockstep.data.tokenizer import Tokenizer
from lockstep.model.formats.huggingface.reader import HuggingFaceFolder


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "line 2 is not valid JSON"),
        (b"[1]", "line 2 is no JSON object"),
        (b'{"txt": "a"}', "line 2 has nothing to score"),
        (b'{"prompt": "a"}', "line 2 has prompt: give one of 'text'"),
        (b'{"text": "a", "completion": "b"}', "line 2 has completion, text"),
        (b'{"text": 3}', "line 2 has 'text' that is no text"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8 at byte 10"),
        (b'{"messages": [{"role": "user"}]}', "line 2: messages are a list"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "line 2 has no message of the assistant"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "line 2 begins with a message of the assistant"),
        (b"[" * 100_000, "line 2 is not readable JSON"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(line: bytes, words: str) -> None:
    with pytest.raises(BadText, match=words.replace("(", r"\(")):
        read_texts([b'\xef\xbb\xbf{"text": "good"}\n', line + b"\n"])


def test_what_is_scored_of_each_form(tokenizer: Tokenizer, tiny_folder: Path) -> None:
    model = HuggingFaceFolder(tiny_folder).config
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    lines = [
        {"text": "State 12"},
        {"text": "<|im_start|>State 12"},
        {"prompt": "12 + ", "completion": "34"},
        {"prompt": "", "completion": "34"},
        {"text": ""},
        {"messages": [*turns, {"role": "assistant", "content": "d<|im_end|>"}]},
    ]
    texts = read_texts([json.dumps(line).encode() for line in lines] + [b" \n"])
    plain, spelled, pair, alone, empty, chat = [parts_of(text, tokenizer, model) for text in texts]
    assert tokenizer.bos == 1
    assert [(p.context, p.scored) for p in plain] == [((1,), tuple(tokenizer.encode("State 12")))]
    assert [(p.context, p.scored) for p in spelled] == [(p.context, p.scored) for p in plain]
    assert [(p.context, p.scored) for p in pair] == [(tuple(tokenizer.encode("12 + ")), tuple(tokenizer.encode("34")))]
    assert alone[0].context == (1,)
    assert empty[0].scored == ()
    assert [p.characters for p in chat] == ["b<|im_end|>", "d<|im_end|><|im_end|>"]
    assert tokenizer.decode(chat[1].context, skip_special=False) == tokenizer.chat([*turns])
    assert chat[1].scored.count(2) == 1
    assert read_document(b"12\n34", "book.txt").given == {"text": "12\n34"}
    assert utf8_bytes("naïve 🦊") == 11
    with pytest.raises(BadText, match=r"^book\.txt is not UTF-8 at byte 1"):
        read_document(b"a\xff", "book.txt")


def test_a_completion_whose_prompt_has_no_tokens_is_conditioned_on_what_stands_before_a_text(
    tokenizer: Tokenizer, tiny_folder: Path
) -> None:
    stripping = json.loads(tokenizer.files["tokenizer.json"])
    stripping["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    strips = Tokenizer(tokenizer.files | {"tokenizer.json": json.dumps(stripping)})
    (text,) = read_texts([b'{"prompt": "  ", "completion": "34"}'])
    (part,) = parts_of(text, strips, HuggingFaceFolder(tiny_folder).config)
    assert (part.context, part.scored) == ((1,), tuple(strips.encode("34")))


def test_without_bos_the_end_of_text_stands_before_and_without_both_the_first_token_is_not_scored(
    tokenizer: Tokenizer, tiny_folder: Path
) -> None:
    model = HuggingFaceFolder(tiny_folder).config
    text = read_document(b"1234", "book.txt")
    files = {"tokenizer.json": tokenizer.files["tokenizer.json"]}
    with_end = Tokenizer(files | {"tokenizer_config.json": json.dumps({"eos_token": "<|im_end|>"})})
    whole = tuple(tokenizer.encode("1234"))
    assert [(p.context, p.scored) for p in parts_of(text, with_end, model)] == [((2,), whole)]
    (part,) = parts_of(text, Tokenizer(files), model)
    assert (part.context, part.scored, part.characters) == (whole[:1], whole[1:], "234")
    with pytest.raises(BadText, match=r"^book\.txt has token .* take the tokenizer that belongs to the model"):
        parts_of(text, tokenizer, model.model_copy(update={"vocabulary": 3}))
