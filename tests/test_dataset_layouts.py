"""Random episodes, written in every layout, load to the same transitions; damaged ones do not load to something else."""

import dataclasses
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sb3_flow.offline.datasets import load_dataset
from sb3_flow.offline.layouts import NAMES
from sb3_flow.offline.transitions import DatasetWarning, named_arrays

h5py = pytest.importorskip("h5py", reason='needs pip install "sb3-flow[offline]"')
pytestmark = pytest.mark.filterwarnings("ignore::sb3_flow.offline.transitions.DatasetWarning")
quick = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Episode(NamedTuple):
    """One observation more than actions, whether it terminated, and whether it was truncated (it can be both)."""

    observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool

    def __len__(self):
        return len(self.actions)


@st.composite
def datasets(draw, endings=("terminated", "truncated", "both")):
    kind = draw(st.sampled_from(("vector", "image", "stacked", "dictionary")))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))

    def observe(n, kind):
        if kind == "dictionary":
            return {"state": observe(n, "vector"), "camera": observe(n, "image")}
        if kind == "image":
            return rng.integers(0, 256, (n, 2, 3, 3), dtype=np.uint8)
        return rng.normal(size=(n, 2, 3) if kind == "stacked" else (n, 3)).astype(np.float32)

    episodes = []
    for length, how in draw(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(endings)), min_size=1, max_size=5)):
        actions, rewards = rng.uniform(-1, 1, (length, 2)), rng.normal(size=length)
        episodes.append(
            Episode(
                observe(length + 1, kind),
                actions.astype(np.float32),
                rewards.astype(np.float32),
                how != "truncated",
                how != "terminated",
            )
        )
    return episodes


# --- What they are


def rows(observations, selection):
    if isinstance(observations, dict):
        return {key: array[selection] for key, array in observations.items()}
    return observations[selection]


def concatenate(parts):
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


def expected(episodes, last_rows=True):
    """Without final observations, the last transition of a truncated episode is lost."""
    kept = [len(episode) if last_rows or episode.terminated else len(episode) - 1 for episode in episodes]
    pairs = [(episode, n) for episode, n in zip(episodes, kept, strict=True) if n]
    if not pairs:
        return None
    ends = np.concatenate([np.arange(n) == n - 1 for _, n in pairs])
    return dict(
        observations=concatenate([rows(episode.observations, slice(0, n)) for episode, n in pairs]),
        actions=np.concatenate([episode.actions[:n] for episode, n in pairs]),
        rewards=np.concatenate([episode.rewards[:n] for episode, n in pairs]),
        next_observations=concatenate([rows(episode.observations, slice(1, n + 1)) for episode, n in pairs]),
        dones=np.concatenate([(np.arange(n) == n - 1) * float(episode.terminated) for episode, n in pairs]),
        episode_ends=ends,
    )


def is_same(transitions, arrays):
    if arrays is None:
        return False
    for name in ("actions", "rewards", "dones", "episode_ends"):
        if not np.array_equal(getattr(transitions, name), arrays[name]):
            return False
    # Nothing is bootstrapped from what comes after the end
    going_on = arrays["dones"] == 0
    for name, selection in (("observations", slice(None)), ("next_observations", going_on)):
        theirs, ours = dict(named_arrays("", arrays[name])), dict(named_arrays("", getattr(transitions, name)))
        if set(theirs) != set(ours) or any(not np.array_equal(ours[key][selection], theirs[key][selection]) for key in ours):
            return False
    return True


# --- Layouts: each a function from episodes to what is loaded


def flat(episodes, names="observations actions rewards next_observations"):
    arrays = expected(episodes)
    keys = ("observations", "actions", "rewards", "next_observations")
    return {name: arrays[key] for name, key in zip(names.split(), keys, strict=True)}


def flags(episodes, how):
    """A flag for each transition, 0 but for the last one of an episode."""
    return np.concatenate([(np.arange(len(episode)) == len(episode) - 1) & bool(how(episode)) for episode in episodes])


def terminated(episodes):
    return flags(episodes, lambda episode: episode.terminated)


