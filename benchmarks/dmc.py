"""
FPO against PPO on the ten DMC tasks of the FPO paper, and on four MuJoCo tasks: `python benchmarks/dmc.py`

Each run is one `sb3-flow train` in a process of its own, with one thread, then 20 episodes from zero noise (PPO: of the mean
action) and 20 stochastic ones. It leaves a JSON file in benchmarks/results/dmc; runs whose file is there are not repeated, so
that an interrupted benchmark goes on where it stopped, and can be done in parts (--tasks, --seeds, --jobs).
`python benchmarks/report.py` makes tables and figures of the files.

FPO has the hyperparameters of hyperparams/fpo.yml. PPO has those of benchmarks/ppo.yml on the DMC tasks, from a search as
FPO's were (tune.py) and fewer runs by hand, and those of rl-zoo3 on the MuJoCo tasks.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from runs import ROOT, Job, fpo_hyperparameters, run_jobs, train_and_evaluate, with_defaults, write_result

from sb3_flow.common.flow import CFMLoss, to_cfm_loss

RESULTS = ROOT / "benchmarks" / "results" / "dmc"
DMC = [
    f"dm_control/{task}-v0"
    for task in ("ball_in_cup-catch", "cartpole-balance", "cheetah-run", "finger-spin", "finger-turn_easy",
                 "finger-turn_hard", "fish-swim", "point_mass-easy", "reacher-easy", "reacher-hard")
]  # fmt: skip
MUJOCO = ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5"]
ALGOS = ("fpo", "ppo")
STEPS = 1_000_000


def hyperparameters(algo: str, env_id: str) -> dict[str, Any]:
    """The block of hyperparameters, in rl-zoo3's format."""
    import rl_zoo3

    if algo == "fpo":
        conf_file = ROOT / "hyperparams" / "fpo.yml"
    elif env_id in DMC:
        conf_file = ROOT / "benchmarks" / "ppo.yml"
    else:
        # It has none for v5
        conf_file, env_id = Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml", env_id.replace("-v5", "-v4")
    return yaml.safe_load(conf_file.read_text())[env_id]


def result_file(algo: str, env_id: str, seed: int, steps: int) -> Path:
    name = env_id.split("/")[-1]
    return RESULTS / f"{name if steps == STEPS else f'{name}-{steps}'}-{algo}-seed{seed}.json"


def is_current(result: dict[str, Any]) -> bool:
    """Whether a result is one of the hyperparameters of now."""
    return result["hyperparameters"] == hyperparameters(result["algo"], result["env"])


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


def is_done(algo: str, env_id: str, seed: int, steps: int) -> bool:
    """Whether there is a result, of these steps and hyperparameters."""
    file = result_file(algo, env_id, seed, steps)
    return file.exists() and is_current(json.loads(file.read_text()))


def run(algo: str, env_id: str, seed: int, steps: int, logs: Path) -> None:
    """One run, in this process."""
    evaluations = ["--eval-freq", str(steps // 10), "--eval-episodes", "5", "--n-eval-envs", "5"]
    file = result_file(algo, env_id, seed, steps)
    result = train_and_evaluate(
        algo, env_id, steps, seed, hyperparameters(algo, env_id), logs / file.stem, train_arguments=evaluations
    )
    command = f"python benchmarks/dmc.py --tasks {env_id} --algos {algo} --seeds {seed} --steps {steps}"
    write_result(file, dict(algo=algo, **result, command=command))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=[*DMC, *MUJOCO], default=[*DMC, *MUJOCO], metavar="ENV")
    parser.add_argument("--algos", nargs="+", choices=ALGOS, default=list(ALGOS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--logs", type=Path, default=Path("logs/dmc"))
    parser.add_argument("--run-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_one:
        run(args.algos[0], args.tasks[0], args.seeds[0], args.steps, args.logs)
        return
    jobs = []
    for seed in args.seeds:
        for env_id in args.tasks:
            for algo in args.algos:
                if not is_done(algo, env_id, seed, args.steps):
                    arguments = ["--run-one", "--tasks", env_id, "--algos", algo, "--seeds", str(seed),
                                 "--steps", str(args.steps), "--logs", str(args.logs)]  # fmt: skip
                    jobs.append(Job(result_file(algo, env_id, seed, args.steps).stem, [__file__, *arguments]))
    print(f"{len(jobs)} runs to do", flush=True)
    run_jobs(jobs, args.jobs, args.logs)


if __name__ == "__main__":
    main()
