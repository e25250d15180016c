"""Action chunks: sequences of a dataset and of a replay buffer, what is learned of them, and how they are executed."""

import itertools
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_flow import FAWAC, FBRAC, FQL, IFQL, QC, FlowBC
from sb3_flow.offline.buffers import OfflineBuffer
from sb3_flow.offline.chunks import ChunkReplayBuffer, ChunkSamples, join_steps
from sb3_flow.offline.transitions import Transitions

WITH_CHUNKS: list[Any] = [FQL, QC, FlowBC]
ONLINE: list[Any] = [FQL, QC]
GAMMA = 0.5


def make_dataset(n=200, length=20):
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (n + 1, 3)).astype(np.float32)
    return dict(
        observations=observations[:-1],
        next_observations=observations[1:],
        actions=rng.uniform(-2, 2, (n, 1)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        timeouts=np.arange(n) % length == length - 1,
    )


def make_model(algorithm, env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    kwargs = dict(seed=0, device="cpu", batch_size=32, chunk_size=3) | kwargs
    small = dict(net_arch=[16, 16], n_flow_steps=4) | (dict(n_samples=4) if algorithm is QC else {})
    kwargs["policy_kwargs"] = small | kwargs.get("policy_kwargs", {})
    return algorithm(policy, env, **kwargs)


class CountingEnv(gym.Env):
    """The observation is the number of steps so far. An episode has ``length`` steps."""

    action_space = spaces.Box(-2, 2, (2,))
    observation_space = spaces.Box(-np.inf, np.inf, (1,))

    def __init__(self, length=5, truncates=False, start=0):
        self.length, self.truncates, self.n_steps, self.total = length, truncates, 0, start

    def _obs(self):
        return np.array([self.total], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_steps = 0
        self.total += 100
        return self._obs(), {}

    def step(self, action):
        self.n_steps += 1
        self.total += 1
        ended = self.n_steps == self.length
        return self._obs(), float(self.n_steps), ended and not self.truncates, ended and self.truncates, {}


# --- Sequences


@pytest.mark.parametrize(
    ("dones", "ends", "expected_done", "valid"),
    [
        # Nothing ends
        ([0, 0, 0], [0, 0, 0], 0, [1, 1, 1]),
        # It terminates, at the first, the middle and the last step
        ([1, 0, 0], [1, 0, 0], 1, [1, 0, 0]),
        ([0, 1, 0], [0, 1, 0], 1, [1, 1, 0]),
        ([0, 0, 1], [0, 0, 1], 1, [1, 1, 1]),
        # It is truncated
        ([0, 0, 0], [0, 1, 0], 0, [1, 1, 0]),
        ([0, 0, 0], [0, 0, 1], 0, [1, 1, 1]),
        # The task is solved in the middle of a trajectory (OGBench)
        ([0, 1, 0], [0, 0, 0], 1, [1, 1, 1]),
        # Two episodes end
        ([0, 0, 1], [1, 0, 1], 1, [1, 0, 0]),
    ],
)
def test_join_steps(dones, ends, expected_done, valid):
    rewards = th.tensor([[2.0, 4.0, 8.0]])
    columns = join_steps(rewards, th.tensor([dones]).float(), th.tensor([ends]) > 0, GAMMA)
    done, returns, discount, are_valid = columns
    assert returns.tolist() == [[2 + 0.5 * 4 + 0.25 * 8]] and discount.tolist() == [[0.125]]
    assert done.tolist() == [[expected_done]] and are_valid.tolist() == [valid]


def plain_chunk(rewards, dones, ends, chunk_size):
    """As the authors have it, one step after the other."""
    total, mask, terminal, valid = rewards[0], 1 - dones[0], ends[0], [1.0]
    for i in range(1, chunk_size):
        valid.append(1.0 - terminal)
        total += GAMMA**i * rewards[i]
        mask = min(mask, 1 - dones[i])
        terminal = max(terminal, ends[i])
    return total, mask, valid


def check_chunk(batch, index, row, observations, next_observations, actions, rewards, dones, ends, chunk_size):
    """One of the samples against the transitions from a row on."""
    total, mask, valid = plain_chunk(rewards[row:], dones[row:], ends[row:], chunk_size)
    assert batch.valid[index].tolist() == valid
    assert batch.actions[index].tolist() == pytest.approx(actions[row : row + chunk_size].flatten().tolist())
    if valid[-1]:
        # (what comes of the others does not matter)
        assert batch.rewards[index].item() == pytest.approx(total, rel=1e-5)
        assert batch.dones[index].item() == 1 - mask
        assert batch.next_observations[index].tolist() == next_observations[row + chunk_size - 1].tolist()
    assert batch.observations[index].tolist() == observations[row].tolist()
    assert batch.discounts[index].item() == pytest.approx(GAMMA**chunk_size)


@given(data=st.data(), n=st.integers(2, 40), chunk_size=st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_chunks_of_a_dataset(data, n, chunk_size):
    ends = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    ends[-1] = True
    dones = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=np.float32)
    rng = np.random.default_rng(0)
    observations = np.arange(n, dtype=np.float32)[:, None]
    arrays = (observations, rng.normal(size=(n, 2)).astype(np.float32), rng.normal(size=n).astype(np.float32))
    transitions = Transitions(*arrays, observations + 0.5, dones, ends)
    buffer = OfflineBuffer(transitions, gamma=GAMMA, chunk_size=chunk_size)
    batch = buffer.sample(30)
    assert isinstance(batch, ChunkSamples)
    # What is beyond the last row is the last row again
    parts = [np.concatenate([x, *[x[-1:]] * chunk_size]) for x in (observations, observations + 0.5, *arrays[1:], dones, ends)]
    for index, row in enumerate(batch.observations[:, 0].int().tolist()):
        check_chunk(batch, index, row, *parts, chunk_size)
    lengths = np.diff(np.flatnonzero(ends), prepend=-1)
    assert buffer.longest_episode == lengths.max()


@given(data=st.data(), n_envs=st.integers(1, 3), chunk_size=st.integers(2, 5), capacity=st.integers(5, 12),
       n=st.integers(1, 30))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_chunks_of_a_replay_buffer(data, n_envs, chunk_size, capacity, n):
    """Each of one environment, with all that was ever stored to compare with: also when the buffer starts again."""
    space = spaces.Box(-np.inf, np.inf, (1,))
    buffer = ChunkReplayBuffer(capacity * n_envs, space, CountingEnv.action_space, "cpu", n_envs, chunk_size=chunk_size,
                               gamma=GAMMA)  # fmt: skip
    rng = np.random.default_rng(0)
    flags = st.lists(st.sampled_from(["", "", "", "terminated", "truncated", "reset"]), min_size=n_envs, max_size=n_envs)
    # Each observation is a number of its own
    number, obs = n_envs, np.arange(n_envs, dtype=np.float32)[:, None]
    stored: list[Any] = []
    for _ in range(n):
        kinds = data.draw(flags)
        next_obs, number = np.arange(number, number + n_envs, dtype=np.float32)[:, None], number + n_envs
        dones = np.array([kind in ("terminated", "truncated") for kind in kinds])
        infos = [{"TimeLimit.truncated": kind == "truncated"} for kind in kinds]
        actions, rewards = rng.normal(size=(n_envs, 2)).astype(np.float32), rng.normal(size=n_envs)
        buffer.add(obs, next_obs, actions, rewards, dones, infos)
        ends = np.array([kind != "" for kind in kinds])
        stored.append((obs, next_obs, actions, rewards, [float(kind == "terminated") for kind in kinds], ends))
        fresh, number = np.arange(number, number + n_envs, dtype=np.float32)[:, None], number + n_envs
        obs = np.where(ends[:, None], fresh, next_obs)
    held = min(n, capacity)
    assert buffer.n_chunks == max(held - chunk_size + 1, 0)
    if buffer.n_chunks == 0:
        return
    batch = buffer.sample(40)
    parts = [np.array(part) for part in zip(*stored, strict=True)]
    where = {float(value): (row, env) for row, values in enumerate(parts[0][:, :, 0]) for env, value in enumerate(values)}
    for index, value in enumerate(batch.observations[:, 0].tolist()):
        row, env = where[value]
        # Held in whole
        assert n - held <= row <= n - chunk_size
        check_chunk(batch, index, row, *(part[:, env] for part in parts), chunk_size)


@pytest.mark.parametrize("truncates", [True, False])
def test_time_limits_online(truncates):
    """Nothing is bootstrapped after a termination, but after a time limit it is."""
    model = make_model(FQL, DummyVecEnv([lambda: CountingEnv(3, truncates)]), learning_starts=10).learn(30)
    batch = model.replay_buffer.sample(200)
    at_end = batch.valid[:, -1] * (batch.observations[:, 0] % 100 == 0)
    assert at_end.sum() > 0 and batch.dones[at_end > 0].flatten().unique().tolist() == [float(not truncates)]


def test_a_reset_is_no_next_step():
    """Learning begins anew in the middle of an episode: no chunk goes on over it."""
    model = make_model(FQL, DummyVecEnv([lambda: CountingEnv(1000)]), learning_starts=1000)
    model.learn(10).learn(10)
    breaks = model.replay_buffer.breaks[:20, 0]
    assert np.flatnonzero(breaks).tolist() == [9]
    batch = model.replay_buffer.sample(500)
    for obs, next_obs, valid in zip(batch.observations, batch.next_observations, batch.valid, strict=True):
        assert bool(valid[-1]) == (next_obs - obs == 3)


def test_missing_observations_are_no_breaks():
    """A sensor that is off is as off in the next step."""
    space = spaces.Box(-np.inf, np.inf, (2,))
    buffer = ChunkReplayBuffer(10, space, CountingEnv.action_space, "cpu", 1, chunk_size=2, gamma=GAMMA)
    observations = np.array([[[number, np.nan]] for number in range(6)], dtype=np.float32)
    for obs, next_obs in itertools.pairwise(observations):
        buffer.add(obs, next_obs, np.zeros((1, 2)), np.zeros(1), np.zeros(1), [{}])
    assert not buffer.breaks.any()


def test_chunks_are_normalized():
    env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0))
    model = make_model(FQL, env, learning_starts=10).learn(60)
    buffer = model.replay_buffer
    np.random.seed(0)
    plain = buffer.sample(20)
    np.random.seed(0)
    normalized = buffer.sample(20, env=env)
    assert np.allclose(normalized.observations, env.normalize_obs(plain.observations.numpy()), atol=1e-6)
    assert np.allclose(normalized.next_observations, env.normalize_obs(plain.next_observations.numpy()), atol=1e-6)
    assert np.allclose(normalized.rewards, plain.rewards / np.sqrt(env.ret_rms.var + env.epsilon), rtol=1e-4)


# --- Losses


def make_batch(model, n=16):
    th.manual_seed(3)
    valid = th.ones(n, 3)
    valid[:5, 1:], valid[5:9, 2:] = 0, 0
    return ChunkSamples(
        th.randn(n, 3), th.rand(n, 3) * 2 - 1, th.randn(n, 3), (th.rand(n, 1) > 0.5).float(), th.randn(n, 1),
        th.full((n, 1), model.gamma**3), valid,
    )  # fmt: skip


def plain_losses(model, batch):
    """In the order in which the algorithm draws its noise. The last step of a chunk must be valid for the critics."""
    obs, actions, losses = batch.observations, batch.actions, {}
    if not isinstance(model, FlowBC):
        with th.no_grad():
            if isinstance(model, FQL):
                next_actions = model.actor.unclipped_actions(batch.next_observations, th.randn(16, 3)).clamp(-1, 1)
            else:
                noise = th.randn(16 * 4, 3)
                repeated = batch.next_observations.repeat_interleave(4, dim=0)
                candidates = model.bc_flow.sample(repeated, noise)
                values = model.critic(repeated, candidates).mean(dim=0)
                best = [4 * i + int(values[4 * i : 4 * i + 4].argmax()) for i in range(16)]
                next_actions = candidates[best]
            next_q = model.critic_target(batch.next_observations, next_actions).mean(dim=0)
            target = batch.rewards[:, 0] + model.gamma**3 * (1 - batch.dones[:, 0]) * next_q
        errors = (model.critic(obs, actions) - target).square() * batch.valid[:, 2]
        losses["critic_loss"] = errors.mean()
    noise, t = th.randn(16, 3), th.rand(16)
    mixed = t[:, None] * noise + (1 - t[:, None]) * actions
    errors = (model.bc_flow(obs, mixed, t) - (noise - actions)).square() * batch.valid
    losses["bc_flow_loss"] = errors.mean()
    return losses


@pytest.mark.parametrize("algorithm", WITH_CHUNKS)
def test_losses(algorithm):
    """Of an action with a single dimension, so that a step is a number of the chunk."""
    model = make_model(algorithm)
    batch = make_batch(model)
    th.manual_seed(2)
    loss, logged = model._losses(batch)
    th.manual_seed(2)
    expected = plain_losses(model, batch)
    for name, value in expected.items():
        assert logged[name].item() == pytest.approx(value.item(), rel=1e-5), name
    parameters = list(model.bc_flow.parameters())
    reference = th.autograd.grad(expected["bc_flow_loss"], parameters)
    for gradient, plain in zip(th.autograd.grad(loss, parameters, retain_graph=True), reference, strict=True):
        th.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)
    if algorithm is not FlowBC:
        parameters = list(model.critic.parameters())
        reference = th.autograd.grad(expected["critic_loss"], parameters)
        for gradient, plain in zip(th.autograd.grad(loss, parameters), reference, strict=True):
            th.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", WITH_CHUNKS)
