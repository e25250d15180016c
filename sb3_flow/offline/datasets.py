"""
Offline datasets: OGBench, Minari, D4RL, d3rlpy, robomimic and others in HDF5, ``.npz``, arrays in memory, lists of transitions
or episodes, tables, and SB3's replay buffers, in one structure. What their arrays may be called is the table in
:mod:`sb3_flow.offline.layouts`.

Nothing that is loaded is ever executed: pickles, and pickled arrays in ``.npz`` files, are read only if the caller says
``allow_pickle=True``.

Loading arrays from files needs no more than 1.1 times the memory of what they become, and, of an HDF5 file with chunks of
more than a MB, one chunk. Where several datasets or episodes
are concatenated, the largest of them is held twice for a moment. OGBench's environment of the task, up to some hundred MB,
is made and freed before.
"""

import dataclasses
import difflib
import gc
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl

from sb3_flow.offline.layouts import describe, find_array, has_role, recognise, stack, warn_of_unknown
from sb3_flow.offline.transitions import DatasetWarning, Transitions, join, map_arrays, named_arrays


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Whatever a reader says is wrong with a dataset is a ValueError that names it."""
    prefix = f"{source}: " if source else ""
    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError):
        raise
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error
    except Exception as error:
        raise ValueError(f"{prefix}it cannot be read ({type(error).__name__}: {error})") from error


@contextmanager
def _naming_warnings(source: str) -> Iterator[None]:
    """What is said about each part of a dataset is said once, with the name of the dataset."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DatasetWarning)
        yield
    ours = [str(warning.message) for warning in caught if warning.category is DatasetWarning]
    for message in dict.fromkeys(ours):
        warnings.warn(f"{source}: {message}" if source else message, DatasetWarning)
    for warning in caught:
        if warning.category is not DatasetWarning:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _missing(extra: str, package: str, error: ImportError) -> ImportError:
    return ImportError(f'{package} is needed for this dataset, it comes with: pip install "sb3-flow[{extra}]" ({error})')


def load_ogbench(name: str, path: str | Path | None = None, need_rewards: bool = True, **env_kwargs) -> Transitions:
    """
    A dataset of OGBench (https://arxiv.org/abs/2410.20092) for one of its single tasks, with the rewards of that task.

    Bootstrapping stops where the task is solved (``masks``), not at the end of a trajectory (``terminals``).

    :param name: e.g. "cube-single-play-singletask-v0", or "...-singletask-task3-v0"
    :param path: The ``.npz`` file, or the folder it is in. If None, OGBench downloads it to ~/.ogbench/data.
    :param need_rewards: Whether there must be rewards. If not, ``name`` need not name a single task.
    :param env_kwargs: For the environment of the task. (Its ``success_timing`` is about its own steps: the rewards of
        a dataset are those of the observation they come with.)
    :return: transitions
    """
    try:
        import ogbench
        from ogbench.relabel_utils import relabel_dataset
    except ImportError as error:
        raise _missing("offline", "ogbench", error) from error

    words = name.split("-")
    if "singletask" in words:
        task = words.index("singletask")
        file_name = "-".join(words[:task] + words[-1:])
        env_name = "-".join(words[: task - 1] + words[task:])
    elif need_rewards:
        raise ValueError(f"{name} has no rewards: name a single task of it, e.g. {name.replace('-v0', '-singletask-v0')}")
    else:
        file_name = name
        _refuse(env_kwargs)
    if path is None:
        ogbench.download_datasets([file_name])
        path = "~/.ogbench/data"
    path = Path(path).expanduser()
    file = path / f"{file_name}.npz" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no dataset file {file}")

    with _naming(str(file)), zipfile.ZipFile(file) as archive:
        arrays = _npz_arrays(archive)
        missing = [key for key in ("observations", "actions", "terminals", "qpos") if key not in arrays]
        if missing:
            raise ValueError(f"it has no {', '.join(map(repr, missing))}: it has {', '.join(map(repr, arrays))}")
        ends = np.asarray(arrays["terminals"]) > 0
        dones, rewards = np.zeros_like(ends), np.zeros(len(ends), dtype=np.float32)
        if file_name != name:
            # The states of the simulator tell where the task is solved, for which no images are needed
            states: dict[str, Any] = {key: np.asarray(arrays[key]) for key in ("qpos", "button_states") if key in arrays}
            env = gym.make(env_name.removeprefix("visual-"), **env_kwargs)
            relabel_dataset(env_name, env, states)
            env.close()
            # The last row of a trajectory has no next observation, and is dropped
            rewards, dones = states["rewards"], ~ends & (states["masks"] == 0)
            # Both can be large, and go before the arrays come
            del states, env
            gc.collect()
        return Transitions.from_arrays(arrays["observations"], arrays["actions"], rewards, dones=dones, episode_ends=ends)


