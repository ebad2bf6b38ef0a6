"""A name becomes a model: the right class, the right order, and one line where it cannot be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attending.cli.errors import CommandError
from attending.cli.loading import find_device, load_model
from tests.cli import models

Saved = Callable[[str], Path]


@pytest.mark.parametrize(
    ("kind", "class_name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("bert", "BertModel"),
        ("roberta", "RobertaModel"),
        ("bart", "BartForConditionalGeneration"),
        ("t5", "T5ForConditionalGeneration"),
    ],
)
def test_folder_gives_the_class_of_its_architecture(
    saved: Saved, kind: str, class_name: str
) -> None:
    loaded = load_model(str(saved(kind)))
    assert type(loaded.model).__name__ == class_name
    assert loaded.model.config._attn_implementation == "sdpa"
    assert not loaded.model.training
    assert loaded.name == str(saved(kind))


def test_masked_language_model_keeps_its_head_and_a_classifier_leaves_it(tmp_path: Path) -> None:
    masked = models.bert(tmp_path / "masked", "BertForMaskedLM")
    assert type(load_model(str(masked)).model).__name__ == "BertForMaskedLM"
    classifier = models.bert(tmp_path / "classifier", "BertForSequenceClassification")
    assert type(load_model(str(classifier)).model).__name__ == "BertModel"


def test_config_without_architectures(tmp_path: Path) -> None:
    folder = models.change_config(models.llama(tmp_path / "m"), architectures=None)
    assert type(load_model(str(folder)).model).__name__ == "LlamaModel"


def test_weights_are_those_of_the_folder(saved: Saved) -> None:
    stored = load_file(saved("llama") / "model.safetensors")
    loaded = load_model(str(saved("llama"))).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def test_dtype_is_the_callers() -> None:
    model = load_model("llama-stdlib", dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_folder_comes_before_the_zoo_and_the_zoo_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_model("llama-stdlib").model.config.vocab_size == 4096
    models.llama(tmp_path / "llama-stdlib")
    assert load_model("llama-stdlib").model.config.vocab_size == models.VOCABULARY


def test_a_zoo_model_that_reads_no_text_is_refused() -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(CommandError, match="wan-shapes paints and reads no text; in Python"):
        load_model("wan-shapes")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    models.llama(tmp_path / "mine")
    assert type(load_model("~/mine").model).__name__ == "LlamaForCausalLM"


def without_tokenizer(folder: Path) -> Path:
    for file in folder.glob("token*"):
        file.unlink()
    return folder


def without_a_weight(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_file(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, r"has no config\.json.*save_pretrained"),
        (lambda f: with_file(empty(f), "adapter_config.json", "{}"), r"is an adapter; merge it"),
        (lambda f: with_file(empty(f), "model_index.json", "{}"), r"is a pipeline.*in Python"),
        (models.pickled, r"only as a pickle \(pytorch_model\.bin\).*save_pretrained"),
        (lambda f: without(models.llama(f), "model.safetensors"), r"no weights as safetensors"),
        (lambda f: with_file(models.llama(f), "model.safetensors", "x"), r"cannot load .*header"),
        (lambda f: with_file(models.llama(f), "config.json", "{"), r"cannot read the config of"),
        (models.deberta, r"DebertaV2Model\) has no attention through scaled_dot_product"),
        (models.vit, r"ViTModel\) does not take text alone.*in Python, attending\.diagnose\(model"),
        (models.clip, r"CLIPModel\) does not take text alone"),
        (lambda f: without_tokenizer(models.bert(f)), r"has no tokenizer.*save_pretrained"),
        (lambda f: without_tokenizer(models.llama(f)), r"tokenizer"),
        (lambda f: without_a_weight(models.llama(f)), r"lacks 1 of the weights.*layers\.1\.mlp"),
        (
            lambda f: models.change_config(models.llama(f), hidden_size=64),
            r"sizes of its weights are not those of its config",
        ),
        (
            lambda f: models.change_config(
                models.llama(f), model_type="own", auto_map={"AutoConfig": "own.Config"}
            ),
            r'model type "own", which transformers .* code that comes with a model is not run',
        ),
        (
            lambda f: models.change_config(models.llama(f), architectures=["OwnForCausalLM"]),
            r"architecture OwnForCausalLM, which transformers",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    folder = make(tmp_path / "model")
    with pytest.raises(CommandError, match=message):
        load_model(str(folder))


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    """A folder whose config names its own code is read by the class that transformers has."""
    folder = models.change_config(
        models.llama(tmp_path / "m"), auto_map={"AutoModelForCausalLM": "own.Model"}
    )
    trace = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Model: ...\n")
    assert type(load_model(str(folder)).model).__module__.startswith("transformers.")
    assert not trace.exists()


def test_missing_head_does_not_matter(tmp_path: Path) -> None:
    """Attention reads nothing of a head, so an encoder saved without one is as good."""
    folder = models.change_config(models.bert(tmp_path / "m"), architectures=["BertForMaskedLM"])
    assert type(load_model(str(folder)).model).__name__ == "BertForMaskedLM"


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "/no/such/folder", "two words"])
def test_name_that_is_nothing(name: str) -> None:
    with pytest.raises(CommandError, match=r"no folder.*zoo models are minilm, llama-stdlib"):
        load_model(name)


def test_no_name() -> None:
    with pytest.raises(CommandError, match="MODEL is empty"):
        load_model(" ")


def test_name_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is a file; give the folder"):
        load_model(str(with_file(tmp_path, "model.safetensors", "")) + "/model.safetensors")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "hpu", "meta", ""])
def test_unknown_device(name: str) -> None:
    with pytest.raises(CommandError, match=f"--device {name}"):
        find_device(name)


def test_default_device() -> None:
    assert find_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu") == torch.device("cpu")
