"""Keeps autocast out: what is measured is measured in the precision of its arguments."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def full_precision(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function as it is outside of autocast.

    Under `torch.autocast` matrix products run in half precision whatever the dtype of what is
    multiplied. A probability that is wrong by 1e-2 is no statistic, so these functions do not.
    """

    @functools.wraps(function)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        tensors = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        device = next((tensor.device.type for tensor in tensors), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return guarded
