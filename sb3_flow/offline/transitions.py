"""
Transitions: what all offline datasets become.

The arrays of a dataset are held once, in single precision. While they are read from a file, converted and checked,
no more than a tenth of their memory is needed beside them: all of that goes by blocks of rows. A chunk of an HDF5
file is read as a whole, however large it is.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape

from sb3_flow.common.bounds import middle_and_half_range

Observations = np.ndarray | dict[str, np.ndarray]
# Memory of a block of rows, in bytes
BLOCK_SIZE = 2**20
# Largest difference of two observations that are the same, in units of the largest one
ROUNDING = 1e-6


# What arrays with a dimension too many may be
_HINT = (
    ". If a row is an episode, or a step of several environments, make a list of dictionaries of them, one for each episode "
    "or environment"
)


class DatasetWarning(UserWarning):
    """Something about a dataset that may not be as it was meant."""


@dataclass
class Transitions:
    """
    Transitions of one or more episodes, in the order in which they were collected.

    :param observations: (n, ...), or a dictionary of such arrays
    :param actions: (n, ...), in env units
    :param rewards: (n,)
    :param next_observations: like the observations
    :param dones: (n,), 1 where the episode terminated, so that there is nothing to bootstrap from,
        0 elsewhere, also where it was truncated
    :param episode_ends: (n,), True at the last transition of each episode, terminated or truncated
    """

    observations: Observations
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: Observations
    dones: np.ndarray
    episode_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        return sum(array.nbytes for _, array in self.items())

    @property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of each episode that has an end."""
        sums = np.concatenate([[0.0], np.cumsum(self.rewards, dtype=np.float64)[self.episode_ends]])
        return np.diff(sums)

    def items(self) -> list[tuple[str, np.ndarray]]:
        """Names and arrays, those of a dictionary of observations one by one."""
        return [pair for field in fields(self) for pair in named_arrays(field.name, getattr(self, field.name))]

    @staticmethod
    def from_arrays(
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any = None,
        dones: Any = None,
        episode_ends: Any = None,
    ) -> "Transitions":
        """
        From arrays in memory or in a file, converted to single precision (images stay bytes). Those in memory are not
        copied if they are already.

        :param observations: (n, ...) or a dictionary of such arrays
        :param actions: (n, ...)
        :param rewards: (n,)
        :param next_observations: like the observations. If None, they are taken from the following row, for which the ends
            of the episodes must be known. The last transition of an episode has no following row: it is dropped unless
            the episode terminated there, or the observations have one row more for each episode, its final observation.
        :param dones: (n,), zeros if None
        :param episode_ends: (n,), where ``dones`` are if None. In addition, an episode ends where a next observation is
            not the following observation.
        :return: transitions
        :raises ValueError: if an array is missing, or is not like the others
        """
        observations, actions = _as_sources("observations", observations), as_source("actions", actions)
        rewards = read_column("rewards", rewards)
        dones = np.zeros(len(rewards), dtype=bool) if dones is None else read_flags("dones", dones)
        ends = dones.copy() if episode_ends is None else read_flags("episode_ends", episode_ends)
        lengths = {"actions": len(actions), "rewards": len(rewards), "dones": len(dones), "episode_ends": len(ends)}
        check_lengths(lengths)
        if not len(actions):
            raise ValueError("The dataset is empty")
        actions, rewards = _read("actions", actions), _read("rewards", rewards)
        if next_observations is None:
            rows, keep = _rows_with_next(observations, dones, ends, lengths)
            observations, next_observations = _shift("observations", observations, rows)
            # Where an episode was truncated, the transition before becomes the last one
            ends = (ends | np.append(ends[1:] & ~keep[1:], False))[keep]
            if not keep.all():
                actions, rewards, dones = actions[keep], rewards[keep], dones[keep]
        else:
            next_observations = _as_sources("next_observations", next_observations)
            for name, value in (("observations", observations), ("next_observations", next_observations)):
                lengths |= {key: len(array) for key, array in named_arrays(name, value)}
            check_lengths(lengths)
            _check_alike(observations, next_observations)
            observations = _read_all("observations", observations)
            next_observations = _read_all("next_observations", next_observations)
            _mark_discontinuities(ends, observations, next_observations)
        # What comes after the last row is not known
        ends[-1:] = True
        return Transitions(observations, actions, rewards, next_observations, dones.astype(np.float32), ends)


