"""
Search the hyperparameters that the DMC tasks share, with Optuna: `python benchmarks/tune.py --algo fpo`

FPO, DPPO and PPO have the same budget: N_TRIALS trials. A trial is one run on each of four tasks, 250,000 steps each, in
EnvPool where the task is the same, and its value their mean deterministic return. It is pruned after a task if its mean so far
is below the median. What they have in common has the same range for all, the first trial of each has the same values, and each
has one lever of its own that widens exploration: FPO the perturbation of its actions, DPPO the noise of its steps, PPO the
noise of RPO or gSDE. The study is in a journal file: further calls, at the same time or later, go on with it, and repeat the
trials of those that were killed. The trials are left in benchmarks/results/tuning/ALGO.csv.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import optuna
from dmc import DMC
from runs import ROOT, Job, run_jobs, train_and_evaluate

from sb3_flow.zoo.shared_study import open_storage

RESULTS = ROOT / "benchmarks" / "results" / "tuning"
ALGOS = ("fpo", "dppo", "ppo")
N_TRIALS = 16
#: Those of the ten that learn something in so few steps, and what is known to be different for them
TASKS: dict[str, dict[str, Any]] = {
    "reacher-easy": {},
    "cheetah-run": {},
    "ball_in_cup-catch": {"gamma": 0.95},
    "finger-spin": {"gamma": 0.95},
}
#: Not among the seeds of dmc.py
SEED = 1000
NET_ARCHS = {"2x64": [64] * 2, "2x128": [128] * 2}
FIRST_TRIAL = {
    "batch_size": 512,
    "n_epochs": 10,
    "learning_rate": 1e-3,
    "gamma": 0.995,
    "clip_range": 0.2,
    "clip_schedule": "",
    "exploration_std": 0.76,
    "net_arch": "2x64",
    "ent_coef": 0.02,
    "action_perturbation_std": 0.0,
    "noise_std": 0.4,
    "exploration": "",
}


def suggest(algo: str, trial: optuna.Trial) -> dict[str, Any]:
    """Hyperparameters in rl-zoo3's format."""
    batch_size = trial.suggest_categorical("batch_size", [128, 256, 512])
    n_epochs = trial.suggest_categorical("n_epochs", [5, 10, 20])
    learning_rate = trial.suggest_float("learning_rate", 2e-4, 2e-3, log=True)
    gamma = trial.suggest_categorical("gamma", [0.97, 0.98, 0.99, 0.995])
    clip_range = f"{trial.suggest_float('clip_range', 0.1, 0.35, log=True):.2f}"
    clip_schedule = trial.suggest_categorical("clip_schedule", ["", "lin_"])
    # Standard deviation of the actions of a new policy, before they are clipped (DPPO: of its initial noise)
    std = trial.suggest_float("exploration_std", 0.2, 1.0, log=True)
    net_arch = NET_ARCHS[trial.suggest_categorical("net_arch", list(NET_ARCHS))]
    hyperparameters: dict[str, Any] = dict(
        env_wrapper="gymnasium.wrappers.FlattenObservation",
        n_envs=16,
        n_timesteps=1e6,
        policy="MlpPolicy",
        n_steps=128,
        batch_size=batch_size,
        n_epochs=n_epochs,
        learning_rate=f"lin_{learning_rate:.1e}",
        gamma=gamma,
        clip_range=f"lin_{clip_range}" if clip_schedule else float(clip_range),
    )
    networks = f"net_arch=dict(pi={net_arch}, vf=[256, 256])"
    if algo == "dppo":
        noise_std = trial.suggest_categorical("noise_std", [0.2, 0.4, 0.8])
        return hyperparameters | dict(policy_kwargs=f"dict({networks}, action_scale={std:.2f}, noise_std={noise_std})")
    hyperparameters["ent_coef"] = trial.suggest_categorical("ent_coef", [0.0, 0.006, 0.02, 0.06])
    if algo == "fpo":
        perturbation = trial.suggest_categorical("action_perturbation_std", [0.0, 0.1, 0.2])
        policy_kwargs = f"dict({networks}, action_scale={std:.2f}, action_perturbation_std={perturbation})"
        return hyperparameters | dict(policy_kwargs=policy_kwargs)
    exploration = trial.suggest_categorical("exploration", ["", "rpo", "gsde"])
    if exploration == "rpo":
        hyperparameters["policy"] = "levers.RPOPolicy"
    elif exploration == "gsde":
        hyperparameters |= dict(use_sde=True, sde_sample_freq=4)
    policy_kwargs = f"dict({networks}, log_std_init=np.log({std:.2f}), activation_fn=nn.SiLU)"
    return hyperparameters | dict(normalize=True, policy_kwargs=policy_kwargs)


def objective(trial: optuna.Trial, algo: str, steps: int, logs: Path) -> float:
    hyperparameters = suggest(algo, trial)
    trial.set_user_attr("hyperparameters", hyperparameters)
    returns: list[float] = []
    for task, overrides in TASKS.items():
        folder = logs / f"{algo}-{trial.number}-{task}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hyperparameters.json").write_text(json.dumps({**hyperparameters, **overrides}))
        arguments = [__file__, "--algo", algo, "--steps", str(steps), "--run-one", task, "--logs", str(folder)]
        run_jobs([Job(folder.name, arguments)], 1, logs)
        returns.append(json.loads((folder / "result.json").read_text())["deterministic"]["mean_return"])
        trial.set_user_attr(task, returns[-1])
        mean = sum(returns) / len(returns)
        trial.report(mean, len(returns))
        if trial.should_prune() and len(returns) < len(TASKS):
            raise optuna.TrialPruned
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=ALGOS, default="fpo")
    parser.add_argument("--trials", type=int, default=N_TRIALS, help="of all calls together")
    parser.add_argument("--steps", type=int, default=250_000)
    parser.add_argument("--logs", type=Path, default=Path("logs/tuning"))
    parser.add_argument("--run-one", metavar="TASK", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_one:
        hyperparameters = json.loads((args.logs / "hyperparameters.json").read_text())
        task = DMC[args.run_one]
        arguments = ["--eval-freq", "-1", "--save-freq", "-1", *(["--vec-env", "envpool"] if task.in_envpool else [])]
        result = train_and_evaluate(args.algo, task.env_id, args.steps, SEED, hyperparameters, args.logs, 10, arguments)
        (args.logs / "result.json").write_text(json.dumps(result))
        return

    args.logs.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=args.algo,
        storage=open_storage(str(args.logs / "journal.log")),
        direction="maximize",
        sampler=optuna.samplers.TPESampler(n_startup_trials=6, multivariate=True, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        load_if_exists=True,
    )
    if not study.trials:
        study.enqueue_trial(FIRST_TRIAL)
    RESULTS.mkdir(parents=True, exist_ok=True)
    while sum(trial.state.is_finished() for trial in study.get_trials()) < args.trials:
        study.optimize(lambda trial: objective(trial, args.algo, args.steps, args.logs), n_trials=1)
        study.trials_dataframe().to_csv(RESULTS / f"{args.algo}.csv", index=False)
    print(study.best_trial.number, study.best_value, study.best_trial.user_attrs)


if __name__ == "__main__":
    main()