def load_minari(dataset_id: str, need_rewards: bool = True) -> Transitions:
    """
    A dataset of Minari, local or downloaded.

    :param dataset_id: NAMESPACE/NAME-vK
    :param need_rewards: Whether there must be rewards
    :return: transitions
    """
    try:
        import minari
    except ImportError as error:
        raise _missing("offline", "minari", error) from error

    dataset = minari.load_dataset(dataset_id, download=dataset_id not in minari.list_local_datasets())

    def episodes() -> Iterator[Transitions]:
        for episode in dataset.iterate_episodes():
            with _naming(f"episode {episode.id}"):
                arrays = recognise(_as_mapping(episode) or {}, is_episode=True, need_rewards=need_rewards).arrays
                yield Transitions.from_arrays(**arrays)

    return join(episodes(), int(dataset.total_steps))


def load_hdf5(path: str | Path, need_rewards: bool = True) -> Transitions:
    """
    An HDF5 file with one array of each kind (D4RL, d3rlpy 1, ...), or with a group for each episode, at the top (Minari's
    files, ManiSkill) or in a group ``data`` (robomimic), or with numbered arrays for each episode (d3rlpy 2).

    :param path: HDF5 file
    :param need_rewards: Whether there must be rewards
    :return: transitions
    """
    try:
        import h5py
    except ImportError as error:
        raise _missing("offline", "h5py", error) from error

    if not h5py.is_hdf5(path):
        raise ValueError(_is_not_a("HDF5", path))
    with h5py.File(path, "r") as file:
        return _from_mapping(file, need_rewards)