def map_arrays(function: Callable[..., Any], *observations: Any) -> Any:
    """
    Apply a function to observations, or to each part of those that are dictionaries.

    :param function: takes as many arrays as there are observations
    :param observations: arrays or tensors, or dictionaries of them with the same keys
    :return: what the function returns, or a dictionary of it
    """
    first = observations[0]
    if isinstance(first, Mapping):
        return {key: function(*(obs[key] for obs in observations)) for key in first}
    return function(*observations)


def named_arrays(name: str, observations: Any) -> list[tuple[str, Any]]:
    """
    :param name: of observations
    :param observations: array, or dictionary of arrays
    :return: names and arrays, one for each part of a dictionary
    """
    if isinstance(observations, Mapping):
        return [(f"{name}[{key!r}]", array) for key, array in observations.items()]
    return [(name, observations)]


# --- Arrays of any kind


def as_source(name: str, source: Any) -> Any:
    """
    :param name: of an array, for errors
    :param source: array, tensor, list, column of a table, or array in a file
    :return: array, or what :func:`blocks` can read, with a row for each transition
    :raises ValueError: if it is none of that
    """
    if isinstance(source, Mapping):
        raise ValueError(f"{name} must be an array, not a dictionary with the keys {', '.join(map(repr, source))}")
    if not _is_in_file(source):
        source = _as_array(name, source)
        if np.ma.is_masked(source):
            raise ValueError(f"{name} has masked rows: leave them out")
        if source.dtype == object and source.ndim:
            source = _stack_rows(name, source)
    elif source.dtype.hasobject and hasattr(source, "blocks"):
        raise ValueError(
            f"{name} must be numbers, not object: it is pickled, which can run any code when it is loaded. Save it as "
            "numbers, or trust it with `allow_pickle=True`"
        )
    if source.shape is None:
        raise ValueError(f"{name} is empty: it has no shape")
    if len(source.shape) == 0:
        raise ValueError(f"{name} must be an array with a row for each transition, not {source[()]!r}")
    return source


def _is_in_file(source: Any) -> bool:
    return hasattr(source, "blocks") or hasattr(source, "read_direct")


def _as_array(name: str, source: Any) -> np.ndarray:
    if isinstance(source, th.Tensor):
        source = source.detach().cpu()
        return (source.float() if source.dtype == th.bfloat16 else source).numpy()
    if hasattr(source, "to_numpy"):
        return source.to_numpy()
    if isinstance(source, (list, tuple)):
        return _stack_rows(name, source)
    return source if isinstance(source, np.ndarray) else np.asarray(source)


def _stack_rows(name: str, rows: Sequence[Any]) -> np.ndarray:
    if isinstance(rows, (list, tuple)) and not any(isinstance(row, th.Tensor) for row in rows[:1]):
        try:
            array = np.asarray(rows)
        except (ValueError, TypeError, RuntimeError):
            array = None
        if array is not None and array.dtype != object:
            return array
    arrays = [_as_array(f"{name}, row {number}", row) for number, row in enumerate(rows)]
    for number, array in enumerate(arrays):
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name} must be numbers, not {array.dtype}: row {number} is a {type(rows[number]).__name__}")
        if array.shape != arrays[0].shape:
            hint = _HINT if array.shape[1:] == arrays[0].shape[1:] else ""
            raise ValueError(f"{name}, row {number}: its shape is {array.shape}, that of row 0 is {arrays[0].shape}{hint}")
    return np.stack(arrays) if arrays else np.zeros(0)


def _as_sources(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: as_source(f"{name}[{key!r}]", part) for key, part in value.items()}
    return as_source(name, value)


