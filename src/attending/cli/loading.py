"""From a name on the command line to a text model that is ready to run.

A name is an existing folder, else a model of the zoo, else a hub id, in this order. A model of the
hub is first brought into the hub's cache, so all three end as a folder, and every check is made
once, on the folder, before any weights are read. What is read is JSON, tokenizer files and
safetensors: no pickle is opened and no code of a model is run.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attending import zoo
from attending.cli.errors import CommandError, one_line, told_as
from attending.zoo.loading import load_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# All that is fetched from the hub. Other safetensors of a repository are copies in other layouts.
_FILES = [
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "model.safetensors",
    "model-*-of-*.safetensors",
]
_PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
_OTHERS = "in Python, attending.diagnose(model, inputs) takes any PyTorch model"
# The architectures of a config decide, in this order, with which class the model is loaded. What is
# in none of the lists, such as a classifier, is loaded without its head.
_CLASSES = (
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
)


@dataclass(frozen=True)
class LoadedModel:
    """A model and its tokenizer, as a command uses them.

    Attributes:
        name: What the user called it.
        model: In evaluation mode, on its device, with SDPA attention.
        tokenizer: Text to token ids and back.
        processor: Scenes and prompts to a batch, for a zoo model that sees.
    """

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    processor: Any = None


def load_model(
    name: str, *, device: str | None = None, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a text model by folder, zoo name or hub id.

    Args:
        name: See the module.
        device: As in PyTorch, such as `cuda:1`; `None` takes CUDA where there is some.
        dtype: The type of the weights in memory.

    Raises:
        CommandError: There is no such model or device, the model's files cannot be used, it has no
            SDPA attention, or text is not what it takes. The message says which, and what to do.
        ImportError: The weights of a zoo model are in a package that is not installed.
    """
    place = find_device(device)
    if not name.strip():
        raise CommandError("MODEL is empty; give a folder, a zoo model or a hub id")
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(name, path, place, dtype)
    if path.is_file():
        raise CommandError(f"MODEL {name} is a file; give the folder that holds it")
    if name in zoo.names():
        loaded = zoo.load(name, device=place, dtype=dtype)
        if loaded.tokenizer is None:
            raise CommandError(f"MODEL {name} paints and reads no text; {_OTHERS}")
        return LoadedModel(name, loaded.model, loaded.tokenizer, loaded.processor)
    return _from_folder(name, _from_hub(name), place, dtype)


