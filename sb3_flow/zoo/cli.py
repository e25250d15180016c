"""The command line: rl-zoo3's own programs, with the algorithms of this package."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium as gym

from sb3_flow.zoo import FLOW_ALGOS, default_conf_file, register, register_envs

#: A new run has a checkpoint this often, unless --save-freq says otherwise
DEFAULT_SAVE_FREQ = 25_000


def _parse_known(*options: tuple[tuple[str, ...], dict]) -> argparse.Namespace:
    """Read some of rl-zoo3's options ahead of its own parser, which has no hook for what we need to fill in."""
    parser = argparse.ArgumentParser(add_help=False)
    for flags, kwargs in options:
        parser.add_argument(*flags, **kwargs)
    return parser.parse_known_args()[0]


ALGO = (("--algo",), dict(default="ppo"))
ENV = (("--env",), dict(default="CartPole-v1"))
FOLDER = (("-f", "--folder"), dict(default=None))
LOG_FOLDER = (("-f", "--log-folder"), dict(default="logs"))


def train() -> None:
    """rl-zoo3's train: our hyperparameters, checkpoints by default, and --resume."""
    import rl_zoo3.train
    from huggingface_sb3 import EnvironmentName
    from rl_zoo3.utils import get_latest_run_id

    from sb3_flow.zoo.experiment import FlowExperimentManager, last_checkpoint

    resume = argparse.ArgumentParser(add_help=False)
    resume.add_argument("--resume", nargs="?", const="", default=None)
    resume_args, sys.argv[1:] = resume.parse_known_args()
    args = _parse_known(
        ALGO,
        ENV,
        LOG_FOLDER,
        (("-conf", "--conf-file"), dict(default=None)),
        (("--save-freq",), dict(default=None)),
        (("--gym-packages",), dict(nargs="+", default=[])),
    )
    if {"-h", "--help"} & set(sys.argv):
        print("sb3-flow adds to the options of rl_zoo3.train:")
        print("  --resume [RUN_FOLDER]  go on from the last checkpoint of a run that was killed (default: the latest run")
        print("                         of this --algo and --env), with the same other options\n")
    elif not args.gym_packages:
        _check_env(args.env)

    if args.conf_file is None and args.algo in FLOW_ALGOS:
        sys.argv += ["--conf-file", default_conf_file(args.algo)]
    if args.save_freq is None:
        sys.argv += ["--save-freq", str(DEFAULT_SAVE_FREQ)]

    run_folder = None
    if resume_args.resume is not None:
        log_path = Path(args.log_folder) / args.algo
        env_name = EnvironmentName(args.env)
        run_folder = Path(resume_args.resume or log_path / f"{env_name}_{get_latest_run_id(str(log_path), env_name)}")
        sys.argv += ["--trained-agent", str(last_checkpoint(run_folder)[0])]
    rl_zoo3.train.ExperimentManager = partial(FlowExperimentManager, resume=run_folder)  # type: ignore[misc, assignment]
    rl_zoo3.train.train()


def enjoy() -> None:
    """rl-zoo3's enjoy, looking into logs/ (where train writes) unless told otherwise."""
    from rl_zoo3.enjoy import enjoy as rl_zoo3_enjoy

    _check_env(_parse_known(ENV).env)
    if _parse_known(FOLDER).folder is None:
        sys.argv += ["--folder", "logs"]
    rl_zoo3_enjoy()


def evaluate() -> None:
    """Evaluate a trained agent and draw its learning curve."""
    from sb3_flow.zoo.evaluate import evaluate as evaluate_run

    parser = argparse.ArgumentParser(prog="sb3-flow evaluate", description=evaluate.__doc__)
    parser.add_argument("--algo", help="RL Algorithm", default="fpo")
    parser.add_argument("--env", help="environment ID", required=True)
    parser.add_argument("-f", "--folder", help="Log folder", default="logs")
    parser.add_argument("--exp-id", help="Experiment ID (default: 0: latest)", default=0, type=int)
    parser.add_argument("--load-best", action="store_true", help="Load the best model instead of the last one")
    parser.add_argument("-n", "--n-eval-episodes", help="Number of episodes", default=10, type=int)
    parser.add_argument("--stochastic", action="store_true", help="Use stochastic actions")
    parser.add_argument("--seed", help="Random generator seed", default=0, type=int)
    parser.add_argument("--device", help="PyTorch device", default="auto")
    args = parser.parse_args()
    _check_env(args.env)
    evaluate_run(**vars(args))


def _check_env(env_id: str) -> None:
    """Stop with gymnasium's own message, which suggests close names, if there is no such environment."""
    register_envs(env_id)
    try:
        gym.spec(env_id)
    except gym.error.Error as error:
        sys.exit(f"sb3-flow: error: argument --env: {error}")


COMMANDS: dict[str, Callable[[], None]] = {"train": train, "enjoy": enjoy, "evaluate": evaluate}


def main() -> None:
    """Entry point of ``sb3-flow`` and of ``python -m sb3_flow.zoo``."""
    usage = f"usage: sb3-flow {{{','.join(COMMANDS)}}} [options]"
    if len(sys.argv) < 2 or sys.argv[1] in {"-h", "--help"}:
        print(usage)
        for name, function in COMMANDS.items():
            print(f"  {name:10} {function.__doc__}")
        print("\nsb3-flow COMMAND --help lists the options of a command.")
        return
    command = sys.argv.pop(1)
    if command not in COMMANDS:
        sys.exit(f"{usage}\nsb3-flow: error: unknown command {command!r}, it must be one of {', '.join(COMMANDS)}")
    try:
        register()
        COMMANDS[command]()
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"sb3-flow: error: {error}")
