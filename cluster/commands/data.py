"""The commands `lockstep data tokenize` and `lockstep data tokenizer`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lockstep.cluster.commands.console import err, out, sentences

if TYPE_CHECKING:
    from lockstep.data.corpus.tokenization import OnBad

app = typer.Typer(no_args_is_help=True, help="Text to tokens, for pretraining.")

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Files (.txt, .jsonl, .jsonl.gz, .parquet), folders of them, or a Hub data set owner/name.",
    ),
]
Field = Annotated[str, typer.Option(help="Where JSON lines and Parquet files have their text.")]
Separator = Annotated[
    str | None,
    typer.Option(help='The line between documents of a .txt file ("" for an empty one); else a file is a document.'),
]
Choice = Annotated[str, typer.Option(help="stop at a bad row, or skip and count it.")]


@app.command()
@sentences
def tokenize(
    inputs: Inputs,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The store to make: OUTPUT.bin, .idx and .json.")],
    tokenizer: Annotated[str, typer.Option(help="A tokenizer's folder, a checkpoint, a Hub name or a .gguf file.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    field: Field = "text",
    separator: Separator = None,
    end: Annotated[str | None, typer.Option(help="Token that ends a document; the tokenizer's otherwise.")] = None,
    on_bad: Choice = "stop",
) -> None:
    """Make a Megatron indexed dataset out of text. Killed, it goes on where it was.

    Example: lockstep data tokenize corpus/ tokens/corpus --tokenizer smollm2-135m-instruct --workers 8
    """
    from lockstep.data.corpus import tokenization
    from lockstep.data.corpus.documents import Reading
    from lockstep.data.corpus.indexed_dataset import prefix
    from lockstep.data.tokenizer import Tokenizer
    from lockstep.model.formats.registry import tokenizer_files

    paths, reading = _found(inputs), Reading(field, separator)
    how = tokenization.tokenization_of(
        Tokenizer(tokenizer_files(tokenizer)), end=end, reading=reading, on_bad=_on_bad(on_bad)
    )
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("tokenizing, chunks", total=None)
        note = tokenization.tokenize(
            paths,
            output,
            how,
            workers=workers,
            progress=lambda done, chunks: bar.update(task, completed=done, total=chunks),
        )
    _say_skipped(note.skipped, note.examples)
    out.print(
        f"{prefix(output)}: {note.tokens} tokens in {note.documents} documents from {note.rows} rows, "
        f"{note.skipped} skipped"
    )


@app.command()
@sentences
def tokenizer(
    inputs: Inputs,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A folder that does not exist.")],
    vocabulary: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 32768,
    special: Annotated[list[str] | None, typer.Option(help="A token of its own; may be given more than once.")] = None,
    end: Annotated[str, typer.Option(help="Token that ends a document.")] = "<|endoftext|>",
    field: Field = "text",
    separator: Separator = None,
    on_bad: Choice = "stop",
) -> None:
    """Learn a byte-level BPE tokenizer from text.

    Example: lockstep data tokenizer corpus/ tokenizer --vocabulary 8192 --special "<|im_start|>"
    """
    from lockstep.data.corpus import tokenization
    from lockstep.data.corpus.documents import Reading
    from lockstep.data.tokenizer import Tokenizer, train_tokenizer

    if output.exists():
        raise ValueError(f"{output} exists: give a folder that does not")
    skipped: list[str] = []
    texts = tokenization.texts(_found(inputs), Reading(field, separator), _on_bad(on_bad), skipped)
    files = train_tokenizer(texts, vocabulary, special=special or [], end=end)
    output.mkdir(parents=True)
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
    _say_skipped(len(skipped), skipped[: tokenization.EXAMPLES])
    out.print(f"wrote {output}: {Tokenizer(files).vocabulary} tokens, {len(skipped)} rows skipped")


def _found(inputs: list[str]) -> list[Path]:
    """Inputs as paths; says which files of folders are left out."""
    from lockstep.data.corpus.documents import find_files

    paths = [_path(each) for each in inputs]
    _, others = find_files(paths)
    if others:
        err.print(f"left out {len(others)} files with other endings, {others[0]} first")
    return paths


def _path(name: str) -> Path:
    from lockstep.data.corpus.documents import SUFFIXES

    path = Path(name)
    looks_like_hub = name.count("/") == 1 and not path.is_absolute() and not name.endswith((*SUFFIXES, "/"))
    return _from_hub(name) if looks_like_hub and not path.exists() else path


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from lockstep.data.corpus.documents import SUFFIXES

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=[f"*{s}" for s in SUFFIXES]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"there is no file or folder {name!r} here, and the Hugging Face Hub gave no data set of this name "
            f"({type(error).__name__})"
        ) from error


def _on_bad(value: str) -> "OnBad":
    if value not in ("stop", "skip"):
        raise ValueError(f"--on-bad {value!r} is not known: use stop or skip")
    return cast("OnBad", value)


def _say_skipped(skipped: int, examples: Sequence[str]) -> None:
    for sentence in examples:
        err.print(f"skipped {sentence}")
    if skipped > len(examples):
        err.print(f"and {skipped - len(examples)} more")
