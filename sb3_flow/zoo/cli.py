"""The command line: rl-zoo3's own programs, with the algorithms of this package."""

import argparse
import importlib
import pickle
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_flow.zoo import EVALUATED_WITH_NOISE, FLOW_ALGOS, default_conf_file, register, register_envs

#: A new run has a checkpoint this often, unless --save-freq says otherwise
DEFAULT_SAVE_FREQ = 25_000


def _add_defaults(*arguments: str) -> None:
    """Put arguments in front of those of the user, who has the last word."""
    sys.argv[1:1] = arguments


def _base_parser(**kwargs) -> argparse.ArgumentParser:
    """The options of rl-zoo3 that we need to know ourselves."""
    parser = argparse.ArgumentParser(**kwargs)
    parser.add_argument("--algo", help="RL Algorithm", default="ppo")
    parser.add_argument("--env", help="environment ID", default="CartPole-v1")
    parser.add_argument("--gym-packages", help="Packages to import, for their environments", nargs="+", default=[])
    return parser


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
    parser = _base_parser(add_help=False)
    parser.add_argument("-f", "--log-folder", default="logs")
    parser.add_argument("-i", "--trained-agent")
    args = parser.parse_known_args()[0]
    _check_env(args.env, args.gym_packages)
    if args.trained_agent and not (args.trained_agent.endswith(".zip") and Path(args.trained_agent).is_file()):
        sys.exit(
            f"sb3-flow: error: argument -i/--trained-agent: there is no model {args.trained_agent}, it must be a .zip file"
        )

    _add_defaults("--save-freq", str(DEFAULT_SAVE_FREQ))
    if args.algo in FLOW_ALGOS:
        _add_defaults("--conf-file", default_conf_file(args.algo))
    run_folder = None
    if resume.resume is not None:
        run_folder = Path(resume.resume) if resume.resume else find_run(Path(args.log_folder) / args.algo, args.env)
        _add_defaults("--trained-agent", str(last_checkpoint(run_folder)[0]))
    with mock.patch.object(rl_zoo3.train, "ExperimentManager", partial(FlowExperimentManager, resume=run_folder)):
        rl_zoo3.train.train()


def enjoy() -> None:
    """rl-zoo3's enjoy, looking into logs/ (where train writes) unless told otherwise."""
    from rl_zoo3.enjoy import enjoy as rl_zoo3_enjoy

    _run_with_trained_agent(rl_zoo3_enjoy)


def record_video() -> None:
    """rl-zoo3's record_video: a video of a trained agent, in the folder of its run."""
    # It has no --gym-packages, which are imported here
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gym-packages", nargs="+", default=[])
    args, sys.argv[1:] = parser.parse_known_args()
    _run_with_trained_agent(partial(runpy.run_module, "rl_zoo3.record_video", run_name="__main__"), args.gym_packages)


def _run_with_trained_agent(program: Callable[[], Any], gym_packages: Sequence[str] = ()) -> None:
    from rl_zoo3.utils import ALGOS

    args = _base_parser(add_help=False).parse_known_args()[0]
    _check_env(args.env, [*gym_packages, *args.gym_packages])
    _add_defaults("--folder", "logs")
    if args.algo in EVALUATED_WITH_NOISE and "--deterministic" not in sys.argv:
        _add_defaults("--stochastic")
    loaders = {}
    if args.algo in FLOW_ALGOS and issubclass(FLOW_ALGOS[args.algo], OffPolicyAlgorithm):
        # rl-zoo3 only knows its own off-policy algorithms: ours would allocate a replay buffer too
        loaders[args.algo] = SimpleNamespace(load=partial(FLOW_ALGOS[args.algo].load, buffer_size=1))
    try:
        with mock.patch.dict(ALGOS, loaders):
            program()
    except (ValueError, AssertionError) as error:
        # The message says it all, if there is no such run
        if traceback.extract_tb(error.__traceback__)[-1].name != "get_model_path":
            raise
        raise FileNotFoundError(str(error)) from error


def optimize() -> None:
    """rl-zoo3's train with --optimize-hyperparameters: a search with Optuna."""
    _add_defaults("--optimize-hyperparameters")
    train()


def plot_train() -> None:
    """rl-zoo3's plot_train: training curves, from the Monitor logs."""
    from rl_zoo3.plots import plot_train as program

    _as_folder_names("-e", "--env")
    _plot(program)


