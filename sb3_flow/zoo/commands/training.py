"""Training and the search for hyperparameters."""

import argparse
import contextlib
import errno
import importlib.util
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_flow import distributed
from sb3_flow.zoo import FLOW_ALGOS, default_conf_file
from sb3_flow.zoo.arguments import (
    Parser,
    count_or_never,
    device,
    integer,
    new_folder,
    rl_zoo3_arguments,
    seed,
)
from sb3_flow.zoo.commands.common import add_defaults, base_parser, check_env, check_vec_env
from sb3_flow.zoo.errors import InputError

#: A new run has a checkpoint this often, unless --save-freq says otherwise
DEFAULT_SAVE_FREQ = 25_000
#: Errors of a disk that is full, or of a limit
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def model_file(text: str) -> str:
    """Type of the model to go on from, which rl-zoo3 ignores if it is none."""
    if text and not (text.endswith(".zip") and Path(text).is_file()):
        raise argparse.ArgumentTypeError(f"there is no model {text!r}, expected a .zip file")
    return text


TYPES = dict(
    tensorboard_log=new_folder,
    trained_agent=model_file,
    n_timesteps=integer(0, default=-1),
    num_threads=integer(1, default=-1),
    log_interval=lambda text: int(text) if text == "-2" else integer(1, default=-1)(text),
    eval_freq=count_or_never,
    optimization_log_path=new_folder,
    eval_episodes=integer(1),
    n_eval_envs=integer(1),
    save_freq=count_or_never,
    log_folder=new_folder,
    seed=lambda text: -1 if text == "-1" else seed(text),
    device=device,
    n_trials=integer(1),
    max_total_trials=integer(1),
    n_jobs=integer(1),
    n_startup_trials=integer(0),
    n_evaluations=integer(1),
    trial_id=integer(0),
    verbose=integer(0),
)


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
        print("                         that is finished")
        print("  --vec-env envpool      make the steps in EnvPool (default with an --env of EnvPool, envpool/CheetahRun-v1)")
        print("  --debug                show the traceback of an error\n")
        rl_zoo3.train.train()
        return

    resume_parser = Parser(add_help=False)
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
        raise InputError(f"argument {unwanted[0]}: the trials of a search begin with new models")
    if len(unwanted) == 2:
        raise InputError("argument --resume: not with -i/--trained-agent, which is for a new run")
    run: Run | None = None
    if resume.resume is not None:
        run = Run(Path(resume.resume)) if resume.resume else find_run(Path(args.log_folder) / args.algo, args.env)
    defaults = dict(save_freq=DEFAULT_SAVE_FREQ, vec_env=None) if run is None else run.defaults()

    def check(args: argparse.Namespace) -> None:
        if distributed.world_size() > 1:
            _check_distributed(args, is_new=run is None)
        check_env(args.env, args.gym_packages, env_kwargs=args.env_kwargs, eval_env_kwargs=args.eval_env_kwargs)
        args.vec_env = check_vec_env(args.vec_env, args.env, args.env_kwargs)
        if run is None:
            _check_new_run(args)
        else:
            locks.enter_context(run.resume(args))

    with contextlib.ExitStack() as locks:
        manager = partial(FlowExperimentManager, run=run, locks=locks)
        choices = dict(vec_env=("envpool",))
        with rl_zoo3_arguments(check, TYPES, defaults, choices=choices), patches.experiment_manager(manager):
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
                raise InputError(f"{error}. Once there is space, --resume goes on from the last checkpoint") from error


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, with which clusters end a job, is Ctrl-C in the body: the model is saved. The exit status is its own."""
    is_terminated = False

    def interrupt(number: int, _) -> None:
        nonlocal is_terminated
        is_terminated = number == signal.SIGTERM
        # (torchrun passes on what this process may have got already)
        distributed.ignore_signals()
        raise KeyboardInterrupt

    try:
        numbers = [signal.SIGTERM, *([signal.SIGINT] if distributed.world_size() > 1 else [])]
        former = {number: signal.signal(number, interrupt) for number in numbers}
    except ValueError:
        # Only the main thread can
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        # Before there was anything to save, or once more
        if not is_terminated:
            raise
        print("sb3-flow: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if is_terminated:
        sys.exit(128 + signal.SIGTERM)


def _check_distributed(args: argparse.Namespace, is_new: bool) -> None:
    """What several processes cannot do."""
    several = f"the {distributed.world_size()} processes of torchrun"
    if args.algo not in FLOW_ALGOS:
        raise InputError(f"argument --algo: found {args.algo!r}, expected one of {', '.join(FLOW_ALGOS)} for {several}")
    if args.optimize_hyperparameters:
        raise InputError(f"argument -optimize: a search is shared by way of its --storage, not by {several}")
    if args.track:
        raise InputError(f"argument --track: not with {several}")
    if args.save_replay_buffer and issubclass(FLOW_ALGOS[args.algo], OffPolicyAlgorithm):
        if is_new:
            raise InputError(f"argument --save-replay-buffer: not with {several}, each of which has its own")
        print("The replay buffers are not saved: each process has its own")
        args.save_replay_buffer = False


def _check_new_run(args: argparse.Namespace) -> None:
    """What the arguments name is there."""
    from sb3_flow.zoo.hyperparams import check_storage, check_study, check_trained_agent

    if args.trained_agent:
        check_trained_agent(args.trained_agent, args.algo, "argument -i/--trained-agent")
    if args.conf_file is None and args.algo in FLOW_ALGOS:
        args.conf_file = default_conf_file(args.algo)
    for argument, package, is_needed in (
        ("-tb/--tensorboard-log", "tensorboard", args.tensorboard_log),
        ("--sampler", "optunahub", args.optimize_hyperparameters and args.sampler == "auto"),
    ):
        if is_needed and importlib.util.find_spec(package) is None:
            raise InputError(f"argument {argument}: needs {package}: pip install {package}")
    if args.optimize_hyperparameters and args.storage is not None:
        check_storage(args.storage)
    study = {"--storage": args.storage, "--study-name": args.study_name, "--trial-id": args.trial_id}
    missing = [option for option, value in study.items() if value is None]
    if args.trial_id is not None or not (args.optimize_hyperparameters or len(missing) == 3):
        if missing:
            raise InputError(f"argument {missing[0]}: found nothing, expected all of {', '.join(study)} to train with a trial")
        check_study(args.storage, args.study_name, args.trial_id)


def optimize() -> None:
    """rl-zoo3's train with --optimize-hyperparameters: a search with Optuna."""
    add_defaults("--optimize-hyperparameters")
    train()
