"""The rules of the multi-goal task."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env

import sb3_flow  # noqa: F401 (imported to register the environments)
from sb3_flow.envs.multi_goal import AGENT_COLOR, GOAL_COLOR, MultiGoalEnv


@pytest.mark.parametrize(("name", "n_goals"), [("MultiGoal", 4), ("MultiGoal-8", 8)])
def test_env_checkers(name, n_goals):
    env = gym.make(f"sb3_flow/{name}-v0", render_mode="rgb_array")
    assert len(env.unwrapped.goals) == n_goals and env.spec.max_episode_steps == 30
    check_env(env.unwrapped, warn=True)
    gymnasium_check_env(env.unwrapped)


def test_goals():
    assert np.allclose(MultiGoalEnv().goals, [[5, 0], [0, 5], [-5, 0], [0, -5]])
    # All eight are as far from an axis of the square of actions
    far, near = 5 * np.cos(np.pi / 8), 5 * np.sin(np.pi / 8)
    assert np.allclose(MultiGoalEnv(n_goals=8).goals[[0, 1, 4, 7]], [[far, near], [near, far], [-far, -near], [far, -near]])


@pytest.mark.parametrize(
    ("start", "action", "end", "reward", "goal"),
    [
        ((0, 0), (1, 0), (1, 0), -((4 / 5) ** 2) - 0.1, -1),
        # Shortened to 1, by the same factor along both axes
        ((0, 0), (1, 1), (0.5**0.5, 0.5**0.5), -((5 - 0.5**0.5) ** 2 + 0.5) / 25 - 0.1, -1),
        # Out of the bounds of the action space
        ((0, 0), (0, -9), (0, -1), -((4 / 5) ** 2) - 0.1, -1),
        ((0.5, 3.6), (0, 0.5), (0.5, 4.1), -(0.25 + 0.81) / 25 - 0.025, -1),
        ((0.5, 3.7), (0, 0.5), (0.5, 4.2), 10 - (0.25 + 0.64) / 25 - 0.025, 1),
        ((-4.9, -0.2), (0, 0), (-4.9, -0.2), 10 - (0.01 + 0.04) / 25, 2),
        # The edge of the plane
        ((6.5, 6.5), (0.8, 0.6), (7, 7), -(4 + 49) / 25 - 0.1, -1),
    ],
)
def test_step(start, action, end, reward, goal):
    env = MultiGoalEnv()
    env.reset(seed=0, options=dict(position=start))
    observation, found, terminated, truncated, info = env.step(np.array(action))
    assert np.allclose(observation, end) and found == pytest.approx(reward)
    assert terminated == info["is_success"] == (goal >= 0) and info["goal"] == goal and not truncated


def test_all_goals_are_equally_good():
    """The same return straight to each of them."""
    env = MultiGoalEnv(n_goals=8)
    returns = []
    for number, goal in enumerate(env.goals):
        env.reset(options=dict(position=(0, 0)))
        rewards, terminated = [], False
        while not terminated:
            _, reward, terminated, _, info = env.step(goal / 5 * 0.9)
            rewards.append(reward)
        assert info["goal"] == number
        returns.append(sum(rewards))
    assert len(rewards) == 5 and np.allclose(returns, returns[0])


def test_start():
    env = MultiGoalEnv()
    starts = np.array([env.reset(seed=0)[0], *(env.reset()[0] for _ in range(999))])
    assert np.abs(starts.mean(axis=0)).max() < 0.015 and starts.std() == pytest.approx(0.1, abs=0.01)
    assert np.array_equal(env.reset(seed=0)[0], starts[0])


def test_truncation():
    env = gym.make("sb3_flow/MultiGoal-v0")
    env.reset(seed=0)
    ends = [env.step(np.zeros(2))[2:4] for _ in range(30)]
    assert ends == [(False, False)] * 29 + [(False, True)]


def test_render():
    env = MultiGoalEnv(render_mode="rgb_array")
    env.reset(options=dict(position=(-7, 3)))
    image = env.render()
    assert image.shape == (280, 280, 3) and tuple(image[140, 239]) == GOAL_COLOR == tuple(image[40, 140])
    # y points upwards
    assert tuple(image[80, 0]) == AGENT_COLOR != tuple(image[200, 0])
    assert MultiGoalEnv().render() is None


def test_bad_input():
    with pytest.raises(ValueError, match=r"`n_goals`.*at least 1.*0"):
        gym.make("sb3_flow/MultiGoal-v0", n_goals=0)
    with pytest.raises(ValueError, match=r"`render_mode`.*'human'"):
        MultiGoalEnv(render_mode="human")
    for position in ((8, 0), (0, 0, 0), (np.nan, 0)):
        with pytest.raises(ValueError, match=r"`position` must be \(x, y\)"):
            MultiGoalEnv().reset(options=dict(position=position))
