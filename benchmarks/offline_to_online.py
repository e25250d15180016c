"""
FQL on the replay buffer of a half-trained agent, as D4RL's medium-replay datasets are made:
`python benchmarks/offline_to_online.py --env HalfCheetah-v5`

SB3's SAC (rl-zoo3's hyperparameters for MuJoCo) trains for 100,000 steps, and all of its experience is the dataset.
FQL learns offline from it, then online. Each seed is a process of its own, which evaluates the one-step policy and the
behavioral cloning flow over 20 episodes after each phase, and leaves a JSON file in benchmarks/results/offline_to_online;
runs whose file is there are not repeated. The table is printed from those files (`--table-only` does nothing else).
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
from runs import provenance, write_result

RESULTS = Path(__file__).parent / "results" / "offline_to_online"
N_EVAL_EPISODES = 20
BEHAVIOUR_STEPS = 100_000
BEHAVIOUR_SEED = 0


def dataset_file(env_id: str, logs: Path) -> Path:
    return logs / f"{env_id}-sac-{BEHAVIOUR_STEPS}.pkl"


def record(env_id: str, logs: Path) -> None:
    """Train SAC and keep its replay buffer."""
    from stable_baselines3 import SAC

    model = SAC("MlpPolicy", env_id, learning_starts=10_000, buffer_size=BEHAVIOUR_STEPS, seed=BEHAVIOUR_SEED)
    model.learn(BEHAVIOUR_STEPS, progress_bar=True)
    logs.mkdir(parents=True, exist_ok=True)
    # Under its name only when it is complete
    part = dataset_file(env_id, logs).with_suffix(".part.pkl")
    model.save_replay_buffer(part)
    part.rename(dataset_file(env_id, logs))


def evaluate(policy, env: gym.Env, deterministic: bool) -> dict[str, float]:
    from stable_baselines3.common.evaluation import evaluate_policy

    env.reset(seed=10_000)
    returns, _ = evaluate_policy(policy, env, N_EVAL_EPISODES, deterministic=deterministic, return_episode_rewards=True)
    return dict(mean_return=float(np.mean(returns)), std_return=float(np.std(returns)), n_eval_episodes=N_EVAL_EPISODES)


def run(env_id: str, seed: int, settings: dict, logs: Path, file: Path) -> None:
    """Offline, evaluation, online, evaluation: in this process."""
    import torch as th
    from stable_baselines3.common.callbacks import EvalCallback
    from stable_baselines3.common.monitor import Monitor

    from sb3_flow import FQL

    th.set_num_threads(1)
    folder = logs / file.stem
    eval_env = Monitor(gym.make(env_id))
    model = FQL(
        "MlpPolicy",
        Monitor(gym.make(env_id), str(folder / "online"), override_existing=True),
        dataset=str(dataset_file(env_id, logs)),
        dataset_kwargs=dict(allow_pickle=True),
        alpha=settings["alpha"],
        normalize_q_loss=True,
        policy_kwargs=dict(net_arch=settings["net_arch"]),
        seed=seed,
    )
    evaluation = EvalCallback(
        eval_env, eval_freq=settings["eval_freq"], n_eval_episodes=5, log_path=str(folder), deterministic=True, verbose=1
    )
    result: dict = dict(env=env_id, seed=seed, **settings)
    assert model.offline_buffer is not None
    model.learn_offline(settings["offline_steps"], callback=evaluation)
    result["offline"] = dict(
        deterministic=evaluate(model, eval_env, True),
        stochastic=evaluate(model, eval_env, False),
        bc_flow=evaluate(model.policy.bc_flow, eval_env, False),
    )
    model.save(folder / "offline")
    print(json.dumps(result["offline"]), flush=True)
    model.learn(settings["online_steps"], callback=evaluation, reset_num_timesteps=False)
    model.save(folder / "online")
    result["online"] = dict(deterministic=evaluate(model, eval_env, True), stochastic=evaluate(model, eval_env, False))
    with np.load(folder / "evaluations.npz") as npz:
        result["curve"] = [
            [int(step), float(mean)] for step, mean in zip(npz["timesteps"], npz["results"].mean(axis=1), strict=True)
        ]
    returns = behaviour_returns(env_id, logs)
    result["behaviour"] = dict(
        mean_return=float(returns.mean()), std_return=float(returns.std()), best_return=float(returns.max()), n=len(returns)
    )
    options = " ".join(f"--{key.replace('_', '-')} {_argument(value)}" for key, value in settings.items())
    result["command"] = f"python benchmarks/offline_to_online.py --env {env_id} --seeds {seed} {options}"
    write_result(file, {**result, **provenance()})


def _argument(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def behaviour_returns(env_id: str, logs: Path) -> np.ndarray:
    from sb3_flow.offline.datasets import load_dataset

    return load_dataset(dataset_file(env_id, logs), allow_pickle=True).episode_returns


def print_table(env_id: str, results: Path) -> None:
    runs = [json.loads(file.read_text()) for file in sorted(results.glob(f"{env_id}-*.json"))]
    if not runs:
        return
    behaviour = runs[0]["behaviour"]
    print(f"\n{env_id}: return over {N_EVAL_EPISODES} episodes for each seed, and mean ± std over seeds")
    print(f"behaviour: {behaviour['mean_return']:.0f} on average, {behaviour['best_return']:.0f} in its best episode\n")
    print("| | per seed | mean ± std | / behaviour |\n|---|---|---|---|")
    for label, phase, kind in [
        ("BC flow", "offline", "bc_flow"),
        ("FQL offline, with noise", "offline", "stochastic"),
        ("FQL offline, zero noise", "offline", "deterministic"),
        ("FQL online, with noise", "online", "stochastic"),
        ("FQL online, zero noise", "online", "deterministic"),
    ]:
        values = np.array([run[phase][kind]["mean_return"] for run in runs])
        per_seed = ", ".join(f"{value:.0f}" for value in values)
        ratio = values.mean() / behaviour["mean_return"]
        print(f"| {label} | {per_seed} | {values.mean():.0f} ± {values.std():.0f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--offline-steps", type=int, default=50_000)
    parser.add_argument("--online-steps", type=int, default=50_000)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--net-arch", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--eval-freq", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--logs", type=Path, default=Path("logs/offline_to_online"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--record-only", action="store_true")
    parser.add_argument("--run-one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("offline_steps", "online_steps", "alpha", "net_arch", "eval_freq")}
    if args.run_one is not None:
        run(args.env, args.seeds[0], settings, args.logs, args.run_one)
        return

    def start(seed: int) -> None:
        file = args.results / f"{args.env}-seed{seed}.json"
        if file.exists() and all(json.loads(file.read_text())[key] == value for key, value in settings.items()):
            return
        log = args.logs / f"{file.stem}.log"
        command = [sys.executable, __file__, *sys.argv[1:], "--run-one", str(file), "--seeds", str(seed)]
        with open(log, "w") as output:
            failed = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        print(f"{args.env} seed {seed}: {'failed, see ' + str(log) if failed.returncode else 'done'}", flush=True)

    if not args.table_only:
        if not dataset_file(args.env, args.logs).exists():
            record(args.env, args.logs)
        if args.record_only:
            return
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(start, args.seeds))
    print_table(args.env, args.results)


if __name__ == "__main__":
    main()
