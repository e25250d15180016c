"""Trained agents: watched, evaluated, recorded."""

import argparse
import contextlib
import importlib.util
import io
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import load_results

from sb3_flow.zoo import EVALUATED_WITH_NOISE
from sb3_flow.zoo.arguments import Default, KeyValue, device, folder, integer, new_folder, rl_zoo3_arguments, seed
from sb3_flow.zoo.commands.common import check_env, trained_agent_parser
from sb3_flow.zoo.errors import InputError, user_input

AGENT_TYPES = dict(
    folder=folder,
    n_timesteps=integer(1),
    num_threads=integer(1, default=-1),
    n_envs=integer(1),
    exp_id=integer(0, default=-1),
    verbose=integer(0),
    device=device,
    load_checkpoint=integer(0),
    seed=seed,
    reward_log=new_folder,
    output_folder=new_folder,
    log_dir=folder,
    benchmark_dir=new_folder,
)


def enjoy() -> None:
    """rl-zoo3's enjoy, looking into logs/ (where train writes) unless told otherwise."""
    from rl_zoo3.enjoy import enjoy as program

    def check(args: argparse.Namespace) -> None:
        screens = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
        if not args.no_render and sys.platform.startswith("linux") and not any(map(os.environ.get, screens)):
            raise InputError("argument --no-render: expected, as there is no screen to show the environment on")

    _run_with_trained_agent(program, check)


def record_video() -> None:
    """rl-zoo3's record_video: a video of a trained agent, in the folder of its run."""
    from sb3_flow.zoo.trained_agents import is_trained_agent

    def check(args: argparse.Namespace) -> None:
        for package in ("moviepy", "pygame"):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        if args.output_folder is None and is_trained_agent(Path(args.folder)):
            args.output_folder = "videos"

    # It has no --gym-packages
    packages = ("--gym-packages", dict(nargs="+", default=[], help="Packages to import, for their environments"))
    _run_with_trained_agent(partial(runpy.run_module, "rl_zoo3.record_video", run_name="__main__"), check, [packages])


def _run_with_trained_agent(
    program: Callable[[], Any],
    check_more: Callable[[argparse.Namespace], None],
    options: Sequence[tuple[str, dict[str, Any]]] = (),
) -> None:
    from sb3_flow.zoo import patches
    from sb3_flow.zoo.evaluate import load_run
    from sb3_flow.zoo.trained_agents import folder_with_run

    def check(args: argparse.Namespace) -> None:
        env_id = args.env.gym_id
        check_env(env_id, args.gym_packages, env_kwargs=args.env_kwargs)
        which = dict(load_checkpoint=args.load_checkpoint, load_last_checkpoint=args.load_last_checkpoint)
        is_own = args.exp_id != 0 or args.load_best or args.load_last_checkpoint or args.load_checkpoint is not None
        args.folder = folder_with_run(args.algo, env_id, args.folder, is_own)
        # rl-zoo3 does the same again, without checks
        with contextlib.redirect_stdout(io.StringIO()):
            load_run(args.algo, env_id, args.folder, args.exp_id, args.load_best, **which)[1].close()
        check_more(args)
        if args.algo in EVALUATED_WITH_NOISE and not args.deterministic:
            args.stochastic = True
        loading.enter_context(patches.without_replay_buffer(args.algo))

    arguments = rl_zoo3_arguments(check, AGENT_TYPES, dict(folder=Default("logs")), options)
    with contextlib.ExitStack() as loading, arguments, patches.mujoco_warnings_once(), patches.runs_with_uuid():
        program()


def benchmark() -> None:
    """rl-zoo3's benchmark: evaluate all trained agents of a log folder."""
    import rl_zoo3.utils

    from sb3_flow.zoo import patches

    def check(args: argparse.Namespace) -> None:
        with user_input(f"argument --log-dir: {args.log_dir} has a run that is damaged"):
            trained_models = rl_zoo3.utils.get_trained_models(args.log_dir)
        if not trained_models and args.no_hub:
            raise InputError(f"argument --log-dir: found no trained agents in {args.log_dir!r}, expected ALGO/ENV_1, ...")

    arguments = rl_zoo3_arguments(check, AGENT_TYPES, dict(log_dir="logs", no_hub=True))
    with arguments, patches.enjoy_in_benchmark(), patches.folders_in_benchmark():
        runpy.run_module("rl_zoo3.benchmark", run_name="__main__")


def evaluate() -> None:
    """Evaluate a trained agent and draw its learning curve."""
    from rl_zoo3.utils import StoreDict

    from sb3_flow.zoo.evaluate import evaluate as evaluate_run
    from sb3_flow.zoo.evaluate import find_model
    from sb3_flow.zoo.trained_agents import folder_with_run

    parser = trained_agent_parser(prog="sb3-flow evaluate", description=evaluate.__doc__)
    parser.add_argument("-n", "--n-eval-episodes", help="Number of episodes", default=10, type=integer(1))
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument(
        "--stochastic", action="store_true", help="Use stochastic actions (default of offline ones)", default=None
    )
    noise.add_argument(
        "--deterministic", action="store_false", dest="stochastic", help="Use deterministic actions (default of the others)"
    )
    parser.add_argument(
        "--env-kwargs",
        help="Arguments of the environment, beside those of the training",
        nargs="+",
        action=StoreDict,
        type=KeyValue(),
    )
    args = vars(parser.parse_args())
    check_env(args["env"], args.pop("gym_packages"), env_kwargs=args["env_kwargs"])
    args["folder"] = folder_with_run(args["algo"], args["env"], args["folder"], args["exp_id"] != 0 or args["load_best"])
    run_folder = find_model(args["algo"], args["env"], args["folder"], args["exp_id"], args["load_best"]).parent
    # (those of others may be without)
    has_logs = any(run_folder.glob("*monitor.csv"))
    if has_logs:
        # What the learning curve is drawn of, before the result is written
        with user_input(f"logs of {run_folder}"):
            load_results(str(run_folder))
            if (run_folder / "evaluations.npz").is_file():
                np.load(run_folder / "evaluations.npz").close()
    result = evaluate_run(**args)
    kind = "deterministic" if result["deterministic"] else "stochastic"
    print(
        f"{result['model']}: {result['mean_return']:.2f} ± {result['std_return']:.2f} "
        f"({kind} return, {result['n_eval_episodes']} episodes)"
    )
    if result["success_rate"] is not None:
        print(f"Success rate: {100 * result['success_rate']:.0f} %")
    if not has_logs:
        print(f"No learning curve: there are no Monitor logs in {run_folder}")
    elif importlib.util.find_spec("matplotlib") is None:
        print('No learning curve: matplotlib is not installed, it comes with: pip install "sb3-flow[plots]"')
    else:
        from sb3_flow.plotting.learning_curve import plot_learning_curve

        figure = plot_learning_curve(run_folder, title=f"{args['algo'].upper()} on {args['env']}")
        print(f"Learning curve: {figure}")
