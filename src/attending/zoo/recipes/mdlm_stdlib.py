"""The recipe of ``mdlm-stdlib``: a masked diffusion language model that fills in Python.

A real ``transformers.EuroBertForMaskedLM`` (a Llama without the causal mask: grouped-query
attention, rotary positions, SwiGLU, RMS norms, tied embeddings) on the corpus, the split and the
tokenizer of ``llama-stdlib``, to which a mask token is added.

The objective is that of masked diffusion with a linear schedule (MDLM, Sahoo et al. 2024; LLaDA,
Nie et al. 2025), in the form of LLaDA's equation 6: of the ``L`` tokens of a row exactly ``n`` are
masked, ``n`` uniform over ``1 .. L``, and

    bound = E[ L / n * sum of -log p(token | masked row) over the n masked tokens ]

is at least ``-log p(row)``.  ``n / L`` is the time ``t``, so the weight is ``1 / t``; that each
token is masked by its own coin of probability ``t`` gives the same expectation with more noise.
The times of a batch are spread evenly over (0, 1] from one random offset (Kingma et al. 2021, used
by MDLM), so every batch sees rows with few and with many masks.

The weights start from those of ``llama-stdlib``, whose shape is the same, as Dream started from
Qwen and DiffuLLaMA from Llama: what it took that model 47 minutes to learn of words and syntax is
there at the first step.  Unlike Dream, the token at a position is predicted at that position.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.zoo import llama_stdlib
from attending.zoo.mdlm_stdlib import load_tokenizer
from attending.zoo.recipes.bits_per_byte import bits_per_byte
from attending.zoo.recipes.byte_bpe import encode_document
from attending.zoo.recipes.llama_stdlib import (
    QUICK_CHARACTERS,
    backward_from_states,
    load_corpus,
)
from attending.zoo.recipes.packing import PackedTokens
from attending.zoo.recipes.stdlib_text import Document, read_documents, split
from attending.zoo.recipes.training_attention import fast_attention
from attending.zoo.recipes.training_loop import run_steps
from attending.zoo.recipes.two_optimizers import share_of_rate


@dataclass(frozen=True)
class MdlmStdlibRecipe:
    """Everything that decides the trained weights, apart from the corpus and the warm start.

    The matrices of the layers are trained by Muon, all else by AdamW.  The learning rates of both
    rise over the first ``warmup_steps``, stay, and fall linearly to zero over the last
    ``cooldown`` of all steps.
    """

    hidden: int = 192
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 448
    context: int = 512
    rows_per_step: int = 4
    steps: int = 850
    warmup_steps: int = 50
    cooldown: float = 0.5
    learning_rate: float = 1e-3
    muon_learning_rate: float = 2e-3
    weight_decay: float = 0.05
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    seed: int = 0
    held_out_per_mille: int = 40
    warm_start: bool = True
    bfloat16: bool = True
    evaluate_every: int = 85

    def __post_init__(self) -> None:
        """Refuse what would fail only after minutes of training."""
        for name in ("steps", "evaluate_every", "warmup_steps", "rows_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.context < 2:
            raise ValueError(
                f"expected context of at least 2 (bos and a token), got {self.context}"
            )

    def rate_at(self, step: int) -> float:
        """Share of the full learning rate: linear up, level, linear down."""
        left = self.steps - step
        return share_of_rate(step, self.warmup_steps, left, self.cooldown * self.steps)

    def batch_at(self, data: PackedTokens, step: int) -> Int[Tensor, "rows length"]:
        """The rows of one step, ``bos`` first in each: a function of the step alone."""
        return data.batch(step, self.rows_per_step, self.context - 1)


def build_model(recipe: MdlmStdlibRecipe, tokenizer: Any) -> Any:
    """The ``EuroBertForMaskedLM`` before its training: from the seed, then the warm start."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    config = EuroBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to move
        torch.manual_seed(recipe.seed)
        model = EuroBertForMaskedLM(config)
    if recipe.warm_start:
        _start_from_llama(model)
    return model


