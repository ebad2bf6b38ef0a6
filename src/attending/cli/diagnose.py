"""`attending diagnose`: what the attention of a model does on a text."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attending.cli.console import note
from attending.cli.errors import CommandError
from attending.cli.outputs import check_writable, write
from attending.cli.source import demo_text, read_text

if TYPE_CHECKING:
    from attending.cli.loading import LoadedModel
    from attending.diagnosis.record import Diagnosis

MAX_TOKENS = 4096


class Dtype(StrEnum):
    """The types that weights are loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A local folder, a zoo model (attending zoo), or a hub id."
        ),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to read; - for stdin; else a demo text. A zoo model that sees takes "
            "each line as a prompt about a scene, else it reads true captions of scenes.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write the report as one HTML page.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write all that was measured as JSON.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Read at most so many tokens of the text.")
    ] = MAX_TOKENS,
    device: Annotated[
        str | None,
        typer.Option(metavar="D", help="cpu, cuda, cuda:1, mps; else cuda where there is some."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights in memory.")] = Dtype.float32,
) -> None:
    """Say what the attention of MODEL does: findings, and a line per layer.

    The text is cut into windows that the model can hold. No pickle is read, no code of a model run.
    """
    if html is not None and json is not None and html.absolute() == json.absolute():
        raise CommandError(f"--html and --json are both {html}; give two paths")
    for path, option in ((html, "--html"), (json, "--json")):
        if path is not None:
            check_writable(path, option)

    words = None if text is None else read_text(text)

    from attending.cli.loading import DTYPES, load_model

    loaded = load_model(model, device=device, dtype=DTYPES[dtype])
    if words is None and loaded.processor is None:
        words = demo_text()
    diagnosis = diagnose_text(loaded, words, max_tokens)

    from attending.report.terminal import print_report

    print_report(diagnosis)
    if html is not None:
        write(html, diagnosis.to_html)
    if json is not None:
        write(json, diagnosis.to_json)


def diagnose_text(
    loaded: "LoadedModel", text: str | None, max_tokens: int = MAX_TOKENS
) -> "Diagnosis":
    """The diagnosis of a loaded model on a text, which is read up to `max_tokens` tokens.

    Without a text, a model that sees reads scenes with their true captions.
    """
    import torch

    from attending.cli.scenes import scene_batches
    from attending.cli.text import batches
    from attending.diagnosis import diagnose
    from attending.taps import TapError

    if loaded.processor is not None:
        prepared = scene_batches(loaded, text, max_tokens)
    elif text is not None:
        prepared = batches(loaded, text, max_tokens)
    else:
        raise ValueError(f"expected text for {loaded.name}, which does not see, got None")
    if not prepared.whole:
        note(f"reading the first {prepared.tokens:,} tokens of the text; --max-tokens N changes it")
    try:
        return diagnose(loaded.model, prepared.inputs, tokenizer=loaded.tokenizer, name=loaded.name)
    except TapError as error:
        raise CommandError(f"{loaded.name}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise CommandError(
            f"{loaded.name} and {prepared.tokens:,} tokens do not fit into the memory of "
            f"{loaded.model.device}; try --max-tokens, --dtype bfloat16 or --device cpu"
        ) from error
