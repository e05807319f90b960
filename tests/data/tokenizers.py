"""Small tokenizers of the kinds that public families have, each with control tokens `<s>`, `</s>`, `<|im_start|>`, …"""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The cat sat on the mat. user assistant system tool 12 + 34 = 46",
    "im_start im_end hello world <|im start|> | < > / \n",
]


def _trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    made = Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator(CORPUS * 8, trainer)
    values = json.loads(made.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in CONTROL]
    return Tokenizer.from_str(json.dumps(values))


def _metaspace(scheme: str) -> Tokenizer:
    return _trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainers.BpeTrainer(vocab_size=420, special_tokens=[*CONTROL, *(f"<0x{i:02X}>" for i in range(256))]),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )


def _llama_2() -> Tokenizer:
    return _trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainers.BpeTrainer(vocab_size=420, special_tokens=[*CONTROL, *(f"<0x{i:02X}>" for i in range(256))]),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )


def _byte_level() -> Tokenizer:
    return _trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=CONTROL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )


def _unigram() -> Tokenizer:
    return _trained(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=90, special_tokens=CONTROL, unk_token="<unk>"),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        normalizer=normalizers.NFKC(),
    )


def _word_piece() -> Tokenizer:
    return _trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=CONTROL),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.BertNormalizer(lowercase=True),
    )


def _words() -> Tokenizer:
    words = {word: i for i, word in enumerate([*CONTROL, "The", "cat", "user", "assistant", "hi", "=", "\n"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(CONTROL)
    return made


def _greedy() -> Tokenizer:
    """Control tokens that take white space around them, and that are looked for after normalization."""
    made = _byte_level()
    values = json.loads(made.to_str())
    for token in values["added_tokens"]:
        token |= {"lstrip": token["content"] == "<|im_end|>", "rstrip": True, "normalized": True}
    made = Tokenizer.from_str(json.dumps(values))
    made.normalizer = normalizers.NFKC()
    made.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return made


KINDS: dict[str, Tokenizer] = {
    "byte level": _byte_level(),
    "byte level, greedy": _greedy(),
    "metaspace first": _metaspace("first"),
    "metaspace always": _metaspace("always"),
    "llama 2": _llama_2(),
    "unigram": _unigram(),
    "word piece": _word_piece(),
    "words": _words(),
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def files_of(made: Tokenizer, template: str = CHATML, *, bos: bool = False, **settings: Any) -> dict[str, str]:
    """The files of a tokenizer; with `bos`, its post-processor begins every text with `<s>`."""
    if bos:
        made = Tokenizer.from_str(made.to_str())
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template} | settings
    return {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(settings)}
