"""
Flow policies against Gaussian ones: FPO, DPPO and PPO on the ten DMC tasks of the FPO paper, on four MuJoCo tasks, and on one
whose observation lacks a part: `python benchmarks/dmc.py`

Each run is one `sb3-flow train` in a process of its own, with one thread, in EnvPool where the task is the same, then 20
episodes from zero noise (PPO: of the mean action) and 20 stochastic ones. It leaves a JSON file in benchmarks/results/dmc;
runs whose file is there are not repeated, so that an interrupted benchmark goes on where it stopped, and can be done in parts
(--tasks, --algos, --seeds, --jobs). `python benchmarks/report.py` makes tables and figures of the files.

Algorithms:
  fpo      hyperparams/fpo.yml
  dppo     hyperparams/dppo.yml
  ppo      SB3's PPO with benchmarks/ppo.yml: the environments, rollouts and networks of FPO
  ppo-zoo  SB3's PPO with the hyperparameters of rl-zoo3, on MuJoCo

Tasks, with a million steps and five seeds but for what is said here (DPPO has three):
  the ten of the paper
  finger-turn_easy-5M, ...   three of these that hardly learn anything in a million steps, with five million, three seeds
  HalfCheetah, Hopper        DPPO too
  Walker2d, Ant              three seeds
  Walker2d-hidden            without the angles and velocities of the left leg: what it has to do depends on where it is, which
                             the rest of the observation tells only in part. So several actions may be right, for the
                             different places where it may be, and none in between
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from runs import (
    ROOT,
    do_runs,
    fpo_hyperparameters,
    gflop_per_step,
    has_result,
    train_and_evaluate,
    with_defaults,
    write_result,
)

from sb3_flow.common.flow import CFMLoss, to_cfm_loss

RESULTS = ROOT / "benchmarks" / "results" / "dmc"
STEPS = 1_000_000
SEEDS = (0, 1, 2, 3, 4)


class Task(NamedTuple):
    """An environment, and what is run on it."""

    env_id: str
    algos: tuple[str, ...] = ("fpo", "dppo", "ppo")
    n_seeds: int = 5
    steps: int = STEPS
    in_envpool: bool = True
    #: Of rl-zoo3's `env_wrapper`
    wrapper: str | None = None


def dmc(name: str, **kwargs) -> Task:
    # The ball of EnvPool has another size, and its MuJoCo other contacts: docs/guide/scaling.rst
    return Task(f"dm_control/{name}-v0", in_envpool=not name.startswith(("ball_in_cup", "finger")), **kwargs)


DMC = {
    name: dmc(name)
    for name in ("ball_in_cup-catch", "cartpole-balance", "cheetah-run", "finger-spin", "finger-turn_easy",
                 "finger-turn_hard", "fish-swim", "point_mass-easy", "reacher-easy", "reacher-hard")
}  # fmt: skip
LONGER = {
    f"{name}-5M": dmc(name, algos=("fpo", "ppo"), n_seeds=3, steps=5_000_000)
    for name in ("finger-turn_easy", "finger-turn_hard", "fish-swim")
}
MUJOCO = {
    "HalfCheetah": Task("HalfCheetah-v5", ("fpo", "dppo", "ppo", "ppo-zoo")),
    "Hopper": Task("Hopper-v5", ("fpo", "dppo", "ppo", "ppo-zoo")),
    "Walker2d": Task("Walker2d-v5", ("fpo", "ppo", "ppo-zoo"), n_seeds=3),
    "Ant": Task("Ant-v5", ("fpo", "ppo", "ppo-zoo"), n_seeds=3),
}
HIDDEN = {
    "Walker2d-hidden": Task("Walker2d-v5", ("fpo", "ppo"), in_envpool=False, wrapper="hidden.LeftLegHidden"),
}
TASKS = DMC | LONGER | MUJOCO | HIDDEN
ALGOS = ("fpo", "dppo", "ppo", "ppo-zoo")
N_SEEDS_OF_DPPO = 3


def is_planned(algo: str, task: str, seed: int) -> bool:
    n_seeds = min(TASKS[task].n_seeds, N_SEEDS_OF_DPPO if algo == "dppo" else len(SEEDS))
    return algo in TASKS[task].algos and seed < n_seeds


def hyperparameters(algo: str, task: str) -> dict[str, Any]:
    """The block of hyperparameters, in rl-zoo3's format."""
    import rl_zoo3

    env_id = TASKS[task].env_id
    if algo in ("fpo", "dppo"):
        conf_file = ROOT / "hyperparams" / f"{algo}.yml"
    elif algo == "ppo":
        conf_file = ROOT / "benchmarks" / "ppo.yml"
    else:
        # It has none for v5
        conf_file, env_id = Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml", env_id.replace("-v5", "-v4")
    blocks = yaml.safe_load(conf_file.read_text())
    block = blocks[env_id] if env_id in blocks else blocks["default/dm_control"]
    wrapper = TASKS[task].wrapper
    return block if wrapper is None else block | dict(env_wrapper=wrapper)


