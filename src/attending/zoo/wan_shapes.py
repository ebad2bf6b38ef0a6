"""``wan-shapes``: a small video diffusion transformer trained here on moving shapes, and shipped.

:func:`attending.zoo.video_tasks.make_videos` paints videos with it from captions such as those of
:mod:`attending.zoo.shapes_motion`.
"""

import json
from pathlib import Path

import torch

from attending.zoo.caption_embedding import CaptionEmbedding
from attending.zoo.entry import ZooEntry, ZooModel, recipe_at


def folder() -> Path:
    """The weights inside this package."""
    return Path(__file__).parent / "weights" / "wan-shapes"


def load(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    path: Path | None = None,
) -> ZooModel:
    """Load the shipped weights, or those of your own training.

    Args:
        device: Where the model goes; ``None`` leaves it on the CPU.
        dtype: Of the weights in memory; on disk they are float16.  As everywhere in diffusers some
            small parts of the model stay in float32.
        path: A folder written by the recipe's export, instead of the shipped one.

    Returns:
        ``.model`` is the ``WanTransformer3DModel``, ``.processor`` the
        :class:`~attending.zoo.caption_embedding.CaptionEmbedding`; there is no tokenizer.

    Raises:
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise ImportError(
            'wan-shapes is a model of diffusers: pip install "attending[diffusion]"'
        ) from error

    path = folder() if path is None else path
    with torch.random.fork_rng(devices=[]):  # random weights are drawn, to be overwritten at once
        model = WanTransformer3DModel.from_pretrained(
            path, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        ).eval()
        text = CaptionEmbedding.load(path).to(dtype)
    if device is not None:
        torch.nn.Module.to(model, device)
        text.to(device)
    card = json.loads((path / "card.json").read_text(encoding="utf-8"))
    return ZooModel(model, None, card, ENTRY.name, text.requires_grad_(False))


NAME = "wan-shapes"

ENTRY = ZooEntry(
    name=NAME,
    model_class="diffusers.WanTransformer3DModel",
    description=(
        "a small video diffusion transformer that paints moving shapes from captions: 8 blocks, "
        "5 heads, 64 tokens a frame"
    ),
    source="trained by attending.zoo.recipes.wan_shapes on videos of attending.zoo.shapes_motion",
    license="Apache-2.0",
    folder=folder,
    load=load,
    recipe=recipe_at("attending.zoo.recipes.wan_shapes", "WanShapesRecipe", NAME),
    weights=("diffusion_pytorch_model.safetensors", "caption_embedding.safetensors"),
)