def plot_from_file() -> None:
    """rl-zoo3's plot_from_file: comparisons, from the output of all-plots."""
    from rl_zoo3.plots import plot_from_file as program

    _require(("-i", "--input"))
    if {"-latex", "--latex"} & set(sys.argv) and not shutil.which("latex"):
        sys.exit("sb3-flow: error: argument -latex/--latex: needs LaTeX: apt-get install texlive-latex-extra cm-super dvipng")
    _as_folder_names("--keep-envs")
    _as_folder_names("-skip", "--skip-envs")
    try:
        _plot(program)
    except KeyError as error:
        sys.exit(f"sb3-flow: error: {error} is not there for each environment: leave it out with --skip-keys or --skip-envs")


def all_plots() -> None:
    """rl-zoo3's all_plots: evaluations of several algorithms and environments, and their table."""
    from rl_zoo3.plots import all_plots as program

    _require(("-a", "--algos"), ("-e", "--env"), ("-f", "--exp-folders"))
    _as_folder_names("-e", "--env")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-o", "--output")
    output = parser.parse_known_args()[0].output
    _plot(program)
    if output is None:
        return
    # The last evaluations of a single run, or of a single episode, become one number, which plot-from-file leaves out
    path = Path(f"{output}.pkl")
    results = pickle.loads(path.read_bytes())
    for name, algos in results.items():
        for result in algos.values() if name != "results_table" else ():
            if np.ndim(result["last_evals"]) == 0:
                result["last_evals"] = result["mean_per_eval"][-1]
    path.write_bytes(pickle.dumps(results))


def _plot(program: Callable[[], Any]) -> None:
    """Without a screen to show them on, the figures are saved in the working directory."""
    from matplotlib import pyplot as plt

    def save(*args, **kwargs) -> None:
        for number in plt.get_fignums():
            path = f"{sys.argv[0].split()[-1]}_{number}.png"
            plt.figure(number).savefig(path, bbox_inches="tight")
            print(f"Figure: {path}")
        plt.close("all")

    set_title = plt.title

    def title(label: str, *args, **kwargs) -> Any:
        # It has this title for all environments
        return set_title("Final performance" if label == "PyBullet envs" else label, *args, **kwargs)

    has_screen = plt.get_backend().lower() != "agg"
    with mock.patch.multiple(plt, title=title, show=plt.show if has_screen else save):
        program()


def _as_folder_names(*option: str) -> None:
    """dm_control/cheetah-run-v0 is in the folder dm_control-cheetah-run-v0_1: the plots know environments by these names."""
    from huggingface_sb3 import EnvironmentName

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*option, nargs="+", dest="envs")
    args, rest = parser.parse_known_args()
    if args.envs:
        sys.argv[1:] = [*rest, option[0], *map(EnvironmentName, args.envs)]


def _require(*options: tuple[str, str]) -> None:
    """What rl-zoo3's program cannot do without, although its parser can."""
    given = {arg.split("=")[0] for arg in sys.argv}
    missing = ["/".join(option) for option in options if not given.intersection(option)]
    if missing and not given & {"-h", "--help"}:
        sys.exit(f"sb3-flow: error: the following arguments are required: {', '.join(missing)}")


def benchmark() -> None:
    """rl-zoo3's benchmark: evaluate all trained agents of a log folder."""
    import rl_zoo3.utils
    from huggingface_sb3 import EnvironmentName

    _add_defaults("--log-dir", "logs", "--no-hub")
    call, get_trained_models = subprocess.call, rl_zoo3.utils.get_trained_models

    def call_enjoy(command: list[str], *args, **kwargs) -> int:
        # It looks for enjoy.py in the working directory
        if command[:2] == ["python", "enjoy.py"]:
            options = [arg.gym_id if isinstance(arg, EnvironmentName) else arg for arg in command[2:]]
            command = [sys.executable, "-m", "sb3_flow.zoo", "enjoy", *options]
        return call(command, *args, **kwargs)

    def trained_models_by_folder(log_folder: str) -> dict[str, tuple[str, str]]:
        # It looks for the id of an environment in the names of folders, which have no slash
        return {name: (algo, EnvironmentName(env_id)) for name, (algo, env_id) in get_trained_models(log_folder).items()}

    with (
        mock.patch.object(subprocess, "call", call_enjoy),
        mock.patch.object(rl_zoo3.utils, "get_trained_models", trained_models_by_folder),
    ):
        runpy.run_module("rl_zoo3.benchmark", run_name="__main__")


