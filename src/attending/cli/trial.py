"""`attending trial`: a model plain and under methods, on a text or a task, side by side."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attending.cli.console import note, say
from attending.cli.diagnose import Dtype
from attending.cli.errors import CommandError, one_line
from attending.cli.outputs import check_writable, write
from attending.cli.source import demo_text, read_text

if TYPE_CHECKING:
    from attending.cli.loading import LoadedModel
    from attending.trials import Method, ShapesPope, Trial

MAX_TOKENS = 2048
WINDOW = 128
PROMPT = 32
GENERATE = 48
SCENES = 24


class TaskName(StrEnum):
    """The tasks that a model can be given."""

    shapes_pope = "shapes-pope"
    shapes_pope_faint = "shapes-pope-faint"


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A local folder, a zoo model (attending zoo), or a hub id."
        ),
    ] = None,
    tries: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="METHOD",
            help="NAME, NAME:PARAMETER=VALUE,... or a stack NAME+NAME; may be given again.",
        ),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Show the methods and their parameters.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="UTF-8 text to read; - for stdin; else a demo text."),
    ] = None,
    task: Annotated[TaskName | None, typer.Option(help="A task instead of a text.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write the page of the trial.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write every sample as JSON.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="How often each is timed.")] = 3,
    generate: Annotated[
        int, typer.Option(min=0, metavar="N", help="New tokens per text, greedily; 0 for none.")
    ] = GENERATE,
    prompt: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of each window that are the prompt.")
    ] = PROMPT,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Read at most so many tokens of the text.")
    ] = MAX_TOKENS,
    scenes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images of the task, six questions each.")
    ] = SCENES,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of orders and tasks.")] = 0,
    device: Annotated[
        str | None,
        typer.Option(metavar="D", help="cpu, cuda, cuda:1, mps; else cuda where there is some."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights in memory.")] = Dtype.float32,
) -> None:
    """Run MODEL plain and under each method, and compare quality, drift, speed and memory.

    A method that does not apply to the model says why, and the others go on. Those that learn from
    data first do so on a part of the text that is not scored.
    """
    if list_:
        list_methods()
        return
    if model is None:
        raise CommandError("MODEL is missing; give a folder, a zoo model or a hub id")
    if not tries:
        raise CommandError("--try is missing; give a method, as in --try act (--list shows them)")
    if task is not None and text is not None:
        raise CommandError("--text and --task exclude each other; give one")
    if html is not None and json is not None and html.absolute() == json.absolute():
        raise CommandError(f"--html and --json are both {html}; give two paths")
    for path, option in ((html, "--html"), (json, "--json")):
        if path is not None:
            check_writable(path, option)
    words = demo_text() if text is None else read_text(text)
    stacks = parse(tries)

    from attending.cli.loading import DTYPES, load_model

    loaded = load_model(model, device=device, dtype=DTYPES[dtype])
    if task is not None:
        faint = task is TaskName.shapes_pope_faint
        found = _on_task(loaded, stacks, scenes, faint, repeats, seed)
    else:
        found = _on_text(loaded, stacks, words, max_tokens, prompt, generate, repeats, seed)

    from attending.report.trial_terminal import print_trial

    print_trial(found)
    if html is not None:
        write(html, found.to_html)
    if json is not None:
        write(json, found.to_json)


def parse(tries: list[str]) -> "dict[str, list[tuple[Method, bool]]]":
    """The stacks by the texts that name them, each method with whether it has to be calibrated.

    Raises:
        CommandError: for a text that names none, or comes twice.
    """
    from attending.trials.methods import stack_of

    found: dict[str, list[tuple[Method, bool]]] = {}
    for one in tries:
        if one in found or one == "none":
            why = "is given twice" if one in found else "is always there: it is the plain model"
            raise CommandError(f"--try {one} {why}")
        try:
            found[one] = stack_of(one)
        except ValueError as error:
            raise CommandError(f"--try {one_line(error)} (--list shows all methods)") from error
    return found


def list_methods() -> None:
    """A line for each method, and its parameters with their defaults."""
    from attending.trials.methods import METHODS, parameters_of

    for name, entry in METHODS.items():
        say(f"{name}: {entry.summary} ({entry.takes})", "bold")
        parameters = parameters_of(name).items()
        say("  " + ", ".join(f"{key}={value}" if value else key for key, value in parameters))
    say("--try act:beta=0.2 sets a parameter, act:layers=2/3 a list, act+momentum is a stack")


def calibrated(
    loaded: "LoadedModel", stack: "list[tuple[Method, bool]]", inputs: list[dict[str, Any]]
) -> "list[Method]":
    """The methods of a stack, ready to run; one that cannot learn from the inputs says so later."""
    return [_calibrated(loaded, method, inputs) if learns else method for method, learns in stack]


def _calibrated(loaded: "LoadedModel", method: Any, inputs: list[dict[str, Any]]) -> "Method":
    from attending.interventions.visual_token_pruning import VisualTokenPruning

    try:
        if not inputs:
            raise ValueError("the text is too short to learn from a part of it and score the rest.")
        if isinstance(method, VisualTokenPruning):
            ready: Method = method.calibrate(loaded.model, inputs)
        else:
            ready = method.calibrate(loaded.model, inputs[0])
    # What is wrong with a method is for its row of the table to say, when it is asked to run.
    except Exception as error:
        return _Refusing(method, error)
    return ready


class _Refusing:
    """Stands in for a method that could not be calibrated."""

    def __init__(self, method: object, error: Exception) -> None:
        self.method, self.error = method, error

    def __call__(self, model: object) -> Any:
        raise self.error


def _on_text(
    loaded: "LoadedModel",
    stacks: "dict[str, list[tuple[Method, bool]]]",
    text: str,
    max_tokens: int,
    prompt: int,
    generate: int,
    repeats: int,
    seed: int,
) -> "Trial":
    from attending.cli.text import batches

    prepared = batches(loaded, text, max_tokens, WINDOW)
    if not prepared.whole:
        note(f"reading the first {prepared.tokens:,} tokens of the text; --max-tokens N changes it")
    inputs = prepared.inputs
    learning: list[dict[str, Any]] = []
    if any(learns for stack in stacks.values() for _, learns in stack):
        inputs, learning = _apart(inputs)
    generates = callable(getattr(loaded.model, "can_generate", None)) and (
        loaded.model.can_generate()
    )
    shortest = min(int(batch["attention_mask"].sum(1).min()) for batch in inputs)
    if generates and prompt >= shortest:
        raise CommandError(
            f"--prompt {prompt} leaves nothing to score of windows of {shortest} tokens; give less"
        )
    return _run(
        loaded,
        inputs,
        {name: calibrated(loaded, stack, learning) for name, stack in stacks.items()},
        tokenizer=loaded.tokenizer,
        generate=generate if generates and generate else None,
        prompt_length=prompt if generates else None,
        repeats=repeats,
        seed=seed,
    )


def _apart(
    inputs: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The windows that are scored, and the last quarter of them, which is learnt from instead."""
    count = sum(len(batch["input_ids"]) for batch in inputs)
    kept, learning, left = [], [], count - count // 4
    for batch in inputs:
        rows = len(batch["input_ids"])
        here = min(left, rows)
        if here:
            kept.append({name: value[:here] for name, value in batch.items()})
        if here < rows:
            learning.append({name: value[here:] for name, value in batch.items()})
        left -= here
    return kept, learning