def find_device(name: str | None) -> torch.device:
    """The device of that name, after something was put on it; `None` as in `load_model`."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    # What PyTorch raises depends on what it was built without.
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise CommandError(
            f"--device {name} is no device that PyTorch can use on this machine; give one of "
            f"{', '.join(_devices())}"
        ) from error
    if device.type == "meta":
        raise CommandError("--device meta holds no numbers; use a device that computes")
    return device


def _devices() -> list[str]:
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *mps, *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _from_hub(name: str) -> Path:
    """The folder of the hub's cache with a model's files, which are fetched if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    known = f"zoo models are {', '.join(zoo.names())}"
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except HFValidationError as error:
        raise CommandError(
            f"there is no folder {name}, and the name is no zoo model and no hub id; {known}"
        ) from error
    except GatedRepoError as error:
        raise CommandError(
            f"{name} is on the hub, but only for those who asked: ask on its page, then run "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CommandError(
            f"there is no folder {name}, no zoo model and no public model of the hub of that "
            f"name; {known}; for a private model, run `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise CommandError(
            f"there is no folder {name} and no zoo model of that name, and of the hub it is not in "
            f"the cache and the hub cannot be reached (offline?); {known}"
        ) from error
    except Exception as error:
        raise CommandError(f"cannot fetch {name} from the hub: {one_line(error)}") from error


def _from_folder(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    _check_files(name, folder)
    loader = _Loader(_auto_class(name, folder))
    with told_as(f"cannot load {name}"), _quiet():
        model, tokenizer = load_folder(loader, folder, device, dtype)
    missing = _missing(model, loader.missing)
    if missing:
        raise CommandError(
            f"{name} lacks {len(missing)} of the weights that its config asks for, such as "
            f"{missing[0]}, and random numbers in their place would say nothing; save the model "
            "again with model.save_pretrained(folder)"
        )
    # Without any file of a tokenizer, transformers may make an empty one and say nothing.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise CommandError(
            f"{name} has no tokenizer, or an empty one; save that of the model beside it with "
            "tokenizer.save_pretrained(folder)"
        )
    return LoadedModel(name, model, tokenizer)


class _Loader:
    """Stands in for a class of transformers, and keeps which weights its files did not have."""

    def __init__(self, auto_class: Any) -> None:
        self.auto_class = auto_class
        self.missing: set[str] = set()

    def from_pretrained(self, folder: Path, **settings: Any) -> "PreTrainedModel":
        model: PreTrainedModel
        try:
            model, found = self.auto_class.from_pretrained(
                folder, output_loading_info=True, **settings
            )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError("the sizes of its weights are not those of its config") from error
        self.missing = set(found["missing_keys"])
        return model


def _missing(model: Any, names: set[str]) -> list[str]:
    """Those missing weights that attention depends on: not the head, not the pooler behind it."""
    prefix = f"{model.base_model_prefix}."
    has_head = hasattr(model, model.base_model_prefix)
    return sorted(
        name
        for name in names
        if "pooler." not in name and (name.startswith(prefix) or not has_head)
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of weights that are too many or too few: see `_missing`."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_files(name: str, folder: Path) -> None:
    """Raise `CommandError` unless there is a config and there are weights as safetensors."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise CommandError(f"{name} is an adapter; merge it into its model and save that")
        if (folder / "model_index.json").is_file():
            raise CommandError(f"{name} is a pipeline, not a text model; {_OTHERS}")
        raise CommandError(
            f"{name} has no config.json; give a folder that a model of transformers was saved to "
            "with save_pretrained"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise CommandError(
            f"{name} has its weights only as a pickle ({pickles[0]}), which can run code when it "
            "is opened, and is not read here; where you trust it, load it and save it again with "
            "model.save_pretrained(folder), which writes safetensors"
        )
    raise CommandError(f"{name} has no weights as safetensors, and nothing else is read")


def _auto_class(name: str, folder: Path) -> Any:
    """The class of transformers whose `from_pretrained` loads the text model of a folder."""
    import transformers
    from transformers.models.auto import modeling_auto

    with told_as(f"cannot read the config of {name}"):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind is not None and kind not in transformers.CONFIG_MAPPING:
            raise CommandError(_unknown(name, f'model type "{kind}"'))
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    architecture = (config.architectures or [None])[0]
    if architecture is None:
        model_class = transformers.AutoModel._model_mapping.get(type(config), None)
    else:
        model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise CommandError(_unknown(name, f"architecture {architecture}"))
    auto_name = "AutoModel"
    for mapping, candidate in _CLASSES:
        if architecture in getattr(modeling_auto, mapping).values():
            auto_name = candidate
            break
    modalities = getattr(model_class, "input_modalities", "text")
    text_alone = auto_name != "AutoModel" or modalities in ("text", ("text",), ["text"])
    if model_class.main_input_name != "input_ids" or not text_alone:
        raise CommandError(
            f"{name} ({model_class.__name__}) does not take text alone, and this command takes "
            f"text models; {_OTHERS}"
        )
    if not model_class._supports_sdpa:
        raise CommandError(
            f"{name} ({model_class.__name__}) has no attention through "
            f"scaled_dot_product_attention in transformers {transformers.__version__}, and nothing "
            "else can be seen; there is no setting that changes this"
        )
    return getattr(transformers, auto_name)


def _unknown(name: str, kind: str) -> str:
    import transformers

    return (
        f"{name} has the {kind}, which transformers {transformers.__version__} does not have, and "
        f"code that comes with a model is not run here; {_OTHERS}"
    )
