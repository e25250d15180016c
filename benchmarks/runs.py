"""Runs of the learning benchmarks: each is one `sb3-flow train` in a process of its own, then its evaluation."""

import argparse
import csv
import inspect
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

ROOT = Path(__file__).parent.parent
N_EVAL_EPISODES = 20
BIN = 10_000


class Job(NamedTuple):
    """A run to do: its name, which the file of its output has too, and the arguments of the script that does it."""

    name: str
    arguments: list[str]


def run_jobs(jobs: Iterable[Job], n_jobs: int, logs: Path) -> None:
    """
    Run a script again and again, each time in a process of its own with one thread.

    :param jobs: With which arguments
    :param n_jobs: How many at the same time
    :param logs: Folder for their output
    :raises RuntimeError: at the end, if some failed
    """
    logs.mkdir(parents=True, exist_ok=True)

    def run(job: Job) -> bool:
        log = logs / f"{job.name}.log"
        with open(log, "w") as output:
            process = subprocess.run(
                [sys.executable, *job.arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        print(f"{job.name}: {f'failed, see {log}' if process.returncode else 'done'}", flush=True)
        return process.returncode == 0

    with ThreadPoolExecutor(n_jobs) as pool:
        done = list(pool.map(run, jobs))
    if not all(done):
        raise RuntimeError(f"{done.count(False)} of {len(done)} runs failed")


def do_runs(
    script: str,
    doc: str | None,
    methods: tuple[str, Iterable[str]],
    tasks: Iterable[str],
    seeds: Sequence[int],
    run: Callable[[str, str, int, Path], None],
    result_file: Callable[[str, str, int], Path],
    is_done: Callable[[str, str, int], bool],
    flags: Iterable[str] = (),
) -> argparse.Namespace:
    """
    The command line of a benchmark whose runs have a method, a task and a seed: do those that are not done.

    :param script: The script, which does a single run in each of its processes
    :param doc: What it says of itself
    :param methods: Name of the option for the methods, and their names
    :param tasks: Names of the tasks
    :param seeds: Those that are run if none are named
    :param run: Does a run, of a method, a task and a seed, in this process, with a folder for logs
    :param result_file: Where the result of a run is
    :param is_done: Whether it is there, and that of today
    :param flags: Names of further options, without a value
    :return: what was asked for
    """
    option, names = methods
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{option}", nargs="+", dest="methods", choices=list(names), default=list(names), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", choices=list(tasks), default=list(tasks), metavar="TASK")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--logs", type=Path, default=Path("logs") / Path(script).stem)
    for flag in ("--table-only", *flags):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--run-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_one:
        run(args.methods[0], args.tasks[0], args.seeds[0], args.logs)
        sys.exit()
    if not args.table_only:
        runs = [run for run in itertools.product(args.seeds, args.tasks, args.methods) if not is_done(*run[::-1])]
        jobs = [
            Job(
                result_file(method, task, seed).stem,
                [script, "--run-one", f"--{option}", method, "--tasks", task, "--seeds", str(seed), "--logs", str(args.logs)],
            )
            for seed, task, method in runs
        ]
        print(f"{len(jobs)} runs to do", flush=True)
        run_jobs(jobs, args.jobs, args.logs)
    return args


def class_defaults(cls: Any) -> dict[str, str]:
    """
    :param cls: Algorithm
    :return: what it and its "MlpPolicy" take where nothing is given
    """
    policy_class = cls.policy_aliases["MlpPolicy"]
    of_arguments = {name: str(value) for part in (cls, policy_class) for name, value in _defaults(part).items()}
    # (its argument has None there)
    net_arch = getattr(policy_class, "DEFAULT_NET_ARCH", None)
    return of_arguments | ({} if net_arch is None else dict(default_net_arch=str(net_arch)))


def has_result(file: Path, settings: dict[str, Any]) -> bool:
    """
    :param file: Result of a run
    :param settings: What it depends on today, and has beside its numbers
    :return: whether it is there, and of today
    """
    return file.exists() and _holds(settings, json.loads(file.read_text()))


def _holds(settings: dict[str, Any], found: dict[str, Any]) -> bool:
    def is_same(name: str, value: Any) -> bool:
        if name == "settings":
            # All that a result depends on
            return value.keys() == found[name].keys() and _holds(value, found[name])
        if name == "defaults":
            # What has become an argument since changes nothing where it is not given
            return found[name].items() <= value.items()
        return found[name] == value

    return all(name in found and is_same(name, value) for name, value in settings.items())


def write_result(file: Path, result: dict[str, Any]) -> None:
    """A result is there as a whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.replace(file)


def write_table(file: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Leave a table, for the docs, and print it."""
    rows = list(rows)
    with open(file, "w", newline="") as table:
        csv.writer(table).writerows([header, *rows])
    for row in [header, ["---"] * len(header), *rows]:
        print("|", " | ".join(row), "|")


def mean_and_interval(values: Sequence[float], digits: int = 0) -> str:
    """
    :param values: One of each seed
    :param digits: Number of decimals
    :return: their mean, with its 95 % bootstrap interval if there are several, and their number
    """
    if len(values) == 0:
        return ""
    interval = ""
    if len(values) > 1:
        means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
        low, high = np.quantile(means, (0.025, 0.975))
        interval = f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{np.mean(values):.{digits}f}{interval} ({len(values)})"


def provenance() -> dict[str, Any]:
    """Commit, versions and hardware."""
    packages = ("torch", "stable-baselines3", "rl_zoo3", "gymnasium", "mujoco", "numpy")
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    # The results of the runs before this one are no change of what is run
    changes = ["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    if subprocess.run(changes, cwd=ROOT).returncode:
        commit += "-dirty"
    return dict(
        commit=commit,
        versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
        hardware=f"{os.cpu_count()} × {cpu[0] if cpu else platform.processor()}",
    )


def fpo_hyperparameters(env_id: str) -> dict[str, Any]:
    """FPO's hyperparameters of a task, see :func:`with_defaults`."""
    from sb3_flow.zoo import default_conf_file
    from sb3_flow.zoo.hyperparams import expand_preset

    blocks = yaml.safe_load(Path(default_conf_file("fpo")).read_text())
    return with_defaults(expand_preset("fpo", blocks.get(env_id, blocks["default"]), str))


def with_defaults(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """
    :param hyperparameters: FPO's, in rl-zoo3's format
    :return: hyperparameters with those that the class has by default, and with ``policy_kwargs`` that are a dict
    """
    import rl_zoo3.exp_manager

    from sb3_flow import FPO
    from sb3_flow.fpo import MlpPolicy

    policy_kwargs = hyperparameters.get("policy_kwargs", {})
    if isinstance(policy_kwargs, str):
        policy_kwargs = eval(policy_kwargs, dict(vars(rl_zoo3.exp_manager)))
    policy_kwargs = {**_defaults(MlpPolicy), "net_arch": MlpPolicy.DEFAULT_NET_ARCH, **policy_kwargs}
    return {**_defaults(FPO), **hyperparameters, "policy_kwargs": policy_kwargs}


def _defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def train(
    algo: str,
    env_id: str,
    steps: int,
    seed: int,
    hyperparameters: dict[str, Any],
    log_folder: Path,
    train_arguments: Iterable[str] = (),
) -> None:
    """`sb3-flow train`, in this process: see :func:`train_and_evaluate`."""
    from sb3_flow.zoo import cli

    log_folder.mkdir(parents=True, exist_ok=True)
    conf_file = log_folder / "hyperparams.yml"
    conf_file.write_text(yaml.safe_dump({env_id: hyperparameters}))
    sys.argv = ["sb3-flow", "train", "--algo", algo, "--env", env_id, "-n", str(steps), "--seed", str(seed),
                "--num-threads", "1", "-f", str(log_folder), "-conf", str(conf_file), "--verbose", "0",
                *train_arguments]  # fmt: skip
    cli.main()


def gflop_per_step(
    algo: str, env_id: str, hyperparameters: dict[str, Any], log_folder: Path, train_arguments: Iterable[str] = ()
) -> float:
    """
    :param algo: Name of an on-policy algorithm
    :param env_id: Environment
    :param hyperparameters: in rl-zoo3's format
    :param log_folder: of this run alone
    :param train_arguments: further ones for `sb3-flow train`
    :return: what its networks compute for each step of an environment, forward and backward, of one iteration
    """
    from torch.utils.flop_counter import FlopCounterMode

    n_steps = hyperparameters.get("n_envs", 1) * hyperparameters["n_steps"]
    counter = FlopCounterMode(display=False)
    with counter:
        train(algo, env_id, n_steps, 0, hyperparameters, log_folder, ["--eval-freq", "-1", *train_arguments])
    return counter.get_total_flops() / n_steps / 1e9


def train_and_evaluate(
    algo: str,
    env_id: str,
    steps: int,
    seed: int,
    hyperparameters: dict[str, Any],
    log_folder: Path,
    n_eval_episodes: int = N_EVAL_EPISODES,
    train_arguments: Iterable[str] = (),
) -> dict[str, Any]:
    """
    One run, in this process.

    :param algo: Name of the algorithm
    :param env_id: Environment
    :param steps: Timesteps
    :param seed: Seed of the training. Those of the evaluations are others
    :param hyperparameters: in rl-zoo3's format
    :param log_folder: of this run alone
    :param n_eval_episodes: Number of episodes of each of the final evaluations, from zero noise and stochastic
    :param train_arguments: further ones for `sb3-flow train`
    :return: evaluations, learning curves, hyperparameters, and where they are from
    """
    import torch as th
    from rl_zoo3.utils import get_latest_run_id
    from stable_baselines3.common.monitor import load_results
    from stable_baselines3.common.results_plotter import ts2xy

    from sb3_flow.zoo.evaluate import evaluate

    th.set_num_threads(1)
    # Of the code that is run, whatever becomes of the checkout meanwhile
    source = provenance()
    train(algo, env_id, steps, seed, hyperparameters, log_folder, train_arguments)

    env_name = env_id.replace("/", "-")
    run_folder = log_folder / algo / f"{env_name}_{get_latest_run_id(str(log_folder / algo), env_name)}"
    monitor = load_results(str(run_folder))
    timesteps, returns = ts2xy(monitor, "timesteps")
    bins = timesteps // BIN
    evaluations = [
        evaluate(algo, env_id, str(log_folder), n_eval_episodes=n_eval_episodes, stochastic=stochastic, seed=10_000 + seed)
        for stochastic in (False, True)
    ]
    during: list[list[float]] = []
    if (run_folder / "evaluations.npz").exists():
        with np.load(run_folder / "evaluations.npz") as npz:
            means = npz["results"].mean(axis=1)
            during = [[int(step), float(mean)] for step, mean in zip(npz["timesteps"], means, strict=True)]
    return dict(
        env=env_id,
        steps=steps,
        seed=seed,
        deterministic={key: evaluations[0][key] for key in ("mean_return", "std_return", "n_eval_episodes")},
        stochastic={key: evaluations[1][key] for key in ("mean_return", "std_return", "n_eval_episodes")},
        # Not a measure of speed: other runs may have shared the machine
        train_seconds=float(monitor["t"].max()),
        training_curve=[[int(bin_ * BIN + BIN // 2), float(returns[bins == bin_].mean())] for bin_ in np.unique(bins)],
        deterministic_curve=during,
        hyperparameters=hyperparameters,
        **source,
    )
