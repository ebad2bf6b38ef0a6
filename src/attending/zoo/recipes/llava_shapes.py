"""The recipe of ``llava-shapes``: a small LLaVA that sees and describes coloured shapes.

A real ``transformers.LlavaForConditionalGeneration``: a CLIP vision tower with a class token reads
32 x 32 pixels as 64 patches, a projector puts the patches before the text, and a Llama with
grouped queries captions and answers.  Scenes are drawn and painted on the fly
(:mod:`attending.zoo.shapes`), so no image is seen twice and scenes with other seeds are held out.

For the first ``vision_steps`` the tower alone learns to name what each patch shows; then all is
trained together on text, the naming going on as a smaller second loss.  A stopped training that
is started again goes on as if it had never stopped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attending.zoo.recipes.llava_shapes_data import (
    SEEDS,
    STEPS,
    dense_targets,
    draw_batch,
    make_rows,
    make_tokenizer,
    pixels,
)
from attending.zoo.recipes.llava_shapes_trainee import Trainee
from attending.zoo.recipes.training_attention import fast_attention
from attending.zoo.recipes.training_loop import run_steps
from attending.zoo.recipes.two_optimizers import share_of_rate


@dataclass(frozen=True)
class LlavaShapesRecipe:
    """Everything that decides the trained weights.

    The matrices of the layers are trained by Muon, all else by AdamW.  The learning rates of both
    rise over the first ``warmup_steps`` of each part of the training, stay, and fall linearly to
    zero over the last ``cooldown`` of all steps.  A "yes" or "no" counts as much as
    ``answer_weight`` other words, since a caption has many words and an answer has one.
    """

    image_size: int = 32
    patch_size: int = 4
    hidden: int = 192
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    vision_layers: int = 4
    vision_intermediate: int = 640
    layers: int = 5
    intermediate: int = 416
    context: int = 256
    steps: int = 2200
    vision_steps: int = 600
    vision_images: int = 96
    images: int = 24
    presence: int = 4
    dense_weight: float = 1.0
    answer_weight: float = 3.0
    warmup_steps: int = 100
    cooldown: float = 0.18
    learning_rate: float = 1.2e-3
    muon_learning_rate: float = 3e-3
    weight_decay: float = 0.05
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    bfloat16: bool = True
    evaluate_every: int = 200

    def __post_init__(self) -> None:
        """Refuse what would fail only after minutes of training."""
        for name in ("steps", "evaluate_every", "warmup_steps", "images", "vision_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"expected seed from 0 up to {SEEDS}, got {self.seed}")
        if self.steps > STEPS:
            raise ValueError(f"expected steps of at most {STEPS}, got {self.steps}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"expected patch_size to divide image_size ({self.image_size}), got "
                f"{self.patch_size}"
            )

    @property
    def patches(self) -> int:
        """Patches of an image, each of which is one token of the text."""
        return (self.image_size // self.patch_size) ** 2

    def rate_at(self, step: int) -> float:
        """Share of the full learning rate: linear up, level, linear down."""
        since = step if step < self.vision_steps else step - self.vision_steps
        left = self.steps - step
        return share_of_rate(since, self.warmup_steps, left, self.cooldown * self.steps)


def build_model(recipe: LlavaShapesRecipe, tokenizer: Any) -> Any:
    """The untrained ``LlavaForConditionalGeneration``, initialised from the recipe's seed."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=recipe.hidden,
        intermediate_size=recipe.vision_intermediate,
        projection_dim=recipe.hidden,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.heads,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=recipe.patches,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to move
        torch.manual_seed(recipe.seed)
        return LlavaForConditionalGeneration(config)


def step_loss(
    trainee: Trainee, tokenizer: Any, recipe: LlavaShapesRecipe, step: int
) -> tuple[Tensor, Tensor]:
    """The loss of one step and, of it, what is reported: text if any is trained, else naming."""
    seeing = step < recipe.vision_steps
    batch = draw_batch(recipe.vision_images if seeing else recipe.images, recipe.seed, step)
    images = pixels(batch, recipe.image_size)
    targets = dense_targets(batch, recipe.image_size, recipe.patch_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
        patches, pooled = trainee.see(images)
        dense = trainee.dense_loss(patches, pooled, targets)
        if seeing:
            return dense, dense
        rows = make_rows(batch, tokenizer, recipe.seed, step, recipe.presence)
        weights = torch.ones(len(tokenizer))
        weights[tokenizer.convert_tokens_to_ids(["yes", "no"])] = recipe.answer_weight
        text = trainee.text_loss(patches, rows, tokenizer.bos_token_id, weights)
    return text + recipe.dense_weight * dense, text


def train(
    out_dir: str | Path,
    recipe: LlavaShapesRecipe | None = None,
    resume: bool = True,
    *,
    export_to: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train ``llava-shapes`` and return what was measured on the way.

    Args:
        out_dir: Where the checkpoint goes.
        recipe: The hyper-parameters; ``None`` is the published recipe.
        resume: Go on from the checkpoint in ``out_dir`` if there is one.
        export_to: A folder that receives loadable weights at each measurement.
        on_step: Called with the number of finished steps and the loss of the last one.

    Returns:
        As :func:`attending.zoo.recipes.training_loop.run_steps`.
    """
    from attending.zoo.recipes.llava_shapes_export import quick_accuracy
    from attending.zoo.recipes.weights_folder import write_weights

    recipe = LlavaShapesRecipe() if recipe is None else recipe
    tokenizer = make_tokenizer()
    model = build_model(recipe, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed + 1)
        trainee = Trainee(model, recipe.hidden)

    def backward(step: int) -> float:
        with fast_attention(model):
            loss, shown = step_loss(trainee, tokenizer, recipe, step)
            torch.autograd.backward(loss)
        return shown.item()

    def measure(finished: int) -> dict[str, float]:
        if finished <= recipe.vision_steps:
            return {}
        return {"held_out_accuracy": quick_accuracy(model, tokenizer)}

    def publish(state: dict[str, Any]) -> None:
        if export_to is not None:
            write_weights(model, tokenizer, Path(export_to), {"finished": False, **state})

    return run_steps(
        Path(out_dir),
        trainee,
        recipe,
        backward,
        measure,
        resume=resume,
        publish=publish,
        on_step=on_step,
    )
