import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_flow import FPO, FQL
from sb3_flow.fpo import MlpPolicy
from sb3_flow.offline.datasets import from_replay_buffer
from sb3_flow.on_policy.policies import SQUASH_TYPES


class RandomEnv(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return self.observation_space.sample(), 0.5, False, False, {}


def run(observation_space, action_space, policy="MlpPolicy", **kwargs):
    env = gym.wrappers.TimeLimit(RandomEnv(observation_space, action_space), 30)
    model = FPO(policy, env, n_steps=64, batch_size=32, n_epochs=1, device="cpu", policy_kwargs=dict(net_arch=[12], **kwargs))
    model.learn(64)
    obs, _ = env.reset()
    for deterministic in (True, False):
        action, _ = model.predict(obs, deterministic=deterministic)
        assert action.dtype == action_space.dtype
        assert action_space.contains(action)
    return model


def run_fql(observation_space, action_space):
    """Online, offline from what that collected, and both at once."""
    env = gym.wrappers.TimeLimit(RandomEnv(observation_space, action_space), 30)
    kwargs = dict(buffer_size=100, batch_size=16, policy_kwargs=dict(net_arch=[12]), device="cpu")
    online = FQL("MlpPolicy", env, learning_starts=40, **kwargs).learn(50)
    dataset = from_replay_buffer(online.replay_buffer)
    space = action_space
    assert (dataset.actions >= space.low - 1e-4).all() and (dataset.actions <= space.high + 1e-4).all()
    model = FQL("MlpPolicy", env, dataset=dataset, balanced_sampling=True, offline_steps=5, **kwargs).learn(10)
    obs, _ = env.reset()
    for policy in (model, model.policy.bc_flow):
        for deterministic in (True, False):
            action, _ = policy.predict(obs, deterministic=deterministic)
            assert action.dtype == action_space.dtype and action_space.contains(action)


BOX = spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize("action_dim", [1, 2, 17, 60])
@pytest.mark.parametrize("obs_dim", [1, 1000])
def test_sizes(obs_dim, action_dim):
    run(spaces.Box(-1, 1, (obs_dim,)), spaces.Box(-1, 1, (action_dim,)))


@pytest.mark.parametrize("squash_type", SQUASH_TYPES)
@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Box(-1, 1, (2, 3)),
        spaces.Box(-2, 5, (2,), dtype=np.float64),
        spaces.Box(np.array([-0.4, 0.0, 10.0], dtype=np.float32), np.array([0.4, 1e-3, 1000.0], dtype=np.float32)),
    ],
)
def test_action_spaces(action_space, squash_type):
    run(BOX, action_space, squash_type=squash_type)
    if squash_type == "clip":
        run_fql(BOX, action_space)


@pytest.mark.parametrize(
    "observation_space",
    [
        spaces.Discrete(5),
        spaces.MultiDiscrete([4, 3]),
        spaces.MultiBinary(8),
        spaces.Box(-1, 1, (2, 3), dtype=np.float64),
    ],
)
def test_observation_spaces(observation_space):
    run(observation_space, BOX)
    run_fql(observation_space, BOX)


def test_tanh_reaches_the_bounds_and_no_further():
    """Raw actions at which tanh saturates in single precision."""
    action_space = spaces.Box(np.array([-0.4, 0.1], dtype=np.float32), np.array([0.4, 0.7], dtype=np.float32))
    kwargs = dict(squash_type="tanh", action_scale=1.0)
    policy = FPO("MlpPolicy", RandomEnv(BOX, action_space), policy_kwargs=kwargs, device="cpu").policy
    raw = np.array([[-50.0, -50.0], [50.0, 50.0], [0.0, 0.0]], dtype=np.float32)
    actions = policy.unscale_action(raw)
    assert np.array_equal(actions[0], action_space.low) and np.array_equal(actions[1], action_space.high)
    assert np.allclose(actions[2], [0.0, 0.4])
    # The inverse, inside of the bounds
    raw = np.array([[-2.0, 0.3]], dtype=np.float32)
    assert np.allclose(policy.scale_action(policy.unscale_action(raw)), raw, atol=1e-3)


def test_clip_reaches_the_bounds_and_no_further():
    action_space = spaces.Box(np.array([-0.4, 0.1], dtype=np.float32), np.array([0.4, 0.7], dtype=np.float32))
    kwargs = dict(squash_type="clip", action_scale=0.5)
    policy = FPO("MlpPolicy", RandomEnv(BOX, action_space), policy_kwargs=kwargs, device="cpu").policy
    raw = np.array([[-2.1, -2.1], [2.1, 2.1], [0.0, 0.0], [1.0, 1.0]], dtype=np.float32)
    actions = policy.unscale_action(raw)
    assert np.array_equal(actions[0], action_space.low) and np.array_equal(actions[1], action_space.high)
    assert np.allclose(actions[2:], [[0.0, 0.4], [0.2, 0.55]])
    assert np.allclose(policy.scale_action(actions[2:]), raw[2:], atol=1e-6)


LIMITS = st.floats(-100, 100, width=32)
BOUNDS = st.tuples(st.just(-np.inf) | LIMITS, st.just(np.inf) | LIMITS).map(sorted)


@given(st.lists(BOUNDS, min_size=1, max_size=4), st.sampled_from([np.float32, np.float64]), st.floats(0.1, 2.0), st.booleans())
@settings(max_examples=60, deadline=None)
def test_raw_actions_and_those_of_the_environment(bounds, dtype, action_scale, tanh):
    """Each is the inverse of the other, with bounds of any kind; what an environment receives is legal."""
    low, high = np.array(bounds, dtype).T
    action_space = spaces.Box(low, high, dtype=dtype)
    kwargs = dict(
        net_arch=[2], action_scale=action_scale, squash_type="tanh" if tanh and action_space.is_bounded() else "clip"
    )
    policy = MlpPolicy(BOX, action_space, lambda _: 1e-3, **kwargs)
    rng, bounded = np.random.default_rng(0), np.isfinite(low) & np.isfinite(high)
    raw = rng.normal(scale=100, size=(50, len(low))).astype(np.float32)
    actions = policy.unscale_action(raw)
    assert all(action_space.contains(action.astype(dtype)) for action in actions)
    assert all(action_space.contains(policy.predict(np.zeros(2, np.float32))[0]) for _ in range(3))
    # Of dimensions without two bounds, most actions are not on one
    assert len(np.unique(actions[:, ~bounded])) >= 15 * (~bounded).sum()

    share = rng.uniform(0.05, 0.95, size=(50, bounded.sum()))
    inside = actions.copy()
    inside[:, bounded] = low[bounded] + (high - low)[bounded] * share
    again = policy.scale_action(inside)
    assert np.allclose(policy.unscale_action(again), inside, rtol=1e-5, atol=1e-4)
    # (there are too few numbers in a range that is subnormal)
    free = high - low > 1e6 * np.finfo(np.float32).tiny
    assert np.allclose(policy.scale_action(policy.unscale_action(again))[:, free], again[:, free], rtol=1e-3, atol=1e-3)

    # Nothing is to be learned within the bounds from the bounds, nor where there are none
    raw = th.as_tensor(again, dtype=th.float32)
    assert policy.bounds_loss(raw).max() == 0
    for dim in range(len(low)):
        for sign, bound in ((-1, low[dim]), (1, high[dim])):
            far = raw[:1].clone()
            far[0, dim] = sign * 1e4
            assert (policy.bounds_loss(far).item() > 0) == np.isfinite(bound)
            gain = (policy.log_squashing(far) - policy.log_squashing(raw[:1])).item()
            assert gain > 10 if bounded[dim] else gain == 0
