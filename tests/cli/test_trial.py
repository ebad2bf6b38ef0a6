"""`attending trial` as users start it: on a text, on a task, and what it says of wrong input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration

from attending.trials import Trial
from attending.zoo.recipes.llava_shapes import LlavaShapesRecipe, build_model
from attending.zoo.recipes.llava_shapes_data import make_tokenizer
from tests.cli import models
from tests.cli.conftest import Run, is_one_line

Saved = Callable[[str], Path]
TEXT = (models.WORDS + "\n") * 8
ACT = "act:layers=0/1,alpha=0.5,beta=0,min_observers=1"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA that answers at random, saved as users have it."""
    folder = tmp_path_factory.mktemp("models") / "seeing"
    tokenizer = make_tokenizer()
    recipe = LlavaShapesRecipe(
        hidden=32, heads=2, kv_heads=1, head_dim=16, vision_layers=2, vision_intermediate=32,
        layers=4, intermediate=32,
    )  # fmt: skip
    model: LlavaForConditionalGeneration = build_model(recipe, tokenizer).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read(path: Path) -> Trial:
    return Trial.from_json(path.read_text(encoding="utf-8"))


def test_on_a_text(run: Run, saved: Saved, tmp_path: Path) -> None:
    page, data = tmp_path / "page.html", tmp_path / "data.json"
    result = run(
        "trial", saved("llama"), "--try", ACT, "--try", "momentum", "--try", f"{ACT}+momentum",
        "--try", "damro", "--text", "-", "--prompt", 8, "--generate", 6, "--repeats", 2,
        "--html", page, "--json", data, stdin=TEXT.encode(),
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.out.endswith(f"wrote {page}\nwrote {data}\n")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    found = read(data)
    assert [row.name for row in found] == ["none", ACT, "momentum", f"{ACT}+momentum", "damro"]
    drift = found.estimate(ACT, "drift_kl")
    assert drift is not None
    assert drift.value > 0
    stack = found[f"{ACT}+momentum"]
    assert stack.samples["drift_kl"] == found[ACT].samples["drift_kl"]
    assert stack.counts["MomentumDecoding.tokens"] > 0
    assert found["damro"].status == "not applicable"
    assert "damro: not applicable" in result.out
    assert found.plain.texts
    assert all(len(row.samples["forward_speed"].values) == 2 for row in list(found)[:4])


def test_on_an_encoder_without_generation(run: Run, saved: Saved, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    tree = "hierarchical:tree=4/4,layers=-1"
    result = run("trial", saved("bert"), "--try", tree, "--try", "momentum", "--json", data,
                 "--repeats", 1, "--text", "-", stdin=TEXT.encode())  # fmt: skip
    assert result.code == 0, result.err
    found = read(data)
    names = [measure.name for measure in found.measures]
    assert names == ["drift_l2", "forward_speed", "forward_memory"]
    drift = found.estimate(tree, "drift_l2")
    assert drift is not None
    assert drift.value > 0


def test_on_the_task(run: Run, seeing: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    result = run(
        "trial", seeing, "--task", "shapes-pope", "--scenes", 3, "--repeats", 1, "--json", data,
        "--try", "damro:k=4", "--try", "agile:keep=8", "--try", "var:tau=2", "--try", "damro+act",
        "--try", "hierarchical:tree=4/4,layers=-1",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = read(data)
    names = [measure.name for measure in found.measures]
    assert names == ["accuracy", "yes_ratio", "same_answers", "task_speed", "task_memory"]
    questions = len(found.plain.samples["accuracy"].values)
    assert f"{questions} questions" in found.inputs
    assert [row.status for row in found] == ["ran"] * 5 + ["not applicable"]
    small, whole = (found.estimate(name, "task_memory") for name in ("agile:keep=8", "none"))
    assert small is not None
    assert whole is not None
    assert small.value < whole.value  # the sequence is really shorter
    (agile,) = found["agile:keep=8"].methods
    assert "keep=8" in agile
    assert "erank_avg" in agile  # which was learnt from other scenes
    assert "sink_dimensions=(" in found["var:tau=2"].methods[0]


def test_methods_learn_from_what_is_not_scored(run: Run, saved: Saved, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    arguments = ("trial", saved("llama"), "--prompt", 8, "--generate", 0, "--repeats", 1,
                 "--text", "-", "--json", data)  # fmt: skip
    scored = []
    for method in ("act", "var"):
        result = run(*arguments, "--try", method, stdin=TEXT.encode())
        assert result.code == 0, result.err
        scored.append(len(read(data).plain.samples["perplexity"].values))
    assert 0 < scored[1] < scored[0]


def test_the_list(run: Run) -> None:
    result = run("trial", "--list")
    assert result.code == 0, result.err
    assert "act: damp attention sinks that are not the first one (decoders)" in result.out
    assert "beta=0.4" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trial"], "MODEL is missing"),
        (["trial", "minilm"], "--try is missing"),
        (["trial", "minilm", "--try", "atc"], "Did you mean act?"),
        (["trial", "minilm", "--try", "act:beta=x"], "beta: expected a number, got 'x'"),
        (["trial", "minilm", "--try", "act", "--try", "act"], "--try act is given twice"),
        (["trial", "minilm", "--try", "none"], "is always there: it is the plain model"),
        (["trial", "minilm", "--try", "act", "--task", "shapes-pope", "--text", "x"], "give one"),
        (["trial", "minilm", "--try", "act", "--html", "none/page.html"], "no folder none"),
        (["trial", "minilm", "--try", "act", "--html", "x", "--json", "x"], "give two paths"),
        (["trial", "minilm", "--try", "act", "--text", "none.txt"], "No such file"),
        (["trial", "nothing-like-this", "--try", "act"], "zoo models are minilm"),
    ],
)
def test_wrong_input(
    run: Run, arguments: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert is_one_line(result), result
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_that_shows_when_the_model_is_there(run: Run, saved: Saved) -> None:
    result = run("trial", saved("llama"), "--try", "act", "--task", "shapes-pope")
    assert is_one_line(result), result
    assert "sees none as LLaVA does; try llava-shapes" in result.err
    result = run("trial", saved("llama"), "--try", "act", "--prompt", 90, "--text", "-",
                 stdin=TEXT.encode())  # fmt: skip
    assert is_one_line(result), result
    assert "--prompt 90 leaves nothing to score" in result.err


def test_all_that_is_written_is_json(run: Run, saved: Saved, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    run("trial", saved("llama"), "--try", "momentum", "--json", data, "--repeats", 1,
        "--generate", 4, "--prompt", 4)  # fmt: skip
    assert json.loads(data.read_text(encoding="utf-8"))["rows"][0]["name"] == "none"
