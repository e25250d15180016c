"""
Is FQL as good as the authors' run? `SB3_FLOW_DATA=DATA FQL_CODE=CHECKOUT python benchmarks/fql_beside_official.py`

Both learn from the same 100,000 transitions of cube-single-play (task 2), with the same networks (4×128) and hyperparameters
(alpha 300, the rest as published). The same loop evaluates them every 5,000 updates: success over 50 episodes from random
noise, and the mean Q-value of the same 1,000 transitions. CHECKOUT is the authors' code
(https://github.com/seohongpark/fql), which needs jax, flax, optax, distrax and ml_collections; DATA has
cube-single-play-v0.npz (`python benchmarks/make_ogbench_data.py`). Each run is a process of its own with one thread, and
leaves a JSON file in benchmarks/results/fql_beside_official; runs whose file is there are not repeated (--methods, --seeds,
--jobs).
"""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from runs import ROOT, do_runs, has_result, mean_and_interval, provenance, write_result, write_table

RESULTS = ROOT / "benchmarks" / "results" / "fql_beside_official"
ENV_ID = "cube-single-play-singletask-v0"
NET_ARCH, ALPHA = [128] * 4, 300.0
N_ROWS, STEPS, EVAL_FREQ, N_EVAL_EPISODES, N_Q_VALUES = 100_000, 50_000, 5_000, 50, 1_000
SETTINGS = dict(
    env=ENV_ID,
    net_arch=NET_ARCH,
    alpha=ALPHA,
    n_rows=N_ROWS,
    steps=STEPS,
    eval_freq=EVAL_FREQ,
    n_eval_episodes=N_EVAL_EPISODES,
    n_q_values=N_Q_VALUES,
)
METHODS = ("sb3-flow", "official")
SEEDS = (0, 1, 2, 3, 4)


class Learner(NamedTuple):
    """
    :param update: A number of gradient steps
    :param act: An action from random noise, for an observation
    :param q_values: Values of observations and actions, (batch,), the mean of the critics
    """

    update: Callable[[int], None]
    act: Callable[[np.ndarray], np.ndarray]
    q_values: Callable[[np.ndarray, np.ndarray], np.ndarray]


def make_sb3_flow(env: Any, data: dict[str, np.ndarray], seed: int) -> Learner:
    import torch as th

    from sb3_flow import FQL

    ends = data["terminals"].astype(bool)
    dataset = dict(
        observations=data["observations"],
        next_observations=data["next_observations"],
        actions=data["actions"],
        rewards=data["rewards"],
        terminations=data["masks"] == 0,
        truncations=ends & (data["masks"] != 0),
    )
    model = FQL(
        "MlpPolicy",
        env,
        dataset,
        dict(clip_actions=True),
        alpha=ALPHA,
        buffer_size=1,
        policy_kwargs=dict(net_arch=NET_ARCH),
        seed=seed,
        device="cpu",
    )

    def update(n: int) -> None:
        model.learn_offline(n, log_interval=None, reset_num_timesteps=False)

    def q_values(observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        with th.no_grad():
            return model.critic(th.as_tensor(observations), th.as_tensor(actions)).mean(dim=0).numpy()

    return Learner(update, lambda obs: model.predict(obs)[0], q_values)


def make_official(env: Any, data: dict[str, np.ndarray], seed: int) -> Learner:
    sys.path.insert(0, os.environ["FQL_CODE"])
    # One core, as the other side has one thread
    os.environ |= dict(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    import jax
    from official_fql import create_agent

    # As their main.py does
    data = data | dict(actions=np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5))
    rng, agent = np.random.default_rng(seed), create_agent("fql", NET_ARCH, data, alpha=ALPHA, seed=seed)
    key = jax.random.PRNGKey(seed)
    columns = ("observations", "next_observations", "actions", "rewards", "masks")

    def update(n: int) -> None:
        nonlocal agent
        for _ in range(n):
            rows = rng.integers(len(data["rewards"]), size=agent.config["batch_size"])
            agent, _ = agent.update({name: data[name][rows] for name in columns})

    def act(obs: np.ndarray) -> np.ndarray:
        nonlocal key
        key, seed_of_action = jax.random.split(key)
        return np.clip(np.array(agent.sample_actions(observations=obs, seed=seed_of_action)), -1, 1)

    def q_values(observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return np.array(agent.network.select("critic")(observations, actions=actions)).mean(axis=0)

    return Learner(update, act, q_values)


def result_file(method: str, task: str, seed: int) -> Path:
    return RESULTS / f"{method}-seed{seed}.json"


def is_done(method: str, task: str, seed: int) -> bool:
    return has_result(result_file(method, task, seed), dict(settings=SETTINGS))


def run(method: str, task: str, seed: int, logs: Path) -> None:
    """One run, in this process."""
    import ogbench
    import torch as th

    th.set_num_threads(1)
    source = provenance()
    path = Path(os.environ["SB3_FLOW_DATA"]) / "cube-single-play-v0.npz"
    env, data, _ = ogbench.make_env_and_datasets(ENV_ID, dataset_path=str(path))
    data = {name: array[:N_ROWS] for name, array in data.items()}
    learner = (make_sb3_flow if method == "sb3-flow" else make_official)(env, data, seed)

    curve = []
    for step in range(EVAL_FREQ, STEPS + 1, EVAL_FREQ):
        learner.update(EVAL_FREQ)
        n_solved = sum(solves(env, learner, 1000 * seed + i) for i in range(N_EVAL_EPISODES))
        rows = slice(N_Q_VALUES)
        q_mean = float(learner.q_values(data["observations"][rows], data["actions"][rows]).mean())
        curve.append([step, n_solved / N_EVAL_EPISODES, q_mean])
        print(curve[-1], flush=True)
    for package in ("jax", "flax", "ogbench"):
        try:
            source["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    command = (
        f"SB3_FLOW_DATA=DATA FQL_CODE=CHECKOUT python benchmarks/fql_beside_official.py --methods {method} --seeds {seed}"
    )
    write_result(
        result_file(method, task, seed),
        dict(method=method, seed=seed, settings=SETTINGS, curve=curve, command=command) | source,
    )


def solves(env: Any, learner: Learner, seed: int) -> bool:
    """An episode."""
    obs, _ = env.reset(seed=seed)
    while True:
        obs, _, terminated, truncated, info = env.step(learner.act(obs))
        if terminated or truncated:
            return bool(info["success"])


def print_table() -> None:
    """One row an evaluation."""
    files = {method: [result_file(method, "", seed) for seed in SEEDS if is_done(method, "", seed)] for method in METHODS}
    curves = {method: [json.loads(file.read_text())["curve"] for file in of_method] for method, of_method in files.items()}
    rows = []
    for i, step in enumerate(range(EVAL_FREQ, STEPS + 1, EVAL_FREQ)):
        success = [[100 * curve[i][1] for curve in of_method] for of_method in curves.values()]
        q_means = [[curve[i][2] for curve in of_method] for of_method in curves.values()]
        rows.append([str(step), *map(mean_and_interval, success), *(mean_and_interval(values, 1) for values in q_means)])
    header = ["Updates", *(f"Success in %, {method}" for method in METHODS), *(f"Mean Q, {method}" for method in METHODS)]
    write_table(RESULTS.with_suffix(".csv"), header, rows)


def main() -> None:
    do_runs(__file__, __doc__, ("methods", METHODS), (ENV_ID,), SEEDS, run, result_file, is_done)
    print_table()


if __name__ == "__main__":
    main()