def load_npz(path: str | Path, allow_pickle: bool = False, need_rewards: bool = True) -> Transitions:
    """
    An ``.npz`` file. Dictionaries of observations are arrays with names like "observations/image".

    :param path: ``.npz`` file
    :param allow_pickle: Whether pickled arrays may be loaded. This runs code from the file: only for files you trust.
    :param need_rewards: Whether there must be rewards
    :return: transitions
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(_is_not_a(".npz", path))
    with zipfile.ZipFile(path) as archive:
        return _from_mapping(_npz_arrays(archive, allow_pickle), need_rewards)


def _is_not_a(kind: str, path: str | Path) -> str:
    with open(path, "rb") as file:
        return f"it is no {kind} file, or not a whole one: it starts with {file.read(20)!r}"


def _npz_arrays(archive: zipfile.ZipFile, allow_pickle: bool = False) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for name in (name for name in archive.namelist() if name.endswith(".npy")):
        key = name.removesuffix(".npy")
        with _naming(key):
            array = _NpzArray(archive, name, allow_pickle)
            if array.dtype.hasobject and allow_pickle:
                value = np.asarray(array)
                # A dictionary that was saved as an array has no dimensions
                arrays[key] = value if value.shape else value.item()
            else:
                arrays[key] = array if array.shape or array.dtype.hasobject else np.asarray(array)
    return arrays


class _NpzArray:
    """An array in an ``.npz`` file, to be read by blocks of rows: what NumPy reads of it, it reads whole."""

    def __init__(self, archive: zipfile.ZipFile, name: str, allow_pickle: bool):
        self._open = partial(archive.open, name)
        self._allow_pickle = allow_pickle
        with self._open() as file:
            self.shape, self._fortran_order, self.dtype = self._read_header(file)
            size = archive.getinfo(name).file_size - file.tell()
        if not self.dtype.hasobject and size != int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize:
            raise ValueError(f"it is damaged: {size} bytes cannot be {self.dtype} of shape {self.shape}")

    @staticmethod
    def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(file)
        return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        with self._open() as file:
            array = np.lib.format.read_array(file, allow_pickle=self._allow_pickle)
            self._check_end(file)
        return np.asarray(array, dtype=dtype)

    def blocks(self, n_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        if self._fortran_order:
            yield 0, np.asarray(self)
            return
        row_size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with self._open() as file:
            self._read_header(file)
            for start in range(0, len(self), n_rows):
                rows = min(n_rows, len(self) - start)
                yield start, np.frombuffer(file.read(rows * row_size), self.dtype).reshape(rows, *self.shape[1:])
            self._check_end(file)

    @staticmethod
    def _check_end(file: Any) -> None:
        # The checksum is compared when there is nothing left to read
        if file.read(1):
            raise ValueError("it is damaged: it does not end where it should")


# --- Arrays with names


def _as_mapping(data: Any) -> Mapping[Any, Any] | None:
    """A dataset, an episode or a transition as a mapping. None if it has no names."""
    if isinstance(data, Mapping):
        return data
    if isinstance(data, np.ndarray) and data.dtype.names:
        return {name: data[name] for name in data.dtype.names}
    if hasattr(data, "columns") and hasattr(data, "to_numpy"):
        return {str(column): data[column] for column in data.columns}
    if hasattr(data, "_asdict"):
        return data._asdict()
    if dataclasses.is_dataclass(data) and not isinstance(data, (type, Transitions)):
        return {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    return None


def _from_mapping(data: Mapping[Any, Any], need_rewards: bool) -> Transitions:
    parts, are_episodes = _parts(data)
    return _from_parts(parts, are_episodes, need_rewards)


def _has_actions(data: Any) -> bool:
    return isinstance(data, Mapping) and any(has_role(str(name), "actions") for name in data)


def _parts(data: Mapping[Any, Any]) -> tuple[dict[str, Mapping[Any, Any]], bool]:
    """What the arrays of a dataset are in, and whether that is an episode each."""
    if _has_actions(data):
        return {"": data}, False
    inner = data.get("data")
    if _has_actions(inner):
        others = {name: value for name, value in data.items() if name not in ("data", "meta")}
        return {"data": {**others, **dict(data.get("meta") or {}), **dict(inner or {})}}, False
    for prefix, groups in (("data/", inner), ("", data)):
        if isinstance(groups, Mapping):
            # One without actions is not overlooked
            with_actions = [name for name, group in groups.items() if _has_actions(group)]
            kinds = {_NUMBER.sub("#", str(name)) for name in with_actions}
            names = [name for name in groups if (kind := _NUMBER.sub("#", str(name))) in kinds and kind.endswith("#")]
            if names:
                if len(kinds) > 1:
                    odd = [name for name in with_actions if _NUMBER.sub("#", str(name)) != min(kinds)]
                    raise ValueError(
                        f"there are groups with actions of more than one kind, {', '.join(map(repr, sorted(kinds)))} (such as "
                        f"{odd[0]!r}): give those of one kind, as a list of dictionaries or in a file of their own"
                    )
                # (robomimic's mask is a list of names for each split)
                warn_of_unknown(name for name in {*data, *groups} - {*names, "data", "mask"})
                return {f"{prefix}{name}": groups[name] for name in sorted(names, key=_natural_order)}, True
    if "columns" in data and "num_episodes" in data:
        episodes: list[dict[str, Any]] = [{} for _ in range(int(np.asarray(data["num_episodes"])))]
        for name, value in data.items():
            column, _, number = str(name).rpartition("_")
            if column and number.isdigit():
                if int(number) >= len(episodes):
                    raise ValueError(f"there is {name!r}, but num_episodes is {len(episodes)}")
                episodes[int(number)][column] = value
        return {f"episode {number}": episode for number, episode in enumerate(episodes)}, True
    needed = ["observations", "actions"]
    raise ValueError(describe(data, [role for role in needed if not any(has_role(str(name), role) for name in data)]))


_NUMBER = re.compile(r"\d+$")


def _natural_order(name: Any) -> list[Any]:
    """demo_2 is before demo_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def _from_parts(parts: Mapping[str, Mapping[Any, Any]], are_episodes: bool | None, need_rewards: bool) -> Transitions:
    has = {None: "next observations", True: "a final observation", False: "neither next observations nor a final one"}
    transitions: list[Transitions] = []
    kinds: list[bool | None] = []
    ambiguous: dict[str, list[np.ndarray]] = {}
    dtypes: dict[str, dict[str, str]] = {}
    for name, part in parts.items():
        with _naming(name):
            recognised = recognise(part, are_episodes, need_rewards)
            kinds.append(recognised.has_final_observations)
            if kinds[-1] != kinds[0] and (are_episodes or None not in kinds):
                raise ValueError(f"it has {has[kinds[-1]]}, and {next(iter(parts))} has {has[kinds[0]]}")
            for array_name, array in named_arrays("observations", recognised.arrays["observations"]):
                _check_same_scale(dtypes.setdefault(array_name, {}), array_name, array, name)
            transitions.append(Transitions.from_arrays(**recognised.arrays))
            if need_rewards and recognised.ambiguous:
                ambiguous.setdefault(recognised.ambiguous, []).append(transitions[-1].dones[transitions[-1].episode_ends])
    for name, dones in ambiguous.items():
        _warn_if_each_end_is_done(name, np.concatenate(dones))
    return transitions.pop() if len(transitions) == 1 else _join_and_free(transitions)


