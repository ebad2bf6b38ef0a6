"""The installed command in a process of its own, on real models, as a user starts it."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attending.cli.loading import load_model
from attending.cli.source import demo_text
from attending.cli.text import batches
from attending.diagnosis.record import Diagnosis
from attending.zoo.recipes import stdlib_text
from tests.cli import models
from tests.cli.conftest import COMMAND, Run, is_one_line

Saved = Callable[[str], Path]
TEXT = (models.WORDS + "\n") * 3


def entropies(diagnosis: Diagnosis) -> dict[str, torch.Tensor]:
    return {layer.name: torch.tensor(layer.statistics["entropy"]) for layer in diagnosis.layers}


def test_diagnose_writes_page_and_data(shell: Run, tmp_path: Path) -> None:
    page, data = tmp_path / "page.html", tmp_path / "data.json"
    result = shell("diagnose", "llama-stdlib", "--html", page, "--json", data)
    assert result.code == 0, result.err
    assert "LlamaForCausalLM" in result.out
    assert result.out.endswith(f"wrote {page}\nwrote {data}\n")
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    diagnosis = Diagnosis.from_json(data.read_text(encoding="utf-8"))
    assert diagnosis.model == "llama-stdlib"
    assert len(diagnosis.layers) == 8
    assert all(layer.is_causal and layer.num_heads == 6 for layer in diagnosis.layers)
    assert diagnosis.preview[0] == "<|bos|>"


def test_what_is_written_is_what_the_library_measures(
    run: Run, saved: Saved, tmp_path: Path
) -> None:
    """The command adds nothing of its own but the batches: the numbers are those of the maps."""
    from transformers import BertModel, PreTrainedTokenizerFast

    folder = saved("bert")
    result = run("diagnose", folder, "--json", tmp_path / "out.json", "--text", "-",
                 "--max-tokens", 30, stdin=TEXT.encode())  # fmt: skip
    assert result.code == 0, result.err
    found = entropies(Diagnosis.from_json((tmp_path / "out.json").read_text(encoding="utf-8")))

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:28]
    eager = BertModel.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        maps = eager(torch.tensor([[1, *ids, 2]]), output_attentions=True).attentions
    assert len(found) == len(maps) == 2
    for entropy, attention in zip(found.values(), maps, strict=True):
        expected = torch.special.entr(attention).sum(-1).mean((0, 2))
        torch.testing.assert_close(entropy, expected, rtol=1e-4, atol=1e-4)


def test_text_from_stdin_and_from_a_file_are_alike(run: Run, saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    piped = run("diagnose", saved("llama"), "--text", "-", stdin=TEXT.encode())
    read = run("diagnose", saved("llama"), "--text", tmp_path / "text")
    assert piped.code == read.code == 0, piped.err + read.err
    assert piped.out == read.out


@pytest.mark.parametrize(
    ("kind", "layers"), [("llama", 2), ("bert", 2), ("roberta", 2), ("bart", 5), ("t5", 6)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kinds_of_models(
    run: Run, saved: Saved, tmp_path: Path, kind: str, layers: int, dtype: str
) -> None:
    result = run(
        "diagnose", saved(kind), "--json", tmp_path / "out.json", "--dtype", dtype,
        "--text", "-", "--device", "cpu", stdin=TEXT.encode(),
    )  # fmt: skip
    assert result.code == 0, result.err
    diagnosis = Diagnosis.from_json((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(diagnosis.layers) == layers
    crossing = [layer for layer in diagnosis.layers if layer.kind == "cross"]
    assert len(crossing) == (2 if kind in ("bart", "t5") else 0)
    assert all(0 < v < 10 for layer in entropies(diagnosis).values() for v in layer.tolist())


def test_only_so_many_tokens(run: Run, saved: Saved, tmp_path: Path) -> None:
    result = run("diagnose", saved("llama"), "--json", tmp_path / "o", "--max-tokens", 70)
    assert result.code == 0
    assert "reading the first 70 tokens of the text" in result.err
    assert json.loads((tmp_path / "o").read_text())["tokens"] == 70


def test_demo(shell: Run, tmp_path: Path) -> None:
    result = shell("demo", "--out", tmp_path / "new" / "results")
    assert result.code == 0, result.err
    for name, heads in (("llama-stdlib", "6 heads"), ("minilm", "12 heads")):
        page = tmp_path / "new" / "results" / f"{name}.html"
        assert f"wrote {page}\n" in result.out
        assert heads in result.out
        assert name in page.read_text(encoding="utf-8")


def test_demo_into_a_file(shell: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = shell("demo", "--out", tmp_path / "file")
    assert is_one_line(result)
    assert "is a file; give a folder" in result.err


def test_zoo_list(shell: Run) -> None:
    result = shell("zoo")
    assert result.code == 0
    for word in ("minilm", "llama-stdlib", "Apache-2.0"):
        assert word in result.out


QUICK = [
    (["diagnose", "nothing-like-this"], "zoo models are minilm, llama-stdlib"),
    (["diagnose", "."], "has no config.json"),
    (["diagnose", "minilm", "--text", "none.txt"], "No such file"),
    (["diagnose", "minilm", "--text", "-"], "holds no text"),
    (["diagnose", "minilm", "--html", "none/page.html"], "there is no folder none"),
    (["diagnose", "minilm", "--json", "/proc/attending"], "cannot be written"),
    (["diagnose", "minilm", "--device", "gpu"], "--device gpu is no device"),
    (["zoo", "train", "minilm"], "was trained by others; those with a recipe are llama"),
]  # fmt: skip
SLOW = [
    (["diagnose", "minilm", "--max-tokens", "2"], "leaves no room"),
    (["zoo", "train", "gpt-5"], "is no zoo model"),
    (["zoo", "export", "llama-stdlib", "none", "to"], "run attending zoo train llama-stdlib"),
    (["zoo", "export", "llama-stdlib", ".", "to"], "train first"),
]


@pytest.mark.parametrize(("arguments", "message"), QUICK)
def test_wrong_input(shell: Run, arguments: list[str], message: str) -> None:
    result = shell(*arguments)
    assert is_one_line(result), result
    assert message in result.err
    assert result.out == ""


@pytest.mark.parametrize(("arguments", "message"), SLOW)
def test_wrong_input_that_shows_late(
    run: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert is_one_line(result), result
    assert message in result.err


def test_model_without_sdpa(shell: Run, tmp_path: Path) -> None:
    result = shell("diagnose", models.deberta(tmp_path / "deberta"))
    assert is_one_line(result), result
    assert "has no attention through" in result.err


def test_weights_only_as_a_pickle(shell: Run, tmp_path: Path) -> None:
    result = shell("diagnose", models.pickled(tmp_path / "pickled"))
    assert is_one_line(result), result
    assert "only as a pickle" in result.err


def test_vision_model(run: Run, tmp_path: Path) -> None:
    result = run("diagnose", models.vit(tmp_path / "vit"))
    assert is_one_line(result), result
    assert "takes text models; in Python, attending.diagnose(" in result.err


def test_debug_shows_the_traceback(shell: Run) -> None:
    result = shell("diagnose", "./nowhere", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert "loading.py" in result.err


def test_terminal_that_knows_only_ascii(shell: Run, saved: Saved) -> None:
    result = shell("diagnose", saved("llama"), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.code == 0, result.err
    assert result.out.isascii()


def test_reader_that_goes_away(tmp_path: Path) -> None:
    """`attending zoo | head -1`: no traceback for a closed pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([COMMAND, "zoo"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors


def test_control_c(tmp_path: Path) -> None:
    """The text is a pipe, so that the process is known to be at work when the signal comes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [COMMAND, "diagnose", "llama-stdlib", "--text", str(pipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with pipe.open("wb"):  # waits until the command opens it to read
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert out == b""


@pytest.mark.slow
def test_zoo_train_and_export(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One real step on a part of the standard library, from the command to a diagnosis."""
    library = stdlib_text.stdlib_root()
    part = tmp_path / "library"
    part.mkdir()
    for name in ("argparse.py", "ast.py", "calendar.py", "difflib.py", "inspect.py", "textwrap.py"):
        shutil.copy(library / name, part)
    monkeypatch.setattr(stdlib_text, "stdlib_root", lambda: part)
    training, weights = tmp_path / "training", tmp_path / "weights"

    trained = run("zoo", "train", "llama-stdlib", "--out", training, "--steps", 1)
    assert trained.code == 0, trained.err
    assert "\n1 steps, " in trained.out
    assert f"next: attending zoo export llama-stdlib {training} FOLDER" in trained.out

    other = run("zoo", "train", "llama-stdlib", "--out", training, "--steps", 2)
    assert is_one_line(other)  # that would not be the same training
    fresh = run("zoo", "train", "llama-stdlib", "--out", training, "--steps", 1, "--fresh")
    assert fresh.code == 0, fresh.err

    exported = run("zoo", "export", "llama-stdlib", training, weights)
    assert exported.code == 0, exported.err
    card = json.loads((weights / "card.json").read_text(encoding="utf-8"))
    assert f"{card['held_out']['all']['bits_per_byte']:.3f} held-out bits per byte" in exported.out
    assert run("diagnose", weights, "--max-tokens", 64).code == 0


def test_demo_text_is_what_is_read_without_a_text(run: Run, saved: Saved, tmp_path: Path) -> None:
    run("diagnose", saved("llama"), "--json", tmp_path / "out")
    expected = batches(load_model(str(saved("llama"))), demo_text(), 4096)
    assert json.loads((tmp_path / "out").read_text())["tokens"] == expected.tokens
