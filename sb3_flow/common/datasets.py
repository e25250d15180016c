"""
Offline datasets: OGBench, Minari, D4RL's HDF5, ``.npz``, arrays in memory and SB3's replay buffers, in one structure.

Nothing that is loaded is ever executed: ``.npz`` files are read without pickle, pickled replay buffers only if the
caller says ``allow_pickle=True``.

The arrays of a dataset are held once: beside them, a loaded dataset needs less than a tenth of their memory
(loading a file may hold one more copy of its observations for a moment).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl

Observations = np.ndarray | dict[str, np.ndarray]


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
        From arrays in memory, converted to single precision (images stay bytes) and not copied if they are already.

        :param observations: (n, ...) or a dictionary of such arrays
        :param actions: (n, ...)
        :param rewards: (n,)
        :param next_observations: like the observations. If None, they are taken from the following row, and the
            last transition of each episode, which has no following row, is dropped: this needs ``episode_ends``.
        :param dones: (n,), zeros if None
        :param episode_ends: (n,), where ``dones`` are if None
        :return: transitions
        :raises ValueError: if an array is missing or has another length
        """
        transitions = Transitions(
            _convert(observations),
            _as_float32(actions),
            _as_float32(rewards).reshape(-1),
            _convert(observations if next_observations is None else next_observations),
            np.zeros(len(actions), dtype=np.float32) if dones is None else _as_float32(dones).reshape(-1),
            np.zeros(0, dtype=bool),
        )
        ends = transitions.dones > 0 if episode_ends is None else np.asarray(episode_ends, dtype=bool).reshape(-1)
        transitions.episode_ends = ends
        lengths = {name: len(array) for name, array in transitions.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"The arrays of a dataset must have the same length, they have {lengths}")
        if next_observations is None:
            if not ends.any():
                raise ValueError("`next_observations` are missing, and without `episode_ends` they cannot be made up")
            transitions = _shift_observations(transitions)
        if len(transitions):
            # What comes after the last row is not known
            transitions.episode_ends = transitions.episode_ends.copy()
            transitions.episode_ends[-1] = True
        return transitions