def _check_same_scale(dtypes: dict[str, str], array_name: str, array: Any, part: str) -> None:
    """Bytes and fractions are not the same, also where both become floating point numbers."""
    dtype = str(getattr(array, "dtype", "")).removeprefix("torch.")
    if dtype == "uint8" or dtype.startswith("float"):
        dtypes.setdefault("uint8" if dtype == "uint8" else "float32", part)
    if len(dtypes) > 1:
        first, second = (f"{kind} data in {where}" for kind, where in dtypes.items())
        raise ValueError(
            f"Datasets to be concatenated must have the same shapes and dtypes: {array_name} is {first}, {second}"
        )


def _warn_if_each_end_is_done(name: str, dones: np.ndarray) -> None:
    """Flags of terminations, those where episodes ended."""
    # The last episode may not be over
    if (dones[:-1] if len(dones) > 1 else dones).all():
        warnings.warn(
            f"{name!r} is set wherever an episode ended, and each of them is taken as terminated. If some were truncated, say "
            "so with 'truncated' or 'timeouts'",
            DatasetWarning,
        )


def _is_transition(data: Mapping[Any, Any]) -> bool:
    """Whether it is a single transition, and not an episode."""
    actions, rewards = (find_array(role, data) for role in ("actions", "rewards"))
    if actions is None:
        return False
    if rewards is not None and np.ndim(rewards) == 0:
        return True
    return np.ndim(actions) <= 1 and (rewards is None or np.shape(rewards) == (1,))


def from_replay_buffer(buffer: ReplayBuffer) -> Transitions:
    """
    The content of an SB3 replay buffer. Its actions, which the buffer holds in [-1, 1], are brought back to env units.

    :param buffer: Replay buffer, of any number of environments
    :return: transitions
    """
    if buffer.optimize_memory_usage:
        raise ValueError("A replay buffer with `optimize_memory_usage=True` does not hold the last next observations")
    size = buffer.size()
    if not size or not isinstance(buffer.action_space, spaces.Box):
        raise ValueError(
            f"A replay buffer must hold transitions, and continuous actions, not {size} and {buffer.action_space}"
        )
    # Oldest first, one environment after the other
    order = (np.arange(size) + (buffer.pos if buffer.full else 0)) % buffer.buffer_size

    def flatten(array: np.ndarray) -> np.ndarray:
        return array[order].swapaxes(0, 1).reshape(-1, *array.shape[2:])

    actions = flatten(buffer.actions)
    low, high = buffer.action_space.low, buffer.action_space.high
    actions = low + 0.5 * (actions.reshape(-1, *low.shape) + 1.0) * (high - low)
    dones, timeouts = flatten(buffer.dones), flatten(buffer.timeouts)
    ends = dones > 0
    ends[size - 1 :: size] = True
    transitions = Transitions.from_arrays(
        map_arrays(flatten, buffer.observations),
        actions,
        flatten(buffer.rewards),
        map_arrays(flatten, buffer.next_observations),
        dones=dones * (1 - timeouts),
        episode_ends=ends,
    )
    if not buffer.handle_timeout_termination:
        _warn_if_each_end_is_done("dones", transitions.dones[transitions.episode_ends])
    return transitions


