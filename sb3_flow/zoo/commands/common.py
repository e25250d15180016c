"""What the commands share: the options of rl-zoo3 that we need to know ourselves."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym

from sb3_flow.zoo import register_envs


def add_defaults(*arguments: str) -> None:
    """Put arguments in front of those of the user, who has the last word."""
    sys.argv[1:1] = arguments


def base_parser(**kwargs) -> argparse.ArgumentParser:
    """The options of rl-zoo3 that we need to know ourselves."""
    parser = argparse.ArgumentParser(**kwargs)
    parser.add_argument("--algo", help="RL Algorithm", default="ppo")
    parser.add_argument("--env", help="environment ID", default="CartPole-v1")
    parser.add_argument("--gym-packages", help="Packages to import, for their environments", nargs="+", default=[])
    return parser


def trained_agent_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    parser = base_parser(prog=prog, description=description, conflict_handler="resolve")
    parser.add_argument("-f", "--folder", help="Log folder", default="logs")
    parser.add_argument("--exp-id", help="Experiment ID (default: 0: latest)", default=0, type=int)
    parser.add_argument("--load-best", action="store_true", help="Load the best model instead of the last one")
    parser.add_argument("-o", "--output", help="Figure to write (default: in the folder of the run)", type=Path)
    parser.add_argument("--seed", help="Random generator seed", default=0, type=int)
    parser.add_argument("--device", help="PyTorch device", default="auto")
    return parser


def require(*options: tuple[str, str]) -> None:
    """What rl-zoo3's program cannot do without, although its parser can."""
    given = {arg.split("=")[0] for arg in sys.argv}
    missing = ["/".join(option) for option in options if not given.intersection(option)]
    if missing and not given & {"-h", "--help"}:
        sys.exit(f"sb3-flow: error: the following arguments are required: {', '.join(missing)}")


def check_env(env_id: str, gym_packages: Sequence[str] = ()) -> None:
    """Stop with gymnasium's own message, which suggests close names, if there is no such environment."""
    for package in gym_packages:
        importlib.import_module(package)
    register_envs(env_id)
    try:
        gym.spec(env_id)
    except gym.error.Error as error:
        sys.exit(f"sb3-flow: error: argument --env: {error}")
