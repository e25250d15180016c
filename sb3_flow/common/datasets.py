"""
Offline datasets: OGBench, Minari, D4RL's HDF5, ``.npz``, arrays in memory and SB3's replay buffers, in one structure.

Nothing that is loaded is ever executed: ``.npz`` files are read without pickle, pickled replay buffers only if the
caller says ``allow_pickle=True``.

Loading a dataset from files needs no more than 1.1 times the memory of its arrays, and they are held once. Where several
are concatenated, the largest of them is held twice for a moment. OGBench's environment of the task, up to some hundred
MB, is made and freed before.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl

from sb3_flow.common.transitions import Transitions, join, map_arrays


def _missing(extra: str, package: str, error: ImportError) -> ImportError:
    return ImportError(f'{package} is needed for this dataset, it comes with: pip install "sb3-flow[{extra}]" ({error})')


def load_ogbench(name: str, path: str | Path | None = None, **env_kwargs) -> Transitions:
    """
    A dataset of OGBench (https://arxiv.org/abs/2410.20092) for one of its single tasks, with the rewards of that task.

    Bootstrapping stops where the task is solved (``masks``), not at the end of a trajectory (``terminals``).

    :param name: e.g. "cube-single-play-singletask-v0", or "...-singletask-task3-v0"
    :param path: The ``.npz`` file, or the folder it is in. If None, OGBench downloads it to ~/.ogbench/data.
    :param env_kwargs: For the environment of the task. (Its ``success_timing`` is about its own steps: the rewards of
        a dataset are those of the observation they come with.)
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
        path = "~/.ogbench/data"
    path = Path(path).expanduser()
    file = path / f"{file_name}.npz" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no dataset file {file}")

    with np.load(file, allow_pickle=False) as npz:
        _check_keys(npz.files, ["observations", "actions", "terminals", "qpos"], file)
        # The states of the simulator tell where the task is solved, for which no images are needed
        states = {key: npz[key] for key in ("qpos", "button_states") if key in npz.files}
        env = gym.make(env_name.removeprefix("visual-"), **env_kwargs)
        relabel_dataset(env_name, env, states)
        env.close()
        rewards, masks = states["rewards"], states["masks"]
        # Both can be large, and go before the arrays come
        del states, env
        gc.collect()
        # The last row of a trajectory has no next observation, and is dropped
        ends = npz["terminals"] > 0
        dones = np.where(ends, 0.0, 1.0 - masks)
        return Transitions.from_arrays(
            _NpzArray(npz, "observations"), _NpzArray(npz, "actions"), rewards, dones=dones, episode_ends=ends
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

    def episodes() -> Iterator[Transitions]:
        for episode in dataset.iterate_episodes():
            ends = np.zeros(len(episode.rewards), dtype=bool)
            ends[-1] = True
            yield Transitions.from_arrays(
                map_arrays(lambda array: array[:-1], episode.observations),
                episode.actions,
                episode.rewards,
                map_arrays(lambda array: array[1:], episode.observations),
                dones=episode.terminations,
                episode_ends=ends,
            )

    return join(episodes(), int(dataset.total_steps))


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
        return _from_mapping({key: file[key] for key in file if isinstance(file[key], h5py.Dataset)}, path)


def load_npz(path: str | Path) -> Transitions:
    """
    A ``.npz`` file with D4RL's names, or with ours (``dones``, ``episode_ends``).

    :param path: ``.npz`` file
    :return: transitions
    """
    with np.load(path, allow_pickle=False) as npz:
        return _from_mapping({key: _NpzArray(npz, key) for key in npz.files}, path)


class _NpzArray:
    """An array in an ``.npz`` file, to be read by blocks of rows: what NumPy reads of it, it reads whole."""

    def __init__(self, npz: Any, key: str):
        self.npz, self.key = npz, key
        with npz.zip.open(f"{key}.npy") as file:
            self.shape, fortran_order, self.dtype = self._read_header(file)
        self.ndim = len(self.shape)
        if fortran_order or self.dtype.hasobject or self.ndim == 0:
            # Without pickle, NumPy refuses objects
            self.blocks = lambda n_rows: iter([(0, npz[key])])  # type: ignore[method-assign]

    @staticmethod
    def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(file)
        return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.npz[self.key], dtype=dtype)

    def blocks(self, n_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        row_size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with self.npz.zip.open(f"{self.key}.npy") as file:
            self._read_header(file)
            for start in range(0, len(self), n_rows):
                rows = min(n_rows, len(self) - start)
                yield start, np.frombuffer(file.read(rows * row_size), self.dtype).reshape(rows, *self.shape[1:])


def _check_keys(keys: Sequence[str], needed: list[str], source: Any) -> None:
    missing = [key for key in needed if key not in keys]
    if missing:
        raise ValueError(f"{source} has no {', '.join(map(repr, missing))}: it has {', '.join(map(repr, keys))}")


def _from_mapping(data: Mapping[str, Any], source: Any) -> Transitions:
    """Names of D4RL (terminals, timeouts), of OGBench (masks, terminals), or of :class:`Transitions` (dones, episode_ends)."""
    _check_keys(list(data), ["observations", "actions", "rewards"], source)
    dones, ends = data.get("dones", data.get("terminals")), data.get("episode_ends")
    if "masks" in data:
        # OGBench: where to bootstrap, and where trajectories end, are two things
        dones, ends = 1 - np.asarray(data["masks"]), np.asarray(data["terminals"]) > 0 if "terminals" in data else ends
    if ends is None and "timeouts" in data:
        ends = np.asarray(data["timeouts"]).reshape(-1) > 0
        if dones is not None:
            ends = ends | (np.asarray(dones).reshape(-1) > 0)
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
        map_arrays(flatten, buffer.observations),
        actions,
        flatten(buffer.rewards),
        map_arrays(flatten, buffer.next_observations),
        dones=dones * (1 - timeouts),
        episode_ends=ends,
    )


Dataset = str | Path | Transitions | ReplayBuffer | Mapping[str, Any]


def load_dataset(
    dataset: Dataset | Sequence[Dataset],
    allow_pickle: bool = False,
    reward_scale: float = 1.0,
    reward_shift: float = 0.0,
    **kwargs,
) -> Transitions:
    """
    Load a dataset, or several at once, which are concatenated.

    :param dataset: One of, or a list of,

        - ``"ogbench:NAME"`` or ``"ogbench:NAME@PATH"``, see :func:`load_ogbench`
        - ``"minari:NAMESPACE/NAME-vK"``, see :func:`load_minari`
        - the path of an HDF5 file (``.hdf5``, ``.h5``), see :func:`load_hdf5`, or of an ``.npz`` file, see :func:`load_npz`
        - the path of the ``.pkl`` file of a replay buffer, with ``allow_pickle=True``
        - a mapping of arrays in memory, a replay buffer, or :class:`Transitions`
    :param allow_pickle: Whether a pickle may be loaded. This runs code from the file: only for files you trust.
    :param reward_scale: Factor of all rewards
    :param reward_shift: Added to all rewards after that (-1 for the antmaze datasets of D4RL, as is usual)
    :param kwargs: For the loader of OGBench
    :return: transitions
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is not a dataset, naming what is missing or wrong
    """
    check_reward_arguments(reward_scale, reward_shift)
    if isinstance(dataset, (list, tuple)):
        parts = [load_dataset(part, allow_pickle, reward_scale, reward_shift, **kwargs) for part in dataset]
        if not parts:
            raise ValueError("`dataset` is an empty list")
        return parts[0] if len(parts) == 1 else _join_and_free(parts)
    transitions = _load(dataset, allow_pickle, kwargs)
    if reward_scale == 1 and reward_shift == 0:
        return transitions
    # Not in place: the arrays may be the caller's
    return replace(transitions, rewards=np.float32(reward_scale) * transitions.rewards + np.float32(reward_shift))


def check_reward_arguments(reward_scale: Any = 1.0, reward_shift: Any = 0.0) -> None:
    """
    :param reward_scale: See :func:`load_dataset`
    :param reward_shift: See :func:`load_dataset`
    :raises ValueError: if one of them is not a finite number
    """
    for name, value in (("reward_scale", reward_scale), ("reward_shift", reward_shift)):
        if not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, it is {value!r}")


def dataset_name(dataset: Any) -> str | list[str] | None:
    """
    What a dataset can be loaded by again, from any working directory.

    :param dataset: See :func:`load_dataset`
    :return: the dataset, with absolute paths, or None if some of it is in memory
    """
    if isinstance(dataset, (list, tuple)):
        names = [dataset_name(part) for part in dataset]
        return None if None in names else names  # type: ignore[return-value]
    if not isinstance(dataset, (str, Path)):
        return None
    name = str(dataset)
    before, at, path = name.partition("@") if name.startswith("ogbench:") else ("", "", name)
    if name.startswith("minari:") or not path:
        return name
    return f"{before}{at}{Path(path).expanduser().absolute()}"


def _join_and_free(parts: list[Transitions]) -> Transitions:
    # Memory is taken as it is written to, and each part is given back as soon as it is copied
    total = sum(map(len, parts))
    return join((parts.pop(0) for _ in range(len(parts))), total)


def _load(dataset: Any, allow_pickle: bool, kwargs: dict[str, Any]) -> Transitions:
    kind, _, name = str(dataset).partition(":") if isinstance(dataset, (str, Path)) else ("", "", "")
    if kind == "ogbench":
        name, _, path = name.partition("@")
        return load_ogbench(name, **({"path": path} if path else {}), **kwargs)
    if kwargs:
        raise ValueError(f"{', '.join(map(repr, kwargs))} is for datasets of OGBench, not for this one")
    if kind == "minari":
        return load_minari(name)
    if isinstance(dataset, Transitions):
        # It may have been made by hand
        return Transitions.from_arrays(**dataset.__dict__)
    if isinstance(dataset, ReplayBuffer):
        return from_replay_buffer(dataset)
    if isinstance(dataset, Mapping):
        return _from_mapping(dataset, "The dataset")
    if not isinstance(dataset, (str, Path)):
        raise ValueError(f"A dataset cannot be a {type(dataset).__name__}, see sb3_flow.common.datasets.load_dataset")

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
    buffer = load_from_pkl(path_)
    if not isinstance(buffer, ReplayBuffer):
        raise ValueError(f"{path_} must hold a replay buffer, not a {type(buffer).__name__}")
    return from_replay_buffer(buffer)