Dataset = str | Path | Transitions | ReplayBuffer | Mapping[str, Any] | Sequence[Any]


def load_dataset(
    dataset: Dataset | Sequence[Dataset],
    allow_pickle: bool = False,
    reward_scale: float = 1.0,
    reward_shift: float = 0.0,
    need_rewards: bool = True,
    **kwargs,
) -> Transitions:
    """
    Load a dataset, or several at once, which are concatenated.

    :param dataset: One of, or a list of,

        - ``"ogbench:NAME"`` or ``"ogbench:NAME@PATH"``, see :func:`load_ogbench`
        - ``"minari:NAMESPACE/NAME-vK"``, see :func:`load_minari`
        - the path of an HDF5 file (``.hdf5``, ``.h5``), see :func:`load_hdf5`, or of an ``.npz`` file, see :func:`load_npz`
        - the path of a ``.pkl`` file that holds one of the following, with ``allow_pickle=True``
        - arrays or tensors by name (a dictionary, a table of pandas), one of it for each episode, or a list of
          transitions, each a dictionary: see :mod:`sb3_flow.offline.layouts` for the names
        - a replay buffer of SB3, or :class:`.Transitions`
    :param allow_pickle: Whether pickles may be loaded. This runs code from the file: only for files you trust.
    :param reward_scale: Factor of all rewards
    :param reward_shift: Added to all rewards after that (-1 for the antmaze datasets of D4RL, as is usual)
    :param need_rewards: Whether there must be rewards. If not, they are zeros where there are none.
    :param kwargs: For the environment of a single task of OGBench, see :func:`load_ogbench`
    :return: transitions
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is not a dataset, naming what is missing or wrong, or an argument is not known
    """
    check_reward_arguments(reward_scale, reward_shift)
    _refuse_misspelt(kwargs)
    if {*_OF_SET_DATASET} & kwargs.keys():
        raise ValueError("`clip_actions`, `device` and `validation` are for `set_dataset()` of an algorithm, which has bounds")
    transitions = _load(dataset, allow_pickle, need_rewards, kwargs)
    if len(transitions) == 0:
        raise ValueError("The dataset is empty: no transition has a next observation")
    if reward_scale == 1 and reward_shift == 0:
        return transitions
    # Not in place: the arrays may be the caller's
    return replace(transitions, rewards=np.float32(reward_scale) * transitions.rewards + np.float32(reward_shift))


_OF_SET_DATASET = ("clip_actions", "device", "validation")
_OF_LOAD_DATASET = ("allow_pickle", "reward_scale", "reward_shift", "need_rewards")


def _refuse_misspelt(kwargs: dict[str, Any]) -> None:
    """What is not known is for the environment of OGBench's tasks, which may take anything."""
    for name in ("dataset_dir", "dataset_path"):
        # (those of OGBench's own function)
        if name in kwargs:
            raise ValueError(f'unknown argument {name!r}: where the files of OGBench are is said by "ogbench:NAME@PATH"')
    for name in kwargs.keys() - {*_OF_SET_DATASET}:
        for close in difflib.get_close_matches(name, _OF_SET_DATASET + _OF_LOAD_DATASET, 1, cutoff=0.7):
            raise ValueError(f"unknown argument {name!r} (did you mean {close!r}?)")


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise ValueError(
            f"unknown argument {', '.join(map(repr, kwargs))}: only single tasks of OGBench have others, of their environment"
        )


def check_reward_arguments(reward_scale: Any = 1.0, reward_shift: Any = 0.0) -> None:
    """
    :param reward_scale: See :func:`load_dataset`
    :param reward_shift: See :func:`load_dataset`
    :raises ValueError: if one of them is not a finite number
    """
    for name, value in (("reward_scale", reward_scale), ("reward_shift", reward_shift)):
        if not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, it is {value!r}")