def truncated(episodes):
    return flags(episodes, lambda episode: episode.truncated)


def only_truncated(episodes):
    return flags(episodes, lambda episode: not episode.terminated)


def ends(episodes):
    return flags(episodes, lambda episode: True)


def numbers(episodes):
    return np.concatenate([np.full(len(episode), number) for number, episode in enumerate(episodes)])


def without_next(data):
    return {name: value for name, value in data.items() if "next" not in name}


def padded(episodes):
    """Rows of nothing but the final observation, at the end of each episode."""
    pad = lambda array: np.concatenate([array, np.zeros_like(array[:1])])  # noqa: E731
    last = np.concatenate([np.arange(len(episode) + 1) == len(episode) for episode in episodes])
    return dict(
        observations=concatenate([episode.observations for episode in episodes]),
        actions=np.concatenate([pad(episode.actions) for episode in episodes]),
        rewards=np.concatenate([pad(episode.rewards) for episode in episodes]),
    ), last  # fmt: skip


def sb3_flow(episodes):
    return flat(episodes) | dict(dones=terminated(episodes), episode_ends=ends(episodes))


def gymnasium(episodes):
    names = "observation action reward next_observation"
    return flat(episodes, names) | dict(terminated=terminated(episodes), truncated=truncated(episodes))


def plural(episodes):
    return flat(episodes) | dict(terminations=terminated(episodes)[:, None], truncations=truncated(episodes)[:, None])


def d4rl(episodes):
    return flat(episodes) | dict(
        terminals=terminated(episodes), timeouts=only_truncated(episodes), infos={"qpos": np.zeros(3)}, metadata={"a": "b"}
    )


def d4rl_without_next(episodes):
    return without_next(d4rl(episodes))


def sb3(episodes):
    names = "obs actions rewards next_obs"
    return flat(episodes, names) | dict(dones=ends(episodes), timeouts=only_truncated(episodes))


def sb3_infos(episodes):
    infos = [{"TimeLimit.truncated": True} if is_truncated else {} for is_truncated in only_truncated(episodes)]
    return flat(episodes) | dict(dones=ends(episodes).astype(np.float32), infos=infos)


def ogbench(episodes):
    return flat(episodes) | dict(terminals=ends(episodes), masks=1.0 - terminated(episodes))


def ogbench_compact(episodes):
    arrays, last = padded(episodes)
    masks = np.concatenate([np.append(np.ones(len(e) - 1), [1.0 - e.terminated] * 2) for e in episodes])
    terminals = np.minimum(last + np.append(last[1:], True), 1.0)
    return arrays | dict(terminals=terminals, valids=1.0 - last, masks=masks)


def d3rlpy_1(episodes):
    return without_next(flat(episodes)) | dict(terminals=terminated(episodes), episode_terminals=ends(episodes))


def iql(episodes):
    return flat(episodes) | dict(masks=1.0 - terminated(episodes), dones_float=ends(episodes) * 1.0)


def td3(episodes):
    return flat(episodes, "state action reward next_state") | dict(not_done=1 - terminated(episodes)[:, None])


def tianshou(episodes):
    names = "obs act rew obs_next"
    return flat(episodes, names) | dict(
        terminated=terminated(episodes), truncated=truncated(episodes), done=ends(episodes), policy={}, info={}
    )


def rllib(episodes):
    names = "obs actions rewards new_obs"
    return flat(episodes, names) | dict(
        eps_id=numbers(episodes), terminateds=terminated(episodes), truncateds=truncated(episodes)
    )


def imitation(episodes):
    data = flat(episodes, "obs acts rews next_obs")
    del data["next_obs"]
    return data | dict(
        obs=concatenate([episode.observations for episode in episodes]),
        terminal=np.ones(len(episodes), dtype=bool),
        indices=np.cumsum([len(episode) for episode in episodes[:-1]]),
        infos=[{"TimeLimit.truncated": flag} for flag in only_truncated(episodes)],
    )


