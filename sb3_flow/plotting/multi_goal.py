"""Policies in the multi-goal task: which of the goals, all as good, they reach."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_flow.envs.multi_goal import HALF_SIZE, RADIUS, MultiGoalEnv, make_goals
from sb3_flow.plotting import GREY, entropy, new_figure

MAX_STEPS = 30


class Episode(NamedTuple):
    """Positions, (length + 1, 2), their return, and the number of the goal at the end (-1 for none)."""

    positions: np.ndarray
    episode_return: float
    goal: int


def run_episodes(
    model: BaseAlgorithm, n_goals: int = 4, n_episodes: int = 200, deterministic: bool = False, seed: int = 0
) -> list[Episode]:
    """
    Episodes of at most 30 steps, side by side.

    :param model: A trained model
    :param n_goals: Number of goals
    :param n_episodes: Number of episodes
    :param deterministic: Whether to take deterministic actions
    :param seed: Seed of the first start, the next ones are those of the others
    :return: episodes
    """
    envs = [MultiGoalEnv(n_goals) for _ in range(n_episodes)]
    observations = np.array([env.reset(seed=seed + index)[0] for index, env in enumerate(envs)])
    positions, returns, goals = [[env.position] for env in envs], np.zeros(n_episodes), np.full(n_episodes, -1)
    running, state = np.arange(n_episodes), None
    for _ in range(MAX_STEPS):
        actions, state = model.predict(observations[running], state, deterministic=deterministic)
        for index, action in zip(running, actions, strict=True):
            observations[index], reward, _, _, info = envs[index].step(action)
            positions[index].append(envs[index].position)
            returns[index] += reward
            goals[index] = info["goal"]
        goes_on = goals[running] < 0
        running = running[goes_on]
        state = None if state is None else tuple(part[goes_on] for part in state)
        if len(running) == 0:
            break
    return [Episode(np.array(path), float(r), int(goal)) for path, r, goal in zip(positions, returns, goals, strict=True)]


def goal_statistics(episodes: list[Episode], n_goals: int = 4) -> dict[str, Any]:
    """
    How episodes are spread over the goals.

    :param episodes: Episodes
    :param n_goals: Number of goals
    :return: share of the episodes that reach each goal (``shares``), number of goals that have at least half of an equal
        share (``n_goals_kept``), ``entropy`` of the goals that are reached, in bits, ``mean_return`` of all episodes, and
        that of the goal where it is best (``best_goal_return``, None if no goal is reached)
    """
    goals = np.array([episode.goal for episode in episodes])
    returns = np.array([episode.episode_return for episode in episodes])
    shares = np.array([(goals == goal).mean() for goal in range(n_goals)])
    of_goals = [float(returns[goals == goal].mean()) for goal in range(n_goals) if (goals == goal).any()]
    return dict(
        shares=shares.tolist(),
        n_goals_kept=int((shares >= 0.5 / n_goals).sum()),
        entropy=entropy(shares),
        mean_return=float(returns.mean()),
        best_goal_return=max(of_goals, default=None),
    )


def plot_multi_goal(models: Mapping[str, BaseAlgorithm], path: str | Path, n_goals: int = 4, n_episodes: int = 100) -> Path:
    """
    Draw sampled episodes of each model in a panel of its own, in the colors of the goals that they reach.

    :param models: Trained models, by the names to show
    :param path: Where to write the figure, a PNG
    :param n_goals: Number of goals
    :param n_episodes: Number of episodes
    :return: path of the figure
    :raises ImportError: if matplotlib is not installed
    """
    figure = new_figure(figsize=(3.4 * len(models), 3.6))
    from matplotlib import colormaps
    from matplotlib.patches import Circle

    colors = [*colormaps["tab10"](np.arange(n_goals) % 10), GREY]
    for axes, (name, model) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        episodes = run_episodes(model, n_goals, n_episodes)
        for episode in episodes:
            axes.plot(*episode.positions.T, color=colors[episode.goal], linewidth=0.8, alpha=0.7)
        statistics = goal_statistics(episodes, n_goals)
        for goal, share, color in zip(make_goals(n_goals), statistics["shares"], colors, strict=False):
            axes.add_patch(Circle(tuple(goal), RADIUS, color=color, alpha=0.25))
            axes.annotate(f"{100 * share:.0f} %", goal, ha="center", va="center", fontsize="small")
        limits = (-HALF_SIZE, HALF_SIZE)
        axes.set(title=f"{name}: {statistics['entropy']:.2f} bits", xlim=limits, ylim=limits, box_aspect=1)
    path = Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
