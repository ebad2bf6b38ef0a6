"""Attention operators: ours, the formulation of their own paper, peers, and SDPA.

    python benchmarks/operators.py [--quick] [--only flow] [--lengths 256 1024 4096 16384]
    python benchmarks/operators.py --only flow --memory    # memory anew, times as they are

For each row of `_operator_rows.py`, each form (bidirectional, causal) and each length: time and
peak memory of the forward pass, and of the forward and the backward pass, in one run and by turns;
then the time of our forward pass from 1024 to 65536 tokens and the exponent of its growth. 4 heads
of dim 64, float32, batch 1, self-attention of normal random numbers.

Memory is by how much a process of its own grows at most while the contender runs once; queries,
keys and values (and the gradient that comes in) are there before. With `--only` the other rows of
the JSON file are kept.
"""

import argparse
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, interleaved, machine, peak_growth, ratio, write
from _operator_rows import OURS, ROWS, SDPA, STRAIGHTFORWARD, Attention, Goal, Row, load
from rich.console import Console
from rich.table import Table

HEADS, DIM = 4, 64
FORWARD, BOTH = "forward", "forward and backward"
ROUNDS = {256: 41, 1024: 21, 4096: 11}  # 3 for longer ones
GROWTH = [1024, 4096, 16384, 65536]


def job(function: Attention, length: int, is_causal: bool, work: str) -> Callable[[], object]:
    """One run of a contender, its inputs made."""
    torch.manual_seed(0)
    tensors = torch.randn(3, 1, HEADS, length, DIM).unbind(0)
    if work == FORWARD:

        def forward() -> object:
            with torch.no_grad():
                return function(*tensors, is_causal)

        return forward
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    cotangent = torch.randn(1, HEADS, length, DIM)

    def both() -> object:
        return torch.autograd.grad(function(*leaves, is_causal), leaves, cotangent)

    return both


def contenders(row: Row, is_causal: bool, length: int) -> tuple[dict[str, str], dict[str, str]]:
    """What can be measured, and why the rest cannot."""
    found, left_out = {OURS: row.ours, SDPA: SDPA}, {}
    if is_causal and length > row.longest:
        reason = f"not asked of it beyond {row.longest} tokens, for its memory"
        return found, dict.fromkeys((STRAIGHTFORWARD, *row.peers), reason)
    found[STRAIGHTFORWARD] = row.straightforward
    for name, contender in row.peers.items():
        try:
            job(load(contender), 64, is_causal, FORWARD)()
            found[name] = contender
        except (ImportError, NotImplementedError) as error:
            left_out[name] = f"{type(error).__name__}: {error}"
    return found, left_out


def memory(contender: str, length: int, is_causal: bool, work: str) -> float:
    """The peak growth in MB of a process that has done nothing large before.

    It is forked from a server that has only loaded torch. A fork of this process would inherit what
    its allocator keeps after the timings, and grow by less.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "attending.nn.flow_attention", "_operator_rows"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, contender, length, is_causal, work))
    process.start()
    sender.close()
    try:
        return float(receiver.recv()) / 1e6
    except EOFError:  # it was killed, most likely for its memory
        return math.nan
    finally:
        process.join()


def _child(sender: Any, contender: str, length: int, is_causal: bool, work: str) -> None:
    torch.set_num_threads(1)
    function = load(contender)
    job(function, 64, is_causal, work)()  # whatever is loaded at the first call
    sender.send(peak_growth(job(function, length, is_causal, work)))


def largest_difference(row: Row, is_causal: bool) -> float:
    """Between ours and the straightforward formulation, at 300 tokens."""
    ours, theirs = (
        job(load(one), 300, is_causal, FORWARD)() for one in (row.ours, row.straightforward)
    )
    assert isinstance(ours, torch.Tensor)
    assert isinstance(theirs, torch.Tensor)
    return float((ours - theirs).abs().max())


def measure(
    row: Row, is_causal: bool, length: int, work: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """All contenders of a row, one length."""
    names, left_out = contenders(row, is_causal, length)
    peaks = {name: memory(one, length, is_causal, work) for name, one in names.items()}
    jobs = {name: job(load(one), length, is_causal, work) for name, one in names.items()}
    seconds = interleaved(jobs, rounds)
    found: dict[str, dict[str, Any]] = {
        name: {
            "seconds": statistics.median(times),
            "time over SDPA": ratio(seconds, name, SDPA),
            "time over ours": ratio(seconds, name, OURS),
            "peak MB": peaks[name],
        }
        for name, times in seconds.items()
    }
    compare_memory(found)
    return found | {name: {"left out": reason} for name, reason in left_out.items()}


def measure_memory(row: Row, figures: dict[str, Any]) -> None:
    """Peak memory, put into the figures of a row whose times are there."""
    for is_causal in row.causal:
        form = "causal" if is_causal else "bidirectional"
        for work in (FORWARD, BOTH):
            for length, found in figures[form][work].items():
                names, _ = contenders(row, is_causal, int(length))
                for name in found:
                    if "left out" not in found[name]:
                        found[name]["peak MB"] = memory(names[name], int(length), is_causal, work)
                compare_memory(found)


def compare_memory(found: dict[str, dict[str, Any]]) -> None:
    """What ours takes as a share of what each contender takes."""
    for figures in found.values():
        if "peak MB" in figures:
            share = found[OURS]["peak MB"] / max(figures["peak MB"], 1e-9)
            figures["memory of ours over it"] = share


def conclude(row: Row, figures: dict[str, Any]) -> None:
    """Say which goals were met."""
    results = {goal.words: said(goal, figures) for goal in row.goals}
    figures["goals"] = {words: result for words, result in results.items() if result}


def growth(row: Row, is_causal: bool, lengths: list[int], rounds: int) -> dict[str, Any]:
    """The time of our forward pass, and the slope of its logarithm over that of the length."""
    jobs = {str(n): job(load(row.ours), n, is_causal, FORWARD) for n in lengths}
    seconds = {n: statistics.median(t) for n, t in interleaved(jobs, rounds).items()}
    fit = statistics.linear_regression(
        [math.log(int(n)) for n in seconds], [math.log(t) for t in seconds.values()]
    )
    return {"growth seconds": seconds, "growth exponent": fit.slope}


def said(goal: Goal, figures: dict[str, Any]) -> str | None:
    """Whether a goal was met; None where its figure was not measured."""
    found: Any = figures
    for key in goal.path:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    low, high = goal.at_least, goal.at_most
    met = (low is None or found >= low) and (high is None or found <= high)
    bound = f"at least {low:g}" if low is not None else f"at most {high:g}"
    return f"{bound}: {'met' if met else 'not met'} ({found:.3g})"


def table(name: str, form: str, work: str, found: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Of one form and one kind of work."""
    made = Table(title=f"{name}, {form}, {work}")
    made.add_column("tokens", justify="right")
    made.add_column("")
    for column in ("seconds", "time over SDPA", "time over ours", "peak MB"):
        made.add_column(column, justify="right")
    for length, rows in found.items():
        for contender, figures in rows.items():
            if "left out" not in figures:
                cells = [figures[column] for column in ("seconds", "time over SDPA")]
                cells += [figures["time over ours"], figures["peak MB"]]
                made.add_row(length, contender, *(f"{cell:.3g}" for cell in cells))
    return made