def _as_float32(array: Any) -> np.ndarray:
    array = np.asarray(array)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ValueError(f"A dataset must be made of numbers, not of {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.float32)


def _convert(observations: Any) -> Observations:
    if isinstance(observations, Mapping):
        return {key: _convert(value) for key, value in observations.items()}  # type: ignore[misc]
    array = np.asarray(observations)
    return np.ascontiguousarray(array) if array.dtype == np.uint8 else _as_float32(array)


def _map(function: Callable[[np.ndarray], np.ndarray], observations: Observations) -> Observations:
    if isinstance(observations, dict):
        return {key: function(array) for key, array in observations.items()}
    return function(observations)


def _shift_observations(transitions: Transitions) -> Transitions:
    """Next observations from the following row. The last transition of an episode is only kept if it terminated."""
    ends = transitions.episode_ends
    following = np.minimum(np.arange(len(ends)) + 1, len(ends) - 1)
    # Where an episode terminated, nothing is bootstrapped from the next observation: any will do
    keep = ~ends | (transitions.dones > 0)
    keep[-1] &= ends[-1]
    # Where it was truncated, the transition before becomes the last one
    new_ends = ends | np.append(ends[1:] & ~keep[1:], False)
    return Transitions(
        _map(lambda array: array[keep], transitions.observations),
        transitions.actions[keep],
        transitions.rewards[keep],
        _map(lambda array: array[following[keep]], transitions.observations),
        transitions.dones[keep],
        new_ends[keep],
    )


def concatenate(datasets: Sequence[Transitions]) -> Transitions:
    """
    One dataset from several with the same spaces.

    :param datasets: at least one
    :return: all transitions, in this order
    """
    if len(datasets) == 1:
        return datasets[0]
    first = datasets[0]
    values: dict[str, Any] = {}
    for field in fields(Transitions):
        parts = [getattr(dataset, field.name) for dataset in datasets]
        if isinstance(parts[0], dict):
            values[field.name] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        else:
            if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
                shapes = [part.shape[1:] for part in parts]
                raise ValueError(f"Datasets to be concatenated must have {field.name} of the same shape, they have {shapes}")
            values[field.name] = np.concatenate(parts)
    return type(first)(**values)


def check_transitions(
    transitions: Transitions,
    observation_space: spaces.Space | None = None,
    action_space: spaces.Space | None = None,
) -> None:
    """
    Check that a dataset can be trained on.

    :param transitions: The dataset
    :param observation_space: Space that the observations must have the shape of
    :param action_space: Box that the actions must be in, in env units
    :raises ValueError: naming the field, and the first row, that is wrong
    """
    if len(transitions) == 0:
        raise ValueError("The dataset is empty")
    for name, array in transitions.items():
        if np.issubdtype(array.dtype, np.floating):
            _raise_at_first(~np.isfinite(array), name, array, "NaN or inf")
    _raise_at_first(~np.isin(transitions.dones, (0, 1)), "dones", transitions.dones, "neither 0 nor 1")

    if observation_space is not None:
        for name in ("observations", "next_observations"):
            _check_shapes(name, getattr(transitions, name), observation_space)
    if action_space is not None:
        actions = transitions.actions
        if not isinstance(action_space, spaces.Box) or actions.shape[1:] != action_space.shape:
            raise ValueError(f"actions of shape {actions.shape[1:]} do not fit the action space of the env, {action_space}")
        margin = 1e-4 * np.maximum(1.0, np.abs(action_space.high - action_space.low))
        outside = (actions < action_space.low - margin) | (actions > action_space.high + margin)
        _raise_at_first(outside, "actions", actions, f"outside of the action space of the env, {action_space}")


def _raise_at_first(wrong: np.ndarray, name: str, array: np.ndarray, what: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))
        raise ValueError(f"{name}, row {row}: {what} ({array[row]})")


def _check_shapes(name: str, observations: Observations, space: spaces.Space) -> None:
    if isinstance(observations, dict):
        if not isinstance(space, spaces.Dict) or set(observations) != set(space.spaces):
            keys = set(space.spaces) if isinstance(space, spaces.Dict) else "no dictionary"
            raise ValueError(f"{name} with the keys {set(observations)} do not fit the env, which has {keys}")
        for key, array in observations.items():
            _check_shapes(f"{name}[{key!r}]", array, space.spaces[key])
    elif observations.shape[1:] != space.shape:
        raise ValueError(f"{name} of shape {observations.shape[1:]} do not fit the observation space of the env, {space}")


# --- Loaders


def _missing(extra: str, package: str, error: ImportError) -> ImportError:
    return ImportError(f'{package} is needed for this dataset, it comes with: pip install "sb3-flow[{extra}]" ({error})')


def load_ogbench(name: str, path: str | Path | None = None, **env_kwargs) -> Transitions:
    """
    A dataset of OGBench (https://arxiv.org/abs/2410.20092) for one of its single tasks, with the rewards of that task.

    Bootstrapping stops where the task is solved (``masks``), not at the end of a trajectory (``terminals``).

    :param name: e.g. "cube-single-play-singletask-v0", or "...-singletask-task3-v0"
    :param path: The ``.npz`` file, or the folder it is in. If None, OGBench downloads it to ~/.ogbench/data.
    :param env_kwargs: For the environment of the task, e.g. ``success_timing="post"``
    :return: transitions
    """
    try:
        import ogbench
        from ogbench.relabel_utils import relabel_dataset
    except ImportError as error:
        raise _missing("offline", "ogbench", error) from error

    if "-singletask" not in name:
        raise ValueError(f"{name} has no rewards: name a single task of it, e.g. {name.replace('-v0', '-singletask-v0')}")
    words = name.split("-")
    task = words.index("singletask")
    file_name = "-".join(words[:task] + words[-1:])
    env_name = "-".join(words[: task - 1] + words[task:])
    if path is None:
        ogbench.download_datasets([file_name])
        path = Path("~/.ogbench/data").expanduser()
    path = Path(path)
    file = path / f"{file_name}.npz" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no dataset file {file}")

    with np.load(file, allow_pickle=False) as npz:
        _check_keys(npz.files, ["observations", "actions", "terminals", "qpos"], file)
    env = gym.make(env_name, **env_kwargs)
    dtype = np.uint8 if "visual" in name else np.float32
    data = ogbench.load_dataset(str(file), ob_dtype=dtype, add_info=True)
    relabel_dataset(env_name, env, data)
    env.close()
    return Transitions.from_arrays(
        data["observations"],
        data["actions"],
        data["rewards"],
        data["next_observations"],
        dones=1.0 - data["masks"],
        episode_ends=data["terminals"] > 0,
    )


