"""What the commands share: options, and checks of what they name."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium as gym

from sb3_flow.zoo import register_envs
from sb3_flow.zoo.arguments import Default, Parser, device, folder, integer, seed
from sb3_flow.zoo.errors import InputError, did_you_mean, one_line, user_input


def add_defaults(*arguments: str) -> None:
    """Put arguments in front of those of the user, who has the last word."""
    sys.argv[1:1] = map(Default, arguments)


def base_parser(**kwargs) -> Parser:
    """The options of rl-zoo3 that we need to know ourselves."""
    parser = Parser(**kwargs)
    parser.add_argument("--algo", help="RL Algorithm", default="ppo")
    parser.add_argument("--env", help="environment ID", default="CartPole-v1")
    parser.add_argument("--gym-packages", help="Packages to import, for their environments", nargs="+", default=[])
    return parser


def trained_agent_parser(prog: str, description: str | None) -> Parser:
    """The options that tell which model of which run to load."""
    from rl_zoo3.utils import ALGOS

    parser = Parser(prog=prog, description=description, conflict_handler="resolve")
    parser.add_argument("--algo", help="RL Algorithm", default="ppo", choices=list(ALGOS))
    parser.add_argument("--env", help="environment ID", default="CartPole-v1")
    parser.add_argument("--gym-packages", help="Packages to import, for their environments", nargs="+", default=[])
    parser.add_argument("-f", "--folder", help="Log folder", default="logs", type=folder)
    parser.add_argument("--exp-id", help="Experiment ID (default: 0: latest)", default=0, type=integer(0, default=-1))
    parser.add_argument("--load-best", action="store_true", help="Load the best model instead of the last one")
    parser.add_argument("--seed", help="Random generator seed", default=0, type=seed)
    parser.add_argument("--device", help="PyTorch device", default="auto", type=device)
    return parser


def require(args: argparse.Namespace, *options: tuple[str, str]) -> None:
    """What rl-zoo3's program cannot do without, although its parser can."""
    missing = ["/".join(option) for option in options if getattr(args, option[-1].lstrip("-").replace("-", "_")) is None]
    if missing:
        raise InputError(f"the following arguments are required: {', '.join(missing)}")


def check_env(env_id: str, gym_packages: Sequence[str] = (), **env_kwargs: dict[str, Any] | None) -> None:
    """
    Check that an environment is known, and that it takes its arguments.

    :param env_id: Environment id
    :param gym_packages: Packages to import, for their environments
    :param env_kwargs: Arguments for the environment, by the name of the option that they are from
    :raises InputError: if something is wrong with one of them
    """
    for package in gym_packages:
        try:
            importlib.import_module(package)
        except Exception as error:
            raise InputError(
                f"argument --gym-packages: found {package!r}, expected a package that can be imported: {one_line(error)}"
            ) from error
    register_envs(env_id)
    try:
        gym.spec(env_id)
    except (gym.error.Error, ImportError) as error:
        reason = one_line(error).removeprefix(f"{type(error).__name__}: ")
        hint = "" if "id you mean" in reason else did_you_mean(env_id, gym.registry)
        raise InputError(f"argument --env: found {env_id!r}, expected the id of an environment: {reason}{hint}") from error
    for option, kwargs in env_kwargs.items():
        if kwargs:
            with user_input(f"argument --{option.replace('_', '-')}: found {kwargs}"):
                gym.make(env_id, **kwargs).close()
