"""Learning curve of a run."""

from pathlib import Path

import numpy as np
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.results_plotter import ts2xy, window_func

from sb3_flow.plotting import new_figure

WINDOW = 50


def plot_learning_curve(run_folder: Path, title: str | None = None) -> Path:
    """
    Draw the returns of the training episodes (from the Monitor logs) and of the evaluations
    (from ``evaluations.npz``, if any) of a run, against the number of timesteps.

    :param run_folder: Folder of the run, with its Monitor logs
    :param title: Title of the figure
    :return: path of the figure, ``learning_curve.png`` in that folder
    :raises ImportError: if matplotlib is not installed
    """
    figure = new_figure(figsize=(7, 4.2))
    axes = figure.add_subplot()
    timesteps, returns = ts2xy(load_results(str(run_folder)), "timesteps")
    axes.plot(timesteps, returns, ".", color="#9ecae1", markersize=3, label="training episode")
    if len(returns) >= WINDOW:
        axes.plot(*window_func(timesteps, returns, WINDOW, np.mean), color="#08519c", label=f"mean of {WINDOW} episodes")
    if (run_folder / "evaluations.npz").is_file():
        with np.load(run_folder / "evaluations.npz") as evaluations:
            steps, results = evaluations["timesteps"], evaluations["results"]
        axes.errorbar(
            steps, results.mean(axis=1), results.std(axis=1), color="#d95f02", marker="o", markersize=4, capsize=2,
            label=f"evaluation, mean ± std of {results.shape[1]} episodes",
        )  # fmt: skip
    axes.set(xlabel="timesteps", ylabel="return of an episode", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    path = run_folder / "learning_curve.png"
    figure.savefig(path)
    return path
