"""
Learning curves of FPO and PPO on one task, over seeds: `python benchmarks/learning.py --env HalfCheetah-v5 --steps 300000`

Each run is one `sb3-flow train` in a process of its own, then 20 deterministic and 20 stochastic evaluation episodes.
It leaves a JSON file in benchmarks/results/learning; runs whose file is there are not repeated, so that an interrupted
benchmark goes on where it stopped. The table is printed from those files (`--table-only` does nothing else).

Settings:
  fpo         hyperparams/fpo.yml
  fpo-wide    the same, with action_scale=1: exploration as wide as that of a standard normal
  ppo         PPO at the geometry of fpo.yml: the same environments, rollouts, minibatches, epochs, discounts, learning rate,
              entropy coefficient and networks, with VecNormalize; clip range 0.2
  ppo-narrow  PPO again, with exploration about as narrow as FPO's: log_std_init=-1.2, a standard deviation of 0.3
  ppo-zoo     PPO with the tuned hyperparameters of rl-zoo3 (those of the v4 task where it has none for v5)
"""

import argparse
import json
from pathlib import Path

import numpy as np
import yaml
from runs import N_EVAL_EPISODES, ROOT, Job, fpo_hyperparameters, run_jobs, train_and_evaluate, write_result

RESULTS = ROOT / "benchmarks" / "results" / "learning"
SETTINGS = ("fpo", "fpo-wide", "ppo", "ppo-narrow", "ppo-zoo")


def hyperparameters(setting: str, env_id: str) -> dict:
    """The block of hyperparameters, in rl-zoo3's format."""
    import rl_zoo3

    from sb3_flow.zoo import default_conf_file

    blocks = yaml.safe_load(Path(default_conf_file("fpo")).read_text())
    block = blocks.get(env_id, blocks["default"])
    if setting == "fpo":
        return block
    if setting == "fpo-wide":
        return {**block, "policy_kwargs": f"{{**{block.get('policy_kwargs', '{}')}, 'action_scale': 1.0}}"}
    if setting in ("ppo", "ppo-narrow"):
        geometry = ("n_envs", "n_timesteps", "policy", "n_steps", "batch_size", "n_epochs", "gamma", "learning_rate",
                    "ent_coef", "env_wrapper")  # fmt: skip
        fpo = fpo_hyperparameters(env_id)
        ppo = {key: fpo[key] for key in (*geometry, *(["gae_lambda"] if "gae_lambda" in block else [])) if key in fpo}
        net_arch = fpo["policy_kwargs"]["net_arch"]
        pi, vf = (net_arch[part] if isinstance(net_arch, dict) else net_arch for part in ("pi", "vf"))
        std = ", log_std_init=-1.2" if setting == "ppo-narrow" else ""
        policy_kwargs = f"dict(activation_fn=nn.SiLU{std}, net_arch=dict(pi={pi}, vf={vf}))"
        return {**ppo, "normalize": True, "policy_kwargs": policy_kwargs}
    zoo_blocks = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml").read_text())
    return zoo_blocks.get(env_id) or zoo_blocks[env_id.replace("-v5", "-v4")]


def run(setting: str, env_id: str, steps: int, seed: int, logs: Path) -> None:
    """Train and evaluate one run, in this process, and write its results."""
    run_result = train_and_evaluate(
        setting.split("-")[0], env_id, steps, seed, hyperparameters(setting, env_id), logs / f"{setting}-seed{seed}"
    )
    command = f"python benchmarks/learning.py --env {env_id} --steps {steps} --settings {setting} --seeds {seed}"
    write_result(result_file(setting, env_id, steps, seed), dict(setting=setting, **run_result, command=command))


def result_file(setting: str, env_id: str, steps: int, seed: int) -> Path:
    return RESULTS / f"{env_id.replace('/', '-')}-{steps}-{setting}-seed{seed}.json"


def print_table(env_id: str, steps: int) -> None:
    print(f"\n{env_id}, {steps} steps, return over {N_EVAL_EPISODES} episodes for each seed, and mean ± std over seeds\n")
    print("| setting | deterministic, per seed | mean ± std | stochastic, mean ± std |")
    print("|---|---|---|---|")
    for setting in SETTINGS:
        files = sorted(RESULTS.glob(f"{env_id.replace('/', '-')}-{steps}-{setting}-seed*.json"))
        runs = [json.loads(file.read_text()) for file in files]
        if runs:
            deterministic = np.array([run["deterministic"]["mean_return"] for run in runs])
            stochastic = np.array([run["stochastic"]["mean_return"] for run in runs])
            per_seed = ", ".join(f"{value:.0f}" for value in deterministic)
            print(
                f"| {setting} | {per_seed} | {deterministic.mean():.0f} ± {deterministic.std():.0f} "
                f"| {stochastic.mean():.0f} ± {stochastic.std():.0f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["fpo", "ppo", "ppo-zoo"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--logs", type=Path, default=Path("logs/benchmark"))
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--run-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_one:
        run(args.settings[0], args.env, args.steps, args.seeds[0], args.logs)
        return

    def is_done(setting: str, seed: int) -> bool:
        file = result_file(setting, args.env, args.steps, seed)
        # Those of other hyperparameters are out of date
        return file.exists() and json.loads(file.read_text())["hyperparameters"] == hyperparameters(setting, args.env)

    if not args.table_only:
        jobs = [
            Job(
                f"{args.env.replace('/', '-')}-{setting}-seed{seed}",
                [__file__, "--run-one", "--env", args.env, "--steps", str(args.steps), "--settings", setting,
                 "--seeds", str(seed), "--logs", str(args.logs)],
            )
            for seed in args.seeds
            for setting in args.settings
            if not is_done(setting, seed)
        ]  # fmt: skip
        run_jobs(jobs, args.jobs, args.logs)
    print_table(args.env, args.steps)


if __name__ == "__main__":
    main()
