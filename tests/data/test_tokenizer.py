"""Our tokenizer against the one of `transformers`, on the same files."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lockstep.data.chat_template import BadTemplate
from lockstep.data.tokenizer import BadTokenizer, Tokenizer, train_tokenizer
from lockstep.model.formats.huggingface.reader import read_text_files

TEXTS = [
    "",
    " ",
    "State the final answer: 12 + 345 =",
    "  two  spaces\tand\n\nlines\r\n",
    "naïve café Straße ИЖ 東京 😀👩‍👩‍👧 \u202eabc e\u0301",
    "<|im_start|>user\nhi<|im_end|><|endoftext|> <|im_start",
    "\x00\x7f\ufffd",
]


@pytest.fixture(scope="module")
def ours(tiny_folder: Path) -> Tokenizer:
    return Tokenizer(read_text_files(tiny_folder))


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


def check(text: str, ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    for skip in (True, False):
        assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids, skip_special=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_chosen_texts(text: str, ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    check(text, ours, theirs)


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_ids_of_any_text(text: str, ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    check(text, ours, theirs)


@settings(deadline=None)
@given(contents=st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_chats_are_rendered_alike(contents: list[str], ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat(messages) == expected
    assert ours.chat(messages).endswith("<|im_start|>assistant\n")


def test_size_and_end_of_text(ours: Tokenizer, theirs: PreTrainedTokenizerBase) -> None:
    assert ours.vocabulary == len(theirs)
    assert ours.eos == theirs.eos_token_id


def test_bytes_that_are_no_character_become_replacement_characters(ours: Tokenizer) -> None:
    ids = ours.encode("é")
    assert len(ids) == 2
    assert ours.decode(ids[:1]) == "\ufffd"


def test_many_texts_are_encoded_like_each_alone(ours: Tokenizer) -> None:
    assert ours.encode_all(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert ours.encode_all([]) == []


def test_a_learned_tokenizer_returns_every_text(tmp_path: Path) -> None:
    files = train_tokenizer(["naïve café 2024"] * 9, 290, special=["<|im_start|>"])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    learned, reference = Tokenizer(files), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        check(text, learned, reference)
    assert 258 < learned.vocabulary <= 290
    assert (learned.eos, learned.token("<|im_start|>")) == (0, 1)
    assert len(learned.encode("2024")) == 4
    assert train_tokenizer(iter(["naïve café 2024"] * 9), 290, special=["<|im_start|>"]) == files
    with pytest.raises(
        BadTokenizer, match="a vocabulary of 257 cannot hold 256 bytes and 2 special tokens: ask for 258"
    ):
        train_tokenizer([], 257, special=["<|im_start|>"])
    with pytest.raises(BadTokenizer, match="special tokens must differ"):
        train_tokenizer([], 500, special=["a", "a"])


def test_the_digest_is_that_of_what_tokens_mean(ours: Tokenizer, tiny_folder: Path) -> None:
    files = read_text_files(tiny_folder)
    values = json.loads(files["tokenizer.json"])
    values["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    assert Tokenizer({"tokenizer.json": json.dumps(values)}).digest == ours.digest
    values["added_tokens"][0]["content"] = "<|end|>"
    assert Tokenizer({"tokenizer.json": json.dumps(values)}).digest != ours.digest


def test_a_tokenizer_without_its_file_is_refused() -> None:
    with pytest.raises(BadTokenizer, match=r"no tokenizer\.json"):
        Tokenizer({"tokenizer_config.json": "{}"})


def test_a_broken_tokenizer_file_is_refused() -> None:
    with pytest.raises(BadTokenizer, match=r"tokenizer\.json"):
        Tokenizer({"tokenizer.json": "{"})


def test_a_chat_without_a_template_is_refused(tiny_folder: Path) -> None:
    plain = Tokenizer({"tokenizer.json": read_text_files(tiny_folder)["tokenizer.json"]})
    assert plain.eos is None
    with pytest.raises(BadTemplate, match=r"no chat template: set task\.chat=false"):
        plain.chat([{"role": "user", "content": "hi"}])
