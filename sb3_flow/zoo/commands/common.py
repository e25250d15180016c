"""What the commands share: options, and checks of what they name."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium as gym

from sb3_flow.envs.envpool import DIFFERENT, NAMESPACE, TASKS, check_options, to_envpool_id, to_ordinary_id
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
    parser.add_argument("-f", "--folder", help="Log folder", default=Default("logs"), type=folder)
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
    if env_id.startswith(NAMESPACE):
        with user_input(f"argument --env: found {env_id!r}", ValueError):
            ordinary_id = to_ordinary_id(env_id)
        if ordinary_id in DIFFERENT:
            print(f"Evaluations of {env_id} are in {ordinary_id}: {DIFFERENT[ordinary_id]}")
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


def check_vec_env(vec_env: str | None, env_id: str, env_kwargs: dict[str, Any] | None) -> str:
    """
    Check that an environment can be had in this kind of a ``VecEnv``.

    :param vec_env: What the user gave, if anything
    :param env_id: Environment id
    :param env_kwargs: Arguments for the environment
    :return: "dummy", "subproc" or "envpool"
    :raises InputError: if it cannot
    :raises ImportError: if EnvPool is needed, and is not installed
    """
    is_envpool_id = env_id.startswith(NAMESPACE)
    vec_env = vec_env or ("envpool" if is_envpool_id else "dummy")
    if vec_env != "envpool":
        if is_envpool_id:
            hint = f" (or --env {to_ordinary_id(env_id)})"
            raise InputError(f"argument --vec-env: found {vec_env!r}, expected 'envpool' with {env_id}{hint}")
        return vec_env
    if not is_envpool_id and env_id not in TASKS:
        raise InputError(f"argument --vec-env: found 'envpool', which has no task that is known to be the same as {env_id}")
    with user_input("argument --vec-env: found 'envpool'", ValueError):
        envpool_id = to_envpool_id(env_id)
    with user_input(f"argument --env-kwargs: found {env_kwargs}", ValueError):
        check_options(envpool_id, env_kwargs or {})
    return vec_env
