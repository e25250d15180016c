"""Every loader, on a real file; every kind of bad data, by name and row."""

import os
import pickle
import time
import tracemalloc
import warnings
from collections import namedtuple
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage

from sb3_flow import FQL
from sb3_flow.offline.buffers import OfflineBuffer
from sb3_flow.offline.datasets import from_replay_buffer, load_dataset
from sb3_flow.offline.layouts import NAMES
from sb3_flow.offline.transitions import DatasetWarning, Transitions, check_transitions, fit_observations

needs_data = pytest.mark.skipif(
    "SB3_FLOW_DATA" not in os.environ, reason="SB3_FLOW_DATA, a folder of OGBench files, is not set"
)
OBSERVATION_SPACE, ACTION_SPACE = spaces.Box(-10, 10, (3,)), spaces.Box(-2, 2, (2,))


def make_arrays(n=20, episode=5):
    """Observations that count the rows; every second episode terminates, the others are truncated."""
    rows = np.arange(n, dtype=np.float32)
    ends = (np.arange(n) + 1) % episode == 0
    dones = ends & ((np.arange(n) // episode) % 2 == 0)
    return dict(
        observations=np.stack([rows, rows, rows], axis=1) / 10,
        actions=np.stack([np.sin(rows), np.cos(rows)], axis=1),
        rewards=rows,
        next_observations=np.stack([rows, rows, rows], axis=1) / 10 + 0.1,
        dones=dones,
        episode_ends=ends,
    )


def assert_same(transitions, arrays):
    for name, array in transitions.items():
        assert np.allclose(array, arrays[name]), name


def test_arrays_in_memory():
    arrays = make_arrays()
    transitions = load_dataset(arrays)
    assert_same(transitions, arrays)
    assert len(transitions) == 20
    assert transitions.episode_returns.tolist() == [10, 35, 60, 85]
    # Single precision is not copied
    assert np.shares_memory(transitions.observations, arrays["observations"])
    assert np.shares_memory(load_dataset(transitions).observations, transitions.observations)
    both = load_dataset([arrays, arrays])
    assert len(both) == 40 and both.episode_returns.tolist() == [10, 35, 60, 85] * 2


def test_npz(tmp_path):
    arrays = make_arrays()
    np.savez(tmp_path / "data.npz", **arrays)
    assert_same(load_dataset(tmp_path / "data.npz"), arrays)
    np.savez(tmp_path / "objects.npz", **{**arrays, "rewards": np.array([print] * 20, dtype=object)})
    with pytest.raises(ValueError, match="rewards must be numbers, not object"):
        load_dataset(tmp_path / "objects.npz")


@pytest.mark.parametrize("with_next_observations", [True, False])
def test_d4rl_hdf5(tmp_path, with_next_observations):
    h5py = pytest.importorskip("h5py", reason='needs pip install "sb3-flow[offline]"')
    arrays = make_arrays()
    timeouts = arrays["episode_ends"] & ~arrays["dones"]
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for name in ("observations", "actions", "rewards"):
            file[name] = arrays[name]
        file["terminals"], file["timeouts"] = arrays["dones"], timeouts
        file["metadata/algorithm"] = "none"
        if with_next_observations:
            file["next_observations"] = arrays["next_observations"]
    transitions = load_dataset(tmp_path / "data.hdf5")
    if with_next_observations:
        assert_same(transitions, arrays)
    else:
        # The last transition of a truncated episode has no next observation, that of a terminated one does not need it
        kept = ~timeouts
        assert np.allclose(transitions.rewards, arrays["rewards"][kept])
        assert np.allclose(transitions.dones, arrays["dones"][kept])
        assert transitions.episode_ends.sum() == 4
        going_on = transitions.dones == 0
        assert np.allclose(transitions.next_observations[going_on], arrays["next_observations"][kept][going_on])


def test_minari(monkeypatch, tmp_path):
    minari = pytest.importorskip("minari", reason='needs pip install "sb3-flow[offline]"')
    pytest.importorskip("h5py")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gym.make("Pendulum-v1", max_episode_steps=20)
    episodes = []
    for seed in range(3):
        observations, steps = [env.reset(seed=seed)[0]], []
        for _ in range(20):
            action = env.action_space.sample()
            observation, *outcome, _ = env.step(action)
            observations.append(observation)
            steps.append((action, *outcome))
        actions, rewards, terminations, truncations = zip(*steps, strict=True)
        episodes.append(
            EpisodeBuffer(
                observations=np.array(observations), actions=np.array(actions), rewards=list(rewards),
                terminations=list(terminations), truncations=list(truncations), infos={},
            )
        )  # fmt: skip
    minari.create_dataset_from_buffers("pendulum/random-v0", buffer=episodes, env=env, data_format="hdf5")
    transitions = load_dataset("minari:pendulum/random-v0")
    assert len(transitions) == 60 and transitions.episode_ends.sum() == 3 and transitions.dones.sum() == 0
    assert np.array_equal(transitions.next_observations[:19], transitions.observations[1:20])
    check_transitions(transitions, gym.make("Pendulum-v1").observation_space, gym.make("Pendulum-v1").action_space)
    assert len(load_dataset(["minari:pendulum/random-v0"] * 2)) == 120


@needs_data
@pytest.mark.parametrize("name", ["cube-single-play-singletask-v0", "cube-single-play-singletask-task3-v0"])
def test_ogbench(name):
    pytest.importorskip("ogbench", reason='needs pip install "sb3-flow[offline]"')
    transitions = load_dataset(f"ogbench:{name}@{os.environ['SB3_FLOW_DATA']}")
    env = gym.make(f"ogbench/{name}")
    check_transitions(transitions, env.observation_space, env.action_space)
    assert len(transitions) == 200_000 and transitions.episode_ends.sum() == 200
    # Bootstrapping stops at success, which is not where trajectories end
    n_successes = {"cube-single-play-singletask-v0": 4152, "cube-single-play-singletask-task3-v0": 3878}[name]
    assert transitions.dones.sum() == n_successes == (transitions.rewards == 0).sum()
    assert set(np.unique(transitions.rewards)) == {-1.0, 0.0}
    # What OGBench itself loads
    import ogbench

    path = f"{os.environ['SB3_FLOW_DATA']}/cube-single-play-v0.npz"
    _, theirs, _ = ogbench.make_env_and_datasets(name, dataset_path=path)
    for key in ("observations", "actions", "rewards", "next_observations"):
        assert np.array_equal(getattr(transitions, key), theirs[key])
    assert np.array_equal(transitions.dones, 1 - theirs["masks"])
    assert np.array_equal(transitions.episode_ends, theirs["terminals"] > 0)


def test_ogbench_errors(tmp_path):
    pytest.importorskip("ogbench", reason='needs pip install "sb3-flow[offline]"')
    with pytest.raises(ValueError, match=r"no rewards: name a single task of it, e\.g\. cube-single-play-singletask-v0"):
        load_dataset("ogbench:cube-single-play-v0")
    with pytest.raises(FileNotFoundError, match=r"cube-single-play-v0\.npz"):
        load_dataset(f"ogbench:cube-single-play-singletask-v0@{tmp_path}")
    np.savez(tmp_path / "cube-single-play-v0.npz", observations=np.zeros((3, 28)))
    with pytest.raises(ValueError, match="has no 'actions', 'terminals', 'qpos'"):
        load_dataset(f"ogbench:cube-single-play-singletask-v0@{tmp_path}")


@pytest.mark.parametrize("full", [False, True])
def test_replay_buffer(tmp_path, full):
    buffer = ReplayBuffer(12, OBSERVATION_SPACE, ACTION_SPACE, n_envs=2)
    for step in range(9 if full else 5):
        obs = np.full((2, 3), step) + np.array([[0.0], [0.5]])
        done, timeout = step in (2, 4), step == 4
        infos = [{"TimeLimit.truncated": timeout}] * 2
        buffer.add(obs, obs + 1, np.array([[0.5, -1], [1, 0]]), np.array([step, -step]), np.array([done] * 2), infos)
    transitions = from_replay_buffer(buffer)
    steps = np.arange(3, 9) if full else np.arange(5)
    assert np.allclose(transitions.rewards, [*steps, *-steps])
    assert np.allclose(transitions.observations[:, 0], [*steps, *(steps + 0.5)])
    # Env units, terminations without truncations, and an end where an environment's rows end
    assert np.allclose(transitions.actions[0], [1, -2]) and np.allclose(transitions.actions[-1], [2, 0])
    assert np.allclose(transitions.dones, [*(steps == 2)] * 2)
    assert transitions.episode_ends.tolist() == [*(np.isin(steps, (2, 4)) | (steps == steps[-1]))] * 2

    with open(tmp_path / "other.pkl", "wb") as file:
        pickle.dump({}, file)
    with pytest.raises(ValueError, match="has no 'observations', 'actions'"):
        load_dataset(tmp_path / "other.pkl", allow_pickle=True)
    with open(tmp_path / "buffer.pkl", "wb") as file:
        pickle.dump(buffer, file)
    with pytest.raises(ValueError, match="allow_pickle=True"):
        load_dataset(tmp_path / "buffer.pkl")
    assert_same(load_dataset(tmp_path / "buffer.pkl", allow_pickle=True), dict(transitions.items()))


def test_dict_observations():
    arrays = make_arrays()
    for name in ("observations", "next_observations"):
        images = np.zeros((20, 1, 4, 4), dtype=np.uint8)
        arrays[name] = {"vector": arrays[name], "image": images}
    transitions = load_dataset(arrays)
    assert transitions.observations["image"].dtype == np.uint8
    space = spaces.Dict({"vector": OBSERVATION_SPACE, "image": spaces.Box(0, 255, (1, 4, 4), dtype=np.uint8)})
    check_transitions(transitions, space, ACTION_SPACE)
    with pytest.raises(ValueError, match=r"observations with the keys .* do not fit"):
        check_transitions(transitions, spaces.Dict({"vector": OBSERVATION_SPACE}))
    with pytest.raises(ValueError, match=r"observations\['vector'\] of shape \(3,\)"):
        check_transitions(transitions, spaces.Dict({**space.spaces, "vector": ACTION_SPACE}))


@pytest.mark.parametrize(
    ("space", "values", "error"),
    [
        (spaces.Discrete(5), [0, 4, 5], "row 2: not in the observation space"),
        (spaces.Discrete(5, start=-1), [-1, 3, 4], "row 2: not in the observation space"),
        (spaces.Discrete(5), [0, 0.5, 1], "row 1: not in the observation space"),
        (spaces.MultiDiscrete([2, 3]), [[1, 2], [0, 0], [2, 0]], "row 2: not in the observation space"),
        (spaces.MultiBinary(2), [[1, 0], [0, 2], [0, 0]], "row 1: not in the observation space"),
        # Flat images: bytes for fractions, and the other way round
        (spaces.Box(0, 1, (2,)), [[0, 0], [255, 0], [3, 9]], "row 1: outside .*they look like bytes"),
        (spaces.Box(0, 255, (2,), dtype=np.uint8), [[0, 0], [0.2, 1], [1, 1]], "row 1: a fraction, and .* are bytes"),
        # Other bounds are rough
        (spaces.Box(-1, 1, (2,)), [[0, 0], [0, 1.2], [1, 1]], None),
        (spaces.Box(0, 1, (2,)), [[0, 0], [0, 1.2], [1, 1]], None),
        (spaces.Box(0, np.inf, (2,)), [[0, 0], [0, -1], [1, 1]], None),
    ],
)
@pytest.mark.parametrize("dictionary", [True, False])
def test_values_of_observations(space, values, error, dictionary):
    wrong, right = (np.asarray(rows, dtype=np.float32) for rows in (values, [values[0]] * 3))
    name, keys = "observations", {"a": space} if dictionary else None

    def check(observations, next_observations, dones=0):
        parts = ({"a": part} if dictionary else part for part in (observations, next_observations))
        data = Transitions.from_arrays(next(parts), np.zeros((3, 2)), np.zeros(3), next(parts), np.full(3, dones))
        data = Transitions(**data.__dict__ | {n: fit_observations(getattr(data, n), spaces.Dict(keys) if keys else space)
                                              for n in ("observations", "next_observations")})  # fmt: skip
        check_transitions(data, spaces.Dict(keys) if keys else space, ACTION_SPACE)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What is after the end does not matter
        check(right, right)
        check(right, wrong, dones=1)
    for name, arrays in (("observations", (wrong, right)), ("next_observations", (right, wrong))):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Most next")
            if error is None:
                with pytest.warns(DatasetWarning, match=f"^{name}.*, row 1: outside of the observation space"):
                    check(*arrays)
            else:
                with pytest.raises(ValueError, match=f"^{name}.*, {error}"):
                    check(*arrays)


def test_nested_observations():
    """Their keys can be those of networks."""
    arrays = make_arrays()
    vector, image = arrays.pop("observations"), np.zeros((20, 36, 36, 3), dtype=np.uint8)
    del arrays["next_observations"]
    for nested in (
        {"observations": {"agent": {"qpos": vector, "more": {"x": vector}}, "images": {"top": image}}},
        {"observations": [{"agent": {"qpos": v, "more": {"x": v}}, "images": {"top": image[0]}} for v in vector]},
        {"observations/agent/qpos": vector, "observations/agent/more/x": vector, "observations/images/top": image},
        {"observation.agent.qpos": vector, "observation.agent.more.x": vector, "observation.images.top": image},
    ):
        transitions = load_dataset(arrays | nested)
        assert set(transitions.observations) == {"agent_qpos", "agent_more_x", "images_top"}

    class Env(gym.Env):
        observation_space = spaces.Dict(
            {"agent_qpos": OBSERVATION_SPACE, "agent_more_x": OBSERVATION_SPACE,
             "images_top": spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)}
        )  # fmt: skip
        action_space = ACTION_SPACE

    FQL("MultiInputPolicy", Env(), dataset=transitions, buffer_size=1, policy_kwargs=dict(net_arch=[8])).learn_offline(1)

    for some in ({"a": {"b": vector}, "a_b": vector}, {"a_b": vector, "a": {"b": vector}}, {1: vector, "1": vector}):
        with pytest.raises(ValueError, match=r"observations has two arrays that would be called '(a_b|1)'"):
            load_dataset(arrays | {"observations": some})
    with pytest.raises(ValueError, match="observation has two arrays that would be called 'a_b'"):
        load_dataset(arrays | {"observation.a.b": vector, "observation.a_b": vector})


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("rewards", 7, np.nan, "rewards, row 7: NaN"),
        ("observations", 3, np.inf, "observations, row 3: NaN or inf"),
        ("actions", 11, 2.5, "actions, row 11: outside of the action space"),
        ("dones", 2, 0.5, "dones, row 2: neither 0 nor 1"),
    ],
)
def test_bad_values_are_named(name, row, value, message):
    arrays = make_arrays()
    arrays[name] = arrays[name].astype(np.float32)
    arrays[name][row] = value
    with pytest.raises(ValueError, match=message):
        check_transitions(load_dataset(arrays), OBSERVATION_SPACE, ACTION_SPACE)


