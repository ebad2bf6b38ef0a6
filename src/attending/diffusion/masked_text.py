"""Text from a masked language model: start from masks, let the model fill in the surest ones first.

    canvas = prompt + mask mask mask ... mask
    repeat: read the whole canvas, guess every masked token, keep some guesses, forget the rest

This is how masked diffusion language models write (MDLM, Sahoo et al. 2024; LLaDA, Nie et al.
2025; Dream, Ye et al. 2025), and MaskGIT before them.  The loop knows nothing of the model but
that it takes ``input_ids`` and returns ``logits``: the zoo's ``mdlm-stdlib``, any
``AutoModelForMaskedLM``, or a function.

>>> from attending import zoo
>>> from attending.diffusion import sample_masked_text
>>> mdlm = zoo.load("mdlm-stdlib")
>>> prompt = mdlm.tokenizer("def __init__(", return_tensors="pt").input_ids
>>> tokens = sample_masked_text(
...     mdlm.model, prompt, new_tokens=8, mask_token=mdlm.tokenizer.mask_token_id
... )
>>> tokens.shape[1] == prompt.shape[1] + 8
True
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attending.diffusion.seeds import row_seeds

Order = Literal["confidence", "margin", "entropy", "random"]


@dataclass(frozen=True, eq=False)
class UnmaskingStep:
    """What is known right before the model reads the canvas once more.

    Attributes:
        index: Number of this step, from 0; the model has been called that often.
        steps: How many steps there will be in all.
        block: Number of the block that is being filled, from 0.
        blocks: How many blocks there are.
        new_tokens: How many tokens of the end of the canvas are not prompt.
        tokens: The canvas as the model will read it, a copy.
        masked: Where it is still masked.
        unmasked: How many tokens of each row this step will settle.
    """

    index: int
    steps: int
    block: int
    blocks: int
    new_tokens: int
    tokens: Int[Tensor, "batch length"]
    masked: Bool[Tensor, "batch length"]
    unmasked: Int[Tensor, " batch"]


@torch.no_grad()
def sample_masked_text(
    model: Callable[..., Any],
    input_ids: Int[Tensor, "batch prompt"],
    *,
    new_tokens: int,
    mask_token: int,
    attention_mask: Bool[Tensor, "batch prompt"] | Int[Tensor, "batch prompt"] | None = None,
    steps: int | None = None,
    block_length: int | None = None,
    temperature: float = 0.0,
    order: Order = "confidence",
    seed: int | Sequence[int] = 0,
    banned_tokens: Sequence[int] = (),
    shifted: bool = False,
    on_step: Callable[[UnmaskingStep], None] | None = None,
) -> Int[Tensor, "batch length"]:
    """Write ``new_tokens`` tokens after each prompt by iterative unmasking.

    A step guesses each masked token ``i`` of the current block from its logits ``l[i]``,

        guess[i] = argmax over v of (l[i, v] + temperature * g[i, v]),   g from Gumbel(0, 1),

    which is a draw from ``softmax(l / temperature)``.  All is computed in float64: in float32 the
    largest Gumbel values are cut off, and what is drawn is then likelier than it should be (Zheng
    et al. 2024).  Then it keeps the guesses that ``order`` puts first; the others stay masked.
    Each block of ``m`` masks that gets ``s`` steps settles ``m // s`` tokens a step and, in the
    first ``m % s`` steps, one more.

    Masks that are in the prompt are filled too, in the first block: this is how to fill gaps.  No
    other token of the prompt is ever changed.

    Args:
        model: Called as ``model(input_ids=...)``, plus ``attention_mask`` and ``position_ids`` if
            there is padding; returns logits, or an output that has ``.logits``, of shape
            ``[batch, length, vocabulary]``.
        input_ids: The prompts; shorter ones padded on the left.
        new_tokens: How many tokens to write; 0 fills only the masks of the prompt.
        mask_token: The id that stands for a masked token.  It is never chosen.
        attention_mask: 1 where ``input_ids`` is prompt, 0 where it is padding.
        steps: How often the model is called, shared out evenly among the blocks, the first ones
            getting more; ``None`` is once per token.  A step that has nothing left to settle is
            left out.
        block_length: Blocks of so many tokens are finished from left to right (semi-autoregressive
            sampling, as LLaDA); ``None`` is one block.  The model always reads the whole canvas.
        temperature: 0 takes the likeliest token; 1 draws as the model says.
        order: Which guesses to keep first.  ``"confidence"``: high probability of the guess, as
            the model gives it, without the temperature.  ``"margin"``: likeliest token far ahead of
            the second.  ``"entropy"``: little doubt.  ``"random"``: any.  Of equals, the leftmost.
        seed: Of row ``i`` it is ``seed + i``, or the ``i``-th of several.  What a row becomes does
            not depend on the rows beside it, beyond the rounding of the model.
        banned_tokens: Ids never to choose, such as ``bos`` and padding.
        shifted: The logits at a position speak of the next one, as in models made from causal ones
            without unlearning that (Dream).  Logits then move right by one.
        on_step: Called before every call of the model; an intervention learns here which step it
            is in.

    Returns:
        Prompts and new tokens, no mask left, padding as it was.

    Raises:
        ValueError: An argument is out of range; the model is in training mode, whose dropout would
            change the text; a row has no token, or padding that is not on the left; the model takes
            no ``attention_mask`` though there is padding.

    Note:
        With padding, ``position_ids`` that begin at 0 with each prompt are passed if the model
        takes them.  Models that number positions otherwise (RoBERTa) need prompts of one length.

        From LLaDA's official sampler this differs in: ``steps`` and ``block_length`` need not
        divide each other; masks outside the block are not guessed; the mask itself is never chosen;
        classifier-free guidance is not here.  Dream draws the number of tokens of a step from its
        time grid and applies top-p; here the counts are LLaDA's.
    """
    _check_numbers(input_ids, new_tokens, block_length, temperature, order)
    if getattr(model, "training", False):
        raise ValueError(
            "expected a model in evaluation mode, got one in training mode; call model.eval()"
        )
    seeds = row_seeds(seed, len(input_ids))
    real = _prompt_mask(attention_mask, input_ids)
    new = input_ids.new_full((len(input_ids), new_tokens), mask_token)
    canvas = torch.cat([input_ids, new], dim=1)
    real = torch.cat([real, torch.ones_like(new, dtype=torch.bool)], dim=1)
    masked = (canvas == mask_token) & real
    padding = _padding_arguments(model, real)

    blocks = list(_block_masks(masked, input_ids.shape[1], new_tokens, block_length))
    plan = _plan(blocks, steps)
    generators = [torch.Generator().manual_seed(each) for each in seeds]
    never = sorted({mask_token, *banned_tokens})
    for index, (block, counts) in enumerate(plan):
        if on_step is not None:
            on_step(
                UnmaskingStep(
                    index=index,
                    steps=len(plan),
                    block=block,
                    blocks=len(blocks),
                    new_tokens=new_tokens,
                    tokens=canvas.clone(),
                    masked=masked.clone(),
                    unmasked=counts.clone(),
                )
            )
        logits = _logits(model(input_ids=canvas, **padding), canvas, never, shifted)
        candidates = masked & blocks[block]
        scores = torch.full(canvas.shape, -torch.inf, dtype=torch.float64, device=canvas.device)
        guesses = canvas.clone()
        guesses[candidates], scores[candidates] = _guess(
            logits[candidates].double(), candidates.sum(1), never, temperature, order, generators
        )
        # Stable, so that of equal scores the leftmost comes first in a batch as in a single row.
        ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        settled = candidates & (ranks < counts[:, None])
        canvas = torch.where(settled, guesses, canvas)
        masked = masked & ~settled
    return canvas


def _check_numbers(
    input_ids: Tensor, new_tokens: int, block_length: int | None, temperature: float, order: str
) -> None:
    if input_ids.ndim != 2 or input_ids.is_floating_point() or not len(input_ids):
        raise ValueError(
            "expected input_ids of shape [batch, prompt] with token ids, got "
            f"{list(input_ids.shape)} of {input_ids.dtype}; one prompt is input_ids[None]"
        )
    if new_tokens < 0 or new_tokens + input_ids.shape[1] == 0:
        raise ValueError(
            f"expected new_tokens of at least {0 if input_ids.shape[1] else 1}, got {new_tokens}"
        )
    if block_length is not None and block_length < 1:
        raise ValueError(
            f"expected block_length of at least 1 or None, got {block_length}; None is one block"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"expected temperature of at least 0, got {temperature}")
    if order not in get_args(Order):
        raise ValueError(f"expected order to be one of {', '.join(get_args(Order))}, got {order!r}")


def _prompt_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Bool[Tensor, "batch prompt"]:
    """Where there is a prompt, after a look at whether the padding is on the left."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"expected attention_mask of the shape of input_ids, {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}"
        )
    real = attention_mask.bool()
    if (real[:, :-1] & ~real[:, 1:]).any() or (real.shape[1] and not real[:, -1].all()):
        raise ValueError(
            "expected attention_mask with padding on the left only and at least one token in each "
            'row, got another; tokenize with padding_side="left"'
        )
    return real


