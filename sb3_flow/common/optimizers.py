"""Optimizers."""

from collections.abc import Iterable
from typing import Any

import torch as th
from torch import nn


def make_optimizer(
    optimizer_class: type[th.optim.Optimizer], parameters: Iterable[nn.Parameter], **kwargs: Any
) -> th.optim.Optimizer:
    """
    Create an optimizer. Adam and AdamW update all parameters in one call (``fused``) unless told otherwise: for the sizes
    of policies, that takes a quarter of the time. (Not if there are parameters that this is not for, like frozen integers.)

    :param optimizer_class: The optimizer to use
    :param parameters: What it optimizes
    :param kwargs: Keyword arguments of the optimizer
    :return: the optimizer
    """
    parameters = list(parameters)
    chosen = {"fused", "foreach", "capturable", "differentiable"} & set(kwargs)
    is_possible = all(parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if optimizer_class in (th.optim.Adam, th.optim.AdamW) and not chosen and is_possible:
        kwargs["fused"] = True
    return optimizer_class(parameters, **kwargs)
