"""Operators of `attending.nn` as attention implementations of transformers.

    name = attending.register_attention("softmax-off-by-one")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name)

`OPERATORS` is the table of what can be registered, and what each operator can do. transformers
calls an attention implementation with a mask that holds everything (padding, causality, windows);
the adapter here takes it apart, gives the operator what it knows, and refuses the rest in words.

Nothing happens at import: transformers is loaded, and its tables are written, by the call.
"""

import importlib
import re
from collections.abc import Callable, Mapping

from torch import Tensor

from attending.nn._attention_adapter import Adapter, Operator

OPERATORS: Mapping[str, Operator] = {
    "softmax": Operator(
        "attending.nn.softmax_attention:softmax_attention", decodes=True, cross=True
    ),
    "softmax-off-by-one": Operator(
        "attending.nn.softmax_attention:softmax_off_by_one", decodes=True, cross=True
    ),
    "flow": Operator("attending.nn.flow_attention:flow_attention", masks="keys", cross=True),
    "flow-unclamped": Operator(
        "attending.nn.flow_attention:unclamped_flow_attention", masks="keys", cross=True
    ),
    "sigmoid": Operator(
        "attending.nn.biased_attention:sigmoid_attention",
        decodes=True,
        cross=True,
        required={
            "key_length": "the sequence length in training: its bias is -log(key_length), which "
            "would otherwise change with every length and with padding"
        },
    ),
    "taylor": Operator("attending.nn.taylor_attention:taylor_attention", decodes=True, cross=True),
    "combiner": Operator(
        "attending.nn.combiner:combiner_attention",
        masks="keys",
        required={"plan": "such as FixedPlan(32) of attending.nn.combiner_plans"},
    ),
    "hierarchical": Operator(
        "attending.nn.hierarchical_attention:hierarchical_attention",
        causal=False,
        masks="keys",
        required={"tree": "such as (4, 4), windows of 4 tokens and of 4 such windows"},
    ),
    "nonapprox": Operator("attending.nn.nonapprox_attention:nonapprox_attention", masks="keys"),
    "reversed": Operator("attending.nn.reversed_attention:reversed_attention", causal=False),
    "sinkhorn": Operator("attending.nn.sinkhorn_attention:sinkhorn_attention", causal=False),
    "doubly-stochastic": Operator(
        "attending.nn.doubly_stochastic:doubly_stochastic_attention",
        causal=False,
        required={"normalizer": 'such as "orthostochastic" or CircuitMap(num_tokens=8)'},
    ),
    "norm-softmax": Operator(
        "attending.nn.doubly_stochastic:norm_softmax_attention", decodes=True, cross=True
    ),
}


def register_attention(
    name: str, *, options: Mapping[str, object] | None = None, as_: str | None = None
) -> str:
    """Make an operator an attention implementation of transformers, `attending:<name>`.

        name = attending.register_attention("sigmoid", options={"key_length": 128})
        model = AutoModel.from_config(config, attn_implementation=name)
        model.set_attn_implementation(name)                        # or in a model that is there
        AutoModel.from_pretrained(folder, attn_implementation=name)

    Every architecture that goes through transformers' attention interface can then be trained
    with it, with masks as `"sdpa"` gets them. Registration lasts for the process, and
    `save_pretrained` does not keep the implementation's name: register it and name it again in
    `from_pretrained`, or the model is loaded with softmax attention.

    The adapter refuses, with a `ValueError` that names the layer, what the operator cannot do: a
    causal or a bidirectional model, a mask that is more than padding, decoding with a cache
    (`generate(use_cache=False)` is the way out), cross-attention; and for all operators dropout on
    the map and `output_attentions`. Under autocast it casts as `scaled_dot_product_attention` does.

    Args:
        name: a key of `attending.nn.registration.OPERATORS`.
        options: keyword arguments of the operator to fix, such as `{"key_length": 128}`; see
            the operator's own help.
        as_: register under `attending:<as_>`, to have one operator with several options.

    Returns:
        The name to pass as `attn_implementation`. Registering the same again changes nothing.

    Raises:
        ValueError: for an unknown name, options that the operator does not have or lacks, or a
            name that is taken by another operator or other options.
    """
    if name not in OPERATORS:
        raise ValueError(f"name: expected one of {sorted(OPERATORS)}, got {name!r}.")
    operator = OPERATORS[name]
    label = name if as_ is None else as_
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", label) or re.search("sdpa|fl(ash|ex)", label):
        raise ValueError(
            "as_: expected lower-case letters, digits, dots and dashes, without the names that "
            f"transformers treats as its own (sdpa, flash, flex), got {as_!r}."
        )
    adapter = Adapter(name, operator, load_operator(name), dict(options or {}))

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    implementation = f"attending:{label}"
    registered = AttentionInterface().get(implementation, None)
    if registered is None:
        AttentionInterface.register(implementation, adapter)
        AttentionMaskInterface.register(implementation, sdpa_mask)
    elif not (isinstance(registered, Adapter) and registered.same(adapter)):
        raise ValueError(
            f"name: {implementation!r} is already registered, as {registered!r}; got {adapter!r}. "
            'Give it another name with as_="...".'
        )
    return implementation


def load_operator(name: str) -> Callable[..., Tensor]:
    """The function of a row of `OPERATORS`."""
    module, _, attribute = OPERATORS[name].function.partition(":")
    function: Callable[..., Tensor] = getattr(importlib.import_module(module), attribute)
    return function