def _padding_arguments(model: Callable[..., Any], real: Tensor) -> dict[str, Tensor]:
    """What tells the model of padding; nothing if there is none."""
    if bool(real.all()):
        return {}
    call = model.forward if isinstance(model, torch.nn.Module) else model
    parameters = inspect.signature(call).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    if "attention_mask" not in parameters and not takes_any:
        raise ValueError(
            "expected a model that takes attention_mask, since the prompts differ in length, got "
            f"{type(model).__name__}, which does not; give prompts of one length"
        )
    arguments = {"attention_mask": real.long()}
    if "position_ids" in parameters:
        arguments["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
    return arguments


def _block_masks(
    masked: Tensor, prompt: int, new_tokens: int, block_length: int | None
) -> Iterator[Bool[Tensor, "batch length"]]:
    """The masks of each block; those of the prompt belong to the first."""
    length = max(1, new_tokens) if block_length is None else block_length
    place = torch.arange(masked.shape[1], device=masked.device)
    for start in range(0, max(1, new_tokens), length):
        first = 0 if start == 0 else prompt + start
        yield masked & (place >= first) & (place < prompt + start + length)


def _plan(blocks: list[Tensor], steps: int | None) -> list[tuple[int, Int[Tensor, " batch"]]]:
    """For every step its block and how many tokens of each row it settles."""
    sizes = [block.sum(1) for block in blocks]
    longest = [int(size.max()) for size in sizes]
    if steps is None:
        shares = longest
    else:
        if not len(blocks) <= steps <= max(sum(longest), len(blocks)):
            raise ValueError(
                f"expected steps from {len(blocks)} (the number of blocks) to {sum(longest)} (the "
                f"number of masked tokens), got {steps}"
            )
        shares = [steps // len(blocks) + (i < steps % len(blocks)) for i in range(len(blocks))]
    plan = []
    for block, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        for step in range(share):
            counts = size // share + (step < size % share).long()
            if counts.any():
                plan.append((block, counts))
    return plan


def _logits(
    output: Any, canvas: Tensor, never: list[int], shifted: bool
) -> Float[Tensor, "batch length vocabulary"]:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    if logits.ndim != 3 or logits.shape[:2] != canvas.shape:
        raise ValueError(
            f"expected logits of shape {[*canvas.shape, 'vocabulary']} from the model, got "
            f"{list(logits.shape)}"
        )
    if never[0] < 0 or never[-1] >= logits.shape[-1]:
        raise ValueError(
            f"expected mask_token and banned_tokens within the vocabulary of {logits.shape[-1]}, "
            f"got {never}"
        )
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if shifted else logits


def _guess(
    logits: Float[Tensor, "candidates vocabulary"],
    per_row: Int[Tensor, " batch"],
    never: list[int],
    temperature: float,
    order: str,
    generators: list[torch.Generator],
) -> tuple[Int[Tensor, " candidates"], Float[Tensor, " candidates"]]:
    """A token for each candidate, and how early it should be kept."""
    logits[:, never] = -torch.inf
    drawn = logits
    if temperature > 0:
        # Each row draws by itself, on the processor: the same numbers in any batch, on any device.
        uniform = torch.cat(
            [
                torch.rand(n, logits.shape[1], generator=each, dtype=torch.float64)
                for each, n in zip(generators, per_row.tolist(), strict=True)
            ]
        ).to(logits.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))
        drawn = logits + temperature * gumbel
    guesses = drawn.argmax(-1)
    if order == "random":
        scores = torch.cat(
            [
                torch.rand(n, generator=each, dtype=torch.float64)
                for each, n in zip(generators, per_row.tolist(), strict=True)
            ]
        ).to(logits.device)
        return guesses, scores
    log_p = logits.log_softmax(-1)
    if order == "confidence":
        scores = log_p.gather(-1, guesses[:, None])[:, 0]
    elif order == "margin":
        top = log_p.exp().topk(min(2, log_p.shape[1]), dim=-1).values
        scores = top[:, 0] - top[:, -1]
    else:
        # A banned token has probability 0, and 0 * -inf is no number.
        scores = torch.special.entr(log_p.exp()).sum(-1).neg()
    return guesses, scores