def test_steps_that_are_not_valid_have_no_weight(algorithm):
    model = make_model(algorithm)
    batch = make_batch(model)
    other = batch._replace(
        actions=th.where(batch.valid > 0, batch.actions, -batch.actions),
        rewards=th.where(batch.valid[:, 2:] > 0, batch.rewards, batch.rewards + 10),
    )
    # Their noised actions are inputs of the flow, whose velocity at the valid steps depends on them
    with th.no_grad():
        weights = model.bc_flow.network.input_layer.weight
        weights[:, 4:6] = 0
    losses = []
    for each in (batch, other):
        th.manual_seed(2)
        losses.append({name: value.item() for name, value in model._losses(each)[1].items() if name != "q_mean"})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- Acting


def new_chunks(model, obs, deterministic=False):
    with th.no_grad():
        chunks = model.policy._predict(th.as_tensor(obs), deterministic)
    return model.policy.unscale_action(chunks.numpy().reshape(len(obs), 3, 2))


@pytest.mark.parametrize("algorithm", WITH_CHUNKS)
def test_the_chunk_is_executed(algorithm):
    """Its steps one after the other, whatever is observed meanwhile; then, or where an episode starts, a new one."""
    model = make_model(algorithm, DummyVecEnv([CountingEnv] * 3))
    obs = np.random.default_rng(0).normal(size=(5, 3, 1)).astype(np.float32)
    th.manual_seed(0)
    chunk = new_chunks(model, obs[0])
    th.manual_seed(0)
    state, starts = None, np.ones(3, dtype=bool)
    for step in range(3):
        actions, state = model.predict(obs[step], state, starts)
        assert np.allclose(actions, chunk[:, step], atol=1e-6)
        starts = np.zeros(3, dtype=bool)
    # None is left
    actions, state = model.predict(obs[3], state, starts, deterministic=True)
    expected = new_chunks(model, obs[3], deterministic=True)
    assert np.allclose(actions, expected[:, 0], atol=1e-6)
    # An episode starts in the second environment
    actions, state = model.predict(obs[4], state, np.array([False, True, False]), deterministic=True)
    new = new_chunks(model, obs[4], deterministic=True)
    assert np.allclose(actions, [expected[0, 1], new[1, 0], expected[2, 1]], atol=1e-6)
    assert state[1].tolist() == [2, 1, 2]
    with pytest.raises(ValueError, match="`state` must be of 2 environments, as the observation is, it is of 3"):
        model.predict(obs[0, :2], state)
    with pytest.raises(ValueError, match="`episode_start` must be of 3 environments, as the observation is, it is of 1"):
        model.predict(obs[0], state, np.array([True]))
    # As those of recurrent policies may be
    assert np.array_equal(model.predict(obs[0], state, np.zeros(3))[1][1], state[1] % 3 + 1)