def plot(operators: dict[str, Any], path: Path) -> None:
    """Time and memory over the length; a row of panels for each operator and form."""
    from matplotlib.figure import Figure

    panels = [(n, f) for n, one in operators.items() for f in one if isinstance(one[f], dict)]
    panels = [(name, form) for name, form in panels if FORWARD in operators[name][form]]
    columns = [(work, unit) for unit in ("seconds", "peak MB") for work in (FORWARD, BOTH)]
    figure = Figure(figsize=(4 * len(columns), 3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(columns), squeeze=False)
    for (name, form), row in zip(panels, axes, strict=True):
        for (work, unit), axis in zip(columns, row, strict=True):
            lengths = operators[name][form][work]
            drawn = dict.fromkeys(one for found in lengths.values() for one in found)
            for contender in drawn:
                points = [
                    (int(length), found[contender][unit])
                    for length, found in lengths.items()
                    if unit in found.get(contender, {}) and found[contender][unit] > 0
                ]
                if points:
                    axis.loglog(*zip(*points, strict=True), marker="o", label=contender)
            axis.set(title=f"{name}, {form}\n{work}", xlabel="tokens", ylabel=unit)
            axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, print tables, write the JSON file and the picture beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short lengths: does it run at all?")
    parser.add_argument("--only", nargs="+", choices=sorted(ROWS), default=sorted(ROWS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure memory alone, into the JSON file that is there",
    )
    parser.add_argument("--out", type=Path, help="results/benchmarks/operators.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    console.print(machine())
    out = arguments.out or RESULTS / "operators.json"
    lengths = [64, 128] if arguments.quick else arguments.lengths
    operators: dict[str, Any] = {}
    figures: dict[str, Any]
    if out.exists():
        operators = json.loads(out.read_text()).get("operators", {})
    for name in arguments.only:
        row = ROWS[name]
        if arguments.memory:
            figures = operators[name]
            measure_memory(row, figures)
            conclude(row, figures)
            console.print(figures["goals"])
            continue
        figures = {"machine": machine()}
        for is_causal in row.causal:
            form = "causal" if is_causal else "bidirectional"
            figures[form] = {FORWARD: {}, BOTH: {}}
            if row.same:
                figures[form]["largest difference"] = largest_difference(row, is_causal)
            for work in (FORWARD, BOTH):
                for length in (one for one in lengths if one <= row.most):
                    rounds = 2 if arguments.quick else ROUNDS.get(length, 3)
                    found = measure(row, is_causal, length, work, rounds)
                    figures[form][work][str(length)] = found
                console.print(table(name, form, work, figures[form][work]))
            growing = [64, 128, 256] if arguments.quick else [n for n in GROWTH if n <= row.most]
            figures[form] |= growth(row, is_causal, growing, 2 if arguments.quick else 5)
            console.print(f"growth exponent: {figures[form]['growth exponent']:.3f}")
        conclude(row, figures)
        console.print(figures["goals"])
        operators[name] = figures
        write("operators", {"operators": operators}, out)  # what there is, should the rest fail
    write("operators", {"operators": operators}, out)
    plot(operators, out.with_suffix(".png"))
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
