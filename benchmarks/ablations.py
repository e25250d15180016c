"""
What levers for FPO are worth: `python benchmarks/ablations.py`

Each variant changes the defaults of the class in one thing (benchmarks/levers.py has those that the package does not have), on
four DMC tasks and two of MuJoCo, 200,000 steps in EnvPool, with 16 environments and rollouts of 2,048 transitions. PPO, for
what is a property of the environments, has its class defaults, and SB3's `VecNormalize`. Each run is a process of its own with
one thread, then 20 episodes from zero noise (PPO: of the mean action) and 20 sampled ones. It leaves a JSON file in
benchmarks/results/ablations; runs whose file is there are not repeated, so that an interrupted benchmark goes on where it
stopped, and can be done in parts (--variants, --tasks, --seeds, --jobs). Those of other arguments or defaults are out of date.

The table has the interquartile mean of the returns over tasks and seeds, in units of the defaults' mean on the task (PPO: its
own), with 95 % stratified bootstrap intervals (rliable). The seeds are not those of other results (0 to 4). Variants with less
than 0.9 of the defaults after the first seed, by the mean over tasks and by the interquartile mean, have that one only.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from runs import N_EVAL_EPISODES, ROOT, class_defaults, do_runs, has_result, provenance, write_result, write_table

RESULTS = ROOT / "benchmarks" / "results" / "ablations"
STEPS = 200_000
#: Discounts of hyperparams/fpo.yml
TASKS = {
    "dm_control/cheetah-run-v0": 0.995,
    "dm_control/cartpole-balance-v0": 0.99,
    "dm_control/reacher-hard-v0": 0.995,
    "dm_control/point_mass-easy-v0": 0.995,
    "HalfCheetah-v5": 0.99,
    "Hopper-v5": 0.99,
}
GEOMETRY = dict(n_envs=16, n_steps=128)


class Variant(NamedTuple):
    """What changes: arguments of FPO (those of its policy are in "policy_kwargs"), and classes of benchmarks/levers.py."""

    arguments: dict[str, Any] | None = None
    algorithm: str = "FPO"
    policy: str = "MlpPolicy"
    vec_env: str = "EnvPoolVecEnv"


VARIANTS = {
    "Defaults": Variant(),
    "Colored noise": Variant(policy="ColoredNoisePolicy"),
    "Perturbation of 0.2": Variant(dict(policy_kwargs=dict(action_perturbation_std=0.2))),
    "Entropy bonus of 0.01": Variant(dict(ent_coef=0.01)),
    "Categorical values": Variant(algorithm="CategoricalValueFPO", policy="CategoricalValuePolicy"),
    "Separate gradient norms": Variant(algorithm="SeparateNormsFPO"),
    "Advantages normalized over the rollout": Variant(dict(normalize_advantage="rollout")),
    "ASPO": Variant(dict(trust_region="aspo")),
    "Moving average": Variant(dict(ema_decay=0.9, ema_start=0)),
    "Adaptive learning rate": Variant(algorithm="AdaptiveRateFPO"),
    "Staggered first episodes": Variant(vec_env="StaggeredEnvPool"),
    "PPO": Variant(algorithm="PPO"),
    "PPO, staggered first episodes": Variant(algorithm="PPO", vec_env="StaggeredEnvPool"),
}
SEEDS = (1000, 1001, 1002)


def result_file(variant: str, task: str, seed: int) -> Path:
    return RESULTS / f"{task.split('/')[-1]}-{variant.replace(',', '').replace(' ', '_')}-seed{seed}.json"


def settings(variant: str, task: str) -> dict[str, Any]:
    """All that a result depends on."""
    from stable_baselines3 import PPO

    from sb3_flow import FPO

    of_variant = VARIANTS[variant]
    defaults = class_defaults(PPO if of_variant.algorithm == "PPO" else FPO)
    return dict(steps=STEPS, gamma=TASKS[task], geometry=GEOMETRY, variant=of_variant._asdict(), defaults=defaults)


def is_done(variant: str, task: str, seed: int) -> bool:
    """Whether there is a result, of today's settings."""
    return has_result(result_file(variant, task, seed), dict(settings=settings(variant, task)))