@pytest.mark.parametrize("algorithm", WITH_CHUNKS)
def test_predict_of_one_observation(algorithm):
    """Without a batch, as in an environment that is not vectorized. Without a state each is the first step of a chunk."""
    env = CountingEnv()
    model = make_model(algorithm, env)
    obs, _ = env.reset()
    first, state = model.predict(obs, deterministic=True)
    assert first.shape == (2,) and env.action_space.contains(first)
    second, _ = model.predict(obs, state, deterministic=True)
    again, _ = model.predict(obs, deterministic=True)
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    with pytest.raises(ValueError, match="mixing Gym API"):
        model.predict(env.reset())


@pytest.mark.parametrize("algorithm", WITH_CHUNKS)
def test_evaluate_policy_executes_chunks(algorithm):
    """Each chunk begins where the one before, or the episode before, is over."""
    model = make_model(algorithm, CountingEnv(length=5))
    planned, predict = [], model.policy._predict
    model.policy._predict = lambda obs, deterministic=False: (planned.extend(obs[:, 0].tolist()), predict(obs, deterministic))[
        1
    ]
    evaluate_policy(model, DummyVecEnv([lambda: CountingEnv(length=5)]), n_eval_episodes=2, warn=False)
    # (after 0 and 3 of 5 steps)
    assert planned[:4] == [100, 103, 205, 208]


