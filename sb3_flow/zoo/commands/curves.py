"""Figures of the logs: rl-zoo3's plots."""

import argparse
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sb3_flow.zoo.commands.common import require


def plot_train() -> None:
    """rl-zoo3's plot_train: training curves, from the Monitor logs."""
    from rl_zoo3.plots import plot_train as program

    _as_folder_names("-e", "--env")
    _plot(program)


def plot_from_file() -> None:
    """rl-zoo3's plot_from_file: comparisons, from the output of all-plots."""
    from rl_zoo3.plots import plot_from_file as program

    require(("-i", "--input"))
    if {"-latex", "--latex"} & set(sys.argv) and not shutil.which("latex"):
        sys.exit("sb3-flow: error: argument -latex/--latex: needs LaTeX: apt-get install texlive-latex-extra cm-super dvipng")
    _as_folder_names("--keep-envs")
    _as_folder_names("-skip", "--skip-envs")
    try:
        _plot(program)
    except KeyError as error:
        sys.exit(f"sb3-flow: error: {error} is not there for each environment: leave it out with --skip-keys or --skip-envs")


def all_plots() -> None:
    """rl-zoo3's all_plots: evaluations of several algorithms and environments, and their table."""
    from rl_zoo3.plots import all_plots as program

    require(("-a", "--algos"), ("-e", "--env"), ("-f", "--exp-folders"))
    _as_folder_names("-e", "--env")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-o", "--output")
    output = parser.parse_known_args()[0].output
    _plot(program)
    if output is None:
        return
    # The last evaluations of a single run, or of a single episode, become one number, which plot-from-file leaves out
    path = Path(f"{output}.pkl")
    results = pickle.loads(path.read_bytes())
    for name, algos in results.items():
        for result in algos.values() if name != "results_table" else ():
            if np.ndim(result["last_evals"]) == 0:
                result["last_evals"] = result["mean_per_eval"][-1]
    path.write_bytes(pickle.dumps(results))


def _plot(program: Callable[[], Any]) -> None:
    """Without a screen to show them on, the figures are saved in the working directory."""
    from matplotlib import pyplot as plt

    from sb3_flow.zoo import patches

    with patches.title_of_final_performance(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
        program()
    if plt.get_backend().lower() == "agg" and "--no-display" not in sys.argv:
        for number in plt.get_fignums():
            path = f"{sys.argv[0].split()[-1]}_{number}.png"
            plt.figure(number).savefig(path, bbox_inches="tight")
            print(f"Figure: {path}")
    plt.close("all")


def _as_folder_names(*option: str) -> None:
    """dm_control/cheetah-run-v0 is in the folder dm_control-cheetah-run-v0_1: the plots know environments by these names."""
    from huggingface_sb3 import EnvironmentName

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*option, nargs="+", dest="envs")
    args, rest = parser.parse_known_args()
    if args.envs:
        sys.argv[1:] = [*rest, option[0], *map(EnvironmentName, args.envs)]
