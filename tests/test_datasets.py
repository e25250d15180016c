"""Every loader, on a real file; every kind of bad data, by name and row."""

import os
import pickle
import tracemalloc
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage

from sb3_flow import FQL
from sb3_flow.common.buffers import OfflineBuffer
from sb3_flow.common.datasets import from_replay_buffer, load_dataset
from sb3_flow.common.transitions import Transitions, check_transitions

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
    for dictionary in (False, True):
        if dictionary:
            arrays |= {name: {"a": arrays[name], "b": arrays[name]} for name in ("observations", "next_observations")}
        without = {name: array for name, array in arrays.items() if name != "episode_ends"}
        assert load_dataset(without).episode_ends.tolist() == arrays["episode_ends"].tolist()


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


def test_reward_shift(tmp_path):
    arrays = make_arrays()
    np.savez(tmp_path / "data.npz", **arrays)
    assert np.allclose(load_dataset(tmp_path / "data.npz", reward_shift=-1.0).rewards, arrays["rewards"] - 1)
    assert load_dataset(arrays, reward_shift=2.0).rewards[3] == 5 and arrays["rewards"][3] == 3
    with pytest.raises(ValueError, match="'success_timing' is for datasets of OGBench"):
        load_dataset(arrays, success_timing="post")


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
