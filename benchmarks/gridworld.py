"""
FPO and PPO in GridWorld: success, length of the episodes, and modes. `python benchmarks/gridworld.py`

Each run is one `sb3-flow train` in a process of its own, then 200 deterministic and 200 stochastic episodes, one
deterministic episode from every cell, and the modes at the saddle point (sb3_flow/plotting/gridworld.py). It leaves a JSON
file in benchmarks/results/gridworld; runs whose file is there are not repeated. The table is printed from those files
(`--table-only` does nothing else), `--figure` draws the policies of one seed.

Settings:
  fpo       hyperparams/fpo.yml
  ppo       PPO at the geometry of fpo.yml: the same environments, rollouts, minibatches, discount, and 2×64 networks; its own
            number of epochs (10), clip range (0.2) and learning rate (linear from 1e-3)
  ppo-sb3   the same environments, rollouts and discount, all else SB3's defaults

The seeds of the tuning were 100, 101 and 102.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from runs import provenance, write_result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gridworld"
ENV = "sb3_flow/GridWorld-v0"
SETTINGS = ("fpo", "ppo", "ppo-sb3")
STEPS = 100_000
N_EVAL_EPISODES = 200
BIN = 3_000


def hyperparameters(setting: str) -> dict:
    """The block of hyperparameters, in rl-zoo3's format."""
    from sb3_flow.zoo import default_conf_file

    block = yaml.safe_load(Path(default_conf_file("fpo")).read_text())[ENV]
    if setting == "fpo":
        return block
    kept = ("n_envs", "n_timesteps", "policy", "n_steps", "gamma") + (("batch_size",) if setting == "ppo" else ())
    return {key: block[key] for key in kept} | ({"learning_rate": "lin_1e-3"} if setting == "ppo" else {})


def result_file(setting: str, seed: int) -> Path:
    return RESULTS / f"{setting}-seed{seed}.json"


