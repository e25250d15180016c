"""
Humanoid motion tracking, with all of the reference in sight, or a part of it: `python benchmarks/tracking.py`

FPO, FPO with the settings of its paper (presets.HUMANOID), and SB3's PPO, with the same environments, rollouts, minibatches,
discount, network sizes and number of steps. Each run is one `sb3-flow train` in a process of its own with one thread, then
each of its clips from its beginning, from zero noise (PPO: of the mean action) and sampled. One that is interrupted goes on
from its last checkpoint. It leaves a JSON file in benchmarks/results/tracking; runs whose file is there with today's
settings are not repeated, and the benchmark can be done in parts (--tasks, --arms, --seeds, --jobs). The clips are those of
`sb3-flow datasets mocap`.

Tasks: one walking clip, or five, and what is seen of the reference: all, the positions of the root and the hands, or of the
root. An episode ends in training where the bodies are 0.25 m from the reference on average, as in the authors' code; success
is measured with 0.5 m, and with 0.25 m.

The seeds of the tuning were 1000 and more.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from runs import ROOT, class_defaults, do_runs, has_result, provenance, train, write_result, write_table

from sb3_flow.envs.tracking import CONDITIONINGS

RESULTS = ROOT / "benchmarks" / "results" / "tracking"
STEPS, SAVE_FREQ = 1_000_000, 50_000
CLIPS = {
    "one": ["CMU_016_22"],
    "five": ["CMU_016_22", "CMU_016_31", "CMU_069_01", "CMU_069_04", "CMU_069_20"],
}
TASKS = {f"{clips}-{conditioning}": (clips, conditioning) for clips in CLIPS for conditioning in CONDITIONINGS}
ARMS = ("FPO", "FPO, paper", "PPO")
SEEDS = (0, 1)
TRAINING_ERROR, ERRORS = 0.25, (0.5, 0.25)
#: How far the bodies may be, what is measured, and in what units
MEASURES = ((0.5, "success", 100), (0.25, "success", 100), (0.5, "tracked", 100), (0.5, "error_mm", 1))
GEOMETRY = dict(n_envs=16, n_timesteps=STEPS, policy="MlpPolicy", n_steps=256, batch_size=512, gamma=0.98)


def hyperparameters(arm: str) -> dict[str, Any]:
    """The block of hyperparameters, in rl-zoo3's format."""
    if arm == "FPO, paper":
        return GEOMETRY | dict(preset="humanoid")
    if arm == "FPO":
        return GEOMETRY | dict(
            learning_rate="lin_5e-4",
            policy_kwargs="dict(net_arch=dict(pi=[256, 256], vf=[256, 256]), action_scale=0.2, action_perturbation_std=0.05)",
        )
    return GEOMETRY | dict(
        normalize=True,
        learning_rate="lin_3e-4",
        policy_kwargs="dict(net_arch=dict(pi=[256, 256], vf=[256, 256]), log_std_init=-1.6, activation_fn=nn.SiLU)",
    )


def algorithm(arm: str) -> str:
    return "ppo" if arm == "PPO" else "fpo"


def env_id(task: str) -> str:
    return f"sb3_flow/HumanoidTracking{CONDITIONINGS[TASKS[task][1]]}-v0"


def result_file(arm: str, task: str, seed: int) -> Path:
    return RESULTS / f"{task}-{arm.replace(', ', '_')}-seed{seed}.json"


def settings(arm: str, task: str) -> dict[str, Any]:
    """All that a result depends on."""
    from stable_baselines3 import PPO

    from sb3_flow import FPO

    defaults = class_defaults(PPO if arm == "PPO" else FPO)
    clips = CLIPS[TASKS[task][0]]
    return dict(hyperparameters=hyperparameters(arm), clips=clips, max_error=TRAINING_ERROR, defaults=defaults)


def is_done(arm: str, task: str, seed: int) -> bool:
    """Whether there is a result, of today's settings."""
    return has_result(result_file(arm, task, seed), dict(settings=settings(arm, task)))


