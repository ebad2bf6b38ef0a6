"""sigmaReparam: every weight as its direction times one learned size, so that attention stays soft.

When the loss of a transformer oscillates or diverges, the entropy of its attention often falls to
0 just before. The scores of a head are bounded by the spectral norms of its query and key weights,
and those grow quickly under adaptive optimisers. Zhai et al. (2023) therefore train

    W_hat = gamma / sigma(W) * W

where sigma(W) is the largest singular value and gamma one learned number per layer, so that
`||W_hat||_2 = |gamma|` moves at a rate that does not depend on the width. LayerNorm, warm-up,
weight decay and adaptive optimisers can then be given up one by one.

    from attending.nn import sigma_reparam

    model = sigma_reparam.convert(model)              # keeps what the model computes
    optimizer = AdamW(model.parameters())             # made after: gammas are new parameters
    ...train...
    sigma_reparam.remove(model)                       # plain weights, nothing to pay when serving

`sigma_reparam(layer)` does one layer. It is a parametrization of `torch.nn.utils.parametrize`, so
layers keep their class and all their settings (stride, groups, padding mode).

**Power iteration.** One step per forward in training, from the stored u in the input space:

    v = W u / ||W u||,   u = W^T v / ||W^T v||,   sigma = v^T W u        (with the new u and v)

u and v carry no gradient, sigma does: `dL/dW = gamma / sigma (G - (<G, W> / sigma) v u^T)` and
`dL/dgamma = <G, W> / sigma` for `G = dL/dW_hat`, so that the gradient is orthogonal to W. In eval
mode the step is taken too, but not stored. sigma of a stale u is too small after a large change of
W, so `||W_hat||_2` can exceed gamma for a moment.

**When the step is taken more than once.** Each reading of `layer.weight` in training mode is a
step. More steps only make sigma more exact, and each reading is a consistent function of W, so
gradient accumulation needs no care. Under activation checkpointing the recomputation must give the
same weight as the first run: a reading *inside a backward pass* uses the stored u and v of the last
step and takes none. That leaves open two cases, and both want `update="manual"`:

- a layer used several times in one checkpointed step (shared layers, several micro-batches before
  their backward passes): only the last use would be recomputed with its own u and v;
- `torch.compile` together with checkpointing: compiled code cannot tell a recomputation. PyTorch
  2.13 stops with an error about a modified variable, or, with the backend "aot_eager", recomputes
  with the new u without a word. Compiling without checkpointing is exact.

With `update="manual"` a forward takes no step at all; call `power_step(model)` once per step of the
optimizer. Data-parallel ranks start from the same weights and so take the same steps without
synchronisation.

**Precision.** sigma, gamma and the product are float32 at least, also under autocast and for half
precision weights; the result has the dtype of the weight. gamma, u and v stay float32 when the
model is cast to half precision. `fully_shard` asks that the trainable parameters of a group have
one dtype: keep float32 weights there and use its `MixedPrecisionPolicy`.

Sources: arXiv 2303.06296; the official code apple/ml-sigma-reparam at fea4e35, whose results on
linear layers and convolutions are reproduced to 1e-10. What differs from it:

- pretrained weights are kept, official conversion draws new ones;
- the measured sigma and gamma are two things, officially logging overwrites one with the other;
- convolutions keep groups, dilation and padding mode, and converting twice changes nothing;
- gamma starts at `||W||_2` (`gamma_init="spectral"`, as in the official vision code) or at 1
  (`"one"`, as in the paper and the official speech code).

Mind the width: a weight drawn with std 0.02 has a spectral norm of about 1.1 at width 768 and of
0.2 at width 32. One step of Adam then turns it by a large angle, for its direction is all that
counts. A vision transformer of width 64 without LayerNorm, drawn so, had not begun to learn after
400 steps; with std `fan_in ** -0.5` it did.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attending.nn._select_layers import Exclude, excluder, is_layer, join_names, weight_owners

Update = Literal["forward", "manual"]
GammaInit = Literal["spectral", "one"]

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
)
WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
EXACT_SIZE = 1024  # up to this smaller side the first u comes from a full SVD


class SpectralEstimate(NamedTuple):
    """What one power step tells: sigma, with a gradient, and the vectors, without one."""

    sigma: Float[Tensor, ""]
    u: Float[Tensor, " in_features"]
    v: Float[Tensor, " out_features"]


class SpectralNorm(NamedTuple):
    """The size of one weight: sigma of the raw W as last measured in training, and gamma."""

    measured: float
    gamma: float


def spectral_norm_estimate(
    weight: Float[Tensor, "out_features *in_features"],
    u: Float[Tensor, " flat_in_features"],
    eps: float = 1e-12,
) -> SpectralEstimate:
    """One step of power iteration for the largest singular value of a weight.

        v = W u / ||W u||,   u = W^T v / ||W^T v||,   sigma = v^T W u

    A convolution is seen as the matrix `[out, in / groups * kernel...]`, which is not the norm of
    the convolution as an operator. u and v are detached; `d sigma / d W = v u^T`. Repeat with the
    returned u to converge; every estimate is at most the true value. Where `W u = 0`, u stays as it
    is and sigma is 0.

    Args:
        weight: W, of 2 dimensions or more.
        u: the vector to start from, in the space of inputs, as long as a row of W.
        eps: floor of the two norms that are divided by.
    """
    if weight.dim() < 2 or u.shape != (weight[0].numel(),):
        raise ValueError(
            "u: expected a vector as long as a row of weight, and weight of 2 dimensions or more, "
            f"got u {list(u.shape)} and weight {list(weight.shape)}."
        )
    matrix = weight.flatten(1)
    fixed, start = matrix.detach(), u.detach()
    v = torch.mv(fixed, start)
    v = v / v.norm().clamp_min(eps)
    back = torch.mv(fixed.t(), v)
    size = back.norm()
    end = torch.where(size > 0, back / size.clamp_min(eps), start)
    return SpectralEstimate(torch.dot(v, torch.mv(matrix, end)), end, v)


class SigmaReparam(nn.Module):
    """The parametrization `W -> gamma / sigma(W) * W`; use `sigma_reparam` to put it on a layer.

    Attributes:
        gamma: the learned size, `[1]`. May become negative; the spectral norm is its magnitude.
            Leave it and biases out of weight decay; decay of W only changes the size of steps.
        u, v: buffers, unit vectors in the input and output space, from the last step.
        measured: buffer, sigma(W) of the last step in training: for logging, takes part in nothing.
    """

    u: Tensor
    v: Tensor
    measured: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "out_features *in_features"],
        gamma_init: GammaInit = "spectral",
        update: Update = "forward",
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if gamma_init not in ("spectral", "one"):
            raise ValueError(f'gamma_init: expected "spectral" or "one", got {gamma_init!r}.')
        if update not in ("forward", "manual"):
            raise ValueError(f'update: expected "forward" or "manual", got {update!r}.')
        self.update, self.eps = update, eps
        self._registered = False
        with torch.no_grad():
            wide = weight.detach().to(_wide(weight.dtype))
            u = _first_u(_checked(wide))
            # gamma is what the first forward will measure, to the last bit: gamma / sigma is 1.
            sigma, next_u, v = spectral_norm_estimate(wide, u, eps)
            gamma = sigma if gamma_init == "spectral" else torch.ones_like(sigma)
        self.gamma = nn.Parameter(gamma.reshape(1).clone(), requires_grad=weight.requires_grad)
        self.register_buffer("u", u if update == "forward" else next_u)
        self.register_buffer("v", v)
        self.register_buffer("measured", sigma.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """W_hat, in the shape and dtype of the weight."""
        with torch.autocast(weight.device.type, enabled=False):
            dtype = _wide(weight.dtype)
            wide = weight.to(dtype)
            if self.update == "manual" or (self.training and _in_backward()):
                u, v = self.u.to(dtype, copy=True), self.v.to(dtype, copy=True)
                sigma = torch.dot(v, torch.mv(wide.flatten(1), u))
            else:
                estimate = spectral_norm_estimate(wide, self.u.to(dtype), self.eps)
                sigma = estimate.sigma
                if self.training:
                    self._store(estimate)
            return (self.gamma.to(dtype) / sigma.clamp_min(self.eps) * wide).to(weight.dtype)

    def step(self, weight: Tensor) -> None:
        """One power step that is stored. For `update="manual"`; see `power_step`."""
        with torch.no_grad():
            dtype = _wide(weight.dtype)
            self._store(spectral_norm_estimate(weight.to(dtype), self.u.to(dtype), self.eps))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning `layer.weight = W` sets gamma, u and v too, and the layer computes with W."""
        if not self._registered:  # the call of register_parametrization
            self._registered = True
            return weight
        fresh = SigmaReparam(weight, "spectral", self.update, self.eps).to(self.u.device)
        with torch.no_grad():
            for mine, theirs in zip(self._state(), fresh._state(), strict=True):
                mine.copy_(theirs)
        return weight

    def _store(self, estimate: SpectralEstimate) -> None:
        # In place, so that a wrapper that holds the buffers (DDP, a compiled graph) sees it; the
        # graph of this forward keeps the new tensors, which a later step does not touch.
        with torch.no_grad():
            self.u.copy_(estimate.u)
            self.v.copy_(estimate.v)
            self.measured.copy_(estimate.sigma)

    def _state(self) -> tuple[Tensor, ...]:
        return self.gamma, self.u, self.v, self.measured

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SigmaReparam":
        """As always, but a cast to half precision moves without rounding: see "Precision"."""
        before = [tensor.detach() for tensor in self._state()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor, old in zip(self._state(), before, strict=True):
            if _wide(tensor.dtype) != tensor.dtype:
                source = tensor.detach() if old.is_meta else old
                tensor.data = source.to(tensor.device, _wide(tensor.dtype))
        if self.gamma.grad is not None:
            self.gamma.grad = self.gamma.grad.to(self.gamma.dtype)
        return self

    def extra_repr(self) -> str:
        return f"in={self.u.numel()}, out={self.v.numel()}, update={self.update!r}"


def sigma_reparam(
    module: nn.Module,
    name: str = "weight",
    *,
    gamma_init: GammaInit = "spectral",
    update: Update = "forward",
    eps: float = 1e-12,
) -> nn.Module:
    """Put sigmaReparam on one weight of one layer, in place.

    For `nn.Linear`, all convolutions, `nn.Embedding` and any module with a weight of two dimensions
    or more, transformers' `Conv1D` too (a linear layer with its weight transposed, which has the
    same singular values; u and v change places).

    Args:
        module: the layer, on its device and with its weight already drawn or loaded: initialising
            functions that write into `layer.weight` later reach a copy only.
        name: which parameter; `"in_proj_weight"` of `nn.MultiheadAttention`, for example, where
            query, key and value then share one sigma.
        gamma_init: `"spectral"` keeps the function of the layer, bit for bit; `"one"` starts at
            spectral norm 1, as the paper does.
        update: `"forward"` takes a power step whenever the weight is read in training mode;
            `"manual"` only when `power_step` is called. See the module's docstring.
        eps: floor of sigma.

    Returns:
        The same module.

    Raises:
        ValueError: if there is no such weight, or it is parametrized already, has fewer than 2
            dimensions, is not floating point, is on the meta device, or is zero or not finite.
    """
    weight = _layer_weight(module, name)
    reparam = SigmaReparam(weight, gamma_init, update, eps).train(module.training)
    # unsafe=True skips a trial run, which would be a power step.
    parametrize.register_parametrization(module, name, reparam, unsafe=True)
    return module


def convert(
    model: nn.Module,
    *,
    modules: tuple[type[nn.Module], ...] = LAYERS,
    exclude: Exclude = (),
    gamma_init: GammaInit = "spectral",
    update: Update = "forward",
    eps: float = 1e-12,
) -> nn.Module:
    """Put sigmaReparam on the weights of all linear and convolutional layers of a model, in place.

    With `gamma_init="spectral"` the model computes what it did before. Layers that have it already
    stay as they are. Make the optimizer afterwards. Nothing is changed if anything is refused.

    Tied weights are refused, because of one tensor with two owners only one would be normalised:
    where the output layer of a language model shares the weight of its embedding, say
    `exclude=("lm_head",)`, or untie them first.

    To save and load: `state_dict()` of a converted model loads into a model that was built and
    converted likewise; with transformers, `save_pretrained(folder, save_original_format=False)`
    keeps its names. `remove` first gives a checkpoint that `from_pretrained` reads as usual.

    Args:
        model: a model on its device, with its weights drawn or loaded.
        modules: the classes to convert. transformers' `Conv1D` counts as `nn.Linear`. Embeddings
            are not among the defaults, since the whole table is scaled anew in each forward.
        exclude: names to leave out with all that is below them, as in `model.named_modules()`, with
            `*` and `?` as wildcards, also the last part alone (`"lm_head"`); or a function of name
            and module that says True for what to leave out.
        gamma_init, update, eps: as in `sigma_reparam`.

    Returns:
        The same model.

    Raises:
        ValueError: if there is nothing to convert, a name in `exclude` matches nothing, a weight is
            tied, or a weight cannot be normalised.
    """
    left_out = excluder(model, exclude)
    owners = weight_owners(model)
    found, chosen = 0, []
    for path, module in model.named_modules():
        if not is_layer(module, modules) or left_out(path, module):
            continue
        for name in WEIGHTS:
            if _reparam(module, name) is not None:
                found += 1
                continue
            weight = module._parameters.get(name)
            if weight is None and not parametrize.is_parametrized(module, name):
                continue
            if weight is not None and len(owners[id(weight)]) > 1:
                raise ValueError(
                    f"model: the weight {join_names(path, name)} is tied, to be found as "
                    f"{', '.join(owners[id(weight)])}; only one owner would be normalised. Leave "
                    f"it out with exclude=({path!r},), or untie it first."
                )
            try:
                _checked(_layer_weight(module, name).detach())
            except ValueError as error:
                raise ValueError(f"model: {path}: {error} Or exclude=({path!r},).") from None
            chosen.append((module, name))
    if not found and not chosen:
        raise ValueError(
            "model: expected at least one layer of the classes "
            f"{[kind.__name__ for kind in modules]} that is not excluded, found none."
        )
    for module, name in chosen:
        sigma_reparam(module, name, gamma_init=gamma_init, update=update, eps=eps)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Fold every `W_hat` back into a plain weight, in place: serving then costs nothing extra.

    What is folded is the weight that the next forward would use, in eval mode and in training mode
    alike: one power step from the stored u (with `update="manual"`, the stored u and v). So the
    outputs in eval mode are the same, bit for bit. Other parametrizations stay.

    Returns:
        The same model. Each weight is the parameter that it was before `convert`, with new values;
        gammas are gone, so make a new optimizer to train on. Copies of the model, such as the one
        that goes on training when `remove(copy.deepcopy(model))` is served, stay as they are.
    """
    for module, name, reparam in list(_reparams(model)):
        reparam.eval()  # a step that is used and not stored
        # PyTorch takes the property off the class, which deep copies share: they would break.
        kind = type(module)
        module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def power_step(model: nn.Module) -> None:
    """One stored power step for every layer: once per optimizer step, with `update="manual"`."""
    for module, name, reparam in _reparams(model):
        reparam.step(module.parametrizations[name].original)  # type: ignore[index, union-attr]


def spectral_norms(model: nn.Module) -> dict[str, SpectralNorm]:
    """For each converted weight, by its name: the measured norm of the raw W, and gamma."""
    names = {id(module): path for path, module in model.named_modules()}
    return {
        join_names(names[id(module)], name): SpectralNorm(
            float(reparam.measured.detach()), float(reparam.gamma.detach())
        )
        for module, name, reparam in _reparams(model)
    }


def _reparams(model: nn.Module) -> Iterator[tuple[nn.Module, str, SigmaReparam]]:
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:  # type: ignore[union-attr]
                reparam = _reparam(module, name)
                if reparam is not None:
                    yield module, name, reparam


def _reparam(module: nn.Module, name: str) -> SigmaReparam | None:
    if not parametrize.is_parametrized(module, name):
        return None
    first = module.parametrizations[name][0]  # type: ignore[index]
    return first if isinstance(first, SigmaReparam) else None


def _in_backward() -> bool:
    """Whether autograd is running right now: then a forward is a recomputation."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _first_u(matrix: Tensor) -> Tensor:
    """The leading right singular vector: exact for small matrices, else by block Krylov."""
    matrix = matrix.flatten(1)
    if min(matrix.shape) <= EXACT_SIZE:
        rows: Tensor = torch.linalg.svd(matrix, full_matrices=False).Vh
        return rows[0].clone()
    generator = torch.Generator().manual_seed(0)  # the same on every rank
    block = torch.randn(matrix.shape[1], 8, generator=generator).to(matrix)
    blocks = []
    for _ in range(16):
        block = torch.linalg.qr(matrix.t() @ (matrix @ block)).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, 1)).Q
    inner: Tensor = torch.linalg.svd(matrix @ basis, full_matrices=False).Vh[0]
    return torch.mv(basis, inner)


