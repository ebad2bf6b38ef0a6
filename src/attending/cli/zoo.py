"""`attending zoo`: list the small real models, make one anew, ship what was made."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attending.cli.console import say
from attending.cli.errors import CommandError
from attending.cli.outputs import check_folder

app = typer.Typer(help="Small real models that work offline: list, train, export.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="A model of the zoo.")]


@app.callback(invoke_without_command=True)
def show(context: typer.Context) -> None:
    """List the models; `train` and `export` make one anew."""
    if context.invoked_subcommand is not None:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from attending import zoo

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("name", "parameters", "what it is", "license", "train"):
        justify: Literal["left", "right"] = "right" if heading == "parameters" else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for record in zoo.describe():
        known = record.parameters is not None
        table.add_row(
            record.name,
            f"{record.parameters:,}" if known else "not installed",
            record.description,
            record.license,
            "yes" if record.trainable else "no",
        )
    Console().print(table)
    say('In Python: attending.zoo.load("NAME"). Here: attending diagnose NAME.')


@app.command()
def train(
    name: Name,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the checkpoint goes; else results/train-NAME."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Fewer or more than the recipe says.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew and overwrite a checkpoint that is there.")
    ] = False,
) -> None:
    """Train NAME by its recipe; go on where a stopped training left off."""
    from attending import zoo

    folder = Path("results") / f"train-{name}" if out is None else out
    check_trainable(name)
    check_folder(folder, "--out")
    settings: dict[str, Any] = {} if steps is None else {"steps": steps}
    measured = zoo.train(name, folder, resume=not fresh, **settings)
    last = {name: value for name, value in measured["curve"][-1].items() if name != "step"}
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in last.items())
    say(f"{measured['step']} steps, {measured['seconds']:.0f} seconds: {figures}")
    say(f"wrote {folder}; next: attending zoo export {name} {folder} FOLDER")


@app.command()
def export(
    name: Name,
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="--out of the training.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets weights and data card.")],
) -> None:
    """Measure the training in RUN_DIR and write weights and data card into FOLDER."""
    from attending import zoo

    check_trainable(name)
    if not run_dir.is_dir():
        raise CommandError(f"RUN_DIR {run_dir} is no folder; run attending zoo train {name} first")
    check_folder(folder, "FOLDER")
    card = zoo.export(name, run_dir, folder)
    say(f"wrote {folder}: {card['parameters']:,} parameters, {card['headline']}")
    say(f"next: attending diagnose {folder}")


def check_trainable(name: str) -> None:
    """Raise `CommandError` before folders are made for a name that no recipe can fill."""
    from attending import zoo

    trainable = {record.name: record.trainable for record in zoo.describe()}
    if not trainable.get(name, False):
        why = "was trained by others" if name in trainable else "is no zoo model"
        those = ", ".join(known for known, possible in trainable.items() if possible)
        raise CommandError(f"NAME {name} {why}; those with a recipe are {those}")
