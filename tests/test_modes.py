"""FPO keeps equally good actions, and what pulls their shares back together."""

from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

from sb3_flow import FPO, presets
from sb3_flow.common.flow import CFMLoss, cfm_loss, draw_pairs, interpolate
from sb3_flow.envs.two_peaks import PEAK, TwoPeaksEnv

OBSERVATION = np.zeros((10_000, 1), dtype=np.float32)


def test_two_peaks():
    env = gym.make("sb3_flow/TwoPeaks-v0").unwrapped
    check_env(env, warn=True)
    gymnasium_check_env(env, skip_render_check=True)
    env.reset(seed=0)
    for action, reward in {0.6: 1.0, -0.6: 1.0, 0.7: np.exp(-0.5), -0.5: np.exp(-0.5), 0.0: np.exp(-18)}.items():
        assert env.step(np.array([action]))[1:4] == (pytest.approx(reward, abs=1e-6), True, False)


def shares_of_peaks(model):
    """Shares of the samples at either peak."""
    actions = model.predict(OBSERVATION, deterministic=False)[0][:, 0]
    return [float((np.abs(actions - peak) < 0.2).mean()) for peak in (-PEAK, PEAK)]


class NoReward(gym.RewardWrapper):
    """All actions are as good."""

    def reward(self, reward):
        return 0.0


def model_of_two_peaks(share: float) -> FPO:
    """A policy that goes to the peak at 0.6 with this share of its samples, and to the other with the rest."""
    model = FPO(
        "MlpPolicy", make_vec_env(lambda: NoReward(TwoPeaksEnv()), 16), n_steps=64, batch_size=128, gamma=0.0,
        learning_rate=1e-3, normalize_advantage=False, policy_kwargs=dict(net_arch=[64, 64]), seed=0, device="cpu",
    )  # fmt: skip
    optimizer = th.optim.Adam(model.policy.action_net.parameters())
    loss = CFMLoss("velocity", timestep_distribution="uniform")
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 500)
        peak = th.where(th.rand(256, 1, 1) < share, PEAK, -PEAK)
        actions = (peak + 0.1 * th.randn(256, 1, 1)) / model.policy.action_scale
        noise, times, _ = draw_pairs((256, 4, 1), loss)
        output = model.policy.flow_output(th.zeros(256, 1), interpolate(actions, noise, times), times)
        optimizer.zero_grad()
        cfm_loss(output, actions, noise, times).mean().backward()
        optimizer.step()
    return model


def test_entropy_pulls_shares_together():
    """How unlikely an action is tells the share of its mode. With nothing else to learn from, the smaller share grows."""
    model = model_of_two_peaks(0.8)
    weights = deepcopy(model.policy.state_dict())
    before, larger = shares_of_peaks(model)
    assert 0.15 < before < 0.27 and larger > 0.7

    # Without a bonus it stays what it is
    model.ent_coef = 0.0
    model.learn(16 * 64)
    assert abs(shares_of_peaks(model)[0] - before) < 0.02

    model.policy.load_state_dict(weights)
    model.ent_coef = 0.3
    rollout = model._get_rollout()
    actions, surprise = rollout.actions[:, 0, 0, 0], model._surprise(rollout)
    difference = surprise[actions < 0].mean() - surprise[actions > 0].mean()
    # Of about 200 actions at the smaller peak
    expected = np.log(larger / before)
    assert 0.7 * expected < difference < 1.4 * expected
    model.learn(6 * 16 * 64)
    assert shares_of_peaks(model)[0] - before > 0.025


@pytest.mark.slow
def test_fpo_keeps_both_peaks():
    """With the hyperparameters of the YAML file."""
    policy_kwargs = presets.PAPER["policy_kwargs"] | dict(net_arch=[64, 64], normalize_values=True)
    settings = presets.PAPER | dict(
        n_steps=128, batch_size=256, n_epochs=10, gamma=0.0, gae_lambda=0.0, learning_rate=LinearSchedule(1e-3, 0.0, 1.0),
        ent_coef=0.4, max_grad_norm=0.5, log_ratio_clip=3.0, policy_kwargs=policy_kwargs,
        cfm_loss=dict(supervision="noise", reduction="mean", timestep_distribution="grid", sampling="stratified"),
    )  # fmt: skip
    model = FPO("MlpPolicy", make_vec_env("sb3_flow/TwoPeaks-v0", 64), **settings, seed=0, device="cpu").learn(65_536)
    left, right = shares_of_peaks(model)
    assert left >= 0.2 and right >= 0.2 and left + right > 0.9