def run(setting: str, seed: int, logs: Path) -> None:
    """Train and evaluate one run, in this process, and write its results."""
    import torch as th
    from stable_baselines3.common.monitor import load_results

    from sb3_flow.envs.gridworld import FREE, GOAL, make_layout
    from sb3_flow.plotting.gridworld import multimodality, run_episodes
    from sb3_flow.zoo import cli
    from sb3_flow.zoo.evaluate import evaluate, load_run

    th.set_num_threads(1)
    algo, log_folder = setting.split("-")[0], logs / f"{setting}-seed{seed}"
    log_folder.mkdir(parents=True, exist_ok=True)
    conf_file = log_folder / "hyperparams.yml"
    conf_file.write_text(yaml.safe_dump({ENV: hyperparameters(setting)}))
    sys.argv = ["sb3-flow", "train", "--algo", algo, "--env", ENV, "-n", str(STEPS), "--seed", str(seed), "--eval-freq", "-1",
                "--num-threads", "1", "-f", str(log_folder), "-conf", str(conf_file), "--verbose", "0"]  # fmt: skip
    cli.main()

    evaluations = [
        evaluate(algo, ENV, str(log_folder), n_eval_episodes=N_EVAL_EPISODES, stochastic=stochastic, seed=10_000 + seed)
        for stochastic in (False, True)
    ]
    model, _, model_path = load_run(algo, ENV, str(log_folder), seed=20_000 + seed)
    cells = make_layout("two_walls")
    episodes = run_episodes(model, np.argwhere(cells == FREE)[:, ::-1], deterministic=True)
    monitor = load_results(str(model_path.parent))
    bins = np.cumsum(monitor["l"].to_numpy()) // BIN
    curve = monitor[["r", "l"]].groupby(bins).mean()
    keys = ("success_rate", "mean_length", "mean_return", "n_eval_episodes", "seed")
    result = dict(
        setting=setting,
        env=ENV,
        steps=STEPS,
        seed=seed,
        deterministic={key: evaluations[0][key] for key in keys},
        stochastic={key: evaluations[1][key] for key in keys},
        deterministic_from_every_cell=dict(
            success_rate=float(np.mean([cells[y, x] == GOAL for x, y in (positions[-1] for positions in episodes)])),
            mean_length=float(np.mean([len(positions) - 1 for positions in episodes])),
        ),
        saddle=multimodality(model),
        # Timesteps, and the mean return and length of the training episodes around them
        training_curve=[[int(bin_) * BIN + BIN // 2, float(r), float(length)] for bin_, r, length in curve.itertuples()],
        # Not a measure of speed: other programs may have shared the machine
        train_seconds=float(monitor["t"].max()),
        hyperparameters=hyperparameters(setting),
        command=f"python benchmarks/gridworld.py --settings {setting} --seeds {seed}",
        **provenance(),
    )
    write_result(result_file(setting, seed), result)


def first_step(curve: list, wanted) -> int | None:
    """Timesteps after which the training episodes are as wanted, None if they never are."""
    return next((step + BIN // 2 for step, mean_return, length in curve if wanted(mean_return, length)), None)


def print_table() -> None:
    def over_seeds(values: Sequence, digits: int) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"

    print(f"\n{ENV}, {STEPS} steps; {N_EVAL_EPISODES} episodes for each seed and mode; mean ± std over seeds\n")
    header = ["setting", "success %, deterministic", "stochastic", "length, deterministic", "stochastic"]
    header += ["return ≥ 19.8 after", "length ≤ 7 after"]
    header += ["larger mode at the saddle", "smaller", "between them", "smaller, per seed", "goal entropy, bits"]
    print("| " + " | ".join(header) + " |")
    print("|" + len(header) * "---|")
    for setting in SETTINGS:
        runs = [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{setting}-seed*.json"))]
        if not runs:
            continue
        columns = [
            over_seeds([100 * run[mode]["success_rate"] for run in runs], 1) for mode in ("deterministic", "stochastic")
        ]
        columns += [over_seeds([run[mode]["mean_length"] for run in runs], 2) for mode in ("deterministic", "stochastic")]
        for wanted in (lambda r, _: r >= 19.8, lambda _, length: length <= 7):
            steps = [first_step(run["training_curve"], wanted) for run in runs]
            columns.append("never in a run" if None in steps else over_seeds([step / 1000 for step in steps if step], 0) + "k")
        modes = np.sort([(run["saddle"]["high"], run["saddle"]["low"]) for run in runs], axis=1)
        columns += [over_seeds(list(100 * modes[:, index]), 0) + " %" for index in (1, 0)]
        columns.append(over_seeds([100 * run["saddle"]["stay"] for run in runs], 0) + " %")
        columns.append(", ".join(f"{100 * smaller:.0f}" for smaller in modes[:, 0]))
        columns.append(over_seeds([run["saddle"]["goal_entropy"] for run in runs], 2))
        print(f"| {setting} | " + " | ".join(columns) + " |")


def draw(seed: int, logs: Path, path: Path) -> None:
    """The policies of one seed."""
    import torch as th

    from sb3_flow.plotting.gridworld import plot_gridworld
    from sb3_flow.zoo import register
    from sb3_flow.zoo.evaluate import load_run

    register()
    models = {algo.upper(): load_run(algo, ENV, str(logs / f"{algo}-seed{seed}"))[0] for algo in ("fpo", "ppo")}
    th.manual_seed(0)
    print(*plot_gridworld(models, path), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--logs", type=Path, default=Path("logs/gridworld"))
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--figure", type=Path, help="figure of the policies of the first of the seeds, after their runs")
    parser.add_argument("--run-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_one:
        run(args.settings[0], args.seeds[0], args.logs)
        return
    jobs = [] if args.table_only else [(setting, seed) for seed in args.seeds for setting in args.settings]
    for setting, seed in jobs:
        file = result_file(setting, seed)
        # Those of other hyperparameters are out of date
        if file.exists() and json.loads(file.read_text())["hyperparameters"] == hyperparameters(setting):
            continue
        log = args.logs / f"{setting}-seed{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            __file__,
            "--run-one",
            "--settings",
            setting,
            "--seeds",
            str(seed),
            "--logs",
            str(args.logs),
        ]
        with open(log, "w") as output:
            failed = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        print(f"{setting} seed {seed}: {'failed, see ' + str(log) if failed.returncode else 'done'}", flush=True)
    print_table()
    if args.figure:
        draw(args.seeds[0], args.logs, args.figure)


if __name__ == "__main__":
    main()
