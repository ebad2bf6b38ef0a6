"""Every `scaled_dot_product_attention` call of a model, as data or through a handler.

`scaled_dot_product_attention` is the one function in which the attention of transformers,
diffusers, timm and plain PyTorch models ends. `tap(model)` watches it, and knows for every call
which module of the model made it. Nothing is registered, subclassed or patched for any model.

    with tap(model) as calls:                 # record
        model(**inputs)
    calls[0].name, calls[0].query.shape       # 'model.layers.0.self_attn', [1, 32, 128, 64]

    def sharper(call, proceed):               # or change: a handler stands in for the function
        return proceed(dataclasses.replace(call, scale=2 * call.softmax_scale))

    with tap(model, sharper):
        model.generate(**inputs)

`DenoisingClock` tells which step of a sampler's loop a call of the model is.
"""

from attending.taps.call import AttentionCall, Handler, Proceed
from attending.taps.denoising import DenoisingClock, Moment
from attending.taps.refusal import TapError, TapWarning
from attending.taps.session import Tap, tap

__all__ = [
    "tap",
    "Tap",
    "AttentionCall",
    "Handler",
    "Proceed",
    "TapError",
    "TapWarning",
    "DenoisingClock",
    "Moment",
]