@dataclasses.dataclass
class Trajectory:
    obs: Any
    acts: Any
    infos: Any
    terminal: bool
    rews: Any


def trajectories(episodes):
    return [
        Trajectory(
            e.observations, e.actions, [{"TimeLimit.truncated": flag} for flag in only_truncated([e])], True, e.rewards
        )
        for e in episodes
    ]  # fmt: skip


def episodes_in_memory(episodes):
    """Tensors, and the final observation of each episode."""
    return [
        dict(
            observations=th_tensors(e.observations), actions=th.tensor(e.actions, requires_grad=True), rewards=list(e.rewards),
            terminations=terminated([e]), truncations=truncated([e]),
        )
        for e in episodes
    ]  # fmt: skip


def th_tensors(observations):
    return {k: th.tensor(v) for k, v in observations.items()} if isinstance(observations, dict) else th.tensor(observations)


def hil_serl(episodes):
    data = flat(episodes) | dict(masks=1.0 - terminated(episodes), dones=ends(episodes))
    return [
        {name: rows(value, row) for name, value in data.items()} | {"infos": {"succeed": True}}
        for row in range(len(data["actions"]))
    ]


def torchrl(episodes):
    data = flat(episodes, "observation action reward next_observation")
    n = len(data["action"])
    following = dict(
        observation=data.pop("next_observation"), reward=data.pop("reward")[:, None], done=ends(episodes)[:, None],
        terminated=terminated(episodes)[:, None], truncated=truncated(episodes)[:, None], step_count=np.ones((n, 1)),
    )  # fmt: skip
    return data | dict(done=np.zeros((n, 1)), terminated=np.zeros((n, 1)), truncated=np.zeros((n, 1)), next=following)


def lerobot(episodes):
    data = flat(episodes, "observation action next.reward next_observation")
    del data["next_observation"]
    observations = data.pop("observation")
    if not isinstance(observations, dict):
        observations = {"state": observations}
    data |= {f"observation.{key}": array for key, array in observations.items()}
    n = len(data["action"])
    return data | {
        "episode_index": numbers(episodes), "frame_index": np.arange(n), "index": np.arange(n), "timestamp": np.arange(n) / 10,
        "task_index": np.zeros(n), "next.done": ends(episodes), "next.success": terminated(episodes),
    }  # fmt: skip


def lerobot_frames(episodes):
    data = {name: th.as_tensor(value) for name, value in lerobot(episodes).items()}
    return [{name: value[row] for name, value in data.items()} | {"task": "lift"} for row in range(len(data["action"]))]


def rlds(episodes):
    arrays, last = padded(episodes)
    names = dict(observations="observation", actions="action", rewards="reward")
    is_terminal = np.concatenate([(np.arange(len(e) + 1) == len(e)) & e.terminated for e in episodes])
    first = np.append(True, last[:-1])
    return {names[k]: v for k, v in arrays.items()} | dict(is_first=first, is_last=last, is_terminal=is_terminal)


def oxe(episodes):
    data = flat(episodes, "observation action reward next_observation")
    del data["next_observation"]
    last = ends(episodes)
    return data | dict(
        is_first=np.append(True, last[:-1]), is_last=last, is_terminal=terminated(episodes),
        discount=np.ones(len(last)), language_instruction=["lift it"] * len(last),
    )  # fmt: skip


def groups(name, prefix, with_final, **columns):
    """A group for each episode, at the top or in another group."""

    def layout(episodes):
        result = {}
        for number, e in enumerate(episodes):
            selection = slice(None) if with_final else slice(0, len(e))
            group = {"obs" if prefix else "observations": rows(e.observations, selection), "actions": e.actions}
            group["rewards"] = e.rewards
            if prefix:
                group["next_obs"] = rows(e.observations, slice(1, None))
                group["states"] = np.zeros((len(e), 2))
            result[f"{name}_{number}"] = group | {key: how([e]) for key, how in columns.items()}
        return {prefix: result, "mask": {"train": np.zeros(2)}} if prefix else result

    return layout


