"""
Return and time of a trained policy against the solver and its number of steps: `python benchmarks/samplers.py`

FPO is trained with Euler's method and 10 steps, on a task of MuJoCo and one of dm_control, by `sb3-flow train`. The same
model is then evaluated with each sampler and number of steps: 10 episodes from random noise and 10 from zero noise, time of
one `predict` of 16 observations (the fastest of 100), and distance of its actions to those of the exact flow (dopri5) from
the same noise. A JSON file for each task and seed in benchmarks/results/samplers; those that are there are not measured again
(`--table-only` only prints the table). `--retime` measures the times again, for when nothing else runs on the machine.
`--figure` draws what is in them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from runs import provenance, write_result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "samplers"
TASKS = ("HalfCheetah-v5", "dm_control/cheetah-run-v0")
SAMPLERS = ("euler", "sde", "midpoint", "heun", "rk4", "dopri5")
EVALUATIONS = {"euler": 1, "sde": 1, "midpoint": 2, "heun": 2, "rk4": 4}
STEPS = (1, 2, 4, 8, 16)
#: Those of the training
REFERENCE = ("euler", 10)
N_EVAL_EPISODES, N_OBS = 10, 16


def hyperparameters(env_id: str) -> dict:
    """The block of hyperparameters, in rl-zoo3's format."""
    from sb3_flow.zoo import default_conf_file

    blocks = yaml.safe_load(Path(default_conf_file("fpo")).read_text())
    wrapper = {"env_wrapper": "gymnasium.wrappers.FlattenObservation"} if env_id.startswith("dm_control/") else {}
    return blocks.get(env_id, blocks["default"]) | wrapper


def result_file(env_id: str, seed: int) -> Path:
    return RESULTS / f"{env_id.replace('/', '-')}-seed{seed}.json"


def run(env_id: str, seed: int, timesteps: int, logs: Path) -> None:
    """Train a policy, in this process, evaluate it with all samplers, and write the results."""
    import torch as th
    from stable_baselines3.common.evaluation import evaluate_policy

    from sb3_flow.zoo import cli
    from sb3_flow.zoo.evaluate import load_run

    th.set_num_threads(1)
    log_folder = logs / f"{env_id.replace('/', '-')}-seed{seed}"
    log_folder.mkdir(parents=True, exist_ok=True)
    conf_file = log_folder / "hyperparams.yml"
    conf_file.write_text(yaml.safe_dump({env_id: hyperparameters(env_id)}))
    sys.argv = ["sb3-flow", "train", "--algo", "fpo", "--env", env_id, "-n", str(timesteps), "--seed", str(seed),
                "--eval-freq", "-1", "--num-threads", "1", "-f", str(log_folder), "-conf", str(conf_file),
                "--verbose", "0"]  # fmt: skip
    cli.main()

    loaded: Any = load_run("fpo", env_id, str(log_folder), n_envs=N_EVAL_EPISODES)
    model, env, _ = loaded
    policy = model.policy
    # Observations that the policy meets
    obs = env.reset()
    visited = []
    for _ in range(100):
        obs, *_ = env.step(model.predict(obs, deterministic=False)[0])
        visited.append(obs)
    observations = np.concatenate(visited)

    def actions(deterministic: bool = False) -> np.ndarray:
        th.manual_seed(0)
        return model.predict(observations, deterministic=deterministic)[0]

    policy.set_sampler("dopri5")
    exact = actions()
    rows = []
    for sampler, n_flow_steps in [REFERENCE, *((sampler, n) for sampler in SAMPLERS for n in STEPS)]:
        if sampler == "dopri5" and n_flow_steps > 1:
            continue
        policy.set_sampler(sampler, n_flow_steps)
        row: dict[str, Any] = dict(
            sampler=sampler,
            n_flow_steps=None if sampler == "dopri5" else n_flow_steps,
            evaluations=count_evaluations(policy, observations[:N_OBS]),
            rms_distance=float(np.sqrt(np.square(actions() - exact).mean())),
            ms=time_predict(model, observations[:N_OBS]),
        )
        for deterministic in (False, True):
            env.seed(10_000 + seed)
            th.manual_seed(10_000 + seed)
            mean, std = evaluate_policy(model, env, N_EVAL_EPISODES, deterministic=deterministic, warn=False)
            row["deterministic" if deterministic else "stochastic"] = dict(mean_return=mean, std_return=std)
        rows.append(row)
        print(row, flush=True)
    result = dict(
        env=env_id,
        steps=timesteps,
        seed=seed,
        n_eval_episodes=N_EVAL_EPISODES,
        rows=rows,
        hyperparameters=hyperparameters(env_id),
        command=f"python benchmarks/samplers.py --tasks {env_id} --seeds {seed} --steps {timesteps}",
        **provenance(),
    )
    write_result(result_file(env_id, seed), result)


def count_evaluations(policy, observations: np.ndarray) -> int:
    """Number of evaluations of the network for one action."""
    import torch as th

    from sb3_flow.common.samplers import SAMPLERS as functions

    field = policy.velocity_field(policy.obs_to_tensor(observations)[0])
    count = 0

    def counted_field(x, t):
        nonlocal count
        count += 1
        return field(x, t)

    with th.no_grad():
        noise = th.randn(len(observations), policy.action_net.action_dim)
        functions[policy.sampler](counted_field, noise, policy.n_flow_steps, 0.0, ())
    return count