def evaluate() -> None:
    """Evaluate a trained agent and draw its learning curve."""
    from sb3_flow.plotting.learning_curve import plot_learning_curve
    from sb3_flow.zoo.evaluate import evaluate as evaluate_run

    parser = _base_parser(prog="sb3-flow evaluate", description=evaluate.__doc__)
    parser.add_argument("-f", "--folder", help="Log folder", default="logs")
    parser.add_argument("--exp-id", help="Experiment ID (default: 0: latest)", default=0, type=int)
    parser.add_argument("--load-best", action="store_true", help="Load the best model instead of the last one")
    parser.add_argument("-n", "--n-eval-episodes", help="Number of episodes", default=10, type=int)
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("--stochastic", action="store_true", help="Use stochastic actions (default of FQL)", default=None)
    noise.add_argument(
        "--deterministic", action="store_false", dest="stochastic", help="Use deterministic actions (default of the others)"
    )
    parser.add_argument("--seed", help="Random generator seed", default=0, type=int)
    parser.add_argument("--device", help="PyTorch device", default="auto")
    args = vars(parser.parse_args())
    _check_env(args["env"], args.pop("gym_packages"))
    result = evaluate_run(**args)
    kind = "deterministic" if result["deterministic"] else "stochastic"
    print(
        f"{result['model']}: {result['mean_return']:.2f} ± {result['std_return']:.2f} "
        f"({kind} return, {result['n_eval_episodes']} episodes)"
    )
    if result["success_rate"] is not None:
        print(f"Success rate: {100 * result['success_rate']:.0f} %")
    figure = plot_learning_curve(Path(result["model"]).parent, title=f"{args['algo'].upper()} on {args['env']}")
    print(f"Learning curve: {figure}")


def plot_flow() -> None:
    """Draw the samples of a trained flow policy as they go from noise to action."""
    import numpy as np
    from stable_baselines3.common.vec_env import unwrap_vec_normalize

    from sb3_flow.plotting.flow import plot_flow as plot
    from sb3_flow.zoo.evaluate import load_run

    parser = _plot_parser("sb3-flow plot-flow", plot_flow.__doc__)
    parser.set_defaults(algo="fpo", env="HalfCheetah-v5")
    observation = parser.add_mutually_exclusive_group()
    observation.add_argument("--obs", help="Observation (not normalized)", nargs="+", type=float)
    observation.add_argument("--steps", help="Or that after some steps of the policy in the environment", default=0, type=int)
    parser.add_argument("--dims", help="One or two dimensions of the action to show", nargs="+", type=int)
    parser.add_argument("--n-samples", help="Number of samples", default=1000, type=int)
    args = parser.parse_args()
    _check_env(args.env, args.gym_packages)
    model, env, model_path = load_run(args.algo, args.env, args.folder, args.exp_id, args.load_best, args.seed, args.device)
    obs: Any = env.reset()
    for _ in range(args.steps):
        obs, *_ = env.step(model.predict(obs, deterministic=False)[0])
    if isinstance(obs, dict):
        sys.exit("sb3-flow: error: plot-flow draws policies with one observation, not with a Dict of them")
    if args.obs is not None:
        if obs[0].size != len(args.obs):
            sys.exit(f"sb3-flow: error: argument --obs: expected {obs[0].size} numbers, got {len(args.obs)}")
        obs = np.array(args.obs, dtype=obs.dtype).reshape(obs.shape)
        normalization = unwrap_vec_normalize(env)
        obs = obs if normalization is None else normalization.normalize_obs(obs)
    where = f"at {args.obs}" if args.obs else f"after {args.steps} steps"
    path = args.output or model_path.parent / "flow.png"
    try:
        files = plot(model, obs[0], path, args.dims, args.n_samples, f"{args.algo.upper()} on {args.env}, {where}")
    except ValueError as error:
        sys.exit(f"sb3-flow: error: {error}")
    print(*files, sep="\n")