@pytest.mark.parametrize("algorithm", ONLINE)
def test_learning_executes_chunks(algorithm):
    """Steps of chunks are taken, which are dropped when an episode ends; single steps are stored."""
    env = DummyVecEnv([lambda: CountingEnv(4), lambda: CountingEnv(5, start=0.5)])
    model = make_model(algorithm, env, learning_starts=8, gradient_steps=0)
    planned, chunks, predict = [], [], model.policy._predict

    def noted(obs, deterministic=False):
        actions = predict(obs, deterministic)
        planned.extend(obs[:, 0].tolist())
        chunks.extend(actions.reshape(len(obs), 3, 2).tolist())
        return actions

    model.policy._predict = noted
    model.learn(60)
    buffer = model.replay_buffer
    executed = {float(obs[0]): action.tolist() for e in range(2) for obs, action in
                zip(buffer.observations[:30, e], buffer.actions[:30, e], strict=True)}  # fmt: skip
    assert len(executed) == 60
    n_steps = 0
    for start, chunk in zip(planned, chunks, strict=True):
        length = 4 if start % 1 == 0 else 5
        # Observations are 100 more, and as many as there were steps, at each reset
        taken = [step for step in range(3) if start + step in executed]
        for step in taken:
            assert executed[start + step] == pytest.approx(chunk[step], abs=1e-6)
        n_steps += len(taken)
        assert len(taken) <= length
    # All but the 8 random ones
    assert n_steps == 52


