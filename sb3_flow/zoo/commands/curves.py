"""Figures of the logs: rl-zoo3's plots."""

import argparse
import contextlib
import itertools
import pickle
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import LoadMonitorResultsError, load_results

from sb3_flow.zoo.arguments import folder, image_format, integer, new_file, rl_zoo3_arguments
from sb3_flow.zoo.commands.common import require
from sb3_flow.zoo.errors import InputError, did_you_mean, user_input


def plot_train() -> None:
    """rl-zoo3's plot_train: training curves, from the Monitor logs."""
    from rl_zoo3.plots import plot_train as program

    def check(args: argparse.Namespace) -> None:
        args.env = _folder_names(args.env)
        for run in (run for env in args.env for run in _runs(args.exp_folder, args.algo, env)):
            with user_input(f"Monitor logs of {run} are damaged"), contextlib.suppress(LoadMonitorResultsError):
                load_results(str(run))

    types = dict(exp_folder=folder, max_timesteps=integer(1), episode_window=integer(1))
    types |= dict(fontsize=integer(1), figsize=integer(1))
    _plot(program, check, types)


def plot_from_file() -> None:
    """rl-zoo3's plot_from_file: comparisons, from the output of all-plots."""
    from rl_zoo3.plots import plot_from_file as program

    def check(args: argparse.Namespace) -> None:
        require(args, ("-i", "--input"))
        if args.latex and not shutil.which("latex"):
            raise InputError("argument -latex/--latex: needs LaTeX: apt-get install texlive-latex-extra cm-super dvipng")
        args.keep_envs, args.skip_envs = _folder_names(args.keep_envs), _folder_names(args.skip_envs)
        results = _read_results("-i/--input", args.input if args.input.endswith(".pkl") else f"{args.input}.pkl")
        for path in args.merge:
            for env, curves in _read_results("--merge", path).items():
                results.get(env, {}).update(curves)
        known = {"envs": set(results), "keys": {key for curves in results.values() for key in curves}}
        for kind, names in known.items():
            for option in (f"keep_{kind}", f"skip_{kind}"):
                for name in getattr(args, option):
                    if name not in names:
                        expected = f"one of {', '.join(sorted(names))}{did_you_mean(name, names)}"
                        raise InputError(f"argument --{option.replace('_', '-')}: found {name!r}, expected {expected}")
        envs = [env for env in results if env not in args.skip_envs and (not args.keep_envs or env in args.keep_envs)]
        keys = [key for key in next(iter(results.values()), ()) if key not in args.skip_keys]
        keys = [key for key in keys if not args.keep_keys or key in args.keep_keys]
        if not envs or not keys:
            raise InputError(
                "argument --skip-envs: found all of them, expected something to be left to draw, and of the keys too"
            )
        for env in envs:
            missing = [key for key in keys if key not in results[env]]
            if missing:
                raise InputError(
                    f"argument --keep-keys: found {missing[0]!r}, which is not there for {env}: "
                    "leave one of them out with --skip-keys or --skip-envs"
                )
        if args.labels is not None and len(args.labels) != len(keys):
            raise InputError(f"argument -l/--labels: found {len(args.labels)}, expected one for each of {', '.join(keys)}")

    _plot(program, check, dict(output=new_file, fontsize=integer(1), figsize=integer(1), format=image_format))


def all_plots() -> None:
    """rl-zoo3's all_plots: evaluations of several algorithms and environments, and their table."""
    from rl_zoo3.plots import all_plots as program

    outputs = []

    def check(args: argparse.Namespace) -> None:
        require(args, ("-a", "--algos"), ("-e", "--env"), ("-f", "--exp-folders"))
        args.env = _folder_names(args.env)
        if args.labels is not None and len(args.labels) != len(args.exp_folders):
            raise InputError(f"argument -l/--labels: found {len(args.labels)}, expected {len(args.exp_folders)}, one a folder")
        # What is not there would be 0 in the table
        for env, algo, exp_folder in itertools.product(args.env, args.algos, args.exp_folders):
            _check_evaluations(_runs(exp_folder, algo.lower(), env), args)
        outputs.append(args.output)

    types = dict(exp_folders=folder, max_timesteps=integer(1), min_timesteps=integer(0, default=-1), output=_without_suffix)
    _plot(program, check, types)
    if outputs[0] is None:
        return
    # The last evaluations of a single run, or of a single episode, become one number, which plot-from-file leaves out
    path = Path(f"{outputs[0]}.pkl")
    results = pickle.loads(path.read_bytes())
    for name, algos in results.items():
        for result in algos.values() if name != "results_table" else ():
            if np.ndim(result["last_evals"]) == 0:
                result["last_evals"] = result["mean_per_eval"][-1]
    path.write_bytes(pickle.dumps(results))