def _on_task(
    loaded: "LoadedModel",
    stacks: "dict[str, list[tuple[Method, bool]]]",
    scenes: int,
    faint: bool,
    repeats: int,
    seed: int,
) -> "Trial":
    from attending.zoo import shapes

    asked = shapes_task(loaded, scenes, faint, seed)
    learning = []
    if any(learns for stack in stacks.values() for _, learns in stack):
        others = shapes.make_scenes(scenes, seed + 1)
        inputs = asked.zoo_model.processor(others, shapes.DESCRIBE)
        learning = [{name: value.to(loaded.model.device) for name, value in inputs.items()}]
        learning[0]["pixel_values"] = learning[0]["pixel_values"].to(loaded.model.dtype)
    return _run(
        loaded,
        asked,
        {name: calibrated(loaded, stack, learning) for name, stack in stacks.items()},
        repeats=repeats,
        seed=seed,
    )


def shapes_task(loaded: "LoadedModel", scenes: int, faint: bool, seed: int) -> "ShapesPope":
    """The task for a model that sees.

    Raises:
        CommandError: for one that does not see, or not the way the task shows images.
    """
    from attending.trials import ShapesPope
    from attending.zoo.entry import ZooModel
    from attending.zoo.llava_shapes import make_processor

    config = loaded.model.config
    if not hasattr(config, "vision_config") or not hasattr(config, "image_seq_length"):
        raise CommandError(
            f"--task shows images, and {loaded.name} ({type(loaded.model).__name__}) "
            "sees none as LLaVA does; try llava-shapes"
        )
    if "<image>" not in loaded.tokenizer.get_vocab():
        raise CommandError(
            f"--task needs a token <image>, which the tokenizer of {loaded.name} lacks"
        )
    processor = make_processor(loaded.model, loaded.tokenizer)
    seeing = ZooModel(loaded.model, loaded.tokenizer, {}, loaded.name, processor)
    return ShapesPope(seeing, scenes=scenes, seed=seed, faint=faint)


def _run(loaded: "LoadedModel", inputs: Any, methods: Any, **settings: Any) -> "Trial":
    import torch

    from attending.trials import trial

    try:
        return trial(loaded.model, inputs, methods, name=loaded.name, **settings)
    except torch.OutOfMemoryError as error:
        raise CommandError(
            f"{loaded.name} does not fit into the memory of {loaded.model.device}; try "
            "--max-tokens, --dtype bfloat16 or --device cpu"
        ) from error
