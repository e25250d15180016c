"""Pictures: what they are drawn from, and that they are written."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO

from sb3_flow import DPPO, FPO, FQL
from sb3_flow.envs.gridworld import CENTER, DEATH, GOAL, LAYOUTS, SIZE, make_layout
from sb3_flow.on_policy.policies import SQUASH_TYPES
from sb3_flow.plotting import entropy
from sb3_flow.plotting.flow import N_TIMES, STEPS_PER_FRAME, flow_paths, plot_flow
from sb3_flow.plotting.gridworld import SADDLES, goal_regions, multimodality, plot_gridworld, run_episodes, saddle_line
from sb3_flow.plotting.multi_goal import Episode, goal_statistics, plot_multi_goal
from sb3_flow.plotting.multi_goal import run_episodes as run_goal_episodes

pytest.importorskip("matplotlib", reason='needs pip install "sb3-flow[plots]"')
Image = pytest.importorskip("PIL.Image")

KWARGS = dict(n_steps=32, batch_size=32, seed=0, device="cpu")


class Reach(gym.Env):
    """Four actions, with bounds of their own, and one of them without."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Box(np.array([-1, 0, -2, -1], "f4"), np.array([1, 5, 2, 1], "f4"))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, "f4"), {}

    def step(self, action):
        return np.zeros(3, "f4"), 0.0, False, True, {}


