"""Normalization within the policy: statistics of observations and returns, and when they change."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_flow import FPO
from sb3_flow.common.normalization import (
    NormalizedCombinedExtractor,
    NormalizedFlattenExtractor,
    RunningStatistics,
    ValueNormalization,
)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    offset=st.floats(-1e3, 1e3),
    scale=st.floats(1e-2, 1e3),
    seed=st.integers(0, 1000),
)
def test_running_statistics(sizes, offset, scale, seed):
    """In whatever parts it is seen, and wherever it is: mean and variance of all of it."""
    seen = offset + scale * np.random.default_rng(seed).standard_normal((sum(sizes), 2))
    statistics = RunningStatistics(2)
    for part in np.split(seen, np.cumsum(sizes)[:-1]):
        statistics.update(th.as_tensor(part, dtype=th.float32))
    # (that of float32)
    resolution = 1e-6 * (abs(offset) + scale)
    assert np.allclose(statistics.mean, seen.mean(axis=0), atol=resolution)
    assert np.allclose(statistics.var.sqrt(), seen.std(axis=0), rtol=1e-4, atol=resolution)
    assert statistics.count == sum(sizes)


def test_returns_of_former_policies_are_forgotten():
    """... and with them the standard normal distribution that they begin with."""
    statistics = RunningStatistics(1, last_weight=0.5)
    for value in (8.0, 4.0):
        statistics.update(th.full((10, 1), value))
    assert statistics.mean == 0.25 * 0 + 0.25 * 8 + 0.5 * 4
    assert statistics.var == 0.25 * (4**2 + 1) + 0.25 * 4**2


@given(offset=st.floats(-10, 10), scale=st.floats(0.1, 1e3))
def test_values_stay_when_their_normalization_changes(offset, scale):
    th.manual_seed(0)
    offset *= scale
    last_layer, normalization, latent = nn.Linear(3, 1), ValueNormalization(), th.randn(20, 3)
    for _ in range(60):
        before = normalization(last_layer(latent))
        returns = offset + scale * th.randn(500)
        normalization.update(returns, last_layer)
        after = normalization(last_layer(latent))
        assert th.allclose(before, after, rtol=1e-3, atol=1e-3 * (abs(offset) + scale))
    # What the network has to predict is of unit size
    normalized = (returns - normalization.returns.mean) / normalization.std
    assert abs(normalized.mean()) < 0.2 and 0.8 < normalized.std() < 1.2


@pytest.mark.parametrize("value", [1e20, 1e30])
def test_overflow_is_an_error(value):
    """The variance of what is too large is inf, or NaN: nothing is changed."""
    for x in (th.tensor([[0.0], [value]]), th.full((2, 1), 100 * value)):
        statistics = RunningStatistics(1)
        with pytest.raises(ValueError, match="too large to be normalized"):
            statistics.update(x)
        assert (statistics.count, statistics.mean, statistics.var) == (0, 0, 1)


@pytest.mark.parametrize("layer", [nn.Sequential(nn.Linear(256, 1)), nn.Linear(256, 1, bias=False)])
def test_last_layer_must_be_linear(layer):
    """... for the values to be rescaled. Without the normalization it may be any other."""
    kwargs = dict(n_steps=16, batch_size=16, n_epochs=1)
    model = FPO("MlpPolicy", "Pendulum-v1", **kwargs)
    model.policy.value_net = layer
    with pytest.raises(ValueError, match=r"`normalize_values` must be False: .* it is (Sequential|Linear)"):
        model.learn(16)
    model = FPO("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(normalize_values=False), **kwargs)
    model.policy.value_net = layer
    model.learn(16)


def test_what_is_normalized():
    """Vectors are, images and what is one-hot are not."""
    image = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    extractor = NormalizedCombinedExtractor(
        spaces.Dict(image=image, vector=spaces.Box(-1, 1, (2, 3)), choice=spaces.Discrete(4))
    )
    one_hot = nn.functional.one_hot(th.tensor([1, 3]), 4).float()
    observations = dict(image=th.rand(2, 3, 36, 36), vector=5 + th.randn(2, 2, 3), choice=one_hot)
    before = extractor(observations)
    extractor.update(observations)
    sizes = dict(image=256, vector=6, choice=4)
    keys = list(extractor.extractors)
    before, after = (
        dict(zip(keys, features.split([sizes[key] for key in keys], dim=1), strict=True))
        for features in (before, extractor(observations))
    )
    assert th.equal(after["choice"], one_hot)
    assert th.equal(after["image"], before["image"])
    expected = (observations["vector"] - observations["vector"].mean(0)) / observations["vector"].std(0, correction=0)
    assert th.allclose(after["vector"], expected.flatten(1), atol=1e-3)
    assert isinstance(NormalizedFlattenExtractor(spaces.Discrete(4)).flatten, nn.Flatten)


def test_outliers_are_bounded():
    extractor = NormalizedFlattenExtractor(spaces.Box(-np.inf, np.inf, (1,)))
    extractor.update(th.randn(1000, 1))
    assert extractor(th.tensor([[1e6], [-1e6]])).flatten().tolist() == [10, -10]


class Shifted(gym.Wrapper):
    """Pendulum with observations and rewards far from zero."""

    def __init__(self, scale):
        super().__init__(gym.make("Pendulum-v1"))
        self.scale = scale
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,))

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.scale * (obs + 3), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self.scale * (obs + 3), self.scale * reward, terminated, truncated, info


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_networks_see_units_of_one(scale):
    """Whatever the units of the environment are."""
    model = FPO("MlpPolicy", Shifted(scale), n_steps=512, batch_size=128, n_epochs=4, seed=0).learn(4096)
    policy, data = model.policy, next(model.rollout_buffer.get())
    features = policy.extract_features(data.observations)
    assert features.abs().max() <= 10 and features.mean(0).abs().max() < 1 and 0.3 < features.std(0).min() < 2
    loss = nn.functional.mse_loss(data.returns, policy.predict_values(data.observations).flatten())
    assert loss < 0.8 * data.returns.square().mean()


def test_statistics_change_between_rollouts(monkeypatch):
    """While a rollout is collected and learned from they are the same, and afterwards those of all that was seen."""
    model = FPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=2, seed=0)
    statistics = model.policy.features_extractor.flatten.statistics
    seen, means = [], []
    losses = model._losses

    def note(batch, *args):
        means.append(statistics.mean.clone())
        return losses(batch, *args)

    monkeypatch.setattr(model, "_losses", note)
    for _ in range(3):
        model.learn(64, reset_num_timesteps=False)
        seen.append(next(model.rollout_buffer.get()).observations)
    assert all(th.equal(means[4 * i], mean) for i in range(3) for mean in means[4 * i : 4 * i + 4])
    assert th.allclose(statistics.mean, th.cat(seen).mean(0), atol=1e-5)
    assert th.allclose(statistics.var, th.cat(seen).var(0, correction=0), atol=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_moving_average_has_the_statistics_of_the_actor(share):
    """Averages of them would take as long as those of the weights to forget zero and one, far from these observations."""
    model = FPO("MlpPolicy", Shifted(1e3), n_steps=64, batch_size=32, n_epochs=1, ema_decay=0.99, ema_start=0, seed=0,
                policy_kwargs=dict(share_features_extractor=share)).learn(192)  # fmt: skip
    policy = model.policy
    actor = policy.features_extractor if share else policy.pi_features_extractor
    statistics, averages = actor.state_dict(), policy.ema.module[0].state_dict()
    assert statistics and all(th.equal(averages[name], value) for name, value in statistics.items())
    # That of the weights is one
    assert not th.equal(policy.ema.module[1].input_layer.weight, policy.action_net.input_layer.weight)


def test_own_extractor_is_left_alone():
    policy_kwargs = dict(features_extractor_class=FlattenExtractor, normalize_values=False)
    model = FPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=2, policy_kwargs=policy_kwargs).learn(64)
    assert model.policy.state_dict().keys() == dict(model.policy.named_parameters(remove_duplicate=False)).keys()
    obs = th.randn(2, 3)
    assert th.equal(model.policy.extract_features(obs), obs)


class WithinAnother(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 3)
        self.inner = NormalizedFlattenExtractor(observation_space)

    def forward(self, observations):
        return self.inner(observations)


def test_statistics_that_would_not_be_updated():
    with pytest.raises(ValueError, match=r"features_extractor_class.* within WithinAnother would never be updated"):
        FPO("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(features_extractor_class=WithinAnother))


@pytest.mark.parametrize("share", [True, False])
def test_each_extractor_is_updated(share):
    policy_kwargs = dict(share_features_extractor=share)
    model = FPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=1, policy_kwargs=policy_kwargs).learn(64)
    counts = [module.count for module in model.policy.modules() if isinstance(module, RunningStatistics)]
    assert [int(count) for count in counts] == [64] * (2 if share else 3)


def test_images_have_no_statistics():
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)
    model = FPO("CnnPolicy", env, n_steps=16, batch_size=16, n_epochs=1, policy_kwargs=dict(normalize_values=False)).learn(16)
    assert model.policy.state_dict().keys() == dict(model.policy.named_parameters(remove_duplicate=False)).keys()