def _without_suffix(text: str) -> str:
    """Type of a file to write, to which rl-zoo3 adds .pkl."""
    new_file(f"{text}.pkl")
    return text


def _folder_names(env_ids: list[str]) -> list[str]:
    """dm_control/cheetah-run-v0 is in the folder dm_control-cheetah-run-v0_1: the plots know environments by these names."""
    from huggingface_sb3 import EnvironmentName

    return [str(EnvironmentName(env_id)) for env_id in env_ids]


def _runs(exp_folder: str, algo: str, env: str) -> list[Path]:
    """Folders of the runs that rl-zoo3 finds: those whose names have the environment in them."""
    log_path = Path(exp_folder) / algo
    if not log_path.is_dir():
        algos = sorted(path.name for path in Path(exp_folder).iterdir() if path.is_dir())
        raise InputError(
            f"argument -a: found {algo!r}, which has no runs in {exp_folder}, expected "
            f"one of {', '.join(algos) or 'none: there are no runs'}{did_you_mean(algo, algos)}"
        )
    folders = sorted(path for path in log_path.iterdir() if path.is_dir())
    runs = [path for path in folders if env in path.name]
    if not runs:
        envs = sorted({path.name.rpartition("_")[0] for path in folders})
        expected = f"one of {', '.join(envs)}" if envs else "an environment with runs"
        expected += did_you_mean(env, envs)
        raise InputError(f"argument -e/--env: found {env!r}, of which there are no runs in {log_path}, expected {expected}")
    return runs


def _check_evaluations(runs: list[Path], args: argparse.Namespace) -> None:
    """One of the runs has what rl-zoo3 draws a curve of."""
    n_episodes = 0
    for run in runs:
        path = run / "evaluations.npz"
        if not path.is_file():
            continue
        with user_input(f"{path} is damaged", ValueError, zipfile.BadZipFile, EOFError, KeyError, OSError), np.load(
            path
        ) as npz:
            timesteps, results = npz["timesteps"], npz["results"]
            keys = [key for key in npz.files if npz[key].shape == results.shape]
        if args.key not in keys:
            hint = did_you_mean(args.key, keys)
            raise InputError(f"argument -k/--key: found {args.key!r}, expected one of {', '.join(keys)} of {path}{hint}")
        if timesteps[0] > args.max_timesteps:
            raise InputError(f"argument -max/--max-timesteps: found {args.max_timesteps}, expected {timesteps[0]} or more")
        if len(timesteps) > 1 and timesteps[-1] >= args.min_timesteps:
            # Of a single number rl-zoo3 cannot take the mean
            n_episodes += results.shape[1]
    if n_episodes < 2:
        raise InputError(
            f"argument -f/--exp-folders: found no run with two evaluations (of two episodes) or more, "
            f"and --min-timesteps, among {', '.join(map(str, runs))}"
        )


def _read_results(option: str, path: str) -> dict[str, Any]:
    """The output of all-plots: results by environment, algorithm and folder."""
    if not Path(path).is_file():
        raise InputError(f"argument {option}: found {path!r}, expected the output of all-plots, which is not there")
    with user_input(f"argument {option}: found {path!r}, expected the output of all-plots"):
        results = pickle.loads(Path(path).read_bytes())
        table = results.pop("results_table")
        assert {"headers", "value_matrix"} <= table.keys(), "there is no table in it"
        for curves in results.values():
            for curve in curves.values():
                assert {"timesteps", "mean", "std_error", "last_evals"} <= curve.keys(), "there are no curves in it"
    return results


def _plot(
    program: Callable[[], Any], check: Callable[[argparse.Namespace], None], types: dict[str, Callable[[str], Any]]
) -> None:
    """Without a screen to show them on, the figures are saved in the working directory."""
    from matplotlib import pyplot as plt

    from sb3_flow.zoo import patches

    try:
        with rl_zoo3_arguments(check, types), patches.title_of_final_performance(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
            program()
        figures = {number: plt.figure(number) for number in plt.get_fignums()}
        if not all(axes.has_data() for figure in figures.values() for axes in figure.axes):
            raise InputError(
                "nothing to draw: the runs have no such data, or fewer episodes than --episode-window, within --max-timesteps"
            )
        if plt.get_backend().lower() == "agg" and "--no-display" not in sys.argv:
            for number, figure in figures.items():
                path = f"{sys.argv[0].split()[-1]}_{number}.png"
                figure.savefig(path, bbox_inches="tight")
                print(f"Figure: {path}")
    finally:
        plt.close("all")