def test_bad_structure_is_named(tmp_path):
    arrays = make_arrays()
    with pytest.raises(ValueError, match="has no 'rewards'"):
        load_dataset({name: arrays[name] for name in ("observations", "actions")})
    with pytest.raises(ValueError, match=r"same length, they have .*'rewards': 19"):
        load_dataset({**arrays, "rewards": arrays["rewards"][1:]})
    with pytest.raises(ValueError, match="`next_observations` are missing"):
        load_dataset({name: arrays[name] for name in ("observations", "actions", "rewards")})
    with pytest.raises(ValueError, match="rewards must be numbers"):
        load_dataset({**arrays, "rewards": np.array(["a"] * 20)})
    with pytest.raises(ValueError, match=r"observations of shape \(3,\) do not fit"):
        check_transitions(load_dataset(arrays), spaces.Box(-1, 1, (4,)))
    with pytest.raises(ValueError, match=r"actions of shape \(2,\) do not fit"):
        check_transitions(load_dataset(arrays), OBSERVATION_SPACE, spaces.Box(-1, 1, (1,)))
    images = {name: np.zeros((20, 1, 4, 4)) for name in ("observations", "next_observations")}
    with pytest.raises(ValueError, match="observations must be bytes, as the images of the env are, not float32"):
        check_transitions(load_dataset(arrays | images), spaces.Box(0, 255, (1, 4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="same length"):
        load_dataset(Transitions(**make_arrays() | dict(rewards=np.zeros(3))))
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        load_dataset(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match=r"Unknown dataset 'cube\.zip': it must be ogbench:NAME"):
        load_dataset("cube.zip")
    with pytest.raises(ValueError, match="cannot be a int"):
        load_dataset(3)
    with pytest.raises(ValueError, match="empty"):
        check_transitions(Transitions.from_arrays(*[np.zeros((0, 2))] * 2, np.zeros(0), np.zeros((0, 2)), np.zeros(0)))


def test_n_step_returns():
    """By hand, up to the end of an episode, terminated or truncated."""
    arrays = make_arrays()
    buffer = OfflineBuffer(load_dataset(arrays), n_steps=3, gamma=0.9)
    rewards, last, discounts = buffer._n_step_returns(th.tensor([0, 2, 3, 4, 8]))
    assert last.tolist() == [2, 4, 4, 4, 9]
    expected = [0 + 0.9 + 0.81 * 2, 2 + 0.9 * 3 + 0.81 * 4, 3 + 0.9 * 4, 4, 8 + 0.9 * 9]
    assert np.allclose(rewards, expected)
    assert np.allclose(discounts.flatten(), [0.9**3, 0.9**3, 0.9**2, 0.9, 0.9**2])
    batch = buffer.sample(500)
    # Next observations are those after the last reward
    steps = ((batch.next_observations - batch.observations) * 10)[:, 0].round()
    assert set(steps.tolist()) == {1.0, 2.0, 3.0}
    assert np.allclose(batch.discounts.flatten(), 0.9**steps)


def test_ends_are_found():
    """Where it is not said where episodes end, they end where the next observation is not the following observation."""
    arrays = make_arrays()
    arrays["observations"] = arrays["observations"] + np.repeat(np.arange(4), 5)[:, None]
    arrays["next_observations"] = arrays["observations"] + np.float32(0.1)
    arrays["next_observations"][:-1][~arrays["episode_ends"][:-1]] = arrays["observations"][1:][~arrays["episode_ends"][:-1]]
    some = np.isin(np.arange(20), (9, 19))
    for dictionary in (False, True):
        if dictionary:
            arrays |= {name: {"a": arrays[name], "b": arrays[name]} for name in ("observations", "next_observations")}
        for others in ({}, {"episode_ends": some}, {"timeouts": some}):
            without = {name: array for name, array in arrays.items() if name != "episode_ends"} | others
            assert load_dataset(without).episode_ends.tolist() == arrays["episode_ends"].tolist()


def test_ends_are_found_if_some_are_marked():
    """Neither returns of several steps nor stacked observations reach into the next episode."""
    rows = np.arange(40)
    observations = np.where(rows % 10 == 0, 0.0, rows)[:, None] + 1
    arrays = dict(
        observations=observations, actions=np.zeros((40, 1)), rewards=rows, next_observations=rows[:, None] + 2,
        terminals=np.zeros(40), timeouts=np.isin(rows, (19, 39)),
    )  # fmt: skip
    transitions = load_dataset(arrays)
    assert np.flatnonzero(transitions.episode_ends).tolist() == [9, 19, 29, 39]
    buffer = OfflineBuffer(transitions, n_steps=3, gamma=1.0, n_stack=2)
    rewards, last, _ = buffer._n_step_returns(th.tensor([8]))
    assert rewards.tolist() == [8 + 9] and last.tolist() == [9]
    assert buffer._previous_rows(th.tensor([10, 11]))[0].tolist() == [-1, 10]


@pytest.mark.filterwarnings("error")
def test_rounding_is_no_end():
    rng = np.random.default_rng(0)
    following = rng.normal(size=(200, 3)).cumsum(axis=0)
    arrays = dict(
        observations=np.vstack([np.zeros((1, 3)), following[:-1]]).astype(np.float32), actions=np.zeros((200, 1)),
        rewards=np.zeros(200), next_observations=following, terminated=np.zeros(200), truncated=np.zeros(200),
    )  # fmt: skip
    assert np.flatnonzero(load_dataset(arrays).episode_ends).tolist() == [199]
    following[99, 2] = np.nan
    arrays["observations"][100, 2] = np.nan
    assert np.flatnonzero(load_dataset(arrays).episode_ends).tolist() == [199]


def test_shuffled_rows():
    order = np.random.default_rng(0).permutation(20)
    with pytest.warns(DatasetWarning, match="are the rows shuffled"):
        transitions = load_dataset({name: array[order] for name, array in make_arrays().items()})
    assert transitions.episode_ends.mean() > 0.9


@pytest.mark.parametrize("kind", [int, str, bytes, "table"])
def test_rows_of_episodes_are_together(kind):
    """Following rows are no next observations if those of several environments alternate, or are not in order."""
    numbers = np.arange(20) // 5
    if kind == "table":
        pandas = pytest.importorskip("pandas", reason='needs pip install "sb3-flow[zoo]"')
    arrays = {name: make_arrays()[name] for name in ("observations", "actions", "rewards")}
    arrays |= dict(episode_id=numbers if kind is int else numbers.astype("S" if kind is bytes else "U"))
    arrays |= dict(frame_index=np.arange(20) % 5, truncated=make_arrays()["episode_ends"])

    def load(rows, **others):
        data = {name: array[rows] for name, array in (arrays | others).items()}
        if kind == "table":
            data = pandas.DataFrame({name: list(array) if array.ndim > 1 else array for name, array in data.items()})
        return load_dataset(data)

    rows = np.arange(20)
    assert load(rows).rewards.tolist() == [row for row in rows if row % 5 != 4]
    alternating = rows.reshape(2, 10).T.reshape(-1)
    for order in (alternating, np.random.default_rng(0).permutation(20)):
        with pytest.raises(ValueError, match=r"'episode_id': the rows of episode .* are not together: sort them by episode"):
            load(order)
        with pytest.warns(DatasetWarning, match="are not together: returns of several steps"):
            load(order, next_observations=make_arrays()["next_observations"])
    with pytest.raises(ValueError, match=r"'frame_index' goes down in row 1, where no episode starts \(4, 3\): sort the rows"):
        load(rows.reshape(4, 5)[:, ::-1].reshape(-1), truncated=make_flags(0, 5, 10, 15))
    load(rows.reshape(4, 5)[:, ::-1].reshape(-1), next_observations=make_arrays()["next_observations"])
    # The numbers start again in the second part
    again = np.concatenate([np.arange(10), np.arange(10)])
    with pytest.raises(ValueError, match="the parts in a list"):
        load(again)
    assert len(load_dataset([{name: array[:10] for name, array in arrays.items()}] * 2)) == 16


# --- Names


def make_flags(*rows):
    return np.isin(np.arange(20), rows)


@pytest.mark.parametrize(
    ("flags", "dones", "warns"),
    [
        # SB3's dones include time-outs, which stand beside them
        (dict(dones=make_flags(4, 9, 14, 19), timeouts=make_flags(9, 19)), [4, 14], False),
        (dict(dones=make_flags(4, 9, 14, 19), infos={"TimeLimit.truncated": make_flags(9, 19)}), [4, 14], False),
        ({"done": make_flags(4, 9, 14, 19), "infos/TimeLimit.truncated": make_flags(9, 19)}, [4, 14], False),
        # Or they may do so, but say nothing of it
        (dict(dones=make_flags(4, 9, 14, 19)), [4, 9, 14, 19], True),
        (dict(terminals=make_flags(4, 9, 14, 19)), [4, 9, 14, 19], True),
        # What only tells ends does not help
        *[
            ({name: make_flags(4, 9, 14, 19)} | others, [4, 9, 14, 19], True)
            for name in ("dones", "terminals")
            for others in (
                dict(episode_ends=make_flags(4, 9, 14, 19)),
                dict(is_last=make_flags(4, 9, 14, 19)),
                dict(episode_ends=np.array([5, 10, 15, 20])),
                dict(episode_index=np.arange(20) // 5),
            )
        ],
        (dict(dones=make_flags(4, 9, 14, 19), discount=1 - make_flags(4)), [4], False),
        (dict(terminals=make_flags(4, 9, 14, 19), discount=1 - make_flags(4)), [4], False),
        # There are other ends than these, so that they are no time-outs
        (dict(dones=make_flags(4, 14)), [4, 14], False),
        (dict(terminated=make_flags(4, 14)), [4, 14], False),
        # Both at once: the episode terminated
        (dict(terminated=make_flags(4, 14), truncated=make_flags(4, 9, 19)), [4, 14], False),
        (dict(terminals=make_flags(4, 14), timeouts=make_flags(4, 9, 19)), [4, 14], False),
        (dict(terminated=make_flags(4), done=make_flags(4, 9, 14, 19)), [4], False),
        # Tasks that go on after success
        (dict(masks=1 - make_flags(7), terminals=make_flags(4, 9, 14, 19)), [7], False),
        (dict(dones=make_flags(7), episode_ends=make_flags(4, 9, 14, 19)), [7], False),
        # They only end
        (dict(truncations=make_flags(4, 9, 14, 19)), [], True),
        (dict(episode_starts=make_flags(0, 5, 10, 15)), [], True),
        (dict(episode_index=np.arange(20) // 5), [], True),
        ({"next.done": make_flags(4, 9, 14, 19), "next.success": make_flags(4)}, [4], False),
        # Flags that are not among those of the next state count
        ({"next.done": make_flags(4, 9, 14, 19), "truncated": make_flags(9, 14, 19)}, [4], False),
        ({"next.done": make_flags(4, 9, 14, 19), "done": np.zeros(20), "terminated": make_flags(4)}, [4], False),
        (dict(episode_ends=np.array([5, 10, 15, 20]), terminated=make_flags(4)), [4], False),
        # Nothing at all
        ({}, [], True),
        # dm_env's; those that are always 1 say nothing
        (dict(discount=1 - make_flags(4)), [4], False),
        (dict(discount=np.ones(20)), [], True),
        (dict(is_terminal=make_flags(4), is_last=make_flags(4, 9, 14, 19), discount=np.full(20, 0.99)), [4], False),
    ],
)
def test_what_terminates(flags, dones, warns):
    arrays = make_arrays()
    del arrays["dones"], arrays["episode_ends"]
    arrays["observations"] = arrays["observations"] + np.repeat(np.arange(4), 5)[:, None]
    arrays["next_observations"] = arrays["next_observations"] + np.repeat(np.arange(4), 5)[:, None]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transitions = load_dataset(arrays | flags)
    assert np.flatnonzero(transitions.dones).tolist() == dones
    assert np.flatnonzero(transitions.episode_ends).tolist() == [4, 9, 14, 19]
    assert len(caught) == warns


@pytest.mark.parametrize(
    "names", [("terminated",), ("terminated", "terminals"), ("terminated", "terminateds"), ("masks", "terminated")]
)
@pytest.mark.parametrize(
    "others", [{}, dict(truncated=make_flags(9, 19)), dict(next_observations=make_arrays()["observations"])]
)
def test_only_terminations_and_no_next_observations(names, others):
    """A truncated episode would go on in the next one."""
    arrays = {name: make_arrays()[name] for name in ("observations", "actions", "rewards")} | others
    arrays |= {name: 1 - make_flags(4, 14) if name == "masks" else make_flags(4, 14) for name in names}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_dataset(arrays)
    said = [str(warning.message) for warning in caught]
    assert any("an episode that was truncated would be taken as one with the next" in text for text in said) == (not others)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(terminated=make_flags(4), dones=make_flags(9)), "'terminated' and 'dones' contradict .* in row 4"),
        (dict(terminated=make_flags(4), truncated=make_flags(9), done=make_flags(4, 19)), "contradict .* in row 9"),
        (dict(terminated=make_flags(4), terminals=make_flags(4, 9)), "contradict each other, first in row 9"),
        (dict(terminated=make_flags(4), terminations=make_flags(9)), "'terminated' and 'terminations' contradict"),
        (dict(terminated=make_flags(4), masks=np.ones(20)), "'masks' and 'terminated' contradict each other, first in row 4"),
        (dict(terminals=make_flags(4), episode_terminals=make_flags(9)), "contradict each other, first in row 4"),
        (dict(dones=make_flags(4), done=make_flags(9)), "'dones' and 'done' contradict each other, first in row 4"),
        (dict(masks=make_flags(4) * 0.5), r"masks, row 4: neither 0 nor 1 \(0.5\)"),
        (dict(truncated=np.full(20, np.nan)), r"truncated, row 0: neither 0 nor 1 \(nan\)"),
        (dict(truncated=make_flags(4)[1:]), r"same length, they have \{'actions': 20, 'truncated': 19\}"),
        (dict(valids=make_flags(4)), "'valids' is for datasets without `next_observations`"),
        (dict(obs=np.zeros((20, 3))), "'observations' and 'obs' are both observations"),
        *[
            ({name: make_flags(4)}, f"{name!r} is not known, and looks as if it said where episodes end")
            for name in ("is_done", "terminal_flag", "trunc", "time_out", "end", "isLast", "absorbing", "mask", "valid_mask",
                         "episode_over", "final", "step_type", "dones_mask", "eos", "TERMINAL_STATE", "resets",
                         "dw", "game_over", "over", "dead", "died", "is_alive", "stop", "stopped",
                         "abort", "exit", "complete", "completed", "cutoff", "boundary", "bootstrap", "begin", "gameOver")
        ],
        *[
            ({name: np.arange(20) // 5}, f"{name!r} is not known, .* name it 'episode_index'")
            for name in ("ep_id", "rollout_id", "demo_id", "episode_num", "trajIdx", "ep_idx", "demo_index")
        ],
        *[
            (dict(episode_ends=np.array(counts, dtype=dtype)), "'episode_ends' must be 20 flags, one for each row, or numbers")
            for counts, dtype in [
                ([-5, 10, 20], int), ([10, 5, 20], np.uint64), ([5, 5, 20], np.uint8), ([5, 19], int), ([0, 20], np.uint64)
            ]
        ],
        (dict(indices=np.array([10, 5], dtype=np.uint64)), "'indices' must be 20 flags, one for each row, or numbers"),
    ],
)  # fmt: skip
def test_flags_are_not_guessed(flags, message):
    arrays = make_arrays()
    del arrays["dones"], arrays["episode_ends"]
    with pytest.raises(ValueError, match=message):
        load_dataset(arrays | flags)


def test_unknown_names():
    arrays = make_arrays() | {
        "skill": np.zeros(20),
        "goals": {"a": np.zeros(20)},
        "qpos": np.zeros(20),
        "note": "hello",
        "fps": 30,
    }
    with pytest.warns(DatasetWarning, match=r"^Not known, and not read: 'goals', 'skill'$"):
        load_dataset(arrays)
    arrays["nextobs"] = arrays.pop("next_observations")
    with pytest.raises(ValueError, match="'nextobs' is not known, and looks as if it were 'next_observations'"):
        load_dataset(arrays)


def test_warnings_name_the_file_once(tmp_path):
    h5py = pytest.importorskip("h5py", reason='needs pip install "sb3-flow[offline]"')
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for number in (2, 10, 1):
            for name in ("obs/a", "actions", "rewards", "dones", "skill"):
                file[f"data/demo_{number}/{name}"] = np.full((5, 1), number)
            file[f"data/demo_{number}/dones"][:] = [[0], [0], [0], [0], [1]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transitions = load_dataset(tmp_path / "data.hdf5")
    said = sorted(str(warning.message) for warning in caught)
    assert len(said) == 2 and all(text.startswith(f"{tmp_path / 'data.hdf5'}: ") for text in said)
    assert "'dones' is set wherever an episode ended" in said[0] and "not read: 'skill'" in said[1]
    assert transitions.rewards.tolist() == [1] * 5 + [2] * 5 + [10] * 5
    with h5py.File(tmp_path / "data.hdf5", "a") as file:
        del file["data/demo_2/actions"]
    with pytest.raises(
        ValueError, match=r"data\.hdf5: data/demo_2: it has no 'actions' .* it has the arrays 'dones', 'rewards', "
    ):
        load_dataset(tmp_path / "data.hdf5")


def test_table_of_the_documentation():
    """The table of the guide is the one of the code."""
    lines = [
        ".. list-table::",
        "    :header-rows: 1",
        "    :widths: 30 45 25",
        "",
        "    * - Names",
        "      - Meaning",
        "      - Written by",
    ]
    for row in NAMES:
        lines += [
            f"    * - {', '.join(f'``{name}``' for name in row.names)}",
            f"      - {row.meaning}",
            f"      - {row.written_by}",
        ]
    table = "\n".join(lines)
    page = (Path(__file__).parents[1] / "docs" / "guide" / "own_data.rst").read_text(encoding="utf-8")
    assert table in page, f"docs/guide/own_data.rst must have this table:\n{table}"


def test_masks_of_ogbench_in_memory():
    """What its ``make_env_and_datasets`` returns: ``terminals`` end trajectories, ``masks`` tell where to bootstrap."""
    arrays = make_arrays()
    arrays["terminals"], arrays["masks"] = arrays.pop("episode_ends"), 1.0 - (np.arange(20) == 7)
    del arrays["dones"]
    transitions = load_dataset(arrays)
    assert np.flatnonzero(transitions.dones).tolist() == [7]
    assert np.flatnonzero(transitions.episode_ends).tolist() == [4, 9, 14, 19]
    # Returns of several steps stop where the task is solved, in the middle of a trajectory
    buffer = OfflineBuffer(transitions, n_steps=3, gamma=0.9)
    rewards, last, _ = buffer._n_step_returns(th.tensor([6]))
    assert last.tolist() == [7] and np.allclose(rewards, 6 + 0.9 * 7)


@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], np.array([5.0, 5, 5, 5]), np.array([[5], [5], [5], [5]], dtype=np.uint64)])
def test_lengths_of_episodes(lengths):
    arrays = {name: make_arrays()[name] for name in ("observations", "actions", "rewards", "dones")}
    transitions = load_dataset(arrays | dict(episode_lengths=lengths))
    assert_same(transitions, {name: array[~make_flags(9, 19)] for name, array in make_arrays().items()} | dict(
        episode_ends=make_flags(4, 8, 13, 17)[:18],
        next_observations=transitions.next_observations,
    ))  # fmt: skip
    # Others are those of statistics
    for others in ([5, 5, 5], np.full(20, 5), np.zeros(20), [25, -5], {"mean": 5.0}, 5):
        transitions = load_dataset(arrays | dict(episode_length=others, next_observations=arrays["observations"] + 0.1))
        assert np.array_equal(transitions.dones, arrays["dones"])


@pytest.mark.parametrize("with_next", [True, False])
def test_torchrl(with_next):
    """What its transforms add, at both ends of a step."""
    arrays, column = make_arrays(), th.zeros(20, 1)
    extras = dict(step_count=column, is_init=column.bool(), episode_reward=column)
    data = dict(observation=th.tensor(arrays["observations"]), action=th.tensor(arrays["actions"]), **extras)
    flags = dict(done=arrays["episode_ends"], terminated=arrays["dones"], truncated=arrays["episode_ends"] & ~arrays["dones"])
    following = dict(
        observation=th.tensor(arrays["next_observations"]), reward=th.tensor(arrays["rewards"])[:, None], **extras
    )
    following |= {name: th.tensor(flag)[:, None] for name, flag in flags.items()}
    if not with_next:
        del following["observation"], following["done"], following["truncated"]
    data |= dict(collector={"traj_ids": th.arange(20) // 5}, next=following)
    data |= {name: column.bool() for name in flags if name in following}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transitions = load_dataset(data)
    if with_next:
        assert_same(transitions, arrays)
    else:
        assert np.flatnonzero(transitions.episode_ends).tolist() == [4, 8, 13, 17]


@pytest.mark.parametrize("flag", ["is_terminal", "discount"])
@pytest.mark.parametrize("last_step_is_empty", [True, False])
def test_last_step_of_rlds(flag, last_step_is_empty):
    """It is nothing but an observation, unless it has an action and a reward."""
    last, over = make_flags(4, 9, 14, 19), make_flags(4, 14)
    arrays = {name: make_arrays()[name] for name in ("observations", "actions", "rewards")} | dict(is_last=last)
    arrays[flag] = over if flag == "is_terminal" else 1.0 - over
    if last_step_is_empty:
        arrays |= {name: np.where(last.reshape(-1, *[1] * (arrays[name].ndim - 1)), 0, arrays[name])
                   for name in ("actions", "rewards")}  # fmt: skip
    transitions = load_dataset(arrays)
    # (The rows that are left)
    if last_step_is_empty:
        assert len(transitions) == 16 and np.flatnonzero(transitions.dones).tolist() == [3, 11]
    else:
        assert len(transitions) == 18 and np.flatnonzero(transitions.dones).tolist() == [4, 13]


def test_empty_arrays_of_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py", reason='needs pip install "sb3-flow[offline]"')
    for name in ("note", "actions"):
        with h5py.File(tmp_path / "data.h5", "w") as file:
            for key, value in (make_arrays() | {name: h5py.Empty("f")}).items():
                file[key] = value
        if name == "note":
            assert len(load_dataset(tmp_path / "data.h5")) == 20
        else:
            with pytest.raises(ValueError, match="actions is empty: it has no shape"):
                load_dataset(tmp_path / "data.h5")


@pytest.mark.parametrize("with_final", [True, False])
@pytest.mark.parametrize("need_rewards", [True, False])
def test_list_of_demonstrations(with_final, need_rewards):
    """Without flags, each ends in its last row, as those of a file with groups do."""
    demos = [dict(obs=np.random.rand(n + with_final, 3), actions=np.zeros((n, 2)), rewards=np.zeros(n)) for n in (5, 3, 4)]
    ends = [4, 7, 11] if with_final else [3, 5, 8]
    for dataset in (demos, {f"demo_{number}": demo for number, demo in enumerate(demos)}):
        transitions = load_dataset(dataset, need_rewards=need_rewards)
        assert np.flatnonzero(transitions.episode_ends).tolist() == ends and transitions.dones.sum() == 0
    # One with flags is a dataset, of any number of episodes
    several = make_arrays() | dict(next_observations=None)
    assert load_dataset([several, several]).episode_ends.sum() == 8


def test_states_of_a_simulator():
    arrays = make_arrays()
    states = arrays["observations"] + 100
    # Beside observations, they are not theirs
    transitions = load_dataset(arrays | dict(states=states, next_states=states) | dict(next_observations=None))
    assert transitions.observations.max() < 10 and transitions.next_observations.max() < 10
    data = {name: arrays[name] for name in ("actions", "rewards", "dones")} | dict(states=states)
    with pytest.warns(DatasetWarning, match="The states are taken as observations"):
        load_dataset({"data": {"demo_0": data}})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The states")
        load_dataset(data | dict(next_states=states + 0.1))


@pytest.mark.parametrize("kind", ["episodes", "equal episodes", "environments", "arrays of environments"])
def test_rows_that_are_episodes(kind):
    lengths = (5, 3) if kind == "episodes" else (4, 4)
    arrays = dict(observations=3, actions=2, rewards=0, terminated=0)
    data = {name: [np.zeros((n, size) if size else n) for n in lengths] for name, size in arrays.items()}
    if kind == "environments":
        data = {name: [list(step) for step in zip(*value, strict=True)] for name, value in data.items()}
    if kind == "arrays of environments":
        data = {name: np.stack(value, axis=1) for name, value in data.items()}
    with pytest.raises(ValueError, match="make a list of dictionaries of them, one for each episode or environment"):
        load_dataset(data)


def make_inputs():
    arrays = make_arrays()
    arrays["observations"], arrays["next_observations"] = (
        np.round(arrays[name], 2) for name in ("observations", "next_observations")
    )
    steps = [{name: array[row] for name, array in arrays.items()} for row in range(20)]
    Step = namedtuple("Step", arrays)
    structured = np.zeros(20, dtype=[(name, array.dtype, array.shape[1:]) for name, array in arrays.items()])
    for name, array in arrays.items():
        structured[name] = array
    return arrays, {
        "tensors": {name: th.tensor(array, requires_grad=array.dtype == np.float32) for name, array in arrays.items()},
        "lists": {name: array.tolist() for name, array in arrays.items()},
        "lists of tensors": {name: [th.tensor(row) for row in array] for name, array in arrays.items()},
        "arrays of objects": {name: np.array([*map(list, array), None], dtype=object)[:-1] if array.ndim > 1 else array
                              for name, array in arrays.items()},
        "structured array": structured,
        "transitions": steps,
        "transitions of tensors": [{name: th.as_tensor(value) for name, value in step.items()} for step in steps],
        "named tuples": [Step(**step) for step in steps],
        "episodes": [{name: array[start : start + 5] for name, array in arrays.items()} for start in range(0, 20, 5)],
    }  # fmt: skip


@pytest.mark.parametrize("kind", make_inputs()[1])
def test_other_inputs(kind):
    arrays, inputs = make_inputs()
    assert_same(load_dataset(inputs[kind]), arrays)


def test_tables():
    pandas = pytest.importorskip("pandas", reason='needs pip install "sb3-flow[zoo]"')
    arrays = make_arrays()
    table = pandas.DataFrame({name: list(array) if array.ndim > 1 else array for name, array in arrays.items()})
    assert_same(load_dataset(table), arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(observations=3.0), r"observations must be an array with a row for each transition, not np\.float64\(3\.0\)"),
        (dict(observations="data"), "observations must be an array with a row for each transition, not .*'data'"),
        (dict(actions={"left": np.zeros((20, 1))}), "actions must be an array, not a dictionary with the keys 'left'"),
        (dict(actions=[[1.0, 2.0]] * 19 + [[1.0]]), r"actions, row 19: its shape is \(1,\), that of row 0 is \(2,\)"),
        (dict(actions=[[1.0, 2.0]] * 19 + [None]), "actions must be numbers, not object: row 19 is a NoneType"),
        (dict(actions=np.zeros((20, 2), dtype=complex)), "actions must be numbers, not complex128"),
        (dict(rewards=np.zeros((20, 2))), r"rewards must be one number for each transition, of shape \(n,\), not \(20, 2\)"),
        (dict(rewards=np.zeros(20, dtype="timedelta64[s]")), "rewards must be numbers, not timedelta64"),
        (dict(rewards=np.ma.masked_equal(np.arange(20), 3)), "rewards has masked rows"),
        (dict(observations={}), "observations is an empty dictionary"),
        (dict(next_observations=np.zeros((20, 4))), r"observations and next_observations must be the same, .*\(3,\) .*\(4,\)"),
        (dict(next_observations={"a": np.zeros((20, 3))}), r"There is observations, but no next_observations"),
        (
            dict(observations={"a": np.zeros(20), "b": np.zeros(20)}, next_observations={"a": np.zeros(20)}),
            r"There is observations\['b'\], but no next_observations\['b'\]",
        ),
        (
            dict(observations=np.zeros((20, 3, 4, 4), dtype=np.uint8), next_observations=np.zeros((20, 3, 4, 4))),
            "observations and next_observations must be the same, not uint8 .* and float32",
        ),
        (dict(observations=np.zeros((23, 3)), next_observations=None), r"may have one row more for each episode, 24 in all"),
        ({name: np.zeros((0, 1)) for name in make_arrays()}, "empty"),
    ],
)
def test_bad_arrays_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(make_arrays() | change)


def test_bad_parts_are_named():
    arrays, inputs = make_inputs()
    steps, episodes = inputs["transitions"], inputs["episodes"]
    with pytest.raises(ValueError, match="The list of transitions, row 7: there is no 'rewards', which other rows have"):
        load_dataset([*steps[:7], {name: steps[7][name] for name in steps[7] if name != "rewards"}, *steps[8:]])
    with pytest.raises(ValueError, match=r"observations, row 7: its shape is \(2,\), that of row 0 is \(3,\)"):
        load_dataset([*steps[:7], steps[7] | dict(observations=np.zeros(2)), *steps[8:]])
    with pytest.raises(ValueError, match=r"number 2: The arrays of a dataset must have the same length, .*'rewards': 4"):
        load_dataset([*episodes[:2], episodes[2] | dict(rewards=np.zeros(4)), episodes[3]])
    with pytest.raises(
        ValueError, match=r"actions is float32 of shape \(2,\) in number 0, float32 of shape \(3,\) in number 3"
    ):
        load_dataset([*episodes[:3], episodes[3] | dict(actions=np.zeros((5, 3)))])
    # An episode that lacks its final observation
    long = [{"obs": np.zeros((6, 3)), "acts": np.zeros((5, 2)), "rews": np.zeros(5), "terminal": True} for _ in range(3)]
    long[1]["obs"] = np.zeros((5, 3))
    with pytest.raises(
        ValueError, match="number 1: it has neither next observations nor a final one, and number 0 has a final"
    ):
        load_dataset(long)
    with pytest.raises(ValueError, match="number 1: A dataset cannot be a int"):
        load_dataset([arrays, 3])


def test_joined_images_are_of_one_kind():
    """Bytes, and the same in [0, 1], are not the same."""
    flat = [make_arrays() | {name: np.ones((20, 9), dtype=dtype) for name in ("observations", "next_observations")}
            for dtype in (np.uint8, np.float32)]  # fmt: skip
    for some in (flat, {f"demo_{number}": part for number, part in enumerate(flat)}):
        with pytest.raises(ValueError, match=r"observations is uint8 data in .*0, float32 data in .*1"):
            load_dataset(some)
    parts = [make_arrays() | {name: np.ones((20, 3, 4, 4), dtype=dtype) for name in ("observations", "next_observations")}
             for dtype in (np.uint8, np.float32)]  # fmt: skip
    for some in (parts, parts[::-1], [load_dataset(part) for part in parts]):
        with pytest.raises(
            ValueError, match=r"observations is (uint8|float32) .* in number 0, (uint8|float32) .* in number 1"
        ):
            load_dataset(some)


class Trap:
    """Sets a flag if it is unpickled."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "data.npz"
    rows = np.array([*map(list, make_arrays()["observations"]), None], dtype=object)[:-1]
    np.savez(path, **make_arrays() | dict(infos=np.array([Trap()] * 20, dtype=object)))
    # What is not needed is not looked at
    assert_same(load_dataset(path), make_arrays())
    np.savez(path, **make_arrays() | dict(observations=rows))
    with pytest.raises(
        ValueError, match=r"data\.npz: observations must be numbers, not object: it is pickled, .*`allow_pickle=True`"
    ):
        load_dataset(path)
    assert_same(load_dataset(path, allow_pickle=True), make_arrays())
    np.savez(path, **make_arrays() | {name: {"a": make_arrays()[name]} for name in ("observations", "next_observations")})
    with pytest.raises(ValueError, match="it is pickled"):
        load_dataset(path)
    assert set(load_dataset(path, allow_pickle=True).observations) == {"a"}
    np.savez(path, columns=np.array(["actions"]), num_episodes=np.array(Trap(), dtype=object))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        load_dataset(path)
    for suffix in (".npz", ".hdf5", ".pkl"):
        with open(path.with_suffix(suffix), "wb") as file:
            pickle.dump(Trap(), file)
        with pytest.raises(ValueError, match=path.with_suffix(suffix).name):
            load_dataset(path.with_suffix(suffix))
    assert not Trap.sprung
    # What a pickle may hold
    with open(path.with_suffix(".pkl"), "wb") as file:
        pickle.dump(make_inputs()[1]["transitions"], file)
    assert len(load_dataset(path.with_suffix(".pkl"), allow_pickle=True)) == 20


def test_unknown_groups_are_named(tmp_path):
    h5py = pytest.importorskip("h5py", reason='needs pip install "sb3-flow[offline]"')
    with h5py.File(tmp_path / "data.h5", "w") as file:
        for group in ("train", "val"):
            for name, array in make_arrays().items():
                file[f"{group}/{name}"] = array
        file["fps"] = 30
        for name, array in make_arrays().items():
            file[f"numbered/data/demo_0/{name}"] = array
        file["numbered/skills"] = np.zeros(20)
    with pytest.warns(DatasetWarning, match="not read: 'skills'"), h5py.File(tmp_path / "data.h5") as file:
        assert len(load_dataset(file["numbered"])) == 20
    with pytest.raises(
        ValueError, match=r"data\.h5: it has no .* it has the arrays 'fps' and the groups 'numbered', 'train', 'val'"
    ):
        load_dataset(tmp_path / "data.h5")


@pytest.mark.parametrize(
    "names", [("demo_0", "demo_1", "demo_2_aug"), ("train_0", "test_0"), ("demo_0", "extra"), ("0", "a1")]
)
@pytest.mark.parametrize("prefix", ["data", None])
def test_groups_of_one_kind(names, prefix):
    episodes = {name: make_arrays(5) for name in names}
    with pytest.raises(ValueError, match=r"groups with actions of more than one kind, .* \(such as "):
        load_dataset({prefix: episodes} if prefix else episodes)


def test_episodes_by_number():
    arrays = {number: make_arrays(5) | dict(rewards=np.full(5, number)) for number in (10, 2, 1)}
    assert load_dataset(arrays).rewards.tolist() == [1] * 5 + [2] * 5 + [10] * 5


@pytest.mark.parametrize("need_rewards", [True, False])
def test_without_rewards(need_rewards):
    arrays = make_arrays()
    del arrays["rewards"]
    if need_rewards:
        with pytest.raises(ValueError, match="has no 'rewards'"):
            load_dataset(arrays)
    else:
        assert_same(load_dataset(arrays, need_rewards=False), arrays | dict(rewards=np.zeros(20)))
        # OGBench's own files: a row more for each trajectory
        raw = dict(
            observations=arrays["observations"], actions=arrays["actions"], terminals=make_flags(9, 19), qpos=np.zeros(20)
        )
        transitions = load_dataset(raw, need_rewards=False)
        assert len(transitions) == 18 and transitions.dones.sum() == 0


def test_chunks_are_read_once(tmp_path):
    """However large a chunk is."""
    h5py = pytest.importorskip("h5py", reason='needs pip install "sb3-flow[offline]"')
    n = 60_000
    observations = np.random.default_rng(0).normal(size=(n, 40)).round(2).astype(np.float32)
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file.create_dataset("observations", data=observations, chunks=(n, 40), compression="gzip")
        file["actions"], file["rewards"], file["terminals"] = np.zeros((n, 1)), np.zeros(n), np.arange(n) % 1000 == 999
    with h5py.File(tmp_path / "data.hdf5") as file:
        start = time.process_time()
        file["observations"][:]
        once = time.process_time() - start
    start = time.process_time()
    transitions = load_dataset(tmp_path / "data.hdf5")
    assert time.process_time() - start < 3 * once + 0.2
    assert np.array_equal(transitions.observations, observations)


def test_reward_shift(tmp_path):
    arrays = make_arrays()
    np.savez(tmp_path / "data.npz", **arrays)
    assert np.allclose(load_dataset(tmp_path / "data.npz", reward_shift=-1.0).rewards, arrays["rewards"] - 1)
    assert load_dataset(arrays, reward_shift=2.0).rewards[3] == 5 and arrays["rewards"][3] == 3


@pytest.mark.parametrize("dataset", [make_arrays(), [make_arrays()], "data.npz", "ogbench:cube-single-play-v0@data.npz",
                                     "ogbench:cube-single-play-singletask-v0@data.npz", "minari:a/b-v0"])  # fmt: skip
def test_unknown_arguments(dataset):
    close = dict(
        clip_action="clip_actions", reward_sift="reward_shift", need_reward="need_rewards", alow_pickle="allow_pickle"
    )
    for name, meant in close.items():
        with pytest.raises(ValueError, match=rf"unknown argument '{name}' \(did you mean '{meant}'\?\)"):
            load_dataset(dataset, **{name: True})
    with pytest.raises(ValueError, match=r"unknown argument 'dataset_dir': .* \"ogbench:NAME@PATH\""):
        load_dataset(dataset, dataset_dir=".")
    if "singletask" not in dataset:
        pytest.importorskip("ogbench", reason='needs pip install "sb3-flow[offline]"')
        with pytest.raises(ValueError, match="unknown argument 'success_timing': only single tasks of OGBench have others"):
            load_dataset(dataset, need_rewards=False, success_timing="post")


@pytest.mark.parametrize("channels_last", [True, False])
def test_stacked_frames_are_those_of_the_environment(channels_last):
    """The dataset holds single images. Stacked, they are what VecFrameStack and VecTransposeImage make of the same steps."""
    shape = (12, 14, 3) if channels_last else (3, 12, 14)

    class Images(gym.Env):
        observation_space = spaces.Box(0, 255, shape, dtype=np.uint8)
        action_space = spaces.Box(-1, 1, (1,))
        raw: ClassVar[list] = []

        def _observe(self):
            self.raw.append(self.observation_space.sample())
            return self.raw[-1]

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self._observe(), {}

        def step(self, action):
            return self._observe(), 0.0, False, False, {}

    Images.raw.clear()
    env = VecFrameStack(DummyVecEnv([lambda: gym.wrappers.TimeLimit(Images(), 5)]), 3)
    env = VecTransposeImage(env) if channels_last else env
    stacked, stacked_next = [env.reset()], []
    for _ in range(15):
        observation, _, done, info = env.step(np.zeros((1, 1)))
        stacked_next.append(info[0]["terminal_observation"][None] if done[0] else observation.copy())
        stacked.append(observation.copy())

    episodes = [Images.raw[6 * i : 6 * (i + 1)] for i in range(3)]
    dataset = dict(
        observations=np.concatenate([episode[:-1] for episode in episodes]),
        next_observations=np.concatenate([episode[1:] for episode in episodes]),
        actions=np.zeros((15, 1)), rewards=np.zeros(15), episode_ends=(np.arange(15) + 1) % 5 == 0,
    )  # fmt: skip
    model = FQL("CnnPolicy", env, dataset=dataset, buffer_size=10, policy_kwargs=dict(net_arch=[8]))
    rows = th.randint(15, (200,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(th, "randint", lambda *args, **kwargs: rows)
        batch = model.offline_buffer.sample(200)
    assert np.array_equal(batch.observations, np.concatenate(stacked[:-1])[rows])
    assert np.array_equal(batch.next_observations, np.concatenate(stacked_next)[rows])
    model.learn_offline(2)

    # An agent's replay buffer holds them stacked already
    replay = FQL("CnnPolicy", env, learning_starts=0, buffer_size=10, policy_kwargs=dict(net_arch=[8])).learn(4).replay_buffer
    model.set_dataset(replay)
    assert model.offline_buffer.n_stack == 1
    with pytest.raises(ValueError, match=r"observations of shape .* \(3 stacked: .*\) do not fit"):
        model.set_dataset({**dataset, **{name: dataset[name][..., :2, :2] for name in ("observations", "next_observations")}})


@pytest.mark.parametrize("kind", ["arrays", "npz", "npz without next", "hdf5", "hdf5 without next", "float64"])
def test_memory(tmp_path, kind):
    """Loading, checking and holding a dataset takes 1.1 times the memory of its arrays."""
    n = 100_000
    rows = np.arange(n, dtype=np.float32)
    arrays = dict(
        observations=np.stack([rows] * 40, axis=1), actions=np.zeros((n, 4)), rewards=rows, dones=rows % 1000 == 999,
        episode_ends=rows % 1000 == 999,
    )  # fmt: skip
    if "without" not in kind:
        arrays["next_observations"] = arrays["observations"] + 1
    if kind == "float64":
        arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    path = tmp_path / ("data.hdf5" if "hdf5" in kind else "data.npz")
    if "hdf5" in kind:
        h5py = pytest.importorskip("h5py", reason='needs pip install "sb3-flow[offline]"')
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    elif kind != "arrays":
        np.savez(path, **arrays)

    tracemalloc.start()
    transitions = load_dataset(arrays if kind == "arrays" else path)
    check_transitions(transitions, spaces.Box(-np.inf, np.inf, (40,)), spaces.Box(-1, 1, (4,)))
    buffer = OfflineBuffer(transitions, "cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * transitions.nbytes
    for name in ("observations", "next_observations", "actions", "rewards", "dones"):
        assert np.shares_memory(getattr(buffer, name).numpy(), getattr(transitions, name))
    assert np.array_equal(transitions.observations[:, 3], rows)
    going_on = transitions.dones == 0
    assert np.array_equal(transitions.next_observations[going_on, 3], rows[going_on] + 1)
