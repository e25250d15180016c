"""Trained agents: watched, evaluated, recorded."""

import argparse
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sb3_flow.zoo import EVALUATED_WITH_NOISE
from sb3_flow.zoo.commands.common import add_defaults, base_parser, check_env


def enjoy() -> None:
    """rl-zoo3's enjoy, looking into logs/ (where train writes) unless told otherwise."""
    from rl_zoo3.enjoy import enjoy as rl_zoo3_enjoy

    _run_with_trained_agent(rl_zoo3_enjoy)


def record_video() -> None:
    """rl-zoo3's record_video: a video of a trained agent, in the folder of its run."""
    # It has no --gym-packages, which are imported here
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gym-packages", nargs="+", default=[])
    args, sys.argv[1:] = parser.parse_known_args()
    _run_with_trained_agent(partial(runpy.run_module, "rl_zoo3.record_video", run_name="__main__"), args.gym_packages)


def _run_with_trained_agent(program: Callable[[], Any], gym_packages: Sequence[str] = ()) -> None:
    from sb3_flow.zoo import patches

    args = base_parser(add_help=False).parse_known_args()[0]
    check_env(args.env, [*gym_packages, *args.gym_packages])
    add_defaults("--folder", "logs")
    if args.algo in EVALUATED_WITH_NOISE and "--deterministic" not in sys.argv:
        add_defaults("--stochastic")
    try:
        with patches.without_replay_buffer(args.algo), patches.mujoco_warnings_once(), patches.runs_with_uuid():
            program()
    except (ValueError, AssertionError) as error:
        # The message says it all, if there is no such run
        if traceback.extract_tb(error.__traceback__)[-1].name != "get_model_path":
            raise
        raise FileNotFoundError(str(error)) from error


def benchmark() -> None:
    """rl-zoo3's benchmark: evaluate all trained agents of a log folder."""
    from sb3_flow.zoo import patches

    add_defaults("--log-dir", "logs", "--no-hub")
    with patches.enjoy_in_benchmark(), patches.folders_in_benchmark():
        runpy.run_module("rl_zoo3.benchmark", run_name="__main__")


def evaluate() -> None:
    """Evaluate a trained agent and draw its learning curve."""
    from sb3_flow.plotting.learning_curve import plot_learning_curve
    from sb3_flow.zoo.evaluate import evaluate as evaluate_run

    parser = base_parser(prog="sb3-flow evaluate", description=evaluate.__doc__)
    parser.add_argument("-f", "--folder", help="Log folder", default="logs")
    parser.add_argument("--exp-id", help="Experiment ID (default: 0: latest)", default=0, type=int)
    parser.add_argument("--load-best", action="store_true", help="Load the best model instead of the last one")
    parser.add_argument("-n", "--n-eval-episodes", help="Number of episodes", default=10, type=int)
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--stochastic", action="store_true", help="Use stochastic actions (default of FQL)", default=None)
    noise.add_argument(
        "--deterministic", action="store_false", dest="stochastic", help="Use deterministic actions (default of the others)"
    )
    parser.add_argument("--seed", help="Random generator seed", default=0, type=int)
    parser.add_argument("--device", help="PyTorch device", default="auto")
    args = vars(parser.parse_args())
    check_env(args["env"], args.pop("gym_packages"))
    result = evaluate_run(**args)
    kind = "deterministic" if result["deterministic"] else "stochastic"
    print(
        f"{result['model']}: {result['mean_return']:.2f} ± {result['std_return']:.2f} "
        f"({kind} return, {result['n_eval_episodes']} episodes)"
    )
    if result["success_rate"] is not None:
        print(f"Success rate: {100 * result['success_rate']:.0f} %")
    figure = plot_learning_curve(Path(result["model"]).parent, title=f"{args['algo'].upper()} on {args['env']}")
    print(f"Learning curve: {figure}")
