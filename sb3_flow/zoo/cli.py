"""The command line: rl-zoo3's own programs, with the algorithms of this package."""

import sys
from collections.abc import Callable

from sb3_flow.zoo import register
from sb3_flow.zoo.commands import agents, curves, policies, training
from sb3_flow.zoo.commands.datasets import datasets

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
    "plot-flow": policies.plot_flow,
    "plot-gridworld": policies.plot_gridworld,
}


def main() -> None:
    """Entry point of ``sb3-flow`` and of ``python -m sb3_flow.zoo``."""
    usage = f"usage: sb3-flow {{{','.join(COMMANDS)}}} [options]"
    if len(sys.argv) < 2 or sys.argv[1] in {"-h", "--help"}:
        print(usage)
        for name, function in COMMANDS.items():
            print(f"  {name:14} {function.__doc__}")
        print("\nsb3-flow COMMAND --help lists the options of a command.")
        return
    command = sys.argv.pop(1)
    if command not in COMMANDS:
        sys.exit(f"{usage}\nsb3-flow: error: unknown command {command!r}, it must be one of {', '.join(COMMANDS)}")
    # For the usage
    sys.argv[0] = f"sb3-flow {command}"
    try:
        register()
        COMMANDS[command]()
    except (ImportError, FileNotFoundError) as error:
        hint = ' (it may come with: pip install "sb3-flow[zoo,plots]")' if isinstance(error, ModuleNotFoundError) else ""
        sys.exit(f"sb3-flow: error: {error}{hint}")