def plot_gridworld() -> None:
    """Draw trained policies in GridWorld: mean actions, samples at a saddle point, episodes; and count their modes."""
    import numpy as np
    from stable_baselines3.common.vec_env import unwrap_vec_normalize

    from sb3_flow.plotting.gridworld import multimodality
    from sb3_flow.plotting.gridworld import plot_gridworld as plot
    from sb3_flow.zoo.evaluate import load_run

    parser = _plot_parser("sb3-flow plot-gridworld", plot_gridworld.__doc__)
    parser.add_argument("--algo", help="RL Algorithms, a row of the figure for each", nargs="+")
    parser.set_defaults(algo=["fpo"], env="sb3_flow/GridWorld-v0")
    args = parser.parse_args()
    _check_env(args.env, args.gym_packages)
    models, normalize = {}, {}  # type: dict[str, Any], dict[str, Any]
    for algo in args.algo:
        model, env, model_path = load_run(algo, args.env, args.folder, args.exp_id, args.load_best, args.seed, args.device)
        if not env.has_attr("layout"):
            sys.exit(f"sb3-flow: error: argument --env: {args.env} is not a GridWorld")
        layout = env.get_attr("layout")[0]
        args.output = args.output or model_path.parent / "gridworld.png"
        normalization = unwrap_vec_normalize(env)
        models[algo.upper()] = model
        normalize[algo.upper()] = np.asarray if normalization is None else normalization.normalize_obs
    print("At the saddle point: share of samples in each mode (and between them), entropy of the goals of episodes")
    for name, model in models.items():
        modes = multimodality(model, layout, normalize=normalize[name])
        print(f"{name}: {modes['low']:.2f}, {modes['high']:.2f} ({modes['stay']:.2f}), {modes['goal_entropy']:.2f} bits")
    print(*plot(models, args.output, layout, normalize), sep="\n")


def _plot_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    parser = _base_parser(prog=prog, description=description, conflict_handler="resolve")
    parser.add_argument("-f", "--folder", help="Log folder", default="logs")
    parser.add_argument("--exp-id", help="Experiment ID (default: 0: latest)", default=0, type=int)
    parser.add_argument("--load-best", action="store_true", help="Load the best model instead of the last one")
    parser.add_argument("-o", "--output", help="Figure to write (default: in the folder of the run)", type=Path)
    parser.add_argument("--seed", help="Random generator seed", default=0, type=int)
    parser.add_argument("--device", help="PyTorch device", default="auto")
    return parser


def datasets() -> None:
    """Print what is in an offline dataset: sb3-flow datasets info SPEC."""
    from sb3_flow.common.datasets import load_dataset
    from sb3_flow.common.transitions import check_transitions

    parser = argparse.ArgumentParser(prog="sb3-flow datasets", description=datasets.__doc__)
    parser.add_argument("action", choices=["info"])
    parser.add_argument(
        "spec", help="ogbench:NAME[@PATH], minari:NAMESPACE/NAME-vK, or an .hdf5, .npz or .pkl file", nargs="+"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="Load a pickle, which can run any code")
    args = parser.parse_args()
    try:
        transitions = load_dataset(args.spec, allow_pickle=args.allow_pickle)
        check_transitions(transitions)
    except ValueError as error:
        sys.exit(f"sb3-flow: error: {error}")
    returns = transitions.episode_returns
    lines = [
        ("transitions", f"{len(transitions):,}"),
        ("episodes", f"{len(returns):,}, {int(transitions.dones.sum()):,} terminal transitions"),
        ("return", f"{returns.mean():.2f} ± {returns.std():.2f}, from {returns.min():.2f} to {returns.max():.2f}"),
        ("reward", f"from {transitions.rewards.min():.4g} to {transitions.rewards.max():.4g}"),
        (
            "actions",
            f"{transitions.actions.shape[1:]}, from {transitions.actions.min():.4g} to {transitions.actions.max():.4g}",
        ),
    ]
    for name, array in transitions.items():
        if name.startswith("observations"):
            lines.append((name, f"{array.shape[1:]} {array.dtype}, from {array.min():.4g} to {array.max():.4g}"))
    lines.append(("memory", f"{transitions.nbytes / 2**20:.1f} MiB"))
    for name, value in lines:
        print(f"{name + ':':14} {value}")


def _check_env(env_id: str, gym_packages: Sequence[str] = ()) -> None:
    """Stop with gymnasium's own message, which suggests close names, if there is no such environment."""
    for package in gym_packages:
        importlib.import_module(package)
    register_envs(env_id)
    try:
        gym.spec(env_id)
    except gym.error.Error as error:
        sys.exit(f"sb3-flow: error: argument --env: {error}")


COMMANDS: dict[str, Callable[[], None]] = {
    "train": train,
    "optimize": optimize,
    "enjoy": enjoy,
    "evaluate": evaluate,
    "record-video": record_video,
    "plot-train": plot_train,
    "plot-from-file": plot_from_file,
    "all-plots": all_plots,
    "benchmark": benchmark,
    "datasets": datasets,
    "plot-flow": plot_flow,
    "plot-gridworld": plot_gridworld,
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