@torch.no_grad()
def _start_from_llama(model: Any) -> None:
    """Copy the shipped causal model; the mask token starts as the mean of all embeddings."""
    llama = dict(llama_stdlib.load().model.named_parameters())
    embedding = "model.embed_tokens.weight"
    words = llama[embedding]
    llama[embedding] = torch.cat([words, words.mean(0, keepdim=True)])
    own = {name: tuple(value.shape) for name, value in model.named_parameters()}
    theirs = {name: tuple(value.shape) for name, value in llama.items()}
    if own != theirs:
        name = sorted(set(own.items()) ^ set(theirs.items()))[0][0]
        raise ValueError(
            f"expected a recipe of llama-stdlib's shape to start from its weights, got {name} of "
            f"shape {own.get(name)} against {theirs.get(name)}; set warm_start=False or keep the "
            "shape"
        )
    for name, parameter in model.named_parameters():
        parameter.copy_(llama[name])


def spread_times(rows: int, offset: float) -> Float[Tensor, " rows"]:
    """Times in (0, 1], evenly spaced over the rows: ``1 - (offset + i / rows) mod 1``."""
    return 1.0 - (offset + torch.arange(rows, dtype=torch.float64) / rows) % 1.0


def choose_masked(
    can: Bool[Tensor, "rows length"],
    times: Float[Tensor, " rows"],
    generator: torch.Generator,
) -> Bool[Tensor, "rows length"]:
    """Mask exactly ``ceil(t * L)`` of the ``L`` tokens of each row that can be masked.

    Args:
        can: The tokens to choose from: neither ``bos`` nor padding; at least one in each row.
        times: A time in (0, 1] for each row.
        generator: Decides which.
    """
    scores = torch.rand(can.shape, generator=generator).masked_fill(~can, 2.0)
    ranks = scores.argsort(1).argsort(1)
    count = (times * can.sum(1)).ceil().clamp(min=1)
    return (ranks < count[:, None]) & can


def step_generator(recipe: MdlmStdlibRecipe, step: int) -> torch.Generator:
    """The random numbers of one step, so that resuming is exact."""
    digest = hashlib.sha256(f"mdlm-stdlib {recipe.seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def backward(
    model: Any,
    tokens: Int[Tensor, "rows length"],
    masked: Bool[Tensor, "rows length"],
    mask_token: int,
    bfloat16: bool,
) -> float:
    """The bound per token, averaged over the rows; gradients land in the model.

    ``L / n`` times a sum over ``n`` masked tokens, per token of ``L``, is their mean, so each
    masked token weighs ``1 / n`` and all rows the same.
    """
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
        inputs = tokens.masked_fill(masked, mask_token)
        states = model.model(input_ids=inputs).last_hidden_state[masked]
    weights = (1.0 / masked.sum(1, keepdim=True) / len(tokens)).expand_as(masked)[masked]
    return backward_from_states(model, states, tokens[masked], weights, bfloat16)


