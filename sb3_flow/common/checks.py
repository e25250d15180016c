"""Checks of arguments that several classes take."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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


class Range(NamedTuple):
    """What an argument may be, as error messages say it."""

    description: str
    contains: Callable[[float], bool]


FINITE = Range("be finite", math.isfinite)
NOT_NEGATIVE = Range("not be negative", lambda x: 0 <= x < math.inf)
POSITIVE = Range("be positive", lambda x: x > 0)
FINITE_POSITIVE = Range("be positive and finite", lambda x: 0 < x < math.inf)
FRACTION = Range("be in [0, 1]", lambda x: 0 <= x <= 1)
DECAY = Range("be between 0 and 1", lambda x: 0 < x < 1)


def to_float(name: str, value: Any, allowed: Range = FINITE) -> float:
    """
    :param name: Name of the argument, for the error message
    :param value: A number of any kind: of Python, NumPy or PyTorch
    :param allowed: What it may be
    :return: the same as a ``float``
    :raises ValueError: if it is not a number, or out of this range
    """
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)) or getattr(value, "ndim", 0) > 0:
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"`{name}` must be a number, it is {value!r}") from None
    if not allowed.contains(number):
        raise ValueError(f"`{name}` must {allowed.description}, it is {value}")
    return number


def check_floats(
    instance: Any, allowed: dict[str, Range], optional: Iterable[str] = (), schedules: Iterable[str] = ()
) -> None:
    """
    Make attributes floats, see :func:`to_float`.

    :param instance: What has them
    :param allowed: What each of them may be
    :param optional: Those that may be None
    :param schedules: Those that may be functions
    :raises ValueError: if one of them is not a number, or out of its range
    """
    for name, range_ in allowed.items():
        value = getattr(instance, name)
        if (value is None and name in optional) or (callable(value) and name in schedules):
            continue
        setattr(instance, name, to_float(name, value, range_))


def to_bool(name: str, value: Any, other: str | None = None) -> bool:
    """
    :param name: Name of the argument, for the error message
    :param value: True or False, of Python or NumPy
    :param other: What else the argument may be, for the error message
    :return: the same as a ``bool``
    :raises ValueError: if it is something else, as the string "False", which counts as true
    """
    if not isinstance(value, (bool, np.bool_)):
        choices = "True or False" if other is None else f"True, False or {other}"
        raise ValueError(f"`{name}` must be {choices}, it is {value!r}")
    return bool(value)


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
        return {key: _to_layers(f"{name}[{key!r}]", layers) for key, layers in net_arch.items()}
    return _to_layers(name, net_arch)


def _to_layers(name: str, layers: Any) -> list[int]:
    if isinstance(layers, (str, Mapping)) or not isinstance(layers, Iterable):
        raise ValueError(f"`{name}` must be a list of the units of each layer, it is {layers!r}")
    return [_to_units(name, units) for units in layers]


def _to_units(name: str, units: Any) -> int:
    try:
        return to_int(name, units, at_least=1)
    except ValueError as error:
        raise ValueError(f"units of {error}") from None
