"""
Transitions: what all offline datasets become.

The arrays of a dataset are held once, in single precision. While they are read from a file, converted and checked,
no more than a tenth of their memory is needed beside them: all of that goes by blocks of rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape

Observations = np.ndarray | dict[str, np.ndarray]
# Memory of a block of rows, in bytes
BLOCK_SIZE = 2**20


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
        result = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                result += [(f"{field.name}[{key!r}]", array) for key, array in value.items()]
            else:
                result.append((field.name, value))
        return result

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
        :param next_observations: like the observations. If None, they are taken from the following row, and the
            last transition of each episode, which has no following row, is dropped unless the episode terminated
            there: this needs ``episode_ends``.
        :param dones: (n,), zeros if None
        :param episode_ends: (n,), if None, where ``dones`` are and where a next observation is not the following
            observation
        :return: transitions
        :raises ValueError: if an array is missing or has another length
        """
        rewards = _read("rewards", rewards).reshape(-1)
        dones = np.zeros_like(rewards) if dones is None else _read("dones", dones).reshape(-1)
        ends = None if episode_ends is None else np.array(episode_ends, dtype=bool).reshape(-1)
        lengths = {"actions": len(actions), "rewards": len(rewards), "dones": len(dones)}
        for name, value in [("observations", observations), ("next_observations", next_observations), ("episode_ends", ends)]:
            if isinstance(value, Mapping):
                lengths |= {f"{name}[{key!r}]": len(array) for key, array in value.items()}
            elif value is not None:
                lengths[name] = len(value)
        if len(set(lengths.values())) != 1:
            raise ValueError(f"The arrays of a dataset must have the same length, they have {lengths}")

        actions = _read("actions", actions)
        if next_observations is None:
            ends = dones > 0 if ends is None else ends
            if not ends.any():
                raise ValueError("`next_observations` are missing, and without `episode_ends` they cannot be made up")
            # Where an episode terminated, nothing is bootstrapped from the next observation: any will do
            keep = ~ends | (dones > 0)
            keep[-1] &= ends[-1]
            observations, next_observations = _shift(observations, keep)
            # Where it was truncated, the transition before becomes the last one
            ends = (ends | np.append(ends[1:] & ~keep[1:], False))[keep]
            actions, rewards, dones = actions[keep], rewards[keep], dones[keep]
        else:
            observations = map_arrays(partial(_read, "observations"), observations)
            next_observations = map_arrays(partial(_read, "next_observations"), next_observations)
            if ends is None:
                ends = dones > 0
                _mark_discontinuities(ends, observations, next_observations)
        if len(ends):
            # What comes after the last row is not known
            ends[-1] = True
        return Transitions(observations, actions, rewards, next_observations, dones, ends)


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


# --- Blocks of rows


def blocks(source: Any) -> Iterator[tuple[int, np.ndarray]]:
    """
    :param source: array, or what can be sliced like one, or has an iterator ``blocks(n_rows)`` of its own
    :return: iterator of the first row, and the rows, of blocks of a MB
    """
    n_rows = max(1, BLOCK_SIZE // max(1, int(np.prod(source.shape[1:])) * source.dtype.itemsize))
    if hasattr(source, "blocks"):
        yield from source.blocks(n_rows)
    else:
        for start in range(0, len(source), n_rows):
            yield start, source[start : start + n_rows]


def _dtype(name: str, source: Any) -> type:
    if not (np.issubdtype(source.dtype, np.number) or source.dtype == bool):
        raise ValueError(f"{name} must be numbers, not {source.dtype}")
    return np.uint8 if source.dtype == np.uint8 and source.ndim > 2 else np.float32


def _as_source(source: Any) -> Any:
    return source if hasattr(source, "dtype") and hasattr(source, "shape") else np.asarray(source)


def _read(name: str, source: Any) -> np.ndarray:
    """All rows, converted. An array that needs no conversion is not copied."""
    source = _as_source(source)
    dtype = _dtype(name, source)
    if isinstance(source, np.ndarray) and source.dtype == dtype and source.flags.c_contiguous:
        return source
    result = np.empty(source.shape, dtype)
    for start, rows in blocks(source):
        result[start : start + len(rows)] = rows
    return result


def _shift(observations: Any, keep: np.ndarray) -> tuple[Any, Any]:
    """The rows to be kept, and those that follow them."""
    if isinstance(observations, Mapping):
        pairs = {key: _shift(value, keep) for key, value in observations.items()}
        return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}
    source = _as_source(observations)
    # The last row has none: it is repeated
    follows = np.append(False, keep[:-1])
    first, second = (np.empty((int(keep.sum()), *source.shape[1:]), _dtype("observations", source)) for _ in range(2))
    positions = [0, 0]
    for start, rows in blocks(source):
        for number, (result, mask) in enumerate([(first, keep), (second, follows)]):
            selected = rows[mask[start : start + len(rows)]]
            result[positions[number] : positions[number] + len(selected)] = selected
            positions[number] += len(selected)
    if keep[-1]:
        second[-1] = first[-1]
    return first, second


