"""Checks of arguments that several classes take."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def to_int(name: str, value: Any, at_least: int | None = None) -> int:
    """
    :param name: Name of the argument, for the error message
    :param value: An integer of any kind: of Python, NumPy or PyTorch, or a floating point number without a fraction
    :param at_least: Smallest value, no check if None
    :return: the same as an ``int``
    :raises ValueError: if it is not an integer, or smaller
    """
    try:
        # bool is an int, but nobody means one
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        is_float = isinstance(value, (float, np.floating))
        integer = int(value) if is_float and float(value).is_integer() else operator.index(value)
    except TypeError:
        raise ValueError(f"`{name}` must be an integer, it is {value!r}") from None
    if at_least is not None and integer < at_least:
        raise ValueError(f"`{name}` must {f'be at least {at_least}' if at_least else 'not be negative'}, it is {value}")
    return integer


def to_float(name: str, value: Any) -> float:
    """
    :param name: Name of the argument, for the error message
    :param value: A number of any kind: of Python, NumPy or PyTorch
    :return: the same as a ``float``
    :raises ValueError: if it is not a number
    """
    try:
        if isinstance(value, (bool, np.bool_, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"`{name}` must be a number, it is {value!r}") from None


def to_net_arch(net_arch: Any, keys: tuple[str, str], name: str = "net_arch") -> list[int] | dict[str, list[int]]:
    """
    :param net_arch: Numbers of units of the hidden layers, in a list, a tuple, ..., or a dictionary of these
    :param keys: What its keys can be
    :param name: Name of the argument, for the error message
    :return: the same as lists of ``int``
    :raises ValueError: if it is something else, or has another key
    """
    if isinstance(net_arch, Mapping):
        unknown = set(net_arch) - set(keys)
        if unknown:
            raise ValueError(
                f"`{name}` has unknown keys {sorted(map(str, unknown))}, they must be {' and '.join(map(repr, keys))}"
            )
        return {key: to_net_arch(units, keys, f"{name}[{key!r}]") for key, units in net_arch.items()}  # type: ignore[misc]
    if isinstance(net_arch, str) or not isinstance(net_arch, Iterable):
        raise ValueError(f"`{name}` must be a list of the units of each layer, it is {net_arch!r}")
    return [to_int(name, units, at_least=1) for units in net_arch]
