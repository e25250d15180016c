"""Policies in GridWorld: the panels of the first figure of FPO (https://arxiv.org/abs/2507.21053), and their modes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_flow.envs.gridworld import CELL_COLORS, FREE, GOAL, SIZE, GridWorldEnv, make_layout, to_observation
from sb3_flow.plotting import BLUE, GREY, ORANGE, entropy, new_figure
from sb3_flow.plotting.flow import flow_paths, plot_flow

#: A cell of each layout from which there are two equally good ways, and the axis along which they part (0: x, 1: y)
SADDLES = {
    "two_walls": ((12, 12), 1),
    "three_goals": ((12, 7), 0),
    "tree_in_the_middle": ((8, 12), 1),
    "two_slits": ((8, 12), 1),
    "c_shape": ((20, 12), 1),
}
Normalize = Callable[[Any], Any]


def run_episodes(
    model: BaseAlgorithm,
    starts: np.ndarray,
    layout: str = "two_walls",
    deterministic: bool = False,
    normalize: Normalize = np.asarray,
) -> list[np.ndarray]:
    """
    Episodes of at most 100 steps, side by side.

    :param model: A trained model
    :param starts: First position of each episode, (n, 2)
    :param layout: Layout of the world
    :param deterministic: Whether to take deterministic actions
    :param normalize: What the model's observations went through (``VecNormalize.normalize_obs``)
    :return: positions of each episode, (length + 1, 2). It succeeded if the last is a goal.
    """
    envs = [GridWorldEnv(layout) for _ in starts]
    observations = np.array([env.reset(options=dict(position=start))[0] for env, start in zip(envs, starts, strict=True)])
    episodes = [[env.position] for env in envs]
    running, state = np.arange(len(envs)), None
    for _ in range(100):
        actions, state = model.predict(normalize(observations[running]), state, deterministic=deterministic)
        goes_on = []
        for index, action in zip(running, actions, strict=True):
            observations[index], _, terminated, _, _ = envs[index].step(action)
            episodes[index].append(envs[index].position)
            goes_on.append(not terminated)
        running = running[goes_on]
        state = None if state is None else tuple(part[goes_on] for part in state)
        if len(running) == 0:
            break
    return [np.array(positions) for positions in episodes]


def raw_actions(model: BaseAlgorithm, observations: np.ndarray, deterministic: bool = False) -> np.ndarray:
    """
    Samples of the actions, in env units but not clipped.

    :param model: A trained model
    :param observations: (batch, 2)
    :param deterministic: Whether to take deterministic actions
    :return: (batch, 2)
    """
    with th.no_grad():
        actions = model.policy._predict(model.policy.obs_to_tensor(observations)[0], deterministic).cpu().numpy()
    return model.policy.unscale_action(actions) if model.policy.squash_output else actions


def goal_regions(layout: str) -> np.ndarray:
    """
    Number the goals of a layout.

    :param layout: Layout of the world
    :return: number of the goal that a cell is part of, from 1, or 0, [y, x]
    """
    goals = make_layout(layout) == GOAL
    regions = np.where(goals, np.arange(1, goals.size + 1).reshape(goals.shape), 0)
    while True:
        padded = np.pad(regions, 1)
        neighbors = np.max([padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]], 0)
        spread = np.where(goals, neighbors, 0)
        if np.array_equal(spread, regions):
            return np.unique(regions, return_inverse=True)[1].reshape(goals.shape)
        regions = spread


def multimodality(
    model: BaseAlgorithm, layout: str = "two_walls", n_samples: int = 1000, normalize: Normalize = np.asarray
) -> dict[str, float]:
    """
    Figures of merit of the modes of a policy at the saddle point of a layout (``SADDLES``).

    :param model: A trained model
    :param layout: Layout of the world
    :param n_samples: Number of actions at the saddle point, and of episodes that start there
    :param normalize: What the model's observations went through
    :return: shares of the samples in the two modes (``low`` and ``high``, moves of -1 and +1 along the axis on which the ways
        part) and between them (``stay``), and the entropy of the goals that episodes reach, in bits (``goal_entropy``)
    """
    saddle, axis = SADDLES[layout]
    starts = np.tile(saddle, (n_samples, 1))
    moves = np.rint(np.clip(raw_actions(model, normalize(to_observation(starts)))[:, axis], -1, 1))
    ends = np.array([positions[-1] for positions in run_episodes(model, starts, layout, normalize=normalize)])
    reached = goal_regions(layout)[ends[:, 1], ends[:, 0]]
    return dict(
        low=float((moves < 0).mean()),
        high=float((moves > 0).mean()),
        stay=float((moves == 0).mean()),
        goal_entropy=entropy(np.bincount(reached[reached > 0])),
    )


def saddle_line(
    model: BaseAlgorithm, layout: str = "two_walls", n_samples: int = 1000, normalize: Normalize = np.asarray
) -> np.ndarray:
    """
    Shares of the action samples that move to either side, in the cells across the axis on which the ways part: in "two_walls"
    the row between the goals, all of whose cells are as far from both.

    :param model: A trained model
    :param layout: Layout of the world
    :param n_samples: Number of actions in each cell
    :param normalize: What the model's observations went through
    :return: shares of the moves of -1 and +1 along the axis, in each free cell, (n_cells, 2)
    """
    saddle, axis = SADDLES[layout]
    cells = np.tile(saddle, (SIZE, 1))
    cells[:, 1 - axis] = np.arange(SIZE)
    cells = cells[make_layout(layout)[cells[:, 1], cells[:, 0]] == FREE]
    actions = raw_actions(model, normalize(to_observation(cells)).repeat(n_samples, axis=0))[:, axis]
    moves = np.rint(np.clip(actions, -1, 1)).reshape(len(cells), n_samples)
    return np.stack([(moves < 0).mean(axis=1), (moves > 0).mean(axis=1)], axis=1)


def plot_gridworld(
    models: Mapping[str, BaseAlgorithm],
    path: str | Path,
    layout: str = "two_walls",
    normalize: Mapping[str, Normalize] | None = None,
) -> list[Path]:
    """
    Draw a row of three panels for each model: the mean action in each cell, samples of the action at the saddle point (for a
    flow, with the ways that they came from noise), and episodes from several starts.

    :param models: Trained models, by the names to show
    :param path: Where to write the figure, a PNG. For the first flow, an animation of the samples at the saddle point, a GIF,
        goes beside it.
    :param layout: Layout of the world
    :param normalize: What the observations of a model went through, by name
    :return: paths of the files
    :raises ImportError: if matplotlib is not installed
    """
    figure = new_figure(figsize=(9.0, 2.9 * len(models)))
    axes = figure.subplots(len(models), 3, squeeze=False)
    saddle, axis = SADDLES[layout]
    for row, (name, model) in zip(axes, models.items(), strict=True):
        normalize_obs = (normalize or {}).get(name, np.asarray)
        _draw_mean_actions(row[0], model, layout, normalize_obs)
        _draw_saddle(row[1], model, normalize_obs(to_observation(np.array(saddle))), axis)
        _draw_episodes(row[2], model, layout, normalize_obs)
        row[0].set_ylabel(name, fontsize="x-large")
    for panel, title in zip(
        axes[0], ["mean action in each cell", f"action samples at {saddle}", "episodes from several starts"], strict=True
    ):
        panel.set_title(title, fontsize="medium")
    path = Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

    files = [path]
    for name, model in models.items():
        if hasattr(model.policy, "velocity_field"):
            obs = (normalize or {}).get(name, np.asarray)(to_observation(np.array(saddle)))
            title = f"{name} at {saddle}"
            files += plot_flow(model, obs, path.with_name(f"{path.stem}_flow.png"), title=title)
            break
    return files


def _draw_cells(axes: Any, layout: str) -> None:
    axes.imshow(CELL_COLORS[make_layout(layout)], origin="lower")
    axes.set(xticks=[0, 6, 12, 18, 24], yticks=[0, 6, 12, 18, 24], xlim=(-0.5, SIZE - 0.5), ylim=(-0.5, SIZE - 0.5))


def _draw_mean_actions(axes: Any, model: BaseAlgorithm, layout: str, normalize: Normalize, n_samples: int = 64) -> None:
    _draw_cells(axes, layout)
    cells = np.argwhere(make_layout(layout) == FREE)[:, ::-1]
    actions = raw_actions(model, normalize(to_observation(cells)).repeat(n_samples, axis=0)).clip(-1, 1)
    means = actions.reshape(len(cells), n_samples, 2).mean(axis=1)
    axes.quiver(*cells.T, *means.T, pivot="mid", scale=28, width=0.005, headwidth=4, color="#202020")


def _draw_saddle(axes: Any, model: BaseAlgorithm, obs: np.ndarray, axis: int, n_samples: int = 400) -> None:
    if hasattr(model.policy, "velocity_field"):
        paths = flow_paths(model, obs, n_samples)
        samples = paths[-1]
        axes.scatter(*paths[0].T, s=3, color=GREY, linewidths=0, label="noise")
        for index in range(100):
            axes.plot(*paths[:, index].T, color=GREY, linewidth=0.5, alpha=0.5)
    else:
        samples = raw_actions(model, np.tile(obs, (n_samples, 1)))
    for color, chosen, label in (
        (BLUE, samples[:, axis] >= 0.5, "moves +1"),
        (ORANGE, samples[:, axis] <= -0.5, "moves -1"),
        ("black", abs(samples[:, axis]) < 0.5, "stays"),
    ):
        label = f"{label}: {100 * chosen.mean():.0f} %"
        axes.scatter(*samples[chosen].T, s=6, color=color, linewidths=0, label=label, zorder=3)
    for bound in (-0.5, 0.5):
        (axes.axhline if axis == 1 else axes.axvline)(bound, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlim=(-3.8, 3.8), ylim=(-3.2, 4.4), xlabel="action x", ylabel="action y", box_aspect=1)
    axes.legend(loc="upper center", ncols=2, fontsize="x-small", markerscale=2, columnspacing=0.8, handletextpad=0.1)


def _draw_episodes(axes: Any, model: BaseAlgorithm, layout: str, normalize: Normalize, n_episodes: int = 12) -> None:
    _draw_cells(axes, layout)
    (x, y), axis = SADDLES[layout]
    across = np.array([1, 0]) if axis == 1 else np.array([0, 1])
    starts = [np.array((x, y)) + shift * across for shift in (-7, 0, 7)]
    cells = make_layout(layout)
    starts = [start for start in starts if (0 <= start).all() and (start < SIZE).all() and cells[start[1], start[0]] == FREE]
    rng = np.random.default_rng(0)
    for positions in run_episodes(model, np.repeat(starts, n_episodes, axis=0), layout, normalize=normalize):
        # Side by side where they are the same
        jittered = positions + rng.uniform(-0.3, 0.3, size=2)
        color = BLUE if positions[-1, axis] > (x, y)[axis] else ORANGE
        axes.plot(*jittered.T, color=color, linewidth=0.9, alpha=0.8)
    axes.plot(*np.array(starts).T, "o", color="black", markersize=5)
