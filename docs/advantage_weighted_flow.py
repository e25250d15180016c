"""
The picture of docs/guide/modes.rst, a flow in one dimension that bends towards the actions that are rewarded:
`python docs/advantage_weighted_flow.py`

In each iteration actions are sampled from the flow, and the flow is fitted to them again, with CFM losses that are weighted by
the exponential of their advantage. What is drawn is the density of the samples from noise (t = 1) to action (t = 0).
"""

from pathlib import Path

import numpy as np
import torch as th

from sb3_flow.common.flow import CFMLoss, cfm_loss, draw_pairs, interpolate
from sb3_flow.common.networks import FlowNetwork
from sb3_flow.common.samplers import euler
from sb3_flow.plotting import BLUE, ORANGE, new_figure

OUTPUT = Path(__file__).parent / "_static" / "advantage_weighted_flow.png"
PEAKS, WIDTH = (-1.2, 1.2), 0.25
N_ITERATIONS, SHOWN = 8, (0, 1, 2, 4, 8)
N_ACTIONS, N_GRADIENT_STEPS, N_PAIRS, N_TIMES = 8192, 150, 4, 40
LEARNING_RATE = 4e-3
LIMITS = (-3.2, 3.2)


def reward(actions: th.Tensor) -> th.Tensor:
    """Two peaks, equally high."""
    return th.exp(-0.5 * ((actions - th.tensor(PEAKS)) / WIDTH) ** 2).sum(dim=-1)


def paths_of(network: FlowNetwork, noise: th.Tensor, n_times: int = N_TIMES) -> th.Tensor:
    """Samples from noise to action, (n_times + 1, n_samples)."""
    points: list[th.Tensor] = []
    field = network.velocity_field(noise.new_zeros((len(noise), 1)), n_times)

    def recorded_field(x: th.Tensor, t: float) -> th.Tensor:
        points.append(x)
        return field(x, t)

    with th.no_grad():
        points.append(euler(recorded_field, noise, n_times))
    return th.stack(points).squeeze(-1)


def fit(network: FlowNetwork, optimizer: th.optim.Optimizer, actions: th.Tensor, weights: th.Tensor) -> None:
    """Flow matching on weighted actions."""
    for step in range(N_GRADIENT_STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / N_GRADIENT_STEPS)
        chosen = th.multinomial(weights, 1024, replacement=True)
        noise, times, _ = draw_pairs((len(chosen), N_PAIRS, 1), CFMLoss("velocity", timestep_distribution="uniform"))
        x_t = interpolate(actions[chosen].unsqueeze(1), noise, times)
        output = network(noise.new_zeros((len(chosen), 1)), x_t, times)
        loss = cfm_loss(output, actions[chosen].unsqueeze(1), noise, times).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def draw(axes, paths: np.ndarray, iteration: int) -> None:
    """The marginal flow, time to the right, with the reward as a background of its last quarter."""
    bins = np.linspace(*LIMITS, 90)
    density = np.stack([np.histogram(points, bins, density=True)[0] for points in paths], axis=1)
    axes.imshow(
        density,
        origin="lower",
        aspect="auto",
        extent=(1, 0, *LIMITS),
        cmap="Blues",
        vmin=0,
        vmax=0.9,
        interpolation="bilinear",
    )
    for path in paths[:, :24].T:
        axes.plot(np.linspace(1, 0, len(paths)), path, color=BLUE, linewidth=0.6, alpha=0.7)
    for peak in PEAKS:
        axes.plot([0], [peak], marker="<", color=ORANGE, markersize=9, clip_on=False)
    axes.set(xlim=(1, 0), ylim=LIMITS, xlabel="flow time t", title=f"iteration {iteration}")


def main() -> None:
    th.manual_seed(0)
    network = FlowNetwork(1, 1, [64, 64])
    optimizer = th.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    # A flow to start with: that of a standard normal distribution
    for _ in range(4):
        fit(network, optimizer, th.randn(N_ACTIONS, 1), th.ones(N_ACTIONS))
    noise = th.randn(3000, 1)
    frames = [paths_of(network, noise)]
    for _ in range(N_ITERATIONS):
        actions = paths_of(network, th.randn(N_ACTIONS, 1))[-1].unsqueeze(-1)
        rewards = reward(actions)
        advantages = (rewards - rewards.mean()) / rewards.std()
        fit(network, optimizer, actions, advantages.exp())
        frames.append(paths_of(network, noise))

    figure = new_figure(figsize=(2.4 * len(SHOWN), 2.9), dpi=100)
    for axes, iteration in zip(figure.subplots(1, len(SHOWN), sharey=True), SHOWN, strict=True):
        draw(axes, frames[iteration].numpy(), iteration)
    figure.axes[0].set_ylabel("action")
    figure.savefig(OUTPUT)

    from matplotlib.animation import FuncAnimation, PillowWriter

    figure = new_figure(figsize=(3.6, 3.2), dpi=80)
    axes = figure.add_subplot()

    def frame(index: int) -> None:
        axes.clear()
        draw(axes, frames[min(index, N_ITERATIONS)].numpy(), min(index, N_ITERATIONS))
        axes.set_ylabel("action")

    FuncAnimation(figure, frame, frames=N_ITERATIONS + 9).save(OUTPUT.with_suffix(".gif"), PillowWriter(fps=6))
    print(OUTPUT, OUTPUT.with_suffix(".gif"), sep="\n")


if __name__ == "__main__":
    main()
