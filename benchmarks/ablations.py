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

import json
from pathlib import Path
from typing import Any

import numpy as np
from runs import ROOT, class_defaults, do_runs, train_and_evaluate, write_result, write_table

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


def is_done(variant: str, task: str, seed: int) -> bool:
    """Whether there is a result, of today's hyperparameters and defaults."""
    from sb3_flow import FPO

    file = result_file(variant, task, seed)
    if not file.exists():
        return False
    result = json.loads(file.read_text())
    return result["hyperparameters"] == hyperparameters(variant, task) and result["defaults"] == class_defaults(FPO)


def run(variant: str, task: str, seed: int, logs: Path) -> None:
    """One run, in this process."""
    from sb3_flow import FPO

    file, steps = result_file(variant, task, seed), TASKS[task][0]
    arguments = ["--eval-freq", "-1", *(["--vec-env", "envpool"] if task.startswith("dm_control/") else [])]
    block = hyperparameters(variant, task)
    result = train_and_evaluate("fpo", task, steps, seed, block, logs / file.stem, train_arguments=arguments)
    command = f'python benchmarks/ablations.py --variants "{variant}" --tasks {task} --seeds {seed}'
    write_result(file, dict(variant=variant, **result, defaults=class_defaults(FPO), command=command))


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
        if not all(is_done(variant, task, seed) for task in TASKS for seed in seeds):
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
    args = do_runs(__file__, __doc__, ("variants", VARIANTS), TASKS, SEEDS, run, result_file, is_done)
    print_table(args.seeds)


if __name__ == "__main__":
    main()
