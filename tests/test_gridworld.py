"""The rules of GridWorld."""

import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env

import sb3_flow  # noqa: F401 registers the environments
from sb3_flow.envs.gridworld import CENTER, DEATH, FREE, GOAL, LAYOUTS, SIZE, WALL, GridWorldEnv, make_layout


@pytest.mark.parametrize("name", ["GridWorld", *(f"GridWorld-{layout}" for layout in LAYOUTS)])
def test_env_checkers(name):
    env = gym.make(f"sb3_flow/{name}-v0", render_mode="rgb_array")
    assert env.unwrapped.layout == name.removeprefix("GridWorld").removeprefix("-") or name == "GridWorld"
    check_env(env.unwrapped, warn=True)
    gymnasium_check_env(env.unwrapped)


def test_layout_is_an_argument():
    assert gym.make("sb3_flow/GridWorld-v0").unwrapped.layout == "two_walls"
    assert gym.make("sb3_flow/GridWorld-v0", layout="c_shape").unwrapped.layout == "c_shape"
    with pytest.raises(ValueError, match=r"`layout`.*'maze'.*two_slits"):
        gym.make("sb3_flow/GridWorld-v0", layout="maze")


def count(layout):
    return {kind: int((make_layout(layout) == kind).sum()) for kind in (GOAL, DEATH, WALL)}


def test_layouts():
    """Numbers of cells, those of the authors' code."""
    assert count("two_walls") == {GOAL: 4 * 25, DEATH: 0, WALL: 0}
    assert count("three_goals") == {GOAL: 3 * 9, DEATH: 9, WALL: 0}
    assert count("tree_in_the_middle") == {GOAL: 2 * 5, DEATH: 25, WALL: 0}
    assert count("two_slits") == {GOAL: 25, DEATH: 0, WALL: 25 - 8}
    assert count("c_shape") == {GOAL: 25, DEATH: 0, WALL: 31}
    # x to the right, y upwards, as cells[y, x]
    assert make_layout("three_goals")[18, 12] == GOAL and make_layout("two_slits")[0, 15] == WALL
    # Two answers to the same state
    cells = make_layout("two_walls")
    assert np.array_equal(cells, cells[::-1]) and cells[CENTER, CENTER] == FREE


def start(position, layout="two_walls"):
    env = GridWorldEnv(layout)
    observation, _ = env.reset(seed=0, options=dict(position=position))
    assert np.allclose(observation, (np.array(position) - 12) / 12)
    return env


@pytest.mark.parametrize(
    ("action", "move"),
    [((1, 1), (1, 1)), ((0.51, -0.51), (1, -1)), ((0.49, -0.49), (0, 0)), ((-7, 0.6), (-1, 1)), ((0, 0), (0, 0))],
)
def test_moves(action, move):
    observation, reward, terminated, truncated, info = start((12, 12)).step(np.array(action))
    assert np.allclose(observation * 12, move)
    assert reward == 0 and not terminated and not truncated and info == {"is_success": False}


def test_goal():
    env = start((3, 3))
    assert env.step(np.array([0, 0.4]))[1:3] == (0.0, False)
    observation, reward, terminated, truncated, info = env.step(np.array([0, -1.0]))
    assert np.allclose(observation * 12 + 12, (3, 2)) and not terminated
    _, reward, terminated, truncated, info = env.step(np.array([0, -1.0]))
    assert reward == 20 and terminated and not truncated and info["is_success"]


def test_death():
    _, reward, terminated, truncated, info = start((12, 14), "three_goals").step(np.array([0, -1.0]))
    assert reward == -10 and terminated and not truncated and not info["is_success"]


def test_walls_and_borders_stop_the_agent():
    observation, reward, terminated, _, _ = start((14, 12), "two_slits").step(np.array([1.0, 1.0]))
    assert np.allclose(observation * 12 + 12, (14, 12)) and reward == 0 and not terminated
    # Through the slit
    observation, *_ = start((14, 4), "two_slits").step(np.array([1.0, 0.0]))
    assert np.allclose(observation * 12 + 12, (15, 4))
    observation, *_ = start((0, 12)).step(np.array([-1.0, 1.0]))
    assert np.allclose(observation * 12 + 12, (0, 13))


def test_truncation_is_not_a_termination():
    env = gym.make("sb3_flow/GridWorld-v0")
    env.reset(seed=0)
    for step in range(1, 101):
        _, _, terminated, truncated, _ = env.step(np.zeros(2, dtype=np.float32))
        assert not terminated and truncated == (step == 100)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_starts(layout):
    """Every free cell, with about the same probability, and no other."""
    env = GridWorldEnv(layout)
    env.reset(seed=0)
    counts = np.zeros((SIZE, SIZE), dtype=int)
    for _ in range(20_000):
        x, y = np.rint(env.reset()[0] * 12 + 12).astype(int)
        counts[y, x] += 1
    free = make_layout(layout) == FREE
    assert (counts[~free] == 0).all() and (counts[free] > 0).all() and counts[free].max() < 3 * counts[free].mean()


def test_seed():
    env, other = GridWorldEnv(), GridWorldEnv()
    assert np.array_equal(env.reset(seed=5)[0], other.reset(seed=5)[0])
    assert np.array_equal(env.reset()[0], other.reset()[0])
    assert not np.array_equal([env.reset()[0] for _ in range(5)], [env.reset(seed=6)[0] for _ in range(5)])


@pytest.mark.parametrize("position", [(3, 0), (25, 12), (12,)])
def test_start_must_be_free(position):
    with pytest.raises(ValueError, match="`position` must be the"):
        GridWorldEnv().reset(options=dict(position=position))


def test_rgb_array():
    env = gym.make("sb3_flow/GridWorld-three_goals-v0", render_mode="rgb_array")
    env.reset(options=dict(position=(0, 24)))
    image = env.render()
    assert image.shape == (500, 500, 3) and image.dtype == np.uint8
    # Agent, free cell, goal and death, wherever they are: five colors with that of the lines; y points upwards
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 5
    top_left = image[10, 10].copy()
    env.step(np.array([1.0, 0.0]))
    moved = env.render()
    assert np.array_equal(moved[10, 30], top_left) and not np.array_equal(moved[10, 10], top_left)


def test_human(monkeypatch):
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = gym.make("sb3_flow/GridWorld-v0", render_mode="human")
    env.reset(seed=0)
    env.step(np.array([1.0, 0.0]))
    env.close()
    env.close()


@pytest.mark.slow
def test_fpo_reaches_every_goal(tmp_path, monkeypatch):
    """With the hyperparameters that the package comes with."""
    pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')
    from sb3_flow.zoo import cli
    from sb3_flow.zoo.evaluate import evaluate

    monkeypatch.chdir(tmp_path)
    args = [
        "train",
        "--env",
        "sb3_flow/GridWorld-v0",
        "--algo",
        "fpo",
        "--seed",
        "0",
        "--num-threads",
        "1",
        "--eval-freq",
        "-1",
    ]
    monkeypatch.setattr(sys, "argv", ["sb3-flow", *args, "--verbose", "0"])
    cli.main()
    result = evaluate("fpo", "sb3_flow/GridWorld-v0", n_eval_episodes=200, stochastic=True, seed=10_000)
    assert result["success_rate"] >= 0.99 and result["mean_length"] < 7
    # From zero noise it does not leave the middle row, whose two sides are mirror images
    result = evaluate("fpo", "sb3_flow/GridWorld-v0", n_eval_episodes=200, stochastic=False, seed=10_000)
    assert result["success_rate"] >= 0.9
