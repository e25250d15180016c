"""Agents that come with the package, for those who have not trained one: runs, as those of a log folder, but without logs."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_sb3 import EnvironmentName

from sb3_flow.zoo import data_folder
from sb3_flow.zoo.arguments import Default
from sb3_flow.zoo.errors import InputError
from sb3_flow.zoo.runs import run_folders


def trained_agents_folder() -> Path:
    """The log folder that they are in."""
    return data_folder("trained_agents")


def trained_agents() -> list[tuple[str, str]]:
    """Algorithm and environment id of each."""
    options = [yaml.unsafe_load(path.read_text()) for path in trained_agents_folder().glob("*/*/*/args.yml")]
    return sorted((args["algo"], args["env"]) for args in options)


def folder_with_run(algos: str | Sequence[str], env: str, folder: str, is_own: bool = False) -> str:
    """
    Where to look for a run: in the log folder that was asked for or, if none was asked for and there is none in the usual one,
    among the trained agents.

    :param algos: Name of the algorithm, or of several
    :param env: Environment id
    :param folder: Log folder, a :class:`.Default` if it was not asked for
    :param is_own: Whether a certain run or model of it was asked for, which can only be one's own
    :return: log folder
    :raises InputError: if there is no such folder
    """
    if not isinstance(folder, Default):
        return folder
    algos, env_name = [algos] if isinstance(algos, str) else algos, EnvironmentName(env)
    if any(run_folders(Path(folder) / algo, env_name) or (Path(folder) / algo / f"{env_name}.zip").exists() for algo in algos):
        return str(folder)
    if not is_own and all(run_folders(trained_agents_folder() / algo, env_name) for algo in algos):
        print(f"No run of {' or '.join(algos)} on {env} in {folder}/: this is the agent that comes with sb3-flow")
        return str(trained_agents_folder())
    if not Path(folder).is_dir():
        of_algo = [name for algo, name in trained_agents() if algo in algos]
        hint = f" (trained agents of {' and '.join(algos)} are there for {', '.join(of_algo)})" if of_algo else ""
        raise InputError(f"argument -f/--folder: the {str(folder)!r} folder was not found, expected a log folder{hint}")
    return str(folder)


def is_trained_agent(run_folder: Path) -> bool:
    """
    :param run_folder: Folder of a run, or a log folder
    :return: whether it came with the package: nothing is written there
    """
    return run_folder.resolve().is_relative_to(trained_agents_folder().resolve())


def output_folder(run_folder: Path) -> Path:
    """
    :param run_folder: Folder of a run
    :return: where what is made of it belongs: in that folder, or the working directory if it came with the package
    """
    return Path() if is_trained_agent(run_folder) else run_folder