def d3rlpy_2(episodes):
    result = {"columns": np.array([b"observations", b"actions", b"rewards", b"terminated"]), "num_episodes": len(episodes)}
    for number, e in enumerate(episodes):
        values = dict(observations=rows(e.observations, slice(0, len(e))), actions=e.actions, rewards=e.rewards[:, None])
        result |= {f"{key}_{number}": value for key, value in values.items()} | {f"terminated_{number}": e.terminated}
    return result


robomimic = groups("demo", "data", False, dones=terminated)
minari = groups("episode", "", True, terminations=terminated, truncations=truncated)
maniskill = groups("traj", "", True, terminated=terminated, truncated=truncated, success=truncated)

COMPLETE = (
    sb3_flow, gymnasium, plural, d4rl, sb3, sb3_infos, ogbench, ogbench_compact, iql, td3, tianshou, rllib, imitation,
    trajectories, episodes_in_memory, hil_serl, torchrl, rlds, robomimic, minari, maniskill,
)  # fmt: skip
WITHOUT_FINAL_OBSERVATIONS = (d4rl_without_next, d3rlpy_1, d3rlpy_2, lerobot, lerobot_frames, oxe)
LAYOUTS = COMPLETE + WITHOUT_FINAL_OBSERVATIONS
LAYOUT_NAMES = {
    **{layout: layout.__name__ for layout in LAYOUTS},
    robomimic: "robomimic",
    minari: "minari",
    maniskill: "maniskill",
}
LISTS = (trajectories, episodes_in_memory, hil_serl, lerobot_frames)
IN_FILES = [layout for layout in LAYOUTS if layout not in (*LISTS, sb3_infos, imitation)]


def each(layouts):
    return pytest.mark.parametrize("layout", layouts, ids=[LAYOUT_NAMES[layout] for layout in layouts])


# --- Files


def write_hdf5(file, data, compression=None):
    for name, value in data.items():
        if isinstance(value, dict):
            write_hdf5(file.create_group(name), value, compression)
        else:
            value = np.asarray(value)
            value = value.astype("S") if value.dtype.kind == "U" else value
            options = dict(compression=compression, chunks=value.shape) if compression and value.ndim and value.size else {}
            file.create_dataset(name, data=value, **options)


def flatten(data, prefix=""):
    for name, value in data.items():
        yield from flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else [(prefix + name, value)]


@each(LAYOUTS)
@given(episodes=datasets(), as_file=st.sampled_from(["memory", "hdf5", "gzip", "npz", "tensors"]))
@quick
def test_round_trip(tmp_path, layout, episodes, as_file):
    arrays = expected(episodes, layout in COMPLETE)
    data = layout(episodes)
    path = tmp_path / "data.hdf5"
    if layout in IN_FILES and as_file in ("hdf5", "gzip"):
        with h5py.File(path, "w") as file:
            write_hdf5(file, data, "gzip" if as_file == "gzip" else None)
        data = path
    elif layout in IN_FILES and as_file == "npz" and layout not in (robomimic, minari, maniskill, d3rlpy_2):
        data = tmp_path / "data.npz"
        np.savez_compressed(data, **dict(flatten(layout(episodes))))
    elif layout in IN_FILES and as_file == "tensors" and layout is not d3rlpy_2:
        data = tensors(data)
    if arrays is None:
        with pytest.raises(ValueError, match="no transition has a next observation"):
            load_dataset(data)
    else:
        transitions = load_dataset(data)
        assert is_same(transitions, arrays)


def tensors(data):
    if isinstance(data, dict):
        return {name: tensors(value) for name, value in data.items()}
    return th.as_tensor(data) if isinstance(data, np.ndarray) and data.dtype.kind in "biuf" else data


# --- Damage