def dataset_name(dataset: Any) -> str | list[Any] | None:
    """
    What a dataset can be loaded by again, from any working directory.

    :param dataset: See :func:`load_dataset`
    :return: the dataset, with absolute paths, or None if some of it is in memory
    """
    if isinstance(dataset, (list, tuple)):
        names = [dataset_name(part) for part in dataset]
        return None if None in names else names
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


def _load(dataset: Any, allow_pickle: bool, need_rewards: bool, kwargs: dict[str, Any]) -> Transitions:
    if isinstance(dataset, (str, Path)):
        with _naming_warnings(str(dataset)):
            return _load_named(dataset, allow_pickle, need_rewards, kwargs)
    with _naming_warnings(""), _naming(""):
        if isinstance(dataset, (list, tuple)) and not hasattr(dataset, "_asdict"):
            return _load_list(dataset, allow_pickle, need_rewards, kwargs)
        _refuse(kwargs)
        return _load_object(dataset, need_rewards)


def _load_list(datasets: Sequence[Any], allow_pickle: bool, need_rewards: bool, kwargs: dict[str, Any]) -> Transitions:
    if not datasets:
        raise ValueError("`dataset` is an empty list")
    mappings = [mapping for mapping in map(_as_mapping, datasets) if mapping is not None]
    if len(mappings) == len(datasets):
        _refuse(kwargs)
        if _is_transition(mappings[0]):
            return _from_mapping(stack("The list of transitions", mappings), need_rewards)
        if all(_has_actions(mapping) for mapping in mappings):
            return _from_parts({f"number {number}": part for number, part in enumerate(mappings)}, None, need_rewards)
    parts = []
    for number, dataset in enumerate(datasets):
        with _naming("" if isinstance(dataset, (str, Path)) else f"number {number}"):
            parts.append(_load(dataset, allow_pickle, need_rewards, kwargs))
    return parts[0] if len(parts) == 1 else _join_and_free(parts)


def _load_object(dataset: Any, need_rewards: bool) -> Transitions:
    if isinstance(dataset, Transitions):
        # It may have been made by hand
        return Transitions.from_arrays(**dataset.__dict__)
    if isinstance(dataset, ReplayBuffer):
        return from_replay_buffer(dataset)
    mapping = _as_mapping(dataset)
    if mapping is None:
        raise ValueError(
            f"A dataset cannot be a {type(dataset).__name__}: it must be arrays by name (a dictionary), or the file that they "
            "are in, as sb3_flow.offline.datasets.load_dataset explains"
        )
    return _from_mapping(mapping, need_rewards)


def _load_named(dataset: str | Path, allow_pickle: bool, need_rewards: bool, kwargs: dict[str, Any]) -> Transitions:
    kind, _, name = str(dataset).partition(":")
    if kind == "ogbench":
        name, _, path = name.partition("@")
        with _naming(str(dataset)):
            return load_ogbench(name, **({"path": path} if path else {}), need_rewards=need_rewards, **kwargs)
    _refuse(kwargs)
    if kind == "minari":
        with _naming(str(dataset)):
            return load_minari(name, need_rewards)

    path_ = Path(dataset).expanduser()
    suffixes = (".hdf5", ".h5", ".npz", ".pkl")
    if path_.suffix not in suffixes:
        raise ValueError(
            f"Unknown dataset {str(dataset)!r}: it must be ogbench:NAME, minari:NAMESPACE/NAME-vK, "
            f"or a file ending in {', '.join(suffixes)}"
        )
    if not path_.is_file():
        raise FileNotFoundError(f"There is no dataset file {path_}")
    with _naming(str(path_)):
        if path_.suffix == ".npz":
            return load_npz(path_, allow_pickle, need_rewards)
        if path_.suffix != ".pkl":
            return load_hdf5(path_, need_rewards)
        if not allow_pickle:
            raise ValueError("it is a pickle, which can run any code when it is loaded: trust it with `allow_pickle=True`")
        content = load_from_pkl(path_)
        if isinstance(content, (str, Path)):
            raise ValueError(f"it must hold a dataset, not a {type(content).__name__}")
        return _load(content, allow_pickle, need_rewards, {})