def run(arm: str, task: str, seed: int, logs: Path) -> None:
    """One run, in this process."""
    import torch as th

    from sb3_flow.zoo import cli

    th.set_num_threads(1)
    source, algo, env = provenance(), algorithm(arm), env_id(task)
    folder = logs / result_file(arm, task, seed).stem
    clips = CLIPS[TASKS[task][0]]
    if any(folder.glob(f"{algo}/*_1/rl_model_*.zip")):
        sys.argv = ["sb3-flow", "train", "--algo", algo, "--env", env, "--resume", "-f", str(folder), "--num-threads", "1"]
        cli.main()
    else:
        env_kwargs = ["--env-kwargs", f"clips:{clips!r}", f"max_error:{TRAINING_ERROR}"]
        options = ["--save-freq", str(SAVE_FREQ), "--eval-freq", "-1", *env_kwargs]
        train(algo, env, STEPS, seed, hyperparameters(arm), folder, options)
    scores = {
        f"{mode}, {max_error} m": evaluate(algo, env, folder, seed, deterministic, max_error, len(clips))
        for mode, deterministic in (("deterministic", True), ("sampled", False))
        for max_error in ERRORS
    }
    command = f'python benchmarks/tracking.py --arms "{arm}" --tasks {task} --seeds {seed}'
    result = dict(arm=arm, task=task, seed=seed, scores=scores, settings=settings(arm, task), command=command, **source)
    write_result(result_file(arm, task, seed), result)


def evaluate(
    algo: str, env: str, folder: Path, seed: int, deterministic: bool, max_error: float, n_clips: int
) -> dict[str, dict[str, float]]:
    """Of each clip, from its beginning (sampled, five times): success, share that is tracked, mean error in millimeters."""
    from sb3_flow.zoo.evaluate import load_run

    env_kwargs = dict(random_start=False, max_error=max_error)
    model, vec_env, _ = load_run(algo, env, str(folder), seed=20_000 + seed, env_kwargs=env_kwargs)
    references = vec_env.get_attr("references")[0]
    episodes: dict[str, list[tuple[bool, float, float]]] = {}
    obs: Any = vec_env.reset()
    for _ in range(n_clips * (1 if deterministic else 5)):
        errors, ended = [], False
        while not ended:
            actions, _ = model.predict(obs, deterministic=deterministic)
            obs, _, dones, (info,) = vec_env.step(actions)
            errors.append(info["mean_error"])
            ended = bool(dones[0])
        length = int(references.lengths[references.names.index(info["clip"])]) - 1
        episodes.setdefault(info["clip"], []).append(
            (info["is_success"], info["frame"] / length, 1000 * float(np.mean(errors)))
        )
    vec_env.close()
    names = ("success", "tracked", "error_mm")
    return {clip: dict(zip(names, map(float, np.mean(rows, axis=0)), strict=True)) for clip, rows in episodes.items()}


def print_table() -> None:
    """One row for each task and arm, means over clips, seed by seed."""
    rows = []
    for task in TASKS:
        for arm in ARMS:
            files = sorted(RESULTS.glob(result_file(arm, task, 0).name.replace("seed0", "seed*")))
            results = [json.loads(file.read_text()) for file in files]
            results = [result for result in results if is_done(arm, task, result["seed"])]
            if not results:
                continue
            cells = []
            for mode in ("deterministic", "sampled"):
                for max_error, name, factor in MEASURES:
                    of_seeds = [
                        factor * np.mean([clip[name] for clip in result["scores"][f"{mode}, {max_error} m"].values()])
                        for result in results
                    ]
                    cells.append("; ".join(f"{value:.0f}" for value in of_seeds))
            rows.append([task, arm, ", ".join(str(result["seed"]) for result in results), *cells])
    of_mode = ["success in %", "success in % (0.25 m)", "tracked in %", "error in mm"]
    header = ["Task", "Arm", "Seeds", *of_mode, *(f"sampled: {name}" for name in of_mode)]
    if rows:
        write_table(RESULTS.with_suffix(".csv"), header, rows)


def main() -> None:
    do_runs(__file__, __doc__, ("arms", ARMS), TASKS, SEEDS, run, result_file, is_done)
    print_table()


if __name__ == "__main__":
    main()
