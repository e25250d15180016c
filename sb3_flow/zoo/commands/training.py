"""Training and the search for hyperparameters."""

import argparse
import contextlib
import errno
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sb3_flow.zoo import FLOW_ALGOS, default_conf_file
from sb3_flow.zoo.commands.common import add_defaults, base_parser, check_env

#: A new run has a checkpoint this often, unless --save-freq says otherwise
DEFAULT_SAVE_FREQ = 25_000
#: Errors of a disk that is full, or of a limit
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train() -> None:
    """rl-zoo3's train: our hyperparameters, checkpoints by default, and --resume."""
    import rl_zoo3.train

    from sb3_flow.zoo import patches
    from sb3_flow.zoo.experiment import FlowExperimentManager
    from sb3_flow.zoo.runs import Run, RunIsFinished, find_run

    if {"-h", "--help"} & set(sys.argv):
        print("sb3-flow adds to the options of rl_zoo3.train:")
        print("  --resume [RUN_FOLDER]  go on with a run that was killed or interrupted, with the options that it has")
        print("                         (default: the latest run of this --algo and --env). A larger -n goes on with one")
        print("                         that is finished\n")
        rl_zoo3.train.train()
        return

    resume_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    resume_parser.add_argument("--resume", nargs="?", const="", default=None)
    resume, sys.argv[1:] = resume_parser.parse_known_args()
    parser = base_parser(add_help=False)
    parser.add_argument("-f", "--log-folder", default="logs")
    parser.add_argument("-i", "--trained-agent")
    parser.add_argument("-optimize", "--optimize-hyperparameters", action="store_true")
    args = parser.parse_known_args()[0]
    given = [("--resume", resume.resume is not None), ("-i/--trained-agent", bool(args.trained_agent))]
    unwanted = [name for name, is_given in given if is_given]
    if args.optimize_hyperparameters and unwanted:
        sys.exit(f"sb3-flow: error: argument {unwanted[0]}: the trials of a search begin with new models")
    if len(unwanted) == 2:
        sys.exit("sb3-flow: error: argument --resume: not with -i/--trained-agent, which is for a new run")
    if args.trained_agent and not (args.trained_agent.endswith(".zip") and Path(args.trained_agent).is_file()):
        sys.exit(
            f"sb3-flow: error: argument -i/--trained-agent: there is no model {args.trained_agent}, it must be a .zip file"
        )

    run: Run | None = None
    if resume.resume is None:
        check_env(args.env, args.gym_packages)
        add_defaults("--save-freq", str(DEFAULT_SAVE_FREQ))
        if args.algo in FLOW_ALGOS:
            add_defaults("--conf-file", default_conf_file(args.algo))
    else:
        run = Run(Path(resume.resume)) if resume.resume else find_run(Path(args.log_folder) / args.algo, args.env)
        check_env(run.env, [*run.args.get("gym_packages", []), *args.gym_packages])

    with contextlib.ExitStack() as locks:
        arguments: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if run is not None:
            arguments = patches.train_arguments(run.defaults(), lambda parsed: locks.enter_context(run.resume(parsed)))
        manager = partial(FlowExperimentManager, run=run, locks=locks)
        with arguments, patches.experiment_manager(manager):
            try:
                if args.optimize_hyperparameters:
                    rl_zoo3.train.train()
                else:
                    with _terminated_as_interrupted():
                        rl_zoo3.train.train()
            except RunIsFinished as finished:
                print(finished)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                sys.exit(f"sb3-flow: error: {error}. Once there is space, --resume goes on from the last checkpoint")


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, with which clusters end a job, is Ctrl-C in the body: the model is saved. The exit status is its own."""
    is_terminated = False

    def interrupt(*_) -> None:
        nonlocal is_terminated
        is_terminated = True
        raise KeyboardInterrupt

    try:
        former = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        # Only the main thread can
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        # Before there was anything to save, or once more
        print("sb3-flow: interrupted", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if is_terminated else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, former or signal.SIG_DFL)
    if is_terminated:
        sys.exit(128 + signal.SIGTERM)


def optimize() -> None:
    """rl-zoo3's train with --optimize-hyperparameters: a search with Optuna."""
    add_defaults("--optimize-hyperparameters")
    train()