def _checked(weight: Tensor) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: expected finite numbers, got NaN or infinity.")
    if not bool(weight.any()):
        raise ValueError(
            "weight: expected a weight other than zero, which has no direction to keep. Initialise "
            "it first."
        )
    return weight


def _layer_weight(module: nn.Module, name: str) -> nn.Parameter:
    """The weight, if it is one that can be normalised."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module, name):
        raise ValueError(
            f"module: {name} of this {kind} is parametrized already. Remove that first, with "
            "torch.nn.utils.parametrize.remove_parametrizations or sigma_reparam.remove."
        )
    weight = module._parameters.get(name)
    if weight is None or weight.dim() < 2 or not weight.is_floating_point():
        got = "none" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(
            f"module: expected a floating point parameter {name!r} of 2 dimensions or more, and "
            f"this {kind} has {got}."
        )
    if weight.is_meta:
        raise ValueError(
            f"module: {name} of this {kind} is on the meta device and has no values to measure. "
            "Load or initialise the weights first."
        )
    if isinstance(module, nn.Embedding) and (module.sparse or module.max_norm is not None):
        raise ValueError(
            "module: an Embedding with sparse=True or max_norm writes into its own weight or its "
            "gradient in ways that a computed weight does not allow. Build it without."
        )
    return weight