def loads_or_says_why(data, episodes, **kwargs):
    """The same transitions, or those without final observations, or a warning, or a ValueError. Nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DatasetWarning)
        try:
            transitions = load_dataset(data, **kwargs)
        except ValueError as error:
            return str(error)
    said = [str(warning.message) for warning in caught if warning.category is DatasetWarning]
    assert said or any(is_same(transitions, expected(episodes, last_rows)) for last_rows in (True, False))
    return "; ".join(said)


def paths(data, prefix=()):
    for name, value in data.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, name))


def change(data, path, function):
    """A copy with something else in place of the item with this path, which is a list of names and items."""
    result = {}
    for name, value in data.items():
        if name != path[0]:
            result[name] = value
        elif len(path) == 1:
            result |= dict(function(name, value))
        else:
            result[name] = change(value, path[1:], function)
    return result


NAMED = [layout for layout in LAYOUTS if layout not in LISTS]
DAMAGES = {
    "dropped": lambda name, value: [],
    "renamed": lambda name, value: [("finished" if "i" in name else "foo", value)],
    "cut": lambda name, value: [(name, value[:-1] if hasattr(value, "__len__") and not isinstance(value, dict) else value)],
    "doubled": lambda name, value: [(name, np.concatenate([value] * 2) if np.ndim(value) else value)],
    "text": lambda name, value: [(name, np.full(np.shape(value), "text"))],
    "none": lambda name, value: [(name, None)],
    "nothing": lambda name, value: [(name, np.zeros(0))],
    "single": lambda name, value: [(name, 0.5)],
    "nested": lambda name, value: [(name, {"a": {"b": value}})],
    "halves": lambda name, value: [(name, np.full(np.shape(value), 0.5))],
}


@each(NAMED)
@given(
    # Where both flags are set, nothing else says what one of them did
    episodes=datasets(("terminated", "truncated")),
    number=st.integers(0, 30),
    damage=st.sampled_from(list(DAMAGES)),
)
@quick
def test_damaged_arrays(layout, episodes, number, damage):
    data = layout(episodes)
    every = list(paths(data))
    path = every[number % len(every)]
    # What is not needed may be anything, and values may be any numbers
    roles = {name: row.role for row in NAMES for name in row.names}
    role = roles.get(path[-1], roles.get(path[-1].rpartition("_")[0], ""))
    assume(not (damage in ("halves", "nested") and role in ("", "observations", "next_observations", "actions", "rewards")))
    assume(not any(roles.get(name) == "not needed" or name == "mask" for name in path))
    # One transition for each episode, and twice as many observations
    assume(not (damage == "doubled" and role == "observations" and max(map(len, episodes)) == 1))
    # The environment knows which observations there must be, nobody knows how many episodes
    is_part = path[-1] in ("state", "camera") or path[-1].startswith(("observation.", "demo_", "traj_"))
    is_part |= layout is minari and len(path) == 1
    assume(not (damage in ("dropped", "renamed") and is_part))
    loads_or_says_why(change(data, path, DAMAGES[damage]), episodes)


@given(
    episodes=datasets(), as_file=st.sampled_from(["hdf5", "npz", "stored"]), share=st.floats(0, 1), damage=st.integers(0, 255)
)
@settings(quick, max_examples=150)
def test_damaged_files(tmp_path, episodes, as_file, share, damage):
    """Cut off anywhere, and, where there is a checksum, one byte changed anywhere."""
    path = tmp_path / ("data.hdf5" if as_file == "hdf5" else "data.npz")
    if as_file == "hdf5":
        with h5py.File(path, "w") as file:
            write_hdf5(file, d4rl(episodes))
    else:
        (np.savez if as_file == "stored" else np.savez_compressed)(path, **dict(flatten(sb3_flow(episodes))))
    content = bytearray(path.read_bytes())
    position = int(share * (len(content) - 1))
    path.write_bytes(content[:position])
    assert str(path) in loads_or_says_why(path, episodes)
    if as_file != "hdf5":
        content[position] ^= damage
        path.write_bytes(content)
        loads_or_says_why(path, episodes)


@pytest.mark.parametrize("suffix", ["npz", "hdf5", "h5", "pkl"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html><body>404</body></html>", b"", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04."]
)
def test_other_content(tmp_path, suffix, content):
    """A web page, and others, saved under the name of a dataset."""
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name):
        load_dataset(path, allow_pickle=suffix == "pkl")