def time_predict(model, observations: np.ndarray, repeats: int = 100) -> float:
    """Milliseconds of one call: the fastest, which other programs disturb least."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.predict(observations, deterministic=False)
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


def retime(env_id: str, seed: int, logs: Path) -> None:
    """Measure the times of a run again."""
    import torch as th

    from sb3_flow.zoo import register, register_envs
    from sb3_flow.zoo.evaluate import load_run

    th.set_num_threads(1)
    register()
    register_envs(env_id)
    loaded: Any = load_run("fpo", env_id, str(logs / f"{env_id.replace('/', '-')}-seed{seed}"), n_envs=N_OBS)
    model, env, _ = loaded
    file = result_file(env_id, seed)
    result, observations = json.loads(file.read_text()), env.reset()
    for row in result["rows"]:
        model.policy.set_sampler(row["sampler"], row["n_flow_steps"])
        row["ms"] = time_predict(model, observations)
    write_result(file, result)


def read(env_id: str) -> list[dict]:
    """What was measured on a task, over seeds: for each sampler and number of steps, a row of arrays."""
    runs = [json.loads(file.read_text())["rows"] for file in sorted(RESULTS.glob(f"{env_id.replace('/', '-')}-seed*.json"))]
    return [
        dict(
            {key: rows[0][key] for key in ("sampler", "n_flow_steps")},
            **{key: np.array([row[key] for row in rows]) for key in ("evaluations", "rms_distance", "ms")},
            **{mode: np.array([row[mode]["mean_return"] for row in rows]) for mode in ("stochastic", "deterministic")},
            standard_error=np.array([row["deterministic"]["std_return"] for row in rows]) / N_EVAL_EPISODES**0.5,
        )
        for rows in zip(*runs, strict=True)
    ]


def print_table(env_id: str) -> None:
    rows = read(env_id)
    if not rows:
        return
    print(f"\n{env_id}, {len(rows[0]['ms'])} seeds, mean ± std\n")
    print("| sampler | steps | evaluations | distance to the exact flow | ms | return, random noise | return, zero noise |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        returns = [f"{row[mode].mean():.0f} ± {row[mode].std():.0f}" for mode in ("stochastic", "deterministic")]
        print(f"| {row['sampler']} | {row['n_flow_steps'] or 'adaptive'} | {row['evaluations'].mean():.0f} "
              f"| {row['rms_distance'].mean():.3f} | {row['ms'].mean():.2f} | {' | '.join(returns)} |")  # fmt: skip


def draw(tasks: list[str], path: Path) -> None:
    """Return from zero noise against the number of steps, and distance to the exact flow against the time of a call."""
    from sb3_flow.plotting import BLUE, GREEN, GREY, ORANGE, new_figure

    styles = {
        "euler": (BLUE, "o"),
        "sde": (GREY, "x"),
        "midpoint": ("#CC79A7", "v"),
        "heun": (ORANGE, "s"),
        "rk4": (GREEN, "^"),
    }
    figure = new_figure(figsize=(8.0, 3.1 * len(tasks)))
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for (returns, distances), env_id in zip(axes, tasks, strict=True):
        rows = read(env_id)
        (reference,) = (row for row in rows if (row["sampler"], row["n_flow_steps"]) == REFERENCE)
        for sampler, (color, marker) in styles.items():
            chosen = [row for row in rows if row["sampler"] == sampler and row["n_flow_steps"] in STEPS]
            style = dict(color=color, marker=marker, markersize=4, linewidth=1.2, label=sampler)
            if sampler != "sde":
                ratios = [row["deterministic"] / reference["deterministic"] for row in chosen]
                errors = [row["standard_error"] / reference["deterministic"] for row in chosen]
                errors = [np.sqrt(np.square(error).sum()) / len(error) for error in errors]
                returns.errorbar(STEPS, np.mean(ratios, axis=1), errors, capsize=2, **style)
            distances.plot(*zip(*((row["ms"].mean(), row["rms_distance"].mean()) for row in chosen), strict=True), **style)
        (exact,) = (row for row in rows if row["sampler"] == "dopri5")
        ratio = (exact["deterministic"] / reference["deterministic"]).mean()
        returns.axhline(ratio, color="black", linewidth=0.9, linestyle="--")
        distances.axvline(exact["ms"].mean(), color="black", linewidth=0.9, linestyle="--", label="dopri5")
        returns.set(xlabel="steps", ylabel="return from zero noise,\nover that of Euler with 10 steps", title=env_id)
        returns.set(xscale="log", xticks=STEPS, xticklabels=STEPS)
        distances.set(xlabel=f"ms for {N_OBS} actions", ylabel="distance to the exact flow", xscale="log", yscale="log")
        milliseconds = (0.25, 0.5, 1, 2, 4, 8)
        distances.set(title=env_id, ylim=(1e-4, None), xticks=milliseconds, xticklabels=milliseconds)
        for panel in (returns, distances):
            panel.xaxis.minorticks_off()
            panel.grid(alpha=0.3)
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300_000, help="timesteps of the training")
    parser.add_argument("--logs", type=Path, default=Path("logs/samplers"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--retime", action="store_true", help="measure the times of runs in --logs again, and nothing else")
    parser.add_argument("--run-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_one:
        run(args.tasks[0], args.seeds[0], args.steps, args.logs)
        return
    for seed in [] if args.table_only or args.retime else args.seeds:
        for env_id in args.tasks:
            if result_file(env_id, seed).exists():
                continue
            log = args.logs / f"{env_id.replace('/', '-')}-seed{seed}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "--run-one", "--tasks", env_id, "--seeds", str(seed),
                       "--steps", str(args.steps), "--logs", str(args.logs)]  # fmt: skip
            with open(log, "w") as output:
                failed = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
            print(f"{env_id} seed {seed}: {'failed, see ' + str(log) if failed.returncode else 'done'}", flush=True)
    for env_id in args.tasks:
        for seed in args.seeds if args.retime else []:
            retime(env_id, seed, args.logs)
        print_table(env_id)
    if args.figure:
        draw(args.tasks, args.figure)


if __name__ == "__main__":
    main()
