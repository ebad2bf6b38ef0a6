"""The trial of methods on a model: plain and under each, on the same inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attending import __version__
from attending.diagnosis.inputs import as_batches
from attending.diagnosis.run import name_of
from attending.interventions.visual_token_pruning import VisualTokenPruning
from attending.report.text import plural
from attending.taps.running import device_of, evaluating, first_tensor, to_device
from attending.trials.contenders import (
    Contender,
    Methods,
    as_contenders,
    described,
    takes_prompt_length,
)
from attending.trials.forward import Forward, ForwardStage
from attending.trials.generation import generate_settings, prompts_of
from attending.trials.record import Trial, TrialRow
from attending.trials.samples import Measure, Samples
from attending.trials.scoring import MetricStage, TaskStage
from attending.trials.stages import Clock, Stage, shuffled
from attending.trials.tasks import Task
from attending.trials.writing import GenerationStage

_TEXTS = 4  # of each contender that are kept
_PROMPT = 400  # characters of a prompt that are kept


def trial(
    model: nn.Module,
    inputs: Any,
    methods: Methods,
    *,
    tokenizer: Any = None,
    generate: int | Mapping[str, Any] | None = None,
    prompt_length: int | None = None,
    metrics: Mapping[str, Callable[[nn.Module], float]] | None = None,
    repeats: int = 3,
    seed: int = 0,
    max_batches: int | None = None,
    forward: Forward | None = None,
    name: str | None = None,
    progress: bool | None = None,
) -> Trial:
    """Run a model plain and under each method on the same inputs, and compare.

        trial = at.trial(model, batch, {"none": None, "act": act, "both": [act, var]}, generate=64)
        print(trial)
        trial.to_html("trial.html")

    Quality is per sequence and compared with plain sequence by sequence. Speed is timed in repeats
    that take turns, in another order each time, so that a drift of the machine hits all alike;
    one more round, which is not timed, warms up. A method that does not apply to this model, or
    breaks, says so in its notes, and the rest go on. After each method's first block the plain
    outputs are looked at again: a method that leaves a trace ends the trial.

    The model runs in evaluation mode without gradients, and its random state is restored.

    Args:
        model: any PyTorch model that the methods take.
        inputs: what it runs on: token ids `[batch, tokens]`, a mapping of the model's arguments, a
            list of either (batches), a text or a list of texts, if there is a tokenizer; or a
            `Task`, which has scores of its own (`attending.trials.Task`).
        methods: by name, each something that, called with a model, gives a context manager: an
            intervention, a way to decode, your own. A list or tuple nests several, the first
            outermost. None is the plain model, which is added if it is missing. A second None is a
            control: what it shows against plain is noise.
        tokenizer: for texts as inputs, and to show what was generated.
        generate: let the model also write on from the inputs: so many new tokens, greedily; or a
            mapping of arguments for `model.generate`.
        prompt_length: only the first tokens of each sequence are the prompt. Perplexity and drift
            are then over the tokens after it, text is generated from it, and methods that look for
            something in a prompt (`method(model, prompt_length=...)`) look nowhere else. Without,
            such methods see the tokens that they are to predict.
        metrics: measures of your own, `function(model) -> number`, taken once a repeat.
        repeats: how often each contender is timed.
        seed: of the order and of what is sampled; repeat r has seed + r.
        max_batches: take only the first ones.
        forward: `forward(model, batch)` runs one batch, where calling the model is not enough.
        name: what to call the model; by default where it was loaded from, or its class.
        progress: show a progress bar; by default in a terminal only.

    Returns:
        The trial: print it, or see `to_frame`, `to_html` and `to_json`.

    Raises:
        ValueError: for inputs, methods or settings that are none.
        RuntimeError: if a method left the model changed.
        Exception: whatever the plain model raises.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}. Of a pipeline, take "
            "the model inside (pipe.unet, pipe.transformer)."
        )
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}.")
    contenders, device = as_contenders(methods), device_of(model)
    devices = [one for one in {p.device for p in model.parameters()} if one.type == "cuda"]
    with (
        torch.random.fork_rng([one.index or 0 for one in devices]),
        evaluating(model),
        torch.no_grad(),
    ):
        stages, words, prompts = _stages(
            model, inputs, tokenizer, generate, prompt_length, max_batches, forward, seed, device
        )
        if metrics:
            stages.append(MetricStage(model, _checked(metrics), seed))
        _run(contenders, stages, repeats, seed, progress)
    measures, found = _finished(stages, contenders)
    _note_what_changed_nothing(stages, contenders)
    if any(measure.name == "perplexity" for measure in measures):
        _note_who_saw_too_much(contenders, prompt_length)
    texts = _texts(stages, tokenizer)
    return Trial(
        model=name or name_of(model),
        model_class=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        device=_in_words(device),
        inputs=words,
        repeats=repeats,
        seed=seed,
        clock=Clock(device).words,
        measures=measures,
        rows=[
            TrialRow(
                name=one.name,
                methods=[described(method) for method in one.stack],
                status=one.status,
                notes=one.notes([stage.part for stage in stages if stage.part]),
                samples=found.get(one.name, {}),
                counts=one.counts,
                texts=texts.get(one.name, []) if one.status == "ran" else [],
            )
            for one in contenders
        ],
        prompts=_decoded(prompts, tokenizer),
        version=__version__,
    )


