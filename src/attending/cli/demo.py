"""`attending demo`: two real models on a text that comes along, without a network."""

from pathlib import Path
from typing import Annotated

import typer

from attending.cli.console import say
from attending.cli.outputs import check_folder, check_writable, write
from attending.cli.source import demo_text

MODELS = ("llama-stdlib", "minilm")  # a causal model that writes Python, an encoder of sentences


def command(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the pages go; made if it is not there.")
    ] = Path("results"),
) -> None:
    """Diagnose two small real models and write a page about each, offline."""
    check_folder(out, "--out")
    pages = {name: out / f"{name}.html" for name in MODELS}
    for page in pages.values():
        check_writable(page, "--out")

    from attending.cli.diagnose import diagnose_text
    from attending.cli.loading import load_model
    from attending.report.terminal import print_report

    # All before any: a package that is missing shows at once.
    models = [load_model(name, device="cpu") for name in MODELS]
    for loaded in models:
        diagnosis = diagnose_text(loaded, demo_text())
        print_report(diagnosis)
        write(pages[loaded.name], diagnosis.to_html)
        say("")
    say("Open the pages in a browser: every head, its map and its strongest keys, by a click.")
    say("Next: attending diagnose MODEL --text FILE --html OUT, with a model and a text of yours.")