def _mark_discontinuities(ends: np.ndarray, observations: Observations, next_observations: Observations) -> None:
    pairs = [(observations, next_observations)]
    if isinstance(observations, dict) and isinstance(next_observations, dict):
        pairs = [(observations[key], next_observations[key]) for key in observations]
    for current, following in pairs:
        assert isinstance(current, np.ndarray) and isinstance(following, np.ndarray)
        for start, rows in blocks(following[:-1]):
            after = current[start + 1 : start + 1 + len(rows)]
            ends[start : start + len(rows)] |= (rows != after).reshape(len(rows), -1).any(axis=1)


def join(parts: Iterator[Transitions] | Sequence[Transitions], total: int) -> Transitions:
    """
    One dataset from several with the same spaces.

    :param parts: at least one. Those of an iterator are held one at a time.
    :param total: Number of transitions of all of them
    :return: all transitions, in this order
    :raises ValueError: if their shapes differ
    """
    result, start = None, 0
    for part in parts:
        if result is None:
            result = Transitions(
                **{
                    field.name: map_arrays(
                        lambda array: np.empty((total, *array.shape[1:]), array.dtype), getattr(part, field.name)
                    )
                    for field in fields(Transitions)
                }
            )
        targets, arrays = dict(result.items()), dict(part.items())
        shapes, expected = ({name: array.shape[1:] for name, array in x.items()} for x in (arrays, targets))
        if shapes != expected:
            raise ValueError(f"Datasets to be concatenated must have the same shapes, they have {expected} and {shapes}")
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
    _check_rows(lambda rows: ~np.isin(rows, (0, 1)), "dones", transitions.dones, "neither 0 nor 1")
    if action_space is not None:
        actions = transitions.actions
        if not isinstance(action_space, spaces.Box) or actions.shape[1:] != action_space.shape:
            raise ValueError(f"actions of shape {actions.shape[1:]} do not fit the action space of the env, {action_space}")
        if clip_actions:
            return
        margin = 1e-4 * np.maximum(1.0, np.abs(action_space.high - action_space.low))
        low, high = action_space.low - margin, action_space.high + margin
        what = f"outside of the action space of the env, {action_space}, which `clip_actions=True` clips them to"
        _check_rows(lambda rows: (rows < low) | (rows > high), "actions", actions, what)


def _check_rows(
    is_wrong: Callable[[np.ndarray], np.ndarray], name: str, array: np.ndarray, what: str, exempt: np.ndarray | None = None
) -> None:
    for start, rows in blocks(array):
        wrong = is_wrong(rows)
        if exempt is not None and wrong.any():
            wrong[exempt[start : start + len(rows)]] = False
        if wrong.any():
            row = int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))
            raise ValueError(f"{name}, row {start + row}: {what} ({rows[row]})")


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