def run(variant: str, task: str, seed: int, logs: Path) -> None:
    """One run, in this process."""
    import levers
    import stable_baselines3
    import torch as th
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

    import sb3_flow
    from sb3_flow.envs import envpool

    th.set_num_threads(1)
    source = provenance()
    of_variant, gamma = VARIANTS[variant], TASKS[task]
    is_ppo = of_variant.algorithm == "PPO"

    def find(name: str, *modules: Any) -> Any:
        return next(getattr(module, name) for module in (levers, *modules) if hasattr(module, name))

    def make(vec_env: str, n_envs: int, seed: int, training: bool) -> VecEnv:
        env: VecEnv = find(vec_env, envpool)(envpool.to_envpool_id(task), n_envs)
        env.seed(seed)
        return VecNormalize(env, training, norm_reward=training, gamma=gamma) if is_ppo else env

    policy = of_variant.policy if of_variant.policy == "MlpPolicy" else find(of_variant.policy)
    env = make(of_variant.vec_env, GEOMETRY["n_envs"], seed, True)
    model = find(of_variant.algorithm, sb3_flow, stable_baselines3)(
        policy, env, n_steps=GEOMETRY["n_steps"], gamma=gamma, seed=seed, **(of_variant.arguments or {})
    )
    history: list[float] = []

    def note_episodes(variables: dict[str, Any], _: Any) -> bool:
        history.extend(info["episode"]["r"] for info in variables["infos"] if "episode" in info)
        return True

    model.learn(STEPS, callback=note_episodes)
    eval_env = make("EnvPoolVecEnv", N_EVAL_EPISODES, 10_000 + seed, False)
    if is_ppo:
        sync_envs_normalization(env, eval_env)
    returns = {
        name: evaluate_policy(model, eval_env, N_EVAL_EPISODES, deterministic, return_episode_rewards=True)[0]
        for name, deterministic in (("deterministic", True), ("stochastic", False))
    }
    last = history[-max(len(history) // 4, 1) :]
    command = f'python benchmarks/ablations.py --variants "{variant}" --tasks {task} --seeds {seed}'
    result = dict(env=task, seed=seed, settings=settings(variant, task), **returns, training_last_quarter=float(np.mean(last)))
    write_result(result_file(variant, task, seed), result | dict(command=command, **source))


def print_table(seeds: list[int]) -> None:
    """Of the seeds that a variant has on all tasks."""
    from rliable import library, metrics

    def load(variant: str, mode: str) -> np.ndarray:
        files = [[result_file(variant, task, seed) for task in TASKS] for seed in done[variant]]
        return np.array([[np.mean(json.loads(file.read_text())[mode]) for file in row] for row in files])

    done = {variant: [seed for seed in seeds if all(is_done(variant, task, seed) for task in TASKS)] for variant in VARIANTS}
    rows = []
    for variant, seeds_of_variant in done.items():
        peer = "PPO" if VARIANTS[variant].algorithm == "PPO" else "Defaults"
        if not (seeds_of_variant and done[peer]):
            continue
        cells = []
        for mode in ("deterministic", "stochastic", "training_last_quarter"):
            scores = {variant: load(variant, mode) / load(peer, mode).mean(axis=0)}
            # rliable draws from NumPy's global generator, not from its `random_state`
            np.random.seed(0)
            point, interval = library.get_interval_estimates(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=2000)
            # One seed has no interval
            bounds = f" [{interval[variant][0, 0]:.2f}, {interval[variant][1, 0]:.2f}]" if len(seeds_of_variant) > 1 else ""
            cells.append(f"{point[variant][0]:.2f}{bounds}")
        means = load(variant, "deterministic").mean(axis=0)
        rows.append([variant, str(len(seeds_of_variant)), *cells, *(f"{mean:.0f}" for mean in means)])
    if rows:
        header = ["Variant", "Seeds", "IQM, deterministic", "IQM, sampled", "IQM, last quarter of the training"]
        write_table(RESULTS.with_suffix(".csv"), [*header, *(task.split("/")[-1] for task in TASKS)], rows)


def main() -> None:
    args = do_runs(__file__, __doc__, ("variants", VARIANTS), TASKS, SEEDS, run, result_file, is_done)
    print_table(args.seeds)


if __name__ == "__main__":
    main()
