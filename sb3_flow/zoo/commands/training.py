"""Training and the search for hyperparameters."""

import argparse
import sys
from functools import partial
from pathlib import Path
from unittest import mock

from sb3_flow.zoo import FLOW_ALGOS, default_conf_file
from sb3_flow.zoo.commands.common import add_defaults, base_parser, check_env

#: A new run has a checkpoint this often, unless --save-freq says otherwise
DEFAULT_SAVE_FREQ = 25_000


def train() -> None:
    """rl-zoo3's train: our hyperparameters, checkpoints by default, and --resume."""
    import rl_zoo3.train

    from sb3_flow.zoo.experiment import FlowExperimentManager, find_run, last_checkpoint

    if {"-h", "--help"} & set(sys.argv):
        print("sb3-flow adds to the options of rl_zoo3.train:")
        print("  --resume [RUN_FOLDER]  go on from the last checkpoint of a run that was killed (default: the latest run")
        print("                         of this --algo and --env), with the same other options\n")
        rl_zoo3.train.train()
        return

    resume_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    resume_parser.add_argument("--resume", nargs="?", const="", default=None)
    resume, sys.argv[1:] = resume_parser.parse_known_args()
    parser = base_parser(add_help=False)
    parser.add_argument("-f", "--log-folder", default="logs")
    parser.add_argument("-i", "--trained-agent")
    args = parser.parse_known_args()[0]
    check_env(args.env, args.gym_packages)
    if args.trained_agent and not (args.trained_agent.endswith(".zip") and Path(args.trained_agent).is_file()):
        sys.exit(
            f"sb3-flow: error: argument -i/--trained-agent: there is no model {args.trained_agent}, it must be a .zip file"
        )

    add_defaults("--save-freq", str(DEFAULT_SAVE_FREQ))
    if args.algo in FLOW_ALGOS:
        add_defaults("--conf-file", default_conf_file(args.algo))
    run_folder = None
    if resume.resume is not None:
        run_folder = Path(resume.resume) if resume.resume else find_run(Path(args.log_folder) / args.algo, args.env)
        add_defaults("--trained-agent", str(last_checkpoint(run_folder)[0]))
    with mock.patch.object(rl_zoo3.train, "ExperimentManager", partial(FlowExperimentManager, resume=run_folder)):
        rl_zoo3.train.train()


def optimize() -> None:
    """rl-zoo3's train with --optimize-hyperparameters: a search with Optuna."""
    add_defaults("--optimize-hyperparameters")
    train()
