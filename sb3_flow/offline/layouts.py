"""
What the arrays of a dataset are called, and what that means: one table, ``NAMES``, of the names that public datasets
and libraries write.

Two things are told apart. Where an episode *terminated*, there is nothing to bootstrap from. Where it only *ended* (a time
limit, the end of a recording), there is. What an unknown name means is never guessed: it is an error if it looks like an
end flag, and a warning if it does not.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sb3_flow.offline.transitions import DatasetWarning, as_source, check_lengths, named_arrays, read_column, read_flags


class Names(NamedTuple):
    """
    A row of the table.

    :param role: What arrays of these names are
    :param names: Synonyms. A dataset has one of them, or several flags that are equal.
    :param meaning: Shape, or meaning of a 1 if they are flags
    :param written_by: Where these names come from
    """

    role: str
    names: tuple[str, ...]
    meaning: str
    written_by: str


#: The table. Where two rows have the same role, the names of the second one are looked for if there are none of the first.
NAMES = (
    Names(
        "observations",
        ("observations", "observation", "obs"),
        "(n, ...). Or one row more for each episode: its final observation.",
        "all; with final observations: Minari, imitation, ManiSkill",
    ),
    Names(
        "observations",
        ("states", "state"),
        "The same, if there are none of the names above. Beside them it is the state of a simulator, which is not needed.",
        "TD3; robomimic",
    ),
    Names("actions", ("actions", "action", "acts", "act"), "(n, ...), in env units.", "all"),
    Names("rewards", ("rewards", "reward", "rews", "rew", "next.rewards", "next.reward"), "(n,)", "all"),
    Names(
        "next_observations",
        (
            "next_observations", "next_observation", "next_obs", "obs_next", "new_obs",
            "next.observations", "next.observation", "next.obs",
        ),
        "Like the observations. If there are none, they are the observations of the following rows.",
        "D4RL, OGBench, SB3, imitation, robomimic, hil-serl, tianshou, RLlib, TorchRL",
    ),
    Names("next_observations", ("next_states", "next_state"), "The same, if there are none of the names above.", "TD3"),
    Names(
        "terminated",
        ("terminated", "terminateds", "terminations", "next.terminated", "is_terminal", "done_bool"),
        "The episode terminated.",
        "gymnasium, Minari, ManiSkill, d3rlpy 2, TorchRL, RLDS, TD3",
    ),
    Names(
        "terminals",
        ("terminals",),
        "The episode terminated. Beside masks or valids, or in OGBench's files (with qpos, without rewards), it only ended.",
        "D4RL, d3rlpy 1; OGBench",
    ),
    Names(
        "truncated",
        ("truncated", "truncateds", "truncations", "timeouts", "timeout", "next.truncated", "TimeLimit.truncated"),
        "The episode ended. It did not terminate, unless terminated or terminals say so.",
        "gymnasium, Minari, D4RL, d3rlpy, SB3, TorchRL",
    ),
    Names(
        "dones",
        ("dones", "done", "terminal", "next.done"),
        "The episode terminated, unless it was truncated. Beside terminated, terminals or masks, it ended. Beside "
        "episode_ends, or in a file with a group for each episode, nothing is bootstrapped from, and the rows may go on.",
        "SB3, gym, CleanRL, robomimic, imitation, hil-serl, LeRobot",
    ),
    Names("success", ("next.success",), "Beside next.done: a 0 tells that the episode did not terminate.", "LeRobot"),
    Names(
        "masks",
        ("masks", "not_done", "not_dones", "nonterminals"),
        "There is something to bootstrap from. A 0 does not end the episode.",
        "OGBench, hil-serl, IQL, TD3",
    ),
    Names(
        "discounts",
        ("discount", "discounts"),
        "Like masks, if they are 0 and 1, neither of them everywhere, and there are no flags of terminated.",
        "RLDS, dm_env",
    ),
    Names(
        "ends",
        ("episode_ends", "episode_terminals", "is_last", "dones_float"),
        "The episode ended. Or, instead of n flags, the number of rows up to the end of each episode.",
        "sb3-flow, d3rlpy 1, RLDS, IQL; Diffusion Policy",
    ),
    Names("starts", ("episode_starts", "is_first"), "It is the first row of an episode.", "Stable-Baselines, RLDS"),
    Names(
        "lengths",
        ("episode_lengths", "episode_length"),
        "The number of rows of each episode, if they are n in all. Else they are not needed.",
        "gymnasium; own files",
    ),
    Names("splits", ("indices",), "The number of rows before each episode, but for the first one.", "imitation"),
    Names(
        "episodes",
        ("episode_index", "episode_indices", "episode_id", "episode_ids", "eps_id", "traj_id", "traj_ids", "trajectory_id"),
        "The number or the name of the episode. It ended where the next row has another one.",
        "LeRobot, RLlib, TorchRL",
    ),
    Names(
        "order",
        ("frame_index", "timestamp", "timestamps"),
        "Numbers that do not go down within an episode. Not read if there are next observations.",
        "LeRobot",
    ),
    Names("valids", ("valids",), "A 0 is a row with nothing but the final observation of an episode.", "OGBench, compact"),
    Names(
        "not needed",
        (
            "infos", "info", "env_infos", "agent_infos", "metadata", "meta", "complementary_info", "env_states", "policy",
            "qpos", "qvel", "button_states", "success", "is_success", "index", "task_index", "task", "language_instruction",
            "episode_returns", "episode_return", "episode_reward", "episode_step", "step_count", "is_init", "agent_index",
            "unroll_id", "collector", "columns", "num_episodes", "total_size", "version",
        ),
        "Not read, and neither is what is inside of such a group, but for TimeLimit.truncated and collector's traj_ids.",
        "all",
    ),
)  # fmt: skip

_ROWS = {name.lower(): row for row in NAMES for name in row.names}
_OBSERVATIONS = ("observations", "next_observations")
# Flags of the state that a step starts from, where there are those of the next one
_OF_THE_START = ("done", "terminated", "truncated")
# Between the keys of nested observations. PyTorch's modules, which are called like them, cannot have a dot
_SEPARATOR = "_"
_TIME_LIMIT = "TimeLimit.truncated"
# Roles of what says where episodes ended, however they did
_RECORDED = ("ends", "starts", "lengths", "splits", "episodes", "last")

_LOOKS_LIKE_FLAG = re.compile(
    r"done|termin|trunc|time_?out|time_?limit|absorb|mask|valid|episode|traj|step_?type|discount"
    r"|(^|[^a-z])(ends?|ended|eo[est]|last|first|finals?|starts?|init|resets?|continues?|cont|finish(ed)?|term"
    r"|dw|game_?over|over|dead|died|alive|stop(s|ped)?|abort(s|ed)?|exit(s|ed)?|completed?|cut_?off|boundary|boundaries"
    r"|bootstraps?|begins?)([^a-z]|$)"
)
_LOOKS_LIKE_NUMBER = re.compile(r"(^|[^a-z])(eps?|episode|traj|trajectory|rollout|demo)s?_?(id|idx|index|num|number|no)s?$")
_LOOKS_LIKE_NEXT = re.compile("next|new_")
_CAMEL_CASE = re.compile("(?<=[a-z])(?=[A-Z])")


class Recognised(NamedTuple):
    """
    What a dataset was found to be.

    :param arrays: The arguments of :meth:`.Transitions.from_arrays`
    :param ambiguous: Name of the flags of terminations that may include time-outs, and do if they mark every end
    """

    arrays: dict[str, Any]
    ambiguous: str | None

    @property
    def has_final_observations(self) -> bool | None:
        """Whether there are more observations than actions. None if next observations make that unnecessary."""
        if self.arrays["next_observations"] is not None:
            return None
        (_, observations), *_ = named_arrays("observations", self.arrays["observations"])
        return len(observations) > len(self.arrays["actions"])


def recognise(data: Mapping[Any, Any], is_episode: bool | None = False, need_rewards: bool = True) -> Recognised:
    """
    Find out from their names what the arrays of a dataset are.

    :param data: Arrays by name, or nested dictionaries of them
    :param is_episode: Whether it is known to be one episode, which ends in the last row. If None, it is one unless it has
        flags, or next observations.
    :param need_rewards: Whether there must be rewards. If not, they are zeros where there are none.
    :return: the arguments of :meth:`.Transitions.from_arrays`
    :raises ValueError: if something is missing, contradicts something else, or is not known and looks like an end flag
    """
    named = _names(data)
    if _find_in(_ROWS["observations"], named) is not None:
        # Those of a simulator, beside observations
        named = {name: value for name, value in named.items() if _row(name) is not _ROWS["next_states"]}
    elif is_episode and _find("observations", named) is not None:
        warnings.warn(
            "The states are taken as observations. Those of robomimic's files are states of its simulator, which policies "
            "do not have: make observations of them with its dataset_states_to_obs.py",
            DatasetWarning,
        )
    observations, next_observations = (_as_observations(role, _find(role, named)) for role in _OBSERVATIONS)
    actions, rewards = _find("actions", named), _find("rewards", named)
    needed = dict(observations=observations, actions=actions) | (dict(rewards=rewards) if need_rewards else {})
    missing = [role for role, value in needed.items() if value is None]
    if missing:
        raise ValueError(describe(data, missing))
    actions = as_source("actions", actions)
    n = len(actions)
    if n == 0:
        raise ValueError("The dataset is empty")
    _check_unknown(named, n, next_observations is not None)
    if rewards is None:
        if "qpos" in named and "terminals" in named and "masks" not in named:
            named["episode_ends"] = named.pop("terminals")
        rewards = np.zeros(n, dtype=np.float32)
    flags = _Flags(named, n, is_episode, next_observations is not None)
    arrays = dict(observations=observations, actions=actions, rewards=rewards, next_observations=next_observations)
    dones, ends = flags.interpret(arrays)
    if next_observations is None and ends is not None:
        _check_order(named, ends)
    if need_rewards:
        flags.warn_of_what_is_missing(dones, ends)
    return Recognised(arrays | dict(dones=dones, episode_ends=ends), flags.ambiguous)


def describe(data: Mapping[Any, Any], missing: Sequence[str]) -> str:
    """
    :param data: What is not understood
    :param missing: Roles that nothing was found for
    :return: what there is, and what was expected
    """
    groups = [str(name) for name, value in data.items() if isinstance(value, Mapping)]
    arrays = [str(name) for name in data if str(name) not in groups]
    there = [f"the {what} {', '.join(map(repr, names))}" for what, names in (("arrays", arrays), ("groups", groups)) if names]
    synonyms = ", ".join(name for row in NAMES if row.role in missing for name in row.names if name != row.role)
    return (
        f"it has no {', '.join(map(repr, missing))} (nor {synonyms}), it has {' and '.join(there) or 'nothing'}. They must be "
        "at the top, or in numbered groups, one for each episode, at the top or in a group 'data'"
    )


# --- Names


@lru_cache(maxsize=1000)
def _row(name: str) -> Names | None:
    return _ROWS.get(name.lower())


def find_array(role: str, data: Mapping[Any, Any]) -> Any:
    """
    :param role: of the table
    :param data: arrays by name
    :return: the array with this role, None if there is none
    """
    return _find(role, _names(data))


def has_role(name: str, role: str) -> bool:
    """
    :param name: of an array
    :param role: of the table
    :return: whether it has this role
    """
    row = _row(name)
    return row is not None and row.role == role


def _is_needed(name: str) -> bool:
    row = _row(name.removeprefix("next.").partition(".")[0])
    return row is None or row.role != "not needed"


def _names(data: Mapping[Any, Any]) -> dict[str, Any]:
    """What is in a dataset: "next.done" is ``data["next"]["done"]``, ``data["next/done"]`` or ``data["next", "done"]``."""
    named: dict[str, Any] = {}
    for key, value in data.items():
        *groups, name = map(str, key) if isinstance(key, tuple) else str(key).split("/")
        inside = named
        for group in groups:
            inside = inside.setdefault(group, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{group!r} is an array, and {key!r} would be inside of it")
        inside[name] = value
    if isinstance(named.get("next"), Mapping):
        named |= {f"next.{name}": value for name, value in named.pop("next").items()}
    named = {name: value for name, value in named.items() if name not in _OF_THE_START or f"next.{name}" not in named}
    for name in ("infos", "info", "env_infos"):
        limits = _time_limits(named.get(name))
        if limits is not None:
            named[_TIME_LIMIT] = limits
    collector = named.get("collector")
    if isinstance(collector, Mapping) and "traj_ids" in collector:
        named["traj_ids"] = collector["traj_ids"]
    return named


def _time_limits(infos: Any) -> Any:
    """What the environment said of its time limit: an array among others, or in the dictionaries of the steps."""
    if isinstance(infos, Mapping):
        return infos.get(_TIME_LIMIT)
    if isinstance(infos, (list, tuple)) or (isinstance(infos, np.ndarray) and infos.dtype == object):
        steps = [info for info in infos if isinstance(info, Mapping)]
        if any(_TIME_LIMIT in info for info in steps) and len(steps) == len(infos):
            return [bool(info.get(_TIME_LIMIT)) for info in steps]
    return None


class _Parts(dict):
    """Arrays whose names have a prefix in common."""


@lru_cache(maxsize=1000)
def _part(name: str) -> tuple[str, str] | None:
    """("observation", "state") of "observation.state", None if it is no part of observations."""
    for group in (group for row in NAMES if row.role in _OBSERVATIONS for group in row.names):
        if name.lower().startswith(f"{group}."):
            return group, name[len(group) + 1 :]
    return None


def _find(role: str, named: Mapping[str, Any]) -> Any:
    """The array with this role, or the group of arrays. None if there is none."""
    arrays = (_find_in(row, named) for row in NAMES if row.role == role)
    return next((array for array in arrays if array is not None), None)


def _find_in(row: Names, named: Mapping[str, Any]) -> Any:
    """The array with one of these names, or the group of arrays. None if there is none."""
    found = {name: value for name, value in named.items() if _row(name) is row and value is not None}
    for name, value in named.items():
        group, key = _part(name) or ("", "")
        if group in row.names:
            parts = found.setdefault(group, _Parts())
            if not isinstance(parts, _Parts):
                raise ValueError(f"{group!r} and {name!r} are both {row.role}: leave one of them out")
            _put(group, parts, key.replace(".", _SEPARATOR), value)
    if len(found) > 1:
        raise ValueError(f"{' and '.join(map(repr, found))} are both {row.role}: leave one of them out")
    for value in found.values():
        # LeRobot's observation.state by itself is a vector
        return next(iter(value.values())) if isinstance(value, _Parts) and len(value) == 1 else value
    return None


def _as_observations(name: str, value: Any) -> Any:
    """An array, or a dictionary of the arrays of all levels of nested ones, whose keys are joined."""
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
        if len(value) and isinstance(value[0], Mapping):
            value = stack(name, list(value))
    if not isinstance(value, Mapping):
        return value
    if not value:
        raise ValueError(f"{name} is an empty dictionary")
    result: dict[str, Any] = {}
    for key, part in value.items():
        inner = _as_observations(f"{name}[{key!r}]", part)
        if isinstance(inner, dict):
            for rest, array in inner.items():
                _put(name, result, f"{key}{_SEPARATOR}{rest}", array)
        else:
            _put(name, result, str(key), inner)
    return result


def _put(name: str, result: dict[str, Any], key: str, value: Any) -> None:
    if key in result:
        raise ValueError(f"{name} has two arrays that would be called {key!r}: rename one of them")
    result[key] = value


def stack(name: str, rows: Sequence[Any]) -> Any:
    """
    :param name: of the rows, for errors
    :param rows: values of an array, or dictionaries of them with the same keys
    :return: a list of the values, or a dictionary of lists
    :raises ValueError: naming the first row that has other keys
    """
    if not isinstance(rows[0], Mapping):
        return list(rows)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}, row {number}: it is a {type(row).__name__}, row 0 is a dictionary")
        for key in set(row) ^ set(rows[0]):
            raise ValueError(f"{name}, row {number if key in rows[0] else 0}: there is no {key!r}, which other rows have")
    result: dict[Any, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        result[key] = stack(f"{name}[{key!r}]", values) if _is_needed(str(key)) else values
    return result


def _n_rows(value: Any) -> int | None:
    """Number of rows of an array, None if it is a single value."""
    if isinstance(value, (str, bytes, Mapping)):
        return None
    shape = getattr(value, "shape", None)
    if shape is None:
        # (HDF5 has arrays that are empty, and have no shape)
        return len(value) if hasattr(value, "__len__") and not hasattr(value, "dtype") else None
    return shape[0] if len(shape) else None


def _check_unknown(named: Mapping[str, Any], n: int, has_next: bool) -> None:
    unknown = []
    for name, value in named.items():
        n_rows = _n_rows(value)
        if _row(name) or _part(name) or not _is_needed(name) or not (n_rows or isinstance(value, Mapping)):
            continue
        words = _CAMEL_CASE.sub("_", name.removeprefix("next.")).lower()
        if n_rows and _LOOKS_LIKE_NUMBER.search(words):
            raise ValueError(
                f"{name!r} is not known, and looks as if it were the number of the episode: name it 'episode_index', or leave "
                "it out"
            )
        if n_rows and _LOOKS_LIKE_FLAG.search(words):
            raise ValueError(
                f"{name!r} is not known, and looks as if it said where episodes end: name it 'terminated', 'truncated' or "
                "'episode_ends', as the guide \"Your own data\" explains, or leave it out"
            )
        if n_rows == n and not has_next and _LOOKS_LIKE_NEXT.search(words):
            raise ValueError(
                f"{name!r} is not known, and looks as if it were 'next_observations': name it so, or leave it out"
            )
        unknown.append(name)
    warn_of_unknown(unknown)


def _check_order(named: Mapping[str, Any], ends: np.ndarray) -> None:
    """Following rows are next observations only if they are in the order of time."""
    for name in [name for name, value in named.items() if has_role(name, "order") and _n_rows(value) == len(ends)]:
        values = np.asarray(named[name])
        if values.size == len(ends) and values.dtype.kind in "iufM":
            values = values.reshape(-1)
            wrong = (values[1:] < values[:-1]) & ~ends[:-1]
            if wrong.any():
                row = int(np.argmax(wrong)) + 1
                raise ValueError(
                    f"{name!r} goes down in row {row}, where no episode starts ({values[row - 1]}, {values[row]}): sort the "
                    "rows by episode and time, and mark where episodes end"
                )


def warn_of_unknown(names: Iterable[str]) -> None:
    """
    :param names: of what is not read. Those that are in the table as not needed are not worth a warning.
    """
    unknown = sorted(name for name in map(str, names) if _is_needed(name))
    if unknown:
        warnings.warn(f"Not known, and not read: {', '.join(map(repr, unknown))}", DatasetWarning)


# --- Flags


class _Flags:
    """
    The flags of a dataset.

    :param named: What is in the dataset
    :param n: Number of rows of the actions
    :param is_episode: Whether it is one episode, which ends in the last row. If None, it is one if there is nothing else.
    :param has_next: Whether there are next observations
    """

    def __init__(self, named: Mapping[str, Any], n: int, is_episode: bool | None, has_next: bool):
        self.n = n
        self._has_next = has_next
        #: Name of the flags of terminations that may include time-outs
        self.ambiguous: str | None = None
        self._is_episode = is_episode
        self._names: dict[str, str] = {}
        self._flags: dict[str, np.ndarray] = {}
        readers: dict[str, Callable[[str, Any], np.ndarray | None]] = {
            # The first one, as there may be one flag for each of these episodes
            "splits": self._read_splits,
            **dict.fromkeys(("terminated", "terminals", "truncated", "dones", "success", "masks", "valids"), self._read),
            "discounts": self._read_discounts,
            "ends": self._read_ends,
            "lengths": self._read_lengths,
            "starts": self._read_starts,
            "episodes": self._read_episodes,
        }
        for role, reader in readers.items():
            for name in [name for name, value in named.items() if value is not None and has_role(name, role)]:
                flags = reader(name, named[name])
                if flags is None:
                    continue
                if role in self._flags:
                    self._check(role, name, self._flags[role] != flags)
                self._names[role], self._flags[role] = name, flags
        if self._is_episode or (self._is_episode is None and not self._flags and not has_next):
            self._flags["last"] = self._at(np.array([n - 1]))

    def interpret(self, arrays: Mapping[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """
        :param arrays: Actions and rewards
        :return: where episodes terminated, and where they ended. None where nothing says so.
        :raises ValueError: if two flags contradict each other
        """
        flags = self._flags
        nowhere = np.zeros(self.n, dtype=bool)
        if "valids" in flags:
            if self._has_next:
                raise ValueError(f"{self._names['valids']!r} is for datasets without `next_observations`")
            dones = ~flags["masks"] if "masks" in flags else flags.get("terminated")
            return None if dones is None else dones & flags["valids"], ~flags["valids"]
        masks = flags.get("masks", None if "terminated" in flags else flags.get("discounts"))
        if masks is not None:
            if "terminated" in flags:
                self._check("masks", self._names["terminated"], flags["terminated"] == masks)
            ends = self._union(*_RECORDED, "terminated", "terminals", "truncated", "dones")
            ends = nowhere if ends is None else ends
            return ~masks if "masks" in flags else self._of_the_row_before(~masks, ends, arrays), ends
        if "terminated" in flags or "terminals" in flags:
            return self._interpret_terminated(arrays)
        if "dones" in flags:
            dones, ends = flags["dones"], self._union(*_RECORDED, "truncated")
            if ends is None or not ("ends" in flags or self._is_episode):
                ends = dones if ends is None else ends | dones
            if not {"truncated", "success"} & set(flags):
                self.ambiguous = self._names["dones"]
            return dones & ~flags.get("truncated", nowhere) & flags.get("success", ~nowhere), ends
        return None, self._union(*_RECORDED, "truncated")

    def _interpret_terminated(self, arrays: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        flags, role = self._flags, "terminated" if "terminated" in self._flags else "terminals"
        terminated = flags[role]
        if "terminals" in flags:
            self._check(role, self._names["terminals"], flags["terminals"] != terminated)
        if "dones" in flags:
            over = terminated | flags["truncated"] if "truncated" in flags else terminated | flags["dones"]
            self._check(role, self._names["dones"], over != flags["dones"])
        if "ends" in flags:
            self._check(role, self._names["ends"], terminated & ~flags["ends"])
        ends = self._union(*_RECORDED, role, "truncated", "dones")
        assert ends is not None
        if not {"terminated", "truncated"} & set(flags):
            self.ambiguous = self._names["terminals"]
        if self._names[role] == "is_terminal":
            terminated = self._of_the_row_before(terminated, ends, arrays)
        return terminated, ends

    def _of_the_row_before(self, terminated: np.ndarray, ends: np.ndarray, arrays: Mapping[str, Any]) -> np.ndarray:
        """In the last steps of RLDS only the observation counts, and it is the row before that leads to it."""
        if self._has_next or np.any(np.asarray(arrays["actions"])[ends]) or np.any(np.asarray(arrays["rewards"])[ends]):
            return terminated
        return np.append(terminated[1:] & ends[1:], False) & ~ends

    def warn_of_what_is_missing(self, dones: np.ndarray | None, ends: np.ndarray | None) -> None:
        """
        :param dones: Where episodes terminated
        :param ends: Where they ended
        """
        if dones is None or ends is None:
            warnings.warn("No flags say where episodes terminated: all of them are taken as truncated", DatasetWarning)
        elif not (self._has_next or self.ambiguous or {*_RECORDED, "truncated", "valids"} & set(self._flags)):
            if not (ends & ~dones).any():
                warnings.warn(
                    f"Beside {', '.join(map(repr, self._names.values()))} there are neither next observations nor flags of "
                    "truncated episodes: an episode that was truncated would be taken as one with the next",
                    DatasetWarning,
                )

    def _check(self, role: str, name: str, wrong: np.ndarray) -> None:
        if wrong.any():
            raise ValueError(f"{self._names[role]!r} and {name!r} contradict each other, first in row {int(np.argmax(wrong))}")

    def _union(self, *roles: str) -> np.ndarray | None:
        """Where any of them is, None if there are none of them."""
        flags = [self._flags[role] for role in roles if role in self._flags]
        return np.logical_or.reduce(flags) if flags else None

    # Readers

    def _read(self, name: str, value: Any) -> np.ndarray:
        if np.ndim(value) == 0 and not isinstance(value, Mapping):
            # One for the whole episode
            self._is_episode = True
            value = [0] * (self.n - 1) + [value[()] if hasattr(value, "read_direct") else value]
        flags = read_flags(name, value)
        splits = self._flags.get("splits")
        if splits is not None and len(flags) == np.count_nonzero(splits) != self.n:
            # One for each episode
            splits = splits.copy()
            splits[splits] = flags
            flags = splits
        check_lengths({"actions": self.n, name: len(flags)})
        return flags

    def _read_discounts(self, name: str, value: Any) -> np.ndarray | None:
        # Those that are 1 everywhere may be no more than a habit
        discounts = read_column(name, value)
        return self._read(name, discounts) if np.isin(discounts, (0, 1)).all() and 0 < discounts.mean() < 1 else None

    def _read_ends(self, name: str, value: Any) -> np.ndarray:
        counts = np.asarray(as_source(name, value))
        are_flags = len(counts) == self.n and np.isin(counts, (0, 1)).all()
        if counts.ndim == 1 and counts.dtype.kind in "iu" and not are_flags:
            return self._read_counts(name, counts)
        return self._read(name, value)

    def _read_counts(self, name: str, counts: np.ndarray) -> np.ndarray:
        # (Differences of unsigned integers are never negative)
        counts = np.append(0, counts.astype(np.float64))
        if counts[-1] != self.n or (counts % 1).any() or not (np.diff(counts) > 0).all():
            raise ValueError(
                f"{name!r} must be {self.n} flags, one for each row, or numbers of rows, each larger than the one before, up "
                f"to {self.n}"
            )
        return self._at(counts[1:] - 1)

    def _read_starts(self, name: str, value: Any) -> np.ndarray:
        return np.append(self._read(name, value)[1:], True)

    def _read_lengths(self, name: str, value: Any) -> np.ndarray | None:
        # Of another shape if they are those of gymnasium's statistics
        if isinstance(value, Mapping) or not _n_rows(value):
            return None
        lengths = np.asarray(as_source(name, value))
        are_integers = lengths.dtype.kind in "iuf" and not (lengths % 1).any() and (lengths > 0).all()
        return self._at(lengths.reshape(-1).cumsum() - 1) if are_integers and lengths.sum() == self.n else None

    def _read_splits(self, name: str, value: Any) -> np.ndarray:
        counts = read_column(name, value)
        if counts.dtype.kind not in "iuf":
            raise ValueError(f"{name!r} must be numbers of rows, not {counts.dtype}")
        return self._read_counts(name, np.append(counts.astype(np.float64), self.n))

    def _read_episodes(self, name: str, value: Any) -> np.ndarray:
        values = value.to_numpy() if hasattr(value, "to_numpy") else value
        if isinstance(values, (list, np.ndarray)) and len(values) and isinstance(values[0], (str, bytes)):
            values = np.asarray(values, dtype=str)
        numbers = read_column(name, values)
        check_lengths({"actions": self.n, name: len(numbers)})
        last = np.append(numbers[1:] != numbers[:-1], True)
        found, counts = np.unique(numbers[last], return_counts=True)
        if (counts > 1).any():
            message = f"the rows of episode {found[counts > 1][0]} are not together"
            if not self._has_next:
                raise ValueError(
                    f"{name!r}: {message}: sort them by episode and time, or, if the numbers start again in another part of "
                    "the dataset, give the parts in a list"
                )
            warnings.warn(
                f"{name!r}: {message}: returns of several steps and stacked observations stop where another episode follows",
                DatasetWarning,
            )
        return last

    def _at(self, rows: np.ndarray) -> np.ndarray:
        flags = np.zeros(self.n, dtype=bool)
        flags[rows.astype(int)] = True
        return flags