def result_file(algo: str, task: str, seed: int) -> Path:
    return RESULTS / f"{task}-{algo}-seed{seed}.json"


def settings(algo: str, task: str) -> dict[str, Any]:
    """What a result depends on."""
    return dict(hyperparameters=hyperparameters(algo, task), steps=TASKS[task].steps)


def in_new_names(former: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters of FPO up to commit e790d1f, which had four arguments in place of ``cfm_loss``, and other defaults."""
    former = former.copy()
    names = ("supervision", "loss_reduction", "timestep_distribution", "mc_sampling")
    return {"vf_coef": 0.25, "cfm_loss": CFMLoss(*(former.pop(name) for name in names)), **former}


def is_of_former_code(result: dict[str, Any]) -> bool:
    """
    Whether a result is one of the hyperparameters that had the effect of those of now. Up to commit e790d1f observations and
    rewards were normalized by ``VecNormalize``, now they are within the policy. Up to commit baea80a ``ent_coef`` acted at
    about twice its value, and a new policy had 0.88 times the standard deviation that ``action_scale`` says.
    """
    if result["algo"] != "fpo" or "supervision" not in result["hyperparameters"]:
        return False
    former = with_defaults(in_new_names(result["hyperparameters"]))
    now = fpo_hyperparameters(result["env"])
    now.update(normalize=True, cfm_loss=to_cfm_loss(now["cfm_loss"]))
    action_scale = {0.26: 0.3, 0.76: 0.86}.get(now["policy_kwargs"]["action_scale"])
    before = {**now, "ent_coef": now["ent_coef"] / 2, "policy_kwargs": {**now["policy_kwargs"], "action_scale": action_scale}}
    return former in (now, before)


def is_current(algo: str, task: str, seed: int) -> bool:
    """Whether there is a result, of today's hyperparameters, or of those that had their effect."""
    file = result_file(algo, task, seed)
    return has_result(file, settings(algo, task)) or (file.exists() and is_of_former_code(json.loads(file.read_text())))


def is_done(algo: str, task: str, seed: int) -> bool:
    """Whether there is nothing to be run."""
    return not is_planned(algo, task, seed) or has_result(result_file(algo, task, seed), settings(algo, task))


def run(algo: str, task: str, seed: int, logs: Path) -> None:
    """One run, in this process."""
    env_id, steps = TASKS[task].env_id, TASKS[task].steps
    in_envpool = TASKS[task].in_envpool and algo != "ppo-zoo"
    arguments = ["--vec-env", "envpool"] if in_envpool else []
    evaluations = ["--eval-freq", str(steps // 10), "--eval-episodes", "5", "--n-eval-envs", "5"]
    file, block, algorithm = result_file(algo, task, seed), hyperparameters(algo, task), algo.split("-")[0]
    result = train_and_evaluate(
        algorithm, env_id, steps, seed, block, logs / file.stem, train_arguments=[*evaluations, *arguments]
    )
    gflop = gflop_per_step(algorithm, env_id, block, logs / file.stem / "gflop", arguments)
    command = f"python benchmarks/dmc.py --tasks {task} --algos {algo} --seeds {seed}"
    result |= dict(algo=algo, task=task, in_envpool=in_envpool, gflop_per_step=gflop, command=command)
    write_result(file, result)


def main() -> None:
    do_runs(__file__, __doc__, ("algos", ALGOS), TASKS, SEEDS, run, result_file, is_done)


if __name__ == "__main__":
    main()