def load_minari(dataset_id: str) -> Transitions:
    """
    A dataset of Minari, local or downloaded.

    :param dataset_id: NAMESPACE/NAME-vK
    :return: transitions
    """
    try:
        import minari
    except ImportError as error:
        raise _missing("offline", "minari", error) from error

    dataset = minari.load_dataset(dataset_id, download=dataset_id not in minari.list_local_datasets())
    parts = []
    for episode in dataset.iterate_episodes():
        observations = _convert(episode.observations)
        n_steps = len(episode.rewards)
        ends = np.zeros(n_steps, dtype=bool)
        ends[-1] = True
        parts.append(
            Transitions.from_arrays(
                _map(lambda array, n=n_steps: array[:n], observations),  # type: ignore[misc]
                episode.actions,
                episode.rewards,
                _map(lambda array: array[1:], observations),
                dones=episode.terminations,
                episode_ends=ends,
            )
        )
    return concatenate(parts)


def load_hdf5(path: str | Path) -> Transitions:
    """
    A dataset in D4RL's layout: ``observations, actions, rewards, terminals, timeouts`` and, maybe, ``next_observations``.

    :param path: HDF5 file
    :return: transitions
    """
    try:
        import h5py
    except ImportError as error:
        raise _missing("offline", "h5py", error) from error

    with h5py.File(path, "r") as file:
        return _from_mapping({key: file[key][()] for key in file if isinstance(file[key], h5py.Dataset)}, path)


def load_npz(path: str | Path) -> Transitions:
    """
    A ``.npz`` file with D4RL's names, or with ours (``dones``, ``episode_ends``).

    :param path: ``.npz`` file
    :return: transitions
    """
    with np.load(path, allow_pickle=False) as npz:
        return _from_mapping({key: npz[key] for key in npz.files}, path)


def _check_keys(keys: Sequence[str], needed: list[str], source: Any) -> None:
    missing = [key for key in needed if key not in keys]
    if missing:
        raise ValueError(f"{source} has no {', '.join(map(repr, missing))}: it has {', '.join(map(repr, keys))}")


def _from_mapping(data: Mapping[str, Any], source: Any) -> Transitions:
    """D4RL's names (terminals, timeouts), or those of :class:`Transitions` (dones, episode_ends)."""
    _check_keys(list(data), ["observations", "actions", "rewards"], source)
    dones = data.get("dones", data.get("terminals"))
    ends = data.get("episode_ends")
    if ends is None:
        dones_or_zeros = np.zeros(len(data["rewards"])) if dones is None else np.asarray(dones).reshape(-1)
        ends = (dones_or_zeros > 0) | (np.asarray(data.get("timeouts", np.zeros(len(dones_or_zeros)))).reshape(-1) > 0)
    return Transitions.from_arrays(
        data["observations"], data["actions"], data["rewards"], data.get("next_observations"), dones, ends
    )


