"""The command line: rl-zoo3's own programs, with the algorithms of this package."""

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

import gymnasium as gym

from sb3_flow import distributed
from sb3_flow.zoo import register
from sb3_flow.zoo.commands import agents, curves, policies, training
from sb3_flow.zoo.commands.datasets import datasets
from sb3_flow.zoo.commands.export import export
from sb3_flow.zoo.commands.hub import load_from_hub, push_to_hub
from sb3_flow.zoo.errors import InputError, did_you_mean, one_line

COMMANDS: dict[str, Callable[[], None]] = {
    "train": training.train,
    "optimize": training.optimize,
    "enjoy": agents.enjoy,
    "evaluate": agents.evaluate,
    "record-video": agents.record_video,
    "plot-train": curves.plot_train,
    "plot-from-file": curves.plot_from_file,
    "all-plots": curves.all_plots,
    "benchmark": agents.benchmark,
    "datasets": datasets,
    "export": export,
    "plot-flow": policies.plot_flow,
    "plot-gridworld": policies.plot_gridworld,
    "push-to-hub": push_to_hub,
    "load-from-hub": load_from_hub,
}
#: Packages that the commands import when they need them
OF_EXTRAS = ("matplotlib", "moviepy", "pandas", "plotly", "pygame", "pytablewriter", "rl_zoo3", "scipy", "seaborn")
#: Exit status of a wrong input, as that of ``argparse``; a bug, in this process or in another, has 1
WRONG_INPUT = 2
FAILED = 1
INTERRUPTED = 130


def main() -> None:
    """Entry point of ``sb3-flow`` and of ``python -m sb3_flow.zoo``."""
    debug = "--debug" in sys.argv
    sys.argv[:] = [arg for arg in sys.argv if arg != "--debug"]
    try:
        with distributed.together(), _only_rank_zero_prints():
            _run_command()
    except (InputError, ImportError, OSError, gym.error.Error) as error:
        # What is not installed, files that cannot be written, ... tell so in their own words
        hint = ' (it comes with: pip install "sb3-flow[zoo,plots]")' if getattr(error, "name", None) in OF_EXTRAS else ""
        if debug:
            traceback.print_exc()
        _exit(f"sb3-flow: error: {one_line(error)}{hint}", WRONG_INPUT)
    except distributed.RankError as error:
        _exit(f"sb3-flow: error: {one_line(error)}", FAILED, tells=distributed.tells(error))
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _exit("sb3-flow: interrupted", INTERRUPTED)


@contextlib.contextmanager
def _only_rank_zero_prints() -> Iterator[None]:
    if distributed.rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _exit(message: str, status: int, tells: bool | None = None) -> NoReturn:
    distributed.ignore_signals()
    if distributed.rank() == 0 if tells is None else tells:
        print(message, file=sys.stderr)
    error = SystemExit(message)
    error.code = status
    raise error from None


def _run_command() -> None:
    usage = f"usage: sb3-flow {{{','.join(COMMANDS)}}} [options]"
    if len(sys.argv) < 2 or sys.argv[1] in {"-h", "--help"}:
        print(usage)
        for name, function in COMMANDS.items():
            print(f"  {name:14} {function.__doc__}")
        print("\nsb3-flow COMMAND --help lists the options of a command, --debug shows the traceback of an error.")
        return
    command = sys.argv.pop(1)
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        raise InputError(f"unknown command {command!r}, it must be one of {', '.join(COMMANDS)}{hint}")
    if distributed.world_size() > 1 and command != "train":
        raise InputError(f"{command} is done by one process, not by the {distributed.world_size()} of torchrun")
    # For the usage
    sys.argv[0] = f"sb3-flow {command}"
    register()
    COMMANDS[command]()
