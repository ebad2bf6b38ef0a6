"""Which heads the loss depends on (Michel et al. 2019), by one backward pass and without a map.

A gate xi_h = 1 on the output O_h of a head says, by the gradient of the loss, how much would change
if the head were turned down. By the chain rule the gate is not needed (Michel, Levy and Neubig
2019, arXiv 1905.10650, section 4.1):

    I_h = E_x | dL(x) / d xi_h | = E_x | <O_h(x), dL(x) / dO_h> |

then divided by the l2 norm over the heads of the layer.

The absolute value is taken for each sample x, after the sum over its tokens, as the paper writes
it. The authors' code takes it for each token, and the example script of transformers for each
batch [both recall]; those are other numbers, larger and smaller ones.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attending.taps import AttentionCall, Proceed, tap
from attending.taps.running import as_batches, evaluating, first_tensor, run_model

Loss = Callable[[Any, Any], Float[Tensor, ""]]


def head_importance(
    model: nn.Module,
    inputs: Any | Iterable[Any],
    loss: Loss | None = None,
    *,
    normalize: bool = True,
) -> dict[str, Float[Tensor, " heads"]]:
    """How much the loss depends on each attention head of a model: candidates for pruning.

        scores = head_importance(model, [{"input_ids": ids, "labels": ids} for ids in batches])
        scores["model.layers.3.self_attn"].argmin()        # the head that layer 3 misses least

    The model runs in evaluation mode, with gradients whatever the context, and is then what it was:
    training mode, `requires_grad` and `.grad` of its parameters are untouched. It works for frozen
    parameters too.

    Args:
        model: any model that a tap sees.
        inputs: a batch (a mapping of the model's arguments, a tuple of positional ones, or a
            tensor), or an iterable of batches. The first dimension of a batch's first tensor counts
            its samples.
        loss: `loss(outputs, batch)` returns a scalar, the *mean* over the samples of the batch (a
            sum would count large batches more). By default the model's own, `outputs.loss`, which
            models of transformers return if there are `labels` in the inputs.
        normalize: divide by the l2 norm over the heads of each module, as the paper does, so that
            layers can be compared by rank only. False gives the mean absolute derivative, in units
            of the loss.

    Returns:
        For each attention module that was called, by its name and in the order of the calls, one
        number per query head. A module that is called several times in a forward (layers that share
        their weights) has one gate for all of its calls.

    Raises:
        ValueError: if there is no loss or no batch, or if samples cannot be told apart.
        attending.taps.TapError: if the tap saw no attention call; the message says what to set.
    """
    totals: dict[str, Tensor] = {}
    samples = 0
    with evaluating(model), torch.enable_grad():
        for batch in as_batches(inputs):
            size = _samples(batch)
            for name, gate in _gate_gradients(model, batch, size, loss).items():
                # The loss is a mean over the batch: its share of one sample is 1 / size of L(x).
                share = gate.abs().sum(0) * size
                if name in totals and totals[name].shape != share.shape:
                    raise ValueError(
                        f"model: expected {name} to have {len(totals[name])} heads in every batch, "
                        f"got {len(share)}."
                    )
                totals[name] = totals[name] + share if name in totals else share
            samples += size
    if not samples:
        raise ValueError("inputs: expected at least one batch with one sample, got none.")
    scores = {name: total / samples for name, total in totals.items()}
    if not normalize:
        return scores
    return {name: nn.functional.normalize(score, dim=0, eps=0.0) for name, score in scores.items()}


def _samples(batch: Any) -> int:
    tensor = first_tensor(batch)
    if tensor is None or tensor.dim() == 0:
        raise ValueError(
            "inputs: expected a batch with a tensor whose first dimension counts the samples, got "
            f"{type(batch).__name__} without one."
        )
    return tensor.shape[0]


def _gate_gradients(
    model: nn.Module, batch: Any, samples: int, loss: Loss | None
) -> dict[str, Float[Tensor, "samples heads"]]:
    """The derivative of the loss by a gate on each head, for each sample of the batch."""
    seen: list[tuple[AttentionCall, Tensor]] = []

    def keep(call: AttentionCall, proceed: Proceed) -> Tensor:
        output = proceed(call)
        if call.recomputed:
            return output
        if output.dim() != 4 or output.shape[0] % samples:
            raise ValueError(
                f"inputs: expected the attention of {call.name} to have a batch that is a multiple "
                f"of the {samples} samples of the inputs, got {list(output.shape)}. Put a tensor "
                "with one entry for each sample first, or pass one sample at a time."
            )
        if not output.requires_grad:  # frozen parameters: the graph begins here
            output = output.detach().requires_grad_()
        seen.append((call, output))
        return output

    with tap(model, keep):
        outputs = run_model(model, batch)
        value = _loss_of(outputs, batch, loss)
    tensors = [output for _, output in seen]
    # Not backward(): that would write to the .grad of the parameters, and compute it.
    gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    gates: dict[str, Tensor] = {}
    for (call, output), gradient in zip(seen, gradients, strict=True):
        dtype = torch.promote_types(output.dtype, torch.float32)
        if gradient is None:  # the loss does not see this call
            gate = torch.zeros(samples, output.shape[1], dtype=dtype, device=output.device)
        else:
            product = (output.detach().to(dtype) * gradient.to(dtype)).sum((2, 3))
            # Windows of an image are batch entries, those of one image together.
            gate = product.view(samples, -1, output.shape[1]).sum(1)
        gates[call.name] = gates[call.name] + gate if call.name in gates else gate
    return gates


def _loss_of(outputs: Any, batch: Any, loss: Loss | None) -> Tensor:
    if loss is None:
        value = getattr(outputs, "loss", None)
        if value is None:
            raise ValueError(
                "loss: expected a function loss(outputs, batch), since the outputs of the model "
                f"({type(outputs).__name__}) hold no loss. Or add labels to the inputs, if it is a "
                "model of transformers with a head for a task."
            )
    else:
        value = loss(outputs, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: expected a scalar tensor, the mean over the samples, got {shape}.")
    if not value.requires_grad:
        raise ValueError(
            "loss: expected a scalar with a gradient, got one that does not depend on any head; a "
            "no_grad() in the model or in the loss cuts it off."
        )
    return value
