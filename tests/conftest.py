"""What tests share: gloo worlds, a tiny random model in Hugging Face's format, and its tokenizer."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from lockstep.data.tokenizer import Tokenizer
    from lockstep.distributed.world.groups import Groups
    from lockstep.distributed.world.rank_pool import RankPool
    from lockstep.model.transformer import Transformer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait for each other on cores that others use are slow
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background; all that is started would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("fuzz", deadline=None)  # a loaded machine is no bug
settings.register_profile("same", deadline=None, derandomize=True)  # what a commit passes does not depend on luck
settings.load_profile("same")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle-files", type=int, metavar="SEED", help="run files of tests in an order drawn from SEED")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each file's place is drawn from its own name, so that all of xdist's processes agree."""
    seed = config.getoption("--shuffle-files")
    if seed is not None:
        items.sort(key=lambda item: random.Random(f"{seed} {item.nodeid.split('::')[0]}").random())


@pytest.fixture(scope="session")
def worlds() -> "Iterator[RankPool]":
    """Real gloo worlds of any layout."""
    from lockstep.distributed.world.rank_pool import RankPool

    with RankPool() as worlds:
        yield worlds


@pytest.fixture(scope="module")
def groups() -> "Iterator[Groups]":
    """A world of this process alone, left before the next module begins."""
    from lockstep.distributed.world.groups import alone, leave

    yield alone()
    leave()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers with odd sizes: grouped heads, hidden ≠ intermediate, a vocabulary that is odd."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["State the final answer to the following arithmetic problem: 12 + 34 ="] * 4,
        trainers.BpeTrainer(vocab_size=301, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[1], eos_token=special[2])
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) | 1,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rope_theta=5000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def transformer(tiny_folder: Path, groups: "Groups") -> "Transformer":
    """The tiny model in fp32."""
    import torch

    from lockstep.model.formats.huggingface.reader import HuggingFaceFolder
    from lockstep.model.loading import build, transformer_of

    source = HuggingFaceFolder(tiny_folder)
    return transformer_of(build(source.config, groups, torch.float32, source))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> "Tokenizer":
    """The tiny model's."""
    from lockstep.data.tokenizer import Tokenizer
    from lockstep.model.formats.huggingface.reader import read_text_files

    return Tokenizer(read_text_files(tiny_folder))
