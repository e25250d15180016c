"""
What the options of FPO are worth: `python benchmarks/ablations.py`

Each variant changes the defaults of the class in one thing, on four DMC tasks (500,000 steps, in EnvPool, where they are the
same as the ordinary ones) and two of MuJoCo (300,000 steps), with 16 environments and rollouts of 2,048 transitions. Each run
is one `sb3-flow train` in a process of its own, with one thread, then 20 episodes from zero noise and 20 stochastic ones. It
leaves a JSON file in benchmarks/results/ablations; runs whose file is there are not repeated, so that an interrupted benchmark
goes on where it stopped, and can be done in parts (--variants, --tasks, --seeds, --jobs).

The table has the interquartile mean of the returns over tasks and seeds, in units of the defaults' mean on the task, with 95 %
stratified bootstrap intervals. The seeds are not those of other results (0 to 4).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from runs import ROOT, Job, run_jobs, train_and_evaluate, write_result, write_table

RESULTS = ROOT / "benchmarks" / "results" / "ablations"
#: Steps, and what belongs to the task whatever the variant
DMC = dict(env_wrapper="gymnasium.wrappers.FlattenObservation", gamma=0.995)
TASKS: dict[str, tuple[int, dict[str, Any]]] = {
    "dm_control/cheetah-run-v0": (500_000, DMC),
    "dm_control/cartpole-balance-v0": (500_000, DMC | dict(gamma=0.99)),
    "dm_control/reacher-hard-v0": (500_000, DMC),
    "dm_control/point_mass-easy-v0": (500_000, DMC),
    "HalfCheetah-v5": (300_000, {}),
    "Hopper-v5": (300_000, {}),
}
GEOMETRY = dict(policy="MlpPolicy", n_envs=16, n_steps=128)
#: What changes: arguments of FPO, and of its policy
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "no normalized values": ({}, dict(normalize_values=False)),
    "perturbation of 0.2": ({}, dict(action_perturbation_std=0.2)),
    "no perturbation": ({}, dict(action_perturbation_std=0.0)),
    "ASPO": (dict(trust_region="aspo"), {}),
    "averaged ratio": (dict(ratio_type="averaged"), {}),
    "no baseline actions": (dict(n_baseline_actions=0), {}),
    "moving average": (dict(ema_decay=0.95, ema_start=0), {}),
    "advantages normalized over the rollout": (dict(normalize_advantage="rollout"), {}),
}
SEEDS = (1000, 1001, 1002)
N_BOOTSTRAP = 10_000


def hyperparameters(variant: str, task: str) -> dict[str, Any]:
    """The block of hyperparameters, in rl-zoo3's format."""
    steps, of_task = TASKS[task]
    arguments, policy_kwargs = VARIANTS[variant]
    block = dict(n_timesteps=float(steps), **GEOMETRY, **of_task, **arguments)
    return block | (dict(policy_kwargs=repr(policy_kwargs)) if policy_kwargs else {})


def result_file(variant: str, task: str, seed: int) -> Path:
    return RESULTS / f"{task.split('/')[-1]}-{variant.replace(' ', '_')}-seed{seed}.json"


def run(variant: str, task: str, seed: int, logs: Path) -> None:
    """One run, in this process."""
    file, steps = result_file(variant, task, seed), TASKS[task][0]
    arguments = ["--eval-freq", "-1", *(["--vec-env", "envpool"] if task.startswith("dm_control/") else [])]
    block = hyperparameters(variant, task)
    result = train_and_evaluate("fpo", task, steps, seed, block, logs / file.stem, train_arguments=arguments)
    command = f'python benchmarks/ablations.py --variants "{variant}" --tasks {task} --seeds {seed}'
    write_result(file, dict(variant=variant, **result, command=command))


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """
    :param scores: (..., n)
    :return: mean of the middle half, (...,)
    """
    scores, cut = np.sort(scores, axis=-1), scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def with_interval(scores: np.ndarray, rng: np.random.Generator) -> str:
    """
    :param scores: (n_tasks, n_seeds)
    :param rng: For the bootstrap, within each task
    :return: interquartile mean, and its 95 % interval
    """
    picks = rng.integers(scores.shape[1], size=(N_BOOTSTRAP, *scores.shape))
    means = interquartile_mean(np.take_along_axis(scores[None], picks, axis=2).reshape(N_BOOTSTRAP, -1))
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{interquartile_mean(scores.ravel()):.2f} [{low:.2f}, {high:.2f}]"


def print_table(seeds: list[int]) -> None:
    """Of the variants whose runs are all there."""
    rng = np.random.default_rng(0)

    def load(variant: str, mode: str) -> np.ndarray | None:
        files = [[result_file(variant, task, seed) for seed in seeds] for task in TASKS]
        if not all(file.exists() for row in files for file in row):
            return None
        return np.array([[json.loads(file.read_text())[mode]["mean_return"] for file in row] for row in files])

    rows = []
    for variant in VARIANTS:
        cells: list[str] = []
        means: list[str] = []
        for mode in ("deterministic", "stochastic"):
            returns, of_defaults = load(variant, mode), load("defaults", mode)
            if returns is None or of_defaults is None:
                break
            cells.append(with_interval(returns / of_defaults.mean(axis=1, keepdims=True), rng))
            means = means or [f"{mean:.0f}" for mean in returns.mean(axis=1)]
        else:
            rows.append([variant, *cells, *means])
    header = ["Variant", "IQM, deterministic", "IQM, sampled", *(task.split("/")[-1] for task in TASKS)]
    write_table(RESULTS.with_suffix(".csv"), header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="ENV")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--logs", type=Path, default=Path("logs/ablations"))
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--run-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_one:
        run(args.variants[0], args.tasks[0], args.seeds[0], args.logs)
        return
    if not args.table_only:
        jobs = [
            Job(
                result_file(variant, task, seed).stem,
                [
                    __file__,
                    "--run-one",
                    "--variants",
                    variant,
                    "--tasks",
                    task,
                    "--seeds",
                    str(seed),
                    "--logs",
                    str(args.logs),
                ],
            )
            for seed in args.seeds
            for variant in args.variants
            for task in args.tasks
            if not result_file(variant, task, seed).exists()
        ]
        print(f"{len(jobs)} runs to do", flush=True)
        run_jobs(jobs, args.jobs, args.logs)
    print_table(args.seeds)


if __name__ == "__main__":
    main()
