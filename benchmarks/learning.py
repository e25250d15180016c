"""
Learning curves of FPO and PPO on one task, over seeds: `python benchmarks/learning.py --env HalfCheetah-v5 --steps 300000`

Each run is one `sb3-flow train` in a process of its own, then 20 deterministic and 20 stochastic evaluation episodes.
It leaves a JSON file in benchmarks/results/learning; runs whose file is there are not repeated, so that an interrupted
benchmark goes on where it stopped. The table is printed from those files (`--table-only` does nothing else).

Settings:
  fpo         hyperparams/fpo.yml
  fpo-wide    the same, with action_scale=1: exploration as wide as that of a standard normal
  ppo         PPO at the geometry of fpo.yml: the same environments, rollouts, minibatches, epochs, discounts, learning rate
              and normalization; clip range 0.2, networks of 2×64 SiLU for policy and value
  ppo-narrow  PPO again, with exploration as narrow as FPO's with action_scale=0.3: log_std_init=-1.2
  ppo-zoo     PPO with the tuned hyperparameters of rl-zoo3 (those of the v4 task where it has none for v5)
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "learning"
SETTINGS = ("fpo", "fpo-wide", "ppo", "ppo-narrow", "ppo-zoo")
N_EVAL_EPISODES = 20
BIN = 10_000


def hyperparameters(setting: str, env_id: str) -> dict:
    """The block of hyperparameters, in rl-zoo3's format."""
    import rl_zoo3

    from sb3_flow.zoo import default_conf_file

    blocks = yaml.safe_load(Path(default_conf_file("fpo")).read_text())
    block = blocks.get(env_id, blocks["default"])
    if setting == "fpo":
        return block
    if setting == "fpo-wide":
        return {**block, "policy_kwargs": block.get("policy_kwargs", "dict()").replace(", action_scale=0.3", "")}
    if setting in ("ppo", "ppo-narrow"):
        geometry = ("n_envs", "n_timesteps", "policy", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda",
                    "learning_rate", "normalize", "env_wrapper")  # fmt: skip
        ppo = {key: block[key] for key in geometry if key in block}
        # What FPO leaves at a default that is not PPO's
        log_std_init = ", log_std_init=-1.2" if setting == "ppo-narrow" else ""
        return {"batch_size": 256, **ppo, "policy_kwargs": f"dict(activation_fn=nn.SiLU{log_std_init})"}
    zoo_blocks = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml").read_text())
    return zoo_blocks.get(env_id) or zoo_blocks[env_id.replace("-v5", "-v4")]


def provenance() -> dict:
    packages = ("torch", "stable-baselines3", "rl_zoo3", "gymnasium", "mujoco", "numpy")
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return dict(
        commit=commit,
        versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
        hardware=f"{os.cpu_count()} × {cpu[0] if cpu else platform.processor()}",
    )


def run(setting: str, env_id: str, steps: int, seed: int, logs: Path) -> None:
    """Train and evaluate one run, in this process, and write its results."""
    import torch as th
    from rl_zoo3.utils import get_latest_run_id
    from stable_baselines3.common.monitor import load_results
    from stable_baselines3.common.results_plotter import ts2xy

    from sb3_flow.zoo import cli
    from sb3_flow.zoo.evaluate import evaluate

    th.set_num_threads(1)
    algo = setting.split("-")[0]
    log_folder = logs / f"{setting}-seed{seed}"
    log_folder.mkdir(parents=True, exist_ok=True)
    conf_file = log_folder / "hyperparams.yml"
    conf_file.write_text(yaml.safe_dump({env_id: hyperparameters(setting, env_id)}))
    sys.argv = ["sb3-flow", "train", "--algo", algo, "--env", env_id, "-n", str(steps), "--seed", str(seed),
                "--num-threads", "1", "-f", str(log_folder), "-conf", str(conf_file), "--verbose", "0"]  # fmt: skip
    cli.main()

    run_folder = log_folder / algo / f"{env_id}_{get_latest_run_id(str(log_folder / algo), env_id)}"
    monitor = load_results(str(run_folder))
    timesteps, returns = ts2xy(monitor, "timesteps")
    bins = timesteps // BIN
    evaluations = [
        evaluate(algo, env_id, str(log_folder), n_eval_episodes=N_EVAL_EPISODES, stochastic=stochastic, seed=10_000 + seed)
        for stochastic in (False, True)
    ]
    with np.load(run_folder / "evaluations.npz") as npz:
        during = [[int(step), float(mean)] for step, mean in zip(npz["timesteps"], npz["results"].mean(axis=1), strict=True)]
    result = dict(
        setting=setting,
        env=env_id,
        steps=steps,
        seed=seed,
        deterministic={key: evaluations[0][key] for key in ("mean_return", "std_return", "n_eval_episodes")},
        stochastic={key: evaluations[1][key] for key in ("mean_return", "std_return", "n_eval_episodes")},
        # Not a measure of speed: other runs may have shared the machine
        train_seconds=float(monitor["t"].max()),
        training_curve=[[int(bin_ * BIN + BIN // 2), float(returns[bins == bin_].mean())] for bin_ in np.unique(bins)],
        deterministic_curve=during,
        hyperparameters=hyperparameters(setting, env_id),
        command=f"python benchmarks/learning.py --env {env_id} --steps {steps} --settings {setting} --seeds {seed}",
        **provenance(),
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    result_file(setting, env_id, steps, seed).write_text(json.dumps(result, indent=1) + "\n")


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

    def start(setting: str, seed: int) -> None:
        file = result_file(setting, args.env, args.steps, seed)
        # Those of other hyperparameters are out of date
        if file.exists() and json.loads(file.read_text())["hyperparameters"] == hyperparameters(setting, args.env):
            return
        log = args.logs / f"{args.env.replace('/', '-')}-{setting}-seed{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--run-one", "--env", args.env, "--steps", str(args.steps),
                   "--settings", setting, "--seeds", str(seed), "--logs", str(args.logs)]  # fmt: skip
        with open(log, "w") as output:
            failed = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        print(f"{args.env} {setting} seed {seed}: {'failed, see ' + str(log) if failed.returncode else 'done'}", flush=True)

    if not args.table_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: start(*job), [(setting, seed) for seed in args.seeds for setting in args.settings]))
    print_table(args.env, args.steps)


if __name__ == "__main__":
    main()