def from_replay_buffer(buffer: ReplayBuffer) -> Transitions:
    """
    The content of an SB3 replay buffer. Its actions, which the buffer holds in [-1, 1], are brought back to env units.

    :param buffer: Replay buffer, of any number of environments
    :return: transitions
    """
    if buffer.optimize_memory_usage:
        raise ValueError("A replay buffer with `optimize_memory_usage=True` does not hold the last next observations")
    size = buffer.size()
    # Oldest first, one environment after the other
    order = (np.arange(size) + (buffer.pos if buffer.full else 0)) % buffer.buffer_size

    def flatten(array: np.ndarray) -> np.ndarray:
        return array[order].swapaxes(0, 1).reshape(-1, *array.shape[2:])

    actions = flatten(buffer.actions)
    assert isinstance(buffer.action_space, spaces.Box), "A replay buffer of continuous actions is needed"
    low, high = buffer.action_space.low, buffer.action_space.high
    actions = low + 0.5 * (actions.reshape(-1, *low.shape) + 1.0) * (high - low)
    dones, timeouts = flatten(buffer.dones), flatten(buffer.timeouts)
    ends = dones > 0
    ends[size - 1 :: size] = True
    return Transitions.from_arrays(
        _map(flatten, buffer.observations),
        actions,
        flatten(buffer.rewards),
        _map(flatten, buffer.next_observations),
        dones=dones * (1 - timeouts),
        episode_ends=ends,
    )


Dataset = str | Path | Transitions | ReplayBuffer | Mapping[str, Any]


def load_dataset(dataset: Dataset | Sequence[Dataset], allow_pickle: bool = False, **kwargs) -> Transitions:
    """
    Load a dataset, or several at once, which are concatenated.

    :param dataset: One of, or a list of,

        - ``"ogbench:NAME"`` or ``"ogbench:NAME@PATH"``, see :func:`load_ogbench`
        - ``"minari:NAMESPACE/NAME-vK"``, see :func:`load_minari`
        - the path of an HDF5 file (``.hdf5``, ``.h5``), see :func:`load_hdf5`, or of an ``.npz`` file, see :func:`load_npz`
        - the path of the ``.pkl`` file of a replay buffer, with ``allow_pickle=True``
        - a mapping of arrays in memory, a replay buffer, or :class:`Transitions`
    :param allow_pickle: Whether a pickle may be loaded. This runs code from the file: only for files you trust.
    :param kwargs: For the loader
    :return: transitions
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is not a dataset, naming what is missing or wrong
    """
    if isinstance(dataset, (list, tuple)):
        return concatenate([load_dataset(part, allow_pickle, **kwargs) for part in dataset])
    if isinstance(dataset, Transitions):
        return dataset
    if isinstance(dataset, ReplayBuffer):
        return from_replay_buffer(dataset)
    if isinstance(dataset, Mapping):
        return _from_mapping(dataset, "The dataset")
    if not isinstance(dataset, (str, Path)):
        raise ValueError(f"A dataset cannot be a {type(dataset).__name__}, see sb3_flow.common.datasets.load_dataset")

    kind, _, name = str(dataset).partition(":")
    if kind == "ogbench":
        name, _, path = name.partition("@")
        return load_ogbench(name, **({"path": path} if path else {}), **kwargs)
    if kind == "minari":
        return load_minari(name)
    path_ = Path(dataset).expanduser()
    loaders = {".hdf5": load_hdf5, ".h5": load_hdf5, ".npz": load_npz, ".pkl": None}
    if path_.suffix not in loaders:
        raise ValueError(
            f"Unknown dataset {str(dataset)!r}: it must be ogbench:NAME, minari:NAMESPACE/NAME-vK, "
            f"or a file ending in {', '.join(loaders)}"
        )
    if not path_.is_file():
        raise FileNotFoundError(f"There is no dataset file {path_}")
    loader = loaders[path_.suffix]
    if loader is not None:
        return loader(path_)
    if not allow_pickle:
        raise ValueError(f"{path_} is a pickle, which can run any code when it is loaded: trust it with `allow_pickle=True`")
    return from_replay_buffer(load_from_pkl(path_))