@pytest.mark.parametrize("algorithm", ONLINE)
def test_warm_up_drops_chunks(algorithm):
    """Learning begins anew, with random actions: what was planned before is of another episode."""
    model = make_model(algorithm, DummyVecEnv([lambda: CountingEnv(1000)]), learning_starts=10, gradient_steps=0)
    model.learn(11)
    planned, predict = [], model.policy._predict
    model.policy._predict = lambda obs, deterministic=False: (planned.extend(obs[:, 0].tolist()), predict(obs, deterministic))[
        1
    ]
    start = model.env.get_attr("total")[0]
    model.learn(16)
    # (the second reset adds 100)
    assert planned == [start + 100 + 10, start + 100 + 13]


@pytest.mark.parametrize("algorithm", ONLINE)
def test_exploration_noise(algorithm):
    noise = NormalActionNoise(np.full(2, 5.0), np.zeros(2))
    model = make_model(algorithm, CountingEnv(), action_noise=noise, learning_starts=5).learn(20)
    assert (model.replay_buffer.actions[6:20] == 1).all()


# --- What an SB3 algorithm does


@pytest.mark.parametrize("algorithm", WITH_CHUNKS)
def test_save_load(tmp_path, algorithm):
    np.savez(tmp_path / "data.npz", **make_dataset())
    env = make_vec_env("Pendulum-v1", 2, seed=0)
    model = make_model(algorithm, env, dataset=str(tmp_path / "data.npz"), offline_steps=20)
    model.learn(0 if algorithm is FlowBC else 40)
    model.save(tmp_path / "model.zip")
    loaded = algorithm.load(tmp_path / "model.zip", env=env, device="cpu")
    state, other_state = model.policy.state_dict(), loaded.policy.state_dict()
    assert state.keys() == other_state.keys() and all(th.equal(state[name], other_state[name]) for name in state)
    obs = env.reset()
    results = []
    for each in (model, loaded):
        th.manual_seed(0)
        first, chunks = each.predict(obs)
        results.append(np.concatenate([first, each.predict(obs, chunks)[0]]))
    assert np.array_equal(*results)
    loaded.learn_offline(5, reset_num_timesteps=False)
    if algorithm is not FlowBC:
        loaded.learn(20, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="`chunk_size` is 4, but 3 in the `policy_kwargs`"):
        algorithm.load(tmp_path / "model.zip", chunk_size=4)