def check_files(files, stem, size):
    png, gif = files
    assert png.name == f"{stem}.png" and gif.name == f"{stem}.gif"
    with Image.open(png) as image:
        assert image.format == "PNG" and image.size == size
        # Something is drawn in each part of it
        pixels = np.asarray(image.convert("L"))
        assert all(part.std() > 5 for half in np.array_split(pixels, 2) for part in np.array_split(half, 3, axis=1))
    with Image.open(gif) as image:
        assert image.format == "GIF" and image.size == (378, 360) and image.n_frames > N_TIMES // STEPS_PER_FRAME
        first = np.asarray(image.convert("L")).copy()
        image.seek(N_TIMES // STEPS_PER_FRAME)
        assert (first != np.asarray(image.convert("L"))).mean() > 0.005


@pytest.mark.parametrize("dims", [[2], [3, 1]])
def test_plot_flow(tmp_path, dims):
    model = FPO("MlpPolicy", Reach(), **KWARGS)
    files = plot_flow(model, np.zeros(3, "f4"), tmp_path / "new" / "reach.png", dims, n_samples=100, title="Reach")
    check_files(files, "reach", (888, 600))


@pytest.mark.parametrize("algorithm", [FPO, DPPO, FQL])
def test_plot_one_dimension(tmp_path, algorithm):
    kwargs = dict(policy_kwargs=dict(net_arch=[16]), buffer_size=10) if algorithm is FQL else KWARGS
    model = algorithm("MlpPolicy", "Pendulum-v1", **kwargs)
    check_files(plot_flow(model, np.zeros(3, "f4"), tmp_path / "flow", n_samples=100), "flow", (888, 600))
    assert len(plot_flow(model, np.zeros(3, "f4"), tmp_path / "still", n_samples=100, animation=False)) == 1


@pytest.mark.parametrize("squash_type", SQUASH_TYPES)
def test_paths_end_where_the_policy_acts(squash_type):
    model = FPO("MlpPolicy", Reach(), policy_kwargs=dict(squash_type=squash_type, n_flow_steps=N_TIMES), **KWARGS)
    th.manual_seed(0)
    paths = flow_paths(model, np.zeros(3, "f4"), n_samples=50)
    assert paths.shape == (N_TIMES + 1, 50, 4)
    th.manual_seed(0)
    actions, _ = model.predict(np.zeros((50, 3), "f4"), deterministic=False)
    assert np.allclose(np.clip(paths[-1], Reach.action_space.low, Reach.action_space.high), actions, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["velocity", "noise", "action"])
def test_paths_of_a_skip_connection(prediction_type):
    """With few steps too, they go where the policy acts, and its standard deviation is theirs."""
    flow_kwargs = dict(skip_connection=True, prediction_type=prediction_type, n_flow_steps=5, action_scale=0.05)
    model = FPO("MlpPolicy", Reach(), policy_kwargs=flow_kwargs, **KWARGS)
    th.manual_seed(0)
    # (so narrow that none is clipped)
    paths = model.policy.scale_action(flow_paths(model, np.zeros(3, "f4"), n_samples=1000, n_times=5))
    th.manual_seed(0)
    samples = model.policy._predict(th.zeros(1000, 3)).detach().numpy()
    assert np.allclose(paths[-1], samples, atol=1e-4)
    if prediction_type == "velocity":
        expected = [(t**2 + (1 - t) ** 2) ** 0.5 for t in np.linspace(1, 0, 6)]
        assert np.allclose(paths.std(axis=(1, 2)), expected, rtol=0.1)


def test_paths_of_actions_with_axes():
    """Of chunks: each number of an action has its own bounds."""
    model = FQL("MlpPolicy", Reach(), chunk_size=3, buffer_size=10, policy_kwargs=dict(net_arch=[16], n_flow_steps=N_TIMES))
    th.manual_seed(0)
    paths = flow_paths(model, np.zeros(3, "f4"), n_samples=50)
    assert paths.shape == (N_TIMES + 1, 50, 12)
    th.manual_seed(0)
    chunks, _ = model.policy.bc_flow.predict(np.zeros((50, 3), "f4"))
    assert np.allclose(
        np.clip(paths[-1].reshape(50, 3, 4), Reach.action_space.low, Reach.action_space.high), chunks, atol=1e-4
    )


def test_plot_flow_errors(tmp_path):
    with pytest.raises(ValueError, match="PPO has no flow to draw"):
        plot_flow(PPO("MlpPolicy", "Pendulum-v1", device="cpu"), np.zeros(3, "f4"), tmp_path / "flow.png")
    model = FPO("MlpPolicy", "Pendulum-v1", device="cpu")
    for dims in ([1], [], [0, 0, 0], [-1]):
        with pytest.raises(ValueError, match="`dims`"):
            plot_flow(model, np.zeros(3, "f4"), tmp_path / "flow.png", dims)


@pytest.mark.parametrize(("layout", "n_goals"), [*zip(LAYOUTS, [2, 3, 1, 1, 1], strict=True)])
def test_goal_regions(layout, n_goals):
    regions = goal_regions(layout)
    assert sorted(np.unique(regions)) == list(range(n_goals + 1))
    assert np.array_equal(regions > 0, make_layout(layout) == GOAL)
    if layout == "two_walls":
        assert len(np.unique(regions[:2])) == len(np.unique(regions[-2:])) == 1 and regions[0, 0] != regions[24, 0]


def gaussian(mean, std, layout="two_walls"):
    """PPO that has this Gaussian for a policy, whatever it observes."""
    model = PPO("MlpPolicy", f"sb3_flow/GridWorld-{layout}-v0", device="cpu", seed=0)
    with th.no_grad():
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.copy_(th.tensor(mean))
        model.policy.log_std.fill_(np.log(std))
    return model


def test_run_episodes():
    starts = np.array([[12, 12], [0, 3], [24, 20]])
    episodes = run_episodes(gaussian([0.0, 1.0], 1e-6), starts)
    # Straight up to the wall on top, which begins at 23
    assert [len(positions) - 1 for positions in episodes] == [11, 20, 3]
    assert np.array_equal([positions[-1] for positions in episodes], [[12, 23], [0, 23], [24, 23]])
    # Nowhere: an episode ends after 100 steps; and death ends it
    assert len(run_episodes(gaussian([0.0, 0.0], 1e-6), starts[:1])[0]) == 101
    death = run_episodes(gaussian([0.0, 1.0], 1e-6, "three_goals"), np.array([[12, 7]]), "three_goals")[0][-1]
    assert make_layout("three_goals")[death[1], death[0]] == DEATH


def test_multimodality():
    one = multimodality(gaussian([0.0, -1.0], 0.01), n_samples=100)
    assert one == dict(low=1.0, high=0.0, stay=0.0, goal_entropy=0.0)
    # Wide, to both sides: 0.5 is a tenth of its standard deviation
    both = multimodality(gaussian([0.0, 0.0], 5.0))
    assert both["low"] == pytest.approx(0.46, abs=0.05) and both["high"] == pytest.approx(0.46, abs=0.05)
    assert both["low"] + both["high"] + both["stay"] == pytest.approx(1)
    assert both["goal_entropy"] == pytest.approx(1, abs=0.02)
    # Of three goals it may only reach two
    assert multimodality(gaussian([-1.0, 0.0], 0.01, "three_goals"), "three_goals", 50)["low"] == 1


def test_saddle_line():
    model = gaussian([0.0, -1.0], 0.01)
    assert np.array_equal(saddle_line(model, n_samples=10), [[1.0, 0.0]] * SIZE)
    # Upwards on the right, downwards on the left, whatever the row
    with th.no_grad():
        model.policy.mlp_extractor.policy_net = th.nn.Identity()
        model.policy.action_net = th.nn.Linear(2, 2)
        model.policy.action_net.weight.copy_(th.tensor([[0.0, 0.0], [100.0, 0.0]]))
        model.policy.action_net.bias.zero_()
    low, high = saddle_line(model, n_samples=10).T
    assert np.array_equal(low, [1] * CENTER + [0] * (CENTER + 1)) and np.array_equal(high, [0] * (CENTER + 1) + [1] * CENTER)
    # Not in the goal, 5 cells wide, nor in the wall
    assert saddle_line(gaussian([1.0, 0.0], 0.01, "c_shape"), "c_shape", 10).shape == (SIZE - 6, 2)


def test_entropy():
    assert entropy(np.array([3, 0])) == 0 and entropy(np.array([0.2, 0.2])) == 1 and entropy(np.zeros(4)) == 0
    assert entropy(np.array([1, 1, 2])) == 1.5


def test_multi_goal(tmp_path):
    """A policy that goes straight to the right, and one that stays."""
    models = {}
    for name, x in {"right": 1.0, "stays": 0.0}.items():
        models[name] = PPO("MlpPolicy", "sb3_flow/MultiGoal-v0", device="cpu", seed=0)
        with th.no_grad():
            models[name].policy.action_net.weight.zero_()
            models[name].policy.action_net.bias.copy_(th.tensor([x, 0.0]))
            models[name].policy.log_std.fill_(-20)
    episodes = run_goal_episodes(models["right"], n_episodes=10)
    assert all(episode.goal == 0 and 4 <= len(episode.positions) - 1 <= 5 for episode in episodes)
    assert np.allclose(episodes[0].positions[1] - episodes[0].positions[0], [1, 0])
    statistics = goal_statistics(episodes)
    assert statistics["shares"] == [1, 0, 0, 0] and statistics["n_goals_kept"] == 1 and statistics["entropy"] == 0
    assert statistics["mean_return"] == pytest.approx(statistics["best_goal_return"]) and 8 < statistics["mean_return"] < 9
    stays = run_goal_episodes(models["stays"], n_goals=8, n_episodes=3)
    assert [len(episode.positions) for episode in stays] == [31] * 3 and stays[0].episode_return == pytest.approx(-29, abs=3)
    assert goal_statistics(stays, 8)["best_goal_return"] is None and goal_statistics(stays, 8)["n_goals_kept"] == 0
    # Half of an equal share is enough, of all episodes
    ends = [Episode(np.zeros((2, 2)), float(goal), goal) for goal in [0] * 6 + [1] + [-1]]
    assert goal_statistics(ends)["n_goals_kept"] == 2 and goal_statistics(ends)["shares"] == [0.75, 0.125, 0, 0]
    assert goal_statistics(ends)["best_goal_return"] == 1 and goal_statistics(ends)["mean_return"] == 0
    with Image.open(plot_multi_goal(models, tmp_path / "goals", n_episodes=5)) as image:
        assert image.size == (816, 432) and np.asarray(image).std() > 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plot_gridworld(tmp_path, layout):
    env = f"sb3_flow/GridWorld-{layout}-v0"
    models = {"FPO": FPO("MlpPolicy", env, **KWARGS), "PPO": PPO("MlpPolicy", env, device="cpu")}
    if layout == "two_walls":
        png, *flow = plot_gridworld(models, tmp_path / "grid.png")
        check_files(flow, "grid_flow", (888, 600))
    else:
        (png,) = plot_gridworld({"PPO": models["PPO"]}, tmp_path / "grid.png", layout)
    with Image.open(png) as image:
        assert image.size == (1080, 696 if layout == "two_walls" else 348) and np.asarray(image).std() > 20
    # A saddle point is a free cell
    (x, y), _ = SADDLES[layout]
    assert make_layout(layout)[y, x] == 0


def test_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')
    from sb3_flow.zoo import cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sb3-flow", *map(str, args)])
        cli.main()

    monkeypatch.chdir(tmp_path)
    world = "sb3_flow/GridWorld-v0"
    params = ["-n", 64, "--eval-freq", -1, "--verbose", 0, "-params", "n_envs:2", "n_steps:32", "batch_size:32"]
    for algo in ("fpo", "ppo"):
        run("train", "--algo", algo, "--env", world, *params, "normalize:True")
    run("plot-gridworld", "--algo", "fpo", "ppo", "-o", "world.png")
    out = capsys.readouterr().out
    assert "FPO: 0." in out and "PPO: 0." in out and "bits" in out
    for name in ("world.png", "world_flow.png", "world_flow.gif"):
        assert name in out and Path(name).stat().st_size > 10_000
    run("plot-flow", "--env", world, "--steps", 3, "--n-samples", 50)
    assert Path("logs/fpo/sb3_flow-GridWorld-v0_1/flow.gif").is_file()
    run("plot-flow", "--env", world, "--obs", 0, -1, "--dims", 1, "--n-samples", 50, "-o", "one.png")
    assert Path("one.png").is_file()
    with pytest.raises(SystemExit, match="'Pendulum-v1', expected a GridWorld"):
        run("train", "--algo", "fpo", "--env", "Pendulum-v1", *params)
        run("plot-gridworld", "--env", "Pendulum-v1")
    for error, args in {
        "argument --obs: found 1 numbers, expected 2": ["--obs", 0],
        "`dims`": ["--dims", 2],
        "PPO has no flow to draw": ["--algo", "ppo"],
        "folder was not found": ["--algo", "fpo", "-f", "elsewhere"],
    }.items():
        with pytest.raises(SystemExit) as exit_:
            run("plot-flow", "--env", world, *args)
        assert error in str(exit_.value)
