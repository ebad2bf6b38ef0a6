"""One way to read a transformers model from a folder: offline, safetensors only, SDPA attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Loading a few megabytes needs no bar; the user's own setting comes back afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_folder(
    auto_class: Any,
    folder: Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Read model and tokenizer from a local folder.

    Nothing is downloaded, no pickle is opened and no code of the folder is run.

    Args:
        auto_class: The transformers class whose ``from_pretrained`` is called.
        folder: Holds ``config.json``, ``model.safetensors`` and the tokenizer's files.
        device: Where the model goes; ``None`` leaves it on the CPU.
        dtype: The type of the weights in memory, whatever it is on disk.
        tokenizer: The tokenizer, if the folder has none of its own.
    """
    from transformers import AutoTokenizer

    with _without_progress_bar():
        model: PreTrainedModel = auto_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            dtype=dtype,
        )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    model.eval()
    if device is not None:
        torch.nn.Module.to(model, device)
    return model, tokenizer