@pytest.mark.parametrize("algorithm", ONLINE)
def test_another_discount_when_loaded(tmp_path, algorithm):
    model = make_model(algorithm).learn(120)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=model.env, gamma=0.5)
    assert loaded.replay_buffer.gamma == 0.5
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(ValueError, match=r"`gamma` is 0\.5, but 0\.99 in the returns of ChunkReplayBuffer"):
        loaded.learn(10)


@pytest.mark.parametrize("algorithm", ONLINE)
def test_more_environments(tmp_path, algorithm):
    """The chunks are those of the environments of now."""
    model = make_model(algorithm, make_vec_env("Pendulum-v1", 2, seed=0)).learn(110)
    model.save(tmp_path / "model")
    model = algorithm.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", 3, seed=0), force_reset=True)
    assert model.learn(121, reset_num_timesteps=False).num_timesteps > 200


@pytest.mark.parametrize("algorithm", WITH_CHUNKS)
def test_same_seed_same_run(algorithm):
    results = []
    for seed in (7, 7, 8):
        model = make_model(algorithm, make_vec_env("Pendulum-v1", 2, seed=seed), dataset=make_dataset(), seed=seed)
        model.learn_offline(10)
        if algorithm is not FlowBC:
            model.learn(30)
        results.append(model.policy.parameters_to_vector())
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])


@pytest.mark.parametrize("algorithm", ONLINE)
def test_learning_goes_on(algorithm):
    """In two parts as in one: the chunks that are being executed are not dropped."""
    results = []
    for parts in ([41], [20, 21]):
        model = make_model(algorithm, make_vec_env("Pendulum-v1", 1, seed=0), learning_starts=5)
        for part in parts:
            model.learn(part, reset_num_timesteps=model.num_timesteps == 0)
        results.append(model.policy.parameters_to_vector())
    assert np.array_equal(*results)


@pytest.mark.parametrize("kind", ["image", "dict"])
@pytest.mark.parametrize("algorithm", WITH_CHUNKS)
def test_images_and_dicts(algorithm, kind):
    kwargs = {} if algorithm is FlowBC else dict(buffer_size=100, learning_starts=10)
    if kind == "image":
        env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
        model = make_model(algorithm, env, "CnnPolicy", random_crop=3, **kwargs)
    else:
        model = make_model(algorithm, SimpleMultiObsEnv(discrete_actions=False), "MultiInputPolicy", **kwargs)
    if algorithm is not FlowBC:
        assert model.learn(25)._n_updates > 0
    obs = model.env.reset()
    actions, state = model.predict(obs)
    assert actions.shape == (1, *model.action_space.shape)
    assert state[0].shape == (1, 3, *model.action_space.shape)
    assert np.array_equal(model.predict(obs, state)[0], state[0][:, 1])


@pytest.mark.parametrize("algorithm", WITH_CHUNKS)
def test_stacked_observations(algorithm):
    """Chunks begin and end with stacks, in the dataset and online: of the same episode, and zeros before its start."""
    numbers = np.arange(60, dtype=np.float32)[:, None]
    data = dict(
        observations=numbers + 1,
        next_observations=numbers + 2,
        actions=np.zeros((60, 2), np.float32),
        rewards=np.ones(60, np.float32),
        terminations=np.zeros(60, bool),
        truncations=np.arange(60) % 6 == 5,
    )
    env = VecFrameStack(DummyVecEnv([partial(CountingEnv, 6, start=1), partial(CountingEnv, 6, start=1001)]), 2)
    kwargs = {} if algorithm is FlowBC else dict(learning_starts=0, buffer_size=200)
    model = make_model(algorithm, env, dataset=data, **kwargs).learn_offline(2)
    buffers = [model.offline_buffer]
    if algorithm is not FlowBC:
        buffers.append(model.learn(60).replay_buffer)
    for buffer in buffers:
        batch = buffer.sample(200)
        (previous, first), (next_previous, last) = batch.observations.T, batch.next_observations.T
        assert ((previous == first - 1) | (previous == 0)).all() and (previous == 0).any()
        is_valid = batch.valid[:, -1] > 0
        assert is_valid.any() and not is_valid.all()
        assert (last == first + 3)[is_valid].all() and (next_previous == first + 2)[is_valid].all()