@torch.no_grad()
def masked_nats(
    model: Any,
    tokens: Int[Tensor, "rows length"],
    masked: Bool[Tensor, "rows length"],
    mask_token: int,
    attention_mask: Bool[Tensor, "rows length"] | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """For each row the summed ``-log p`` of its masked tokens, and how many were guessed right."""
    inputs = tokens.masked_fill(masked, mask_token)
    kept = None if attention_mask is None or attention_mask.all() else attention_mask
    states = model.model(input_ids=inputs, attention_mask=kept).last_hidden_state[masked]
    logits, targets = model.lm_head(states).float(), tokens[masked]
    nats = torch.zeros(masked.shape, dtype=torch.float64)
    right = torch.zeros(masked.shape, dtype=torch.float64)
    nats[masked] = F.cross_entropy(logits, targets, reduction="none").double()
    right[masked] = (logits.argmax(-1) == targets).double()
    return nats.sum(1), right.sum(1)


def document_rows(
    document_tokens: list[Int[Tensor, " length"]], bos: int, pad: int, context: int
) -> tuple[Int[Tensor, "rows length"], Bool[Tensor, "rows length"]]:
    """Documents cut into rows of ``bos`` and up to ``context - 1`` tokens; what is no padding."""
    pieces = [piece for tokens in document_tokens for piece in tokens.split(context - 1)]
    rows = torch.full((len(pieces), context), pad)
    real = torch.zeros(len(pieces), context, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        rows[row, 0], rows[row, 1 : len(piece) + 1] = bos, piece
        real[row, : len(piece) + 1] = True
    return rows, real


def quick_bits_per_byte(
    model: Any, tokenizer: Any, held_out: list[Document], recipe: MdlmStdlibRecipe
) -> float:
    """The bound on the first characters of each held-out file, with the same masks every time.

    One time for each file: good to watch a run with, too noisy to be quoted.
    """
    texts = [document.text[:QUICK_CHARACTERS] for document in held_out]
    tokens = [encode_document(tokenizer, text)[: recipe.context - 1] for text in texts]
    rows, real = document_rows(
        tokens, tokenizer.bos_token_id, tokenizer.pad_token_id, recipe.context
    )
    size = sum(len(tokenizer.decode(part).encode("utf-8")) for part in tokens)
    can = real.clone()
    can[:, 0] = False
    generator = torch.Generator().manual_seed(0)
    times = spread_times(len(rows), 0.5 / len(rows))
    masked = choose_masked(can, times, generator)
    weights = can.sum(1) / masked.sum(1)
    nats = 0.0
    for first in range(0, len(rows), 8):
        part = slice(first, first + 8)
        found, _ = masked_nats(model, rows[part], masked[part], tokenizer.mask_token_id, real[part])
        nats += float((found * weights[part]).sum())
    return bits_per_byte(nats, size)


def train(
    out_dir: str | Path,
    recipe: MdlmStdlibRecipe | None = None,
    resume: bool = True,
    *,
    export_to: str | Path | None = None,
    root: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train ``mdlm-stdlib`` and return what was measured on the way.

    Args:
        out_dir: Where the checkpoint goes.
        recipe: The hyper-parameters; ``None`` is the published recipe.
        resume: Go on from the checkpoint in ``out_dir`` if there is one.
        export_to: A folder that receives loadable weights at each measurement.
        root: Folder of ``.py`` files to use instead of the standard library.
        on_step: Called with the number of finished steps and the loss of the last one.

    Returns:
        As :func:`attending.zoo.recipes.training_loop.run_steps`, with ``corpus`` and ``start``.
    """
    from attending.zoo.recipes.weights_folder import write_weights

    recipe = MdlmStdlibRecipe() if recipe is None else recipe
    training, held_out = split(read_documents(root), recipe.held_out_per_mille)
    tokenizer = load_tokenizer()
    data, corpus = load_corpus(tokenizer, training, recipe.seed)
    model = build_model(recipe, tokenizer)

    def one_step(step: int) -> float:
        tokens = recipe.batch_at(data, step)
        can = torch.ones_like(tokens, dtype=torch.bool)
        can[:, 0] = False
        generator = step_generator(recipe, step)
        offset = torch.rand((), generator=generator, dtype=torch.float64).item()
        masked = choose_masked(can, spread_times(len(tokens), offset), generator)
        with fast_attention(model):
            return backward(model, tokens, masked, tokenizer.mask_token_id, recipe.bfloat16)

    def measure(_: int) -> dict[str, float]:
        quick = quick_bits_per_byte(model, tokenizer, held_out, recipe)
        return {"held_out_starts_bits_per_byte": quick}

    def publish(state: dict[str, Any]) -> None:
        if export_to is not None:
            write_weights(model, None, Path(export_to), {"finished": False, **state})

    return run_steps(
        Path(out_dir),
        model,
        recipe,
        one_step,
        measure,
        resume=resume,
        facts={"corpus": corpus, "start": start_of(recipe)},
        publish=publish,
        on_step=on_step,
    )


def start_of(recipe: MdlmStdlibRecipe) -> dict[str, Any]:
    """What the weights start from, so that a run is never continued from another start."""
    if not recipe.warm_start:
        return {"from": "random weights"}
    weights = (llama_stdlib.folder() / "model.safetensors").read_bytes()
    return {"from": "llama-stdlib", "sha256": hashlib.sha256(weights).hexdigest()}
