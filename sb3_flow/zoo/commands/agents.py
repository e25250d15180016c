"""Trained agents: watched, evaluated, recorded."""

import argparse
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_flow.zoo import EVALUATED_WITH_NOISE, FLOW_ALGOS
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
    from rl_zoo3.utils import ALGOS

    args = base_parser(add_help=False).parse_known_args()[0]
    check_env(args.env, [*gym_packages, *args.gym_packages])
    add_defaults("--folder", "logs")
    if args.algo in EVALUATED_WITH_NOISE and "--deterministic" not in sys.argv:
        add_defaults("--stochastic")
    loaders = {}
    if args.algo in FLOW_ALGOS and issubclass(FLOW_ALGOS[args.algo], OffPolicyAlgorithm):
        # rl-zoo3 only knows its own off-policy algorithms: ours would allocate a replay buffer too
        loaders[args.algo] = SimpleNamespace(load=partial(FLOW_ALGOS[args.algo].load, buffer_size=1))
    try:
        with mock.patch.dict(ALGOS, loaders):
            program()
    except (ValueError, AssertionError) as error:
        # The message says it all, if there is no such run
        if traceback.extract_tb(error.__traceback__)[-1].name != "get_model_path":
            raise
        raise FileNotFoundError(str(error)) from error


def benchmark() -> None:
    """rl-zoo3's benchmark: evaluate all trained agents of a log folder."""
    import rl_zoo3.utils
    from huggingface_sb3 import EnvironmentName

    add_defaults("--log-dir", "logs", "--no-hub")
    call, get_trained_models = subprocess.call, rl_zoo3.utils.get_trained_models

    def call_enjoy(command: list[str], *args, **kwargs) -> int:
        # It looks for enjoy.py in the working directory
        if command[:2] == ["python", "enjoy.py"]:
            options = [arg.gym_id if isinstance(arg, EnvironmentName) else arg for arg in command[2:]]
            command = [sys.executable, "-m", "sb3_flow.zoo", "enjoy", *options]
        return call(command, *args, **kwargs)

    def trained_models_by_folder(log_folder: str) -> dict[str, tuple[str, str]]:
        # It looks for the id of an environment in the names of folders, which have no slash
        return {name: (algo, EnvironmentName(env_id)) for name, (algo, env_id) in get_trained_models(log_folder).items()}

    with (
        mock.patch.object(subprocess, "call", call_enjoy),
        mock.patch.object(rl_zoo3.utils, "get_trained_models", trained_models_by_folder),
    ):
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