@pytest.mark.parametrize("algorithm", ONLINE)
def test_no_chunk_yet(algorithm):
    """There is nothing to learn from before there is a whole one."""
    model = make_model(algorithm, learning_starts=0, chunk_size=5).learn(4)
    assert model._n_updates == 0
    assert model.learn(10, reset_num_timesteps=False)._n_updates == 10


def test_the_default_of_qc():
    model = QC("MlpPolicy", "Pendulum-v1")
    assert model.chunk_size == 5 and model.policy.n_samples == 32 and model.bc_flow.action_dim == 5
    single = make_model(QC, chunk_size=1, learning_starts=5).learn(20)
    assert type(single.replay_buffer) is ReplayBuffer and single.predict(single.env.reset())[1] is None


@pytest.mark.parametrize(
    ("algorithm", "kwargs", "message"),
    [
        *((algorithm, dict(chunk_size=0), "`chunk_size` must be at least 1, it is 0") for algorithm in WITH_CHUNKS),
        *((algorithm, dict(chunk_size=2.5), "`chunk_size` must be") for algorithm in WITH_CHUNKS),
        *((algorithm, dict(dataset=make_dataset(length=2)), "`chunk_size` is 3, but the longest episode of the dataset has 2")
          for algorithm in WITH_CHUNKS),
        *((algorithm, dict(replay_buffer_class=ReplayBuffer), "`replay_buffer_class` must be a ChunkReplayBuffer")
          for algorithm in ONLINE),
        *((algorithm, dict(optimize_memory_usage=True), "`optimize_memory_usage` must be False") for algorithm in ONLINE),
        (FQL, dict(n_steps=3), "`n_steps` must be 1 with a `chunk_size` of 3, it is 3"),
        *((algorithm, dict(dataset=make_dataset(60), dataset_kwargs=dict(validation=make_dataset(60, 2))),
           "`chunk_size` is 3, but the longest episode of the validation has 2") for algorithm in ONLINE),
        *((algorithm, dict(replay_buffer_kwargs=dict(chunk_size=7)), "`chunk_size` is 3, but 7 in the `replay_buffer_kwargs`")
          for algorithm in ONLINE),
        *((algorithm, dict(policy_kwargs=dict(chunk_size=4)), "`chunk_size` is 3, but 4 in the `policy_kwargs`")
          for algorithm in WITH_CHUNKS),
    ],
)  # fmt: skip
def test_bad_arguments(algorithm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(algorithm, **kwargs)


@pytest.mark.parametrize("algorithm", [IFQL, FBRAC, FAWAC])
def test_methods_without_chunks(algorithm):
    with pytest.raises(ValueError, match="`chunk_size` is 1, but 4 in the `policy_kwargs`"):
        algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(chunk_size=4))


@pytest.mark.parametrize("algorithm", ONLINE)
def test_bad_buffers(tmp_path, algorithm):
    model = make_model(algorithm, make_vec_env("Pendulum-v1", 2), buffer_size=5)
    with pytest.raises(ValueError, match="`buffer_size` must be at least 6 to learn online, it is 5"):
        model.learn(10)
    model = make_model(algorithm)
    model.replay_buffer = ReplayBuffer(100, model.observation_space, model.action_space, "cpu")
    with pytest.raises(ValueError, match="The replay buffer must be a ChunkReplayBuffer with a `chunk_size` of 3"):
        model.learn(10)
    with pytest.raises(ValueError, match="`reward_shift` with returns of several steps needs a `gamma` of less than 1"):
        make_model(algorithm, dataset=make_dataset(), dataset_kwargs=dict(reward_shift=-1.0), gamma=1.0).learn_offline(1)


def test_reward_shift():
    """Of each step of a chunk."""
    model = make_model(FQL, dataset=make_dataset(), dataset_kwargs=dict(reward_scale=2.0, reward_shift=-1.0), gamma=0.9)
    plain = model.offline_buffer.sample(10)
    shifted = model._prepare(plain)
    th.testing.assert_close(shifted.rewards, 2 * plain.rewards - (1 + 0.9 + 0.81))