def read_column(name: str, source: Any) -> np.ndarray:
    """
    :param name: of an array, for errors
    :param source: one value for each transition, see :func:`as_source`
    :return: (n,)
    :raises ValueError: if it has another shape
    """
    source = as_source(name, source)
    if int(np.prod(source.shape[1:])) != 1:
        hint = _HINT if len(source.shape) > 1 else ""
        raise ValueError(f"{name} must be one number for each transition, of shape (n,), not {source.shape}{hint}")
    return np.asarray(source).reshape(-1)


def read_flags(name: str, source: Any) -> np.ndarray:
    """
    :param name: of an array, for errors
    :param source: 0 or 1, or False or True, for each transition
    :return: (n,), bool
    :raises ValueError: naming the first row that is neither
    """
    column = read_column(name, source)
    _dtype(name, column)
    wrong = (column != 0) & (column != 1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{name}, row {row}: neither 0 nor 1 ({column[row]})")
    return column != 0


def check_lengths(lengths: Mapping[str, int], hint: str = "") -> None:
    """
    :param lengths: by name
    :param hint: What else is possible
    :raises ValueError: if they differ
    """
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The arrays of a dataset must have the same length, they have {dict(lengths)}{hint}")


# --- Blocks of rows


def blocks(source: Any) -> Iterator[tuple[int, np.ndarray]]:
    """
    :param source: array, or what can be sliced like one, or has an iterator ``blocks(n_rows)`` of its own
    :return: iterator of the first row, and the rows, of blocks of a MB
    """
    n_rows = max(1, BLOCK_SIZE // max(1, int(np.prod(source.shape[1:])) * source.dtype.itemsize))
    if hasattr(source, "blocks"):
        yield from source.blocks(n_rows)
        return
    if _is_in_file(source):
        # Whole chunks of HDF5 at once, as it decompresses the whole chunk for any of its rows
        chunk = (source.chunks or (1,))[0]
        n_chunk_rows = -(-n_rows // chunk) * chunk
        for start in range(0, len(source), n_chunk_rows):
            for first, rows in blocks(source[start : start + n_chunk_rows]):
                yield start + first, rows
        return
    for start in range(0, len(source), n_rows):
        yield start, source[start : start + n_rows]


def _dtype(name: str, source: Any) -> type:
    if source.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be numbers, not {source.dtype}")
    return np.uint8 if source.dtype == np.uint8 and len(source.shape) > 2 else np.float32


def _read(name: str, source: Any) -> np.ndarray:
    """All rows, converted. An array that needs no conversion is not copied."""
    dtype = _dtype(name, source)
    if isinstance(source, np.ndarray) and source.dtype == dtype and source.flags.c_contiguous:
        return source
    result = np.empty(source.shape, dtype)
    for start, rows in blocks(source):
        result[start : start + len(rows)] = rows
    return result


def _read_all(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _read(f"{name}[{key!r}]", part) for key, part in value.items()}
    return _read(name, value)


def _rows_with_next(
    observations: Any, dones: np.ndarray, ends: np.ndarray, lengths: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the observations, and those of all else, that have a next observation. The last end is marked."""
    lengths = lengths | {name: len(array) for name, array in named_arrays("observations", observations)}
    n, n_ends = len(ends), int(ends.sum() + ~ends[-1])
    if all(len(array) == n + n_ends for _, array in named_arrays("observations", observations)):
        ends[-1] = True
        rows = np.ones(n + n_ends, dtype=bool)
        rows[np.flatnonzero(ends) + np.arange(1, n_ends + 1)] = False
        return rows, np.ones_like(ends)
    check_lengths(lengths, f" (the observations may have one row more for each episode, {n + n_ends} in all)")
    if not ends.any():
        raise ValueError("`next_observations` are missing, and without `episode_ends` they cannot be made up")
    # Where an episode terminated, nothing is bootstrapped from the next observation: any will do
    keep = ~ends | dones
    keep[-1] &= ends[-1]
    return keep, keep


def _shift(name: str, observations: Any, keep: np.ndarray) -> tuple[Any, Any]:
    """The rows to be kept, and those that follow them."""
    if isinstance(observations, Mapping):
        pairs = {key: _shift(f"{name}[{key!r}]", value, keep) for key, value in observations.items()}
        return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}
    # The last row has none: it is repeated
    follows = np.append(False, keep[:-1])
    dtype = _dtype(name, observations)
    first, second = (np.empty((int(keep.sum()), *observations.shape[1:]), dtype) for _ in range(2))
    positions = [0, 0]
    for start, rows in blocks(observations):
        for number, (result, mask) in enumerate([(first, keep), (second, follows)]):
            selected = rows[mask[start : start + len(rows)]]
            result[positions[number] : positions[number] + len(selected)] = selected
            positions[number] += len(selected)
    if keep[-1]:
        second[-1] = first[-1]
    return first, second


def _check_alike(observations: Any, next_observations: Any) -> None:
    first, second = dict(named_arrays("", observations)), dict(named_arrays("", next_observations))
    for key in [*first, *second]:
        names = f"observations{key}", f"next_observations{key}"
        if key not in second or key not in first:
            raise ValueError(f"There is {names[key in second]}, but no {names[key not in second]}")
        kinds = [_kind(names[i], array[key]) for i, array in enumerate((first, second))]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{names[0]} and {names[1]} must be the same, not {_text(kinds[0])} and {_text(kinds[1])}")


def _kind(name: str, source: Any) -> tuple[type, tuple[int, ...]]:
    return _dtype(name, source), source.shape[1:]


def _text(kind: tuple[type, tuple[int, ...]] | None) -> str:
    return "missing" if kind is None else f"{kind[0].__name__} of shape {kind[1]}"


def _mark_discontinuities(ends: np.ndarray, observations: Observations, next_observations: Observations) -> None:
    """Mark the ends where a next observation is not the following observation, by more than rounding errors."""
    marked = ends.copy()
    for (_, current), (_, following) in zip(named_arrays("", observations), named_arrays("", next_observations), strict=True):
        largest = np.zeros(current.shape[1:], dtype=current.dtype)
        if current.dtype != np.uint8:
            for _, rows in blocks(current):
                np.fmax(largest, np.fmax.reduce(np.abs(rows)), out=largest)
        for start, rows in blocks(following[:-1]):
            after = current[start + 1 : start + 1 + len(rows)]
            differs = rows != after
            if current.dtype != np.uint8 and differs.any():
                with np.errstate(invalid="ignore"):
                    differs = (np.abs(rows - after) > ROUNDING * largest) | (np.isnan(rows) != np.isnan(after))
            ends[start : start + len(rows)] |= differs.reshape(len(rows), -1).any(axis=1)
    found, going_on = np.count_nonzero(ends & ~marked), np.count_nonzero(~marked[:-1])
    if 2 * found > going_on:
        warnings.warn(
            "Most next observations are not the observations of the following rows (are the rows shuffled?): each of these "
            "rows is taken as an episode of its own, which returns of several steps and stacked observations stop at",
            DatasetWarning,
        )


def join(parts: Iterator[Transitions] | Sequence[Transitions], total: int) -> Transitions:
    """
    One dataset from several with the same spaces.

    :param parts: at least one. Those of an iterator are held one at a time.
    :param total: Number of transitions of all of them
    :return: all transitions, in this order
    :raises ValueError: naming what has another shape or dtype
    """
    result, start = None, 0
    for number, part in enumerate(parts):
        arrays = dict(part.items())
        if result is None:
            result = Transitions(
                **{
                    field.name: map_arrays(
                        lambda array: np.empty((total, *array.shape[1:]), array.dtype), getattr(part, field.name)
                    )
                    for field in fields(Transitions)
                }
            )
            targets = dict(result.items())
        for name in [*targets, *arrays]:
            kinds = [_kind(name, x[name]) if name in x else None for x in (targets, arrays)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"Datasets to be concatenated must have the same shapes and dtypes: {name} is {_text(kinds[0])} in "
                    f"number 0, {_text(kinds[1])} in number {number}"
                )
        for name, array in arrays.items():
            targets[name][start : start + len(array)] = array
        start += len(part)
    assert result is not None and start == total
    return result


# --- What a dataset must be like


def fit_observations(observations: Observations, space: spaces.Space) -> Observations:
    """
    Observations in the form that SB3 gives them: images with their channels where they are in the space (where
    ``VecTransposeImage`` puts them), and numbers as vectors.

    :param observations: of a dataset
    :param space: The observation space
    :return: the observations, not copied
    """
    if isinstance(observations, dict):
        parts = space.spaces if isinstance(space, spaces.Dict) else {}
        return {key: fit_observations(array, parts.get(key, space)) for key, array in observations.items()}  # type: ignore[misc]
    if isinstance(space, spaces.Discrete) and observations.size == len(observations):
        return observations.reshape(-1, 1)
    height_width = () if space.shape is None else space.shape[1:]
    if observations.ndim == 4 and observations.shape[2:] != height_width == observations.shape[1:3]:
        return np.moveaxis(observations, -1, 1)
    return observations


def check_transitions(
    transitions: Transitions,
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
    n_stack: int = 1,
    clip_actions: bool = False,
) -> None:
    """
    Check that a dataset can be trained on. The next observation where an episode terminated may be anything: nothing is
    bootstrapped from it.

    :param transitions: The dataset
    :param observation_space: Space that the observations must have the shape of
    :param action_space: Box that the actions must be in, in env units
    :param n_stack: Number of observations of the dataset that make up one of the space
    :param clip_actions: Whether the actions will be clipped, so that they may be out of the bounds
    :raises ValueError: naming the field, and the first row, that is wrong
    """
    if len(transitions) == 0:
        raise ValueError("The dataset is empty")
    if observation_space is not None:
        for name in ("observations", "next_observations"):
            _check_shapes(name, getattr(transitions, name), observation_space, n_stack)
    for name, array in transitions.items():
        if np.issubdtype(array.dtype, np.floating):
            exempt = transitions.dones == 1 if name.startswith("next_observations") else None
            _check_rows(lambda rows: ~np.isfinite(rows), name, array, "NaN or inf", exempt)
    if observation_space is not None:
        for name in ("observations", "next_observations"):
            exempt = transitions.dones == 1 if name == "next_observations" else None
            _check_values(name, getattr(transitions, name), observation_space, exempt)
    _check_rows(lambda rows: ~np.isin(rows, (0, 1)), "dones", transitions.dones, "neither 0 nor 1")
    if action_space is not None:
        actions = transitions.actions
        if not isinstance(action_space, spaces.Box) or actions.shape[1:] != action_space.shape:
            raise ValueError(f"actions of shape {actions.shape[1:]} do not fit the action space of the env, {action_space}")
        if clip_actions:
            return
        with np.errstate(over="ignore"):
            margin = 1e-4 * np.maximum(1.0, 2 * middle_and_half_range(action_space)[1].astype(np.float64))
            low, high = action_space.low - margin, action_space.high + margin
        what = f"outside of the action space of the env, {action_space}, which `clip_actions=True` clips them to"
        _check_rows(lambda rows: (rows < low) | (rows > high), "actions", actions, what)


def _check_rows(
    is_wrong: Callable[[np.ndarray], np.ndarray], name: str, array: np.ndarray, what: str, exempt: np.ndarray | None = None
) -> None:
    found = _find_row(is_wrong, array, exempt)
    if found is not None:
        raise ValueError(f"{name}, row {found}: {what} ({array[found]})")


def _find_row(is_wrong: Callable[[np.ndarray], np.ndarray], array: np.ndarray, exempt: np.ndarray | None = None) -> int | None:
    """The first row with something wrong."""
    for start, rows in blocks(array):
        wrong = is_wrong(rows)
        if exempt is not None and wrong.any():
            wrong[exempt[start : start + len(rows)]] = False
        if wrong.any():
            return start + int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))
    return None


def _check_values(name: str, observations: Observations, space: spaces.Space, exempt: np.ndarray | None) -> None:
    """Values must be in the space. Those out of the bounds of a Box are no more than a warning, as many bounds are rough."""
    if isinstance(observations, dict):
        # (as _check_shapes has found)
        assert isinstance(space, spaces.Dict)
        for key, array in observations.items():
            _check_values(f"{name}[{key!r}]", array, space[key], exempt)
        return
    if isinstance(space, spaces.Box):
        _check_box(name, observations, space, exempt)
        return
    if isinstance(space, spaces.MultiBinary):
        low, high = np.zeros(space.shape), np.ones(space.shape)
    else:
        assert isinstance(space, (spaces.Discrete, spaces.MultiDiscrete))
        low = np.asarray(space.start)
        high = low + (space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
    low, high = (np.resize(bound, observations.shape[1:]) for bound in (low, high))
    what = f"not in the observation space of the env, {space}"
    _check_rows(lambda rows: (rows < low) | (rows > high) | (rows % 1 != 0), name, observations, what, exempt)


def _check_box(name: str, observations: np.ndarray, space: spaces.Box, exempt: np.ndarray | None) -> None:
    is_bounded = np.isfinite(space.low).any() or np.isfinite(space.high).any()
    if observations.dtype == space.dtype == np.uint8 or not is_bounded:
        return
    # Stacked ones have the bounds of a single one, several times
    low, high = (bound[: observations.shape[1]] if bound.ndim else bound for bound in (space.low, space.high))
    with np.errstate(over="ignore"):
        margin = 1e-4 * np.maximum(1.0, np.abs(np.where(np.isfinite(high) & np.isfinite(low), high - low, 0.0)))
        low, high = low - margin, high + margin
    if space.dtype == np.uint8 and _find_row(lambda rows: (rows < 0) | (rows > 1), observations, exempt) is None:
        what = "a fraction, and the observations of the env are bytes, from 0 to 255"
        _check_rows(lambda rows: rows % 1 != 0, name, observations, what, exempt)
    row = _find_row(lambda rows: (rows < low) | (rows > high), observations, exempt)
    if row is None:
        return
    what = f"{name}, row {row}: outside of the observation space of the env, {space} ({observations[row]})"
    if (space.low >= 0).all() and (space.high <= 1).all():
        if _find_row(lambda rows: (rows < 0) | (rows > 255) | (rows % 1 != 0), observations, exempt) is None:
            raise ValueError(f"{what}: they look like bytes, from 0 to 255")
    warnings.warn(what, DatasetWarning)


def _check_shapes(name: str, observations: Observations, space: spaces.Space, n_stack: int) -> None:
    if isinstance(observations, dict):
        if not isinstance(space, spaces.Dict) or set(observations) != set(space.spaces):
            keys = set(space.spaces) if isinstance(space, spaces.Dict) else "no dictionary"
            raise ValueError(f"{name} with the keys {set(observations)} do not fit the env, which has {keys}")
        for key, array in observations.items():
            _check_shapes(f"{name}[{key!r}]", array, space.spaces[key], n_stack)
        return
    shape = observations.shape[1:]
    if shape and n_stack > 1:
        shape = (n_stack * shape[0], *shape[1:])
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(shape) == 3 and observations.dtype != np.uint8:
        raise ValueError(f"{name} must be bytes, as the images of the env are, not {observations.dtype}")
    if isinstance(space, spaces.Box) and space.dtype != np.uint8 == observations.dtype and (space.high <= 1).all():
        raise ValueError(f"{name} are bytes, but those of the env are not more than 1: {space}")
    if shape != get_obs_shape(space):
        stacked = f" ({n_stack} stacked: {shape})" if n_stack > 1 else ""
        raise ValueError(
            f"{name} of shape {observations.shape[1:]}{stacked} do not fit the observation space of the env, {space}"
        )
