"""A flow from noise to actions: where its samples are along flow time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_flow.common.flow import standard_normal_std
from sb3_flow.common.samplers import euler, unit_variance_field
from sb3_flow.plotting import BLUE, GREY, new_figure

#: Flow times of the panels of the figure
SNAPSHOTS = (1.0, 0.75, 0.5, 0.25, 0.0)
N_TIMES = 40
#: Steps of the flow for each frame of the animation, and frames that it rests on the last one
STEPS_PER_FRAME, REST = 2, 8


def flow_policy(model: BaseAlgorithm) -> BasePolicy:
    """
    The flow of a model.

    :param model: A trained model
    :return: its policy or, for FQL, the flow that its policy is distilled from
    :raises ValueError: if it has none
    """
    policy: Any = getattr(model.policy, "bc_flow", model.policy)
    if not hasattr(policy, "velocity_field"):
        raise ValueError(f"{type(model).__name__} has no flow to draw: its policy is a {type(policy).__name__}")
    return policy


def flow_paths(model: BaseAlgorithm, obs: np.ndarray, n_samples: int = 1000, n_times: int = N_TIMES) -> np.ndarray:
    """
    Paths of samples from noise to actions, by Euler's method, as the policy takes it. Those of a policy with noise in its
    steps (DPPO) are straight between its own steps.

    :param model: A trained model with a flow
    :param obs: One observation, as the model takes it (normalized if it is)
    :param n_samples: Number of paths
    :param n_times: Number of steps
    :return: in env units, from noise to action, (n_times + 1, n_samples, action_dim)
    """
    policy: Any = flow_policy(model)
    tensor, _ = policy.obs_to_tensor(obs[None])
    tensor = tensor.expand(n_samples, *tensor.shape[1:])
    if hasattr(policy, "sample_chain"):
        states = policy.sample_chain(tensor).movedim(1, 0).cpu().numpy()
        position = np.linspace(0, len(states) - 1, n_times + 1)
        before = np.minimum(position.astype(int), len(states) - 2)
        share = (position - before)[:, None, None]
        return _unscale(policy, (1 - share) * states[before] + share * states[before + 1])
    field = policy.velocity_field(tensor)
    # Of a policy with a skip connection, in other coordinates
    network: Any = getattr(policy, "network", None) or policy.action_net
    has_skip_connection = network.skip_connection
    if has_skip_connection:
        field = unit_variance_field(field, network.prediction_type)
    points: list[th.Tensor] = []

    def recorded_field(x: th.Tensor, t: float) -> th.Tensor:
        points.append(standard_normal_std(t) * x if has_skip_connection else x)
        return field(x, t)

    with th.no_grad():
        noise = th.randn(n_samples, int(np.prod(policy.action_space.shape)), device=policy.device)
        points.append(euler(recorded_field, noise, n_times))
    # (the last one of Euler's method is after the last velocity)
    paths = th.stack(points).cpu().numpy()
    return _unscale(policy, paths) if policy.squash_output else paths


def _unscale(policy: Any, actions: np.ndarray) -> np.ndarray:
    """Flattened actions to env units. Those of an action space, or of a chunk, may have more than one axis."""
    return policy.unscale_action(actions.reshape(*actions.shape[:-1], *policy.action_space.shape)).reshape(actions.shape)


def plot_flow(
    model: BaseAlgorithm,
    obs: np.ndarray,
    path: str | Path,
    dims: Sequence[int] | None = None,
    n_samples: int = 1000,
    title: str | None = None,
    animation: bool = True,
) -> list[Path]:
    """
    Draw samples of the action for one observation as the flow time goes from noise to action: the density of one
    dimension, or points in two, and in the last panel the paths of some of them. A sample keeps the color of where it ends.

    :param model: A trained model with a flow
    :param obs: One observation, as the model takes it (normalized if it is)
    :param path: Where to write the figure, a PNG. An animated GIF goes beside it.
    :param dims: One or two dimensions of the action, by default the first two (or the only one)
    :param n_samples: Number of samples
    :param title: Title of the figure
    :param animation: Whether to write the animation
    :return: paths of the files
    :raises ValueError: if the model has no flow, or the action no such dimension
    :raises ImportError: if matplotlib is not installed
    """
    figure = new_figure(figsize=(7.4, 5.0))
    action_space = flow_policy(model).action_space
    assert isinstance(action_space, spaces.Box)
    action_dim = int(np.prod(action_space.shape))
    dims = list(range(min(action_dim, 2))) if dims is None else list(dims)
    if len(dims) not in (1, 2) or not all(0 <= dim < action_dim for dim in dims):
        raise ValueError(f"`dims` must be one or two of the {action_dim} dimensions of the action, it is {dims}")
    paths = flow_paths(model, obs, n_samples)[:, :, dims]
    low, high = action_space.low.flatten()[dims], action_space.high.flatten()[dims]
    view = _View(paths, low, high, dims)

    axes = figure.subplots(2, 3).flatten()
    for panel, t in zip(axes, SNAPSHOTS, strict=False):
        view.snapshot(panel, round((1 - t) * N_TIMES))
        panel.set_title(f"t = {t:g}" + {1.0: " (noise)", 0.0: " (action)"}.get(t, ""), fontsize="medium")
    view.trails(axes[-1])
    figure.suptitle(title)
    path = Path(path).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return [path, _animate(view, path.with_suffix(".gif"), title)] if animation else [path]


class _View:
    """
    One or two dimensions of the paths of samples.

    :param paths: (n_times + 1, n_samples, 1 or 2)
    :param low: lower bounds of the action
    :param high: upper bounds of the action
    :param dims: Numbers of these dimensions
    """

    def __init__(self, paths: np.ndarray, low: np.ndarray, high: np.ndarray, dims: Sequence[int]):
        from matplotlib import colormaps

        self.paths, self.names = paths, [f"action {dim}" for dim in dims]
        self.low, self.high = low, high
        # Almost all samples, and the bounds
        extremes = np.stack([np.quantile(paths, 0.002, axis=(0, 1)), np.quantile(paths, 0.998, axis=(0, 1))])
        bounds = np.where(np.isfinite([low, high]), [low, high], extremes)
        margin = 0.08 * (bounds[1] - bounds[0])
        self.start = np.minimum(extremes[0], bounds[0]) - margin
        self.end = np.maximum(extremes[1], bounds[1]) + margin
        # Of where a sample ends, from the lowest to the highest
        rank = paths[-1, :, -1].argsort().argsort() / paths.shape[1]
        self.colors = colormaps["viridis"](0.9 * rank)
        self.bins = np.linspace(self.start[0], self.end[0], 60)
        final, _ = np.histogram(paths[-1, :, 0], self.bins, density=True)
        noise, _ = np.histogram(paths[0, :, 0], self.bins, density=True)
        self.tallest = 1.05 * max(noise.max(), min(final.max(), 6 * noise.max()))

    def snapshot(self, axes: Any, step: int) -> None:
        """Samples at one time."""
        points = self.paths[step]
        axes.set(xlabel=self.names[0], xlim=(self.start[0], self.end[0]))
        for bound in (self.low[0], self.high[0]):
            axes.axvline(bound, color=GREY, linewidth=0.8, linestyle=":")
        if len(self.names) == 1:
            axes.hist(points[:, 0], self.bins, density=True, color=BLUE)
            axes.set(ylabel="density", ylim=(0, self.tallest))
            return
        for bound in (self.low[1], self.high[1]):
            axes.axhline(bound, color=GREY, linewidth=0.8, linestyle=":")
        axes.scatter(*points.T, s=4, c=self.colors, linewidths=0)
        axes.set(ylabel=self.names[1], ylim=(self.start[1], self.end[1]))

    def trails(self, axes: Any, n_trails: int = 150) -> None:
        """Paths of some samples, against time or in the plane."""
        paths, colors = self.paths[:, :n_trails], self.colors[:n_trails]
        times = np.linspace(1, 0, len(paths))
        for index, color in enumerate(colors):
            trail = (times, paths[:, index, 0]) if len(self.names) == 1 else paths[:, index].T
            axes.plot(*trail, color=color, linewidth=0.6, alpha=0.6)
        if len(self.names) == 1:
            axes.set(xlabel="flow time t", xlim=(1, 0), ylabel=self.names[0], ylim=(self.start[0], self.end[0]))
        else:
            axes.set(xlabel=self.names[0], xlim=(self.start[0], self.end[0]))
            axes.set(ylabel=self.names[1], ylim=(self.start[1], self.end[1]))
        axes.set_title(f"paths of {len(colors)} samples", fontsize="medium")


def _animate(view: _View, path: Path, title: str | None) -> Path:
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure = new_figure(figsize=(4.2, 4.0), dpi=90)
    axes = figure.add_subplot()
    last = len(view.paths) - 1

    def draw(frame: int) -> None:
        axes.clear()
        step = min(frame * STEPS_PER_FRAME, last)
        view.snapshot(axes, step)
        axes.set_title(f"{title + ', ' if title else ''}t = {1 - step / last:.2f}", fontsize="small")
        if frame == 0:
            figure.draw_without_rendering()
            # The layout stays that of the first frame
            figure.set_layout_engine("none")

    FuncAnimation(figure, draw, frames=last // STEPS_PER_FRAME + 1 + REST).save(path, PillowWriter(fps=10))
    return path