def _stages(
    model: nn.Module,
    inputs: Any,
    tokenizer: Any,
    generate: int | Mapping[str, Any] | None,
    prompt_length: int | None,
    max_batches: int | None,
    forward: Forward | None,
    seed: int,
    device: torch.device,
) -> tuple[list[Stage], str, list[Any]]:
    """The parts of the trial, its inputs in words, and the prompts of what is generated."""
    if prompt_length is not None and prompt_length < 1:
        raise ValueError(f"prompt_length: expected at least 1 or None, got {prompt_length}.")
    if isinstance(inputs, Task):
        for option, given in (("generate", generate), ("forward", forward)):
            if given is not None:
                raise ValueError(
                    f"{option}: expected None with a task as inputs, which runs the model itself, "
                    f"got {given!r}."
                )
        return [TaskStage(model, inputs, device, seed)], f"task {inputs.name}", []
    found, _ = as_batches(inputs, tokenizer, max_batches)
    batches = [to_device(batch, device) for batch in found]
    if not batches:
        raise ValueError("inputs: expected at least one batch, got none.")
    stages: list[Stage] = [ForwardStage(model, batches, forward, prompt_length)]
    sequences = sum(_sequences(batch) for batch in batches)
    words = plural(sequences, "sequence")
    prompts: list[Any] = []
    if generate is not None:
        settings = generate_settings(model, generate)
        prompts = prompts_of(batches, prompt_length)
        stages.append(GenerationStage(model, prompts, settings, seed))
        shown = {name: value for name, value in settings.items() if name != "pad_token_id"}
        words += f"; generated with {', '.join(f'{k}={v}' for k, v in shown.items())}"
    if prompt_length is not None:
        words += f"; the first {plural(prompt_length, 'token')} of each are the prompt"
    return stages, words, prompts


def _run(
    contenders: Sequence[Contender],
    stages: Sequence[Stage],
    repeats: int,
    seed: int,
    progress: bool | None,
) -> None:
    from tqdm.auto import tqdm

    steps = len(contenders) * (repeats + sum(stage.steps for stage in stages))
    # None leaves it to tqdm, which shows a bar in terminals and notebooks only.
    hidden = None if progress is None else not progress
    with tqdm(total=steps, desc="trial", unit="run", disable=hidden, leave=False) as bar:

        def step(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        for stage in stages:
            stage.compare(contenders, step)
        for number in range(repeats):
            for contender in shuffled(contenders, seed + number):
                for stage in stages:
                    if contender.status == "ran":
                        stage.repeat(contender, number)
                step(contender.name)


def _finished(
    stages: Sequence[Stage], contenders: Sequence[Contender]
) -> tuple[list[Measure], dict[str, dict[str, Samples]]]:
    ran = [one for one in contenders if one.status == "ran"]
    measures: list[Measure] = []
    found: dict[str, dict[str, Samples]] = {}
    for stage in stages:
        own, columns = stage.finish(ran)
        seen = {name for samples in columns.values() for name in samples}
        measures += [measure for measure in own if measure.name in seen]
        for name, samples in columns.items():
            found.setdefault(name, {}).update(samples)
    return measures, found


def _note_what_changed_nothing(stages: Sequence[Stage], contenders: Sequence[Contender]) -> None:
    """Never a silent empty success: a method that changed no output and no text says so."""
    plain = contenders[0]
    for contender in contenders:
        same = [stage.same[contender.name] for stage in stages if contender.name in stage.same]
        if contender.stack and contender.status == "ran" and same and all(same):
            if all(isinstance(stage, TaskStage) for stage in stages if stage.same):
                text = f"its scores and answers are those of {plain.name!r}"
            else:
                text = f"all that it gave is bit for bit that of {plain.name!r}"
            if not any(isinstance(stage, GenerationStage | TaskStage) for stage in stages):
                text += "; a way to decode shows with generate=..."
            contender.note(text)


def _note_who_saw_too_much(contenders: Sequence[Contender], prompt_length: int | None) -> None:
    """Perplexity is honest only of those that look for nothing in what they are to predict."""
    for contender in contenders:
        if contender.status != "ran" or not any(map(takes_prompt_length, contender.stack)):
            continue
        if prompt_length is None:
            contender.note(
                "it took whole sequences for prompts and so saw tokens that it was to predict: "
                "give prompt_length for a perplexity that holds for decoding"
            )
        elif any(isinstance(method, VisualTokenPruning) for method in contender.stack):
            contender.note(
                "prompt_length counts tokens before pruning: it took as many of those that are "
                "left for the prompt, and so saw tokens that it was to predict"
            )


def _checked(
    metrics: Mapping[str, Callable[[nn.Module], float]],
) -> Mapping[str, Callable[[nn.Module], float]]:
    for name, metric in metrics.items():
        if not isinstance(name, str) or not callable(metric):
            raise ValueError(
                "metrics: expected a mapping of names to functions of the model, got "
                f"{name!r}: {type(metric).__name__}."
            )
    return metrics


def _texts(stages: Sequence[Stage], tokenizer: Any) -> dict[str, list[str]]:
    """The first texts of each contender, of the first repeat."""
    if tokenizer is None:
        return {}
    return {
        name: [str(tokenizer.decode(text)) for text in repeats[0][:_TEXTS]]
        for stage in stages
        if isinstance(stage, GenerationStage)
        for name, repeats in stage.texts.items()
    }


def _decoded(prompts: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[str]:
    if tokenizer is None:
        return []
    texts = [
        str(tokenizer.decode(ids[mask.bool()]))
        for prompt in prompts
        for ids, mask in zip(prompt["input_ids"], prompt["attention_mask"], strict=True)
    ]
    return [text if len(text) <= _PROMPT else f"...{text[-_PROMPT:]}" for text in texts[:_TEXTS]]


def _sequences(batch: Any) -> int:
    tensor = first_tensor(batch)
    return 1 if tensor is None or tensor.dim() == 0 else len(tensor)


def _in_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"CPU, {plural(torch.get_num_threads(), 'thread')}"
