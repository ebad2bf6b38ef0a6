"""The recipe of ``llama-stdlib``: a small Llama that reads and writes Python.

A real ``transformers.LlamaForCausalLM`` (grouped-query attention, rotary positions, SwiGLU, RMS
norms, tied embeddings) with its own byte-level tokenizer, trained on the source text of the
Python standard library.  Everything is derived from :class:`LlamaStdlibRecipe` and the corpus;
a stopped training that is started again goes on as if it had never stopped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from attending.zoo.recipes.bits_per_byte import bits_per_byte, total_nats
from attending.zoo.recipes.byte_bpe import encode_document, train_tokenizer
from attending.zoo.recipes.packing import PackedTokens
from attending.zoo.recipes.stdlib_text import Document, read_documents, split
from attending.zoo.recipes.training_loop import CHECKPOINT, OneOptimizer, run_steps

# Rows of the output layer evaluated at once: their logits then stay in the processor's cache,
# which makes a training step faster than one product over the whole batch.
LOGIT_ROWS = 128
# Enough characters to fill about one context: the quick measurement reads only each file's start.
QUICK_CHARACTERS = 1600


@dataclass(frozen=True)
class LlamaStdlibRecipe:
    """Everything that decides the trained weights, apart from the corpus itself.

    The first ``short_fraction`` of the steps reads rows of ``short_context`` tokens, which are
    cheaper; the rest reads rows of ``context`` tokens.  Every step reads ``tokens_per_step``.
    """

    vocabulary: int = 4096
    hidden: int = 192
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 448
    context: int = 512
    short_context: int = 256
    short_fraction: float = 0.7
    tokens_per_step: int = 2048
    steps: int = 7000
    warmup_steps: int = 200
    learning_rate: float = 2.5e-3
    final_learning_rate: float = 5e-5
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    seed: int = 0
    held_out_per_mille: int = 40
    bfloat16: bool = True
    evaluate_every: int = 250

    def __post_init__(self) -> None:
        """Refuse what would fail only after minutes of training."""
        for name in ("steps", "evaluate_every", "warmup_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("context", "short_context"):
            if self.tokens_per_step % getattr(self, name):
                raise ValueError(
                    f"expected {name} to divide tokens_per_step ({self.tokens_per_step}), got "
                    f"{getattr(self, name)}; a step is a whole number of rows"
                )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up from near zero, then half a cosine down to the final rate."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_learning_rate + height * (self.learning_rate - self.final_learning_rate)

    def rate_at(self, step: int) -> float:
        """The same as a share of the highest rate."""
        return self.learning_rate_at(step) / self.learning_rate

    def batch_at(self, data: PackedTokens, step: int) -> Tensor:
        """The rows of one step: a function of the step alone, so that resuming is exact."""
        short_steps = round(self.short_fraction * self.steps)
        if step < short_steps:
            return data.batch(step, self.tokens_per_step // self.short_context, self.short_context)
        return data.batch(step - short_steps, self.tokens_per_step // self.context, self.context)


def build_model(recipe: LlamaStdlibRecipe, tokenizer: Any) -> Any:
    """The untrained ``LlamaForCausalLM``, initialised from the recipe's seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
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
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to move
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def backward(model: Any, batch: Tensor, bfloat16: bool) -> float:
    """Mean loss of predicting each token from those before it; gradients land in the model."""
    inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=bfloat16):
        states = model.model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    weights = torch.full(targets.shape, 1.0 / len(targets), device=targets.device)
    return backward_from_states(model, states, targets, weights, bfloat16)


def backward_from_states(
    model: Any,
    states: Float[Tensor, "tokens hidden"],
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    bfloat16: bool,
) -> float:
    """Weighted sum of the losses of ``model.lm_head`` on states, a few rows at a time."""
    leaves = states.detach().requires_grad_()
    total = 0.0
    for start in range(0, len(targets), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        with torch.autocast(targets.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model.lm_head(leaves[rows])
        losses = F.cross_entropy(logits.float(), targets[rows], reduction="none")
        loss = (losses * weights[rows]).sum()
        torch.autograd.backward(loss)
        total += loss.item()
    torch.autograd.backward(states, leaves.grad)
    return total


def quick_bits_per_byte(
    model: Any, tokenizer: Any, held_out: list[Document], recipe: LlamaStdlibRecipe
) -> float:
    """Bits per byte on the first characters of each held-out file: seconds, to watch a run."""
    nats, size = 0.0, 0
    for document in held_out:
        text = document.text[:QUICK_CHARACTERS]
        tokens = encode_document(tokenizer, text)[:-1]  # the text was cut, so it has no end
        nats += total_nats(
            model, tokens, bos=tokenizer.bos_token_id, context=recipe.context, stride=recipe.context
        )
        size += len(text.encode("utf-8"))
    return bits_per_byte(nats, size)


def load_corpus(
    tokenizer: Any, training: list[Document], seed: int
) -> tuple[PackedTokens, dict[str, Any]]:
    """The training stream, and what a run remembers of it to know it again."""
    stream = torch.cat([encode_document(tokenizer, document.text) for document in training])
    data = PackedTokens(stream, tokenizer.bos_token_id, seed)
    return data, {"fingerprint": data.fingerprint, "training_tokens": len(stream)}


def train(
    out_dir: str | Path,
    recipe: LlamaStdlibRecipe | None = None,
    resume: bool = True,
    *,
    export_to: str | Path | None = None,
    root: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train ``llama-stdlib`` and return what was measured on the way.

    Args:
        out_dir: Where the tokenizer and the checkpoint go.
        recipe: The hyper-parameters; ``None`` is the published recipe.
        resume: Go on from the checkpoint in ``out_dir`` if there is one.
        export_to: A folder that receives loadable weights at each measurement.
        root: Folder of ``.py`` files to use instead of the standard library.
        on_step: Called with the number of finished steps and the loss of the last one.

    Returns:
        As :func:`attending.zoo.recipes.training_loop.run_steps`, with ``corpus``.
    """
    from transformers import PreTrainedTokenizerFast

    from attending.zoo.recipes.weights_folder import write_weights

    recipe = LlamaStdlibRecipe() if recipe is None else recipe
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / CHECKPOINT
    resuming = resume and checkpoint.exists()

    training, held_out = split(read_documents(root), recipe.held_out_per_mille)
    if resuming:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    else:
        texts = [document.text for document in training]
        tokenizer = train_tokenizer(texts, recipe.vocabulary, recipe.context)
        tokenizer.save_pretrained(out / "tokenizer")
    data, corpus = load_corpus(tokenizer, training, recipe.seed)

    model = build_model(recipe, tokenizer)
    adam = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
        fused=True,
    )

    def measure(_: int) -> dict[str, float]:
        quick = quick_bits_per_byte(model, tokenizer, held_out, recipe)
        return {"held_out_starts_bits_per_byte": quick}

    def publish(state: dict[str, Any]) -> None:
        if export_to is not None:
            write_weights(model, tokenizer, Path(export_to), {"finished": False, **state})

    return run_steps(
        out,
        model,
        recipe,
        lambda step: backward(model, recipe.batch_at(data, step), recipe.bfloat16),
        measure,
        optimizer=OneOptimizer(adam),
        resume=resume,
        facts={"corpus": corpus},
        publish=publish,
        on_step=on_step,
    )
