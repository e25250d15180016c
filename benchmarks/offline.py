"""
Offline methods on OGBench: `SB3_FLOW_DATA=DATA python benchmarks/offline.py`

FQL, three changes to it, what it is compared with, and a clone, from the same 200,000 transitions with the same networks
(2×128), which two cores can afford; the papers have a million transitions and 4×512. DATA has the datasets of
`python benchmarks/make_ogbench_data.py`. Each run is one `sb3-flow train` in a process of its own with one thread, on a GPU
in captured graphs where there is one, which is evaluated five times over 50 episodes, with noise as the authors do; success
is the mean of the last three. It leaves a JSON file in benchmarks/results/offline; runs whose file is there with today's
settings are not repeated, so that an interrupted benchmark goes on where it stopped, and can be done in parts (--tasks,
--methods, --seeds, --jobs).

All else is of hyperparams/*.yml (the papers' settings for these tasks), and of the papers for QC-FQL (alpha 100, chunks of 5)
and the lower bound (ten critics, half a standard deviation).
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from runs import ROOT, class_defaults, do_runs, has_result, mean_and_interval, provenance, train, write_result, write_table

RESULTS = ROOT / "benchmarks" / "results" / "offline"
STEPS = 50_000
N_EVALUATIONS, N_EVAL_EPISODES, N_LAST = 5, 50, 3
NET_ARCH = [128, 128]
TASKS = {"cube-single": "cube-single-play", "scene": "scene-play", "puzzle-3x3": "puzzle-3x3-play"}
#: Algorithm, its arguments, and those of its policy
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FlowBC": ("flow_bc", {}, {}),
    "IFQL": ("ifql", {}, {}),
    "FBRAC": ("fbrac", {}, {}),
    "FAWAC": ("fawac", {}, {}),
    "FQL": ("fql", {}, {}),
    "FQL-lower-bound": ("fql", dict(rho=0.5), dict(n_critics=10)),
    "FQL-anchor": ("fql", dict(distillation="anchor"), {}),
    "QC-FQL": ("fql", dict(chunk_size=5, alpha=100.0), {}),
}
SEEDS = (0, 1, 2)


def env_id(task: str) -> str:
    return f"ogbench/{TASKS[task]}-singletask-v0"


def hyperparameters(method: str, task: str) -> dict[str, Any]:
    """The block of hyperparameters, in rl-zoo3's format, but for the folder of the dataset."""
    from sb3_flow.zoo import default_conf_file

    algo, arguments, policy_kwargs = METHODS[method]
    block = yaml.safe_load(Path(default_conf_file(algo)).read_text())[env_id(task)]
    return block | arguments | dict(offline_steps=STEPS, policy_kwargs=policy_kwargs | dict(net_arch=NET_ARCH))


def settings(method: str, task: str) -> dict[str, Any]:
    """All that a result depends on."""
    from sb3_flow.zoo import FLOW_ALGOS

    evaluations = dict(number=N_EVALUATIONS, episodes=N_EVAL_EPISODES, last=N_LAST)
    defaults = class_defaults(FLOW_ALGOS[METHODS[method][0]])
    return dict(hyperparameters=hyperparameters(method, task), defaults=defaults, evaluations=evaluations)


def result_file(method: str, task: str, seed: int) -> Path:
    return RESULTS / f"{task}-{method}-seed{seed}.json"


def is_done(method: str, task: str, seed: int) -> bool:
    """Whether there is a result, of today's settings."""
    return has_result(result_file(method, task, seed), settings(method, task))


def run(method: str, task: str, seed: int, logs: Path) -> None:
    """One run, in this process."""
    import torch as th

    th.set_num_threads(1)
    source = provenance()
    algo, block, folder = METHODS[method][0], hyperparameters(method, task), logs / result_file(method, task, seed).stem
    dataset = f"{block['dataset']}@{Path(os.environ['SB3_FLOW_DATA']).resolve()}"
    arguments = ["--eval-freq", str(STEPS // N_EVALUATIONS), "--eval-episodes", str(N_EVAL_EPISODES), "--n-eval-envs", "1",
                 "--save-freq", "-1"]  # fmt: skip
    has_gpu = th.cuda.is_available()
    train(algo, env_id(task), 0, seed, block | dict(dataset=dataset, compile=has_gpu), folder, arguments)
    with np.load(next(folder.rglob("evaluations.npz"))) as evaluations:
        curve = [
            [int(step), float(share.mean())]
            for step, share in zip(evaluations["timesteps"], evaluations["successes"], strict=True)
        ]
    result = dict(
        method=method,
        task=task,
        env=env_id(task),
        seed=seed,
        success=float(np.mean([share for _, share in curve[-N_LAST:]])),
        curve=curve,
        device=th.cuda.get_device_name() if has_gpu else "CPU",
        command=f"SB3_FLOW_DATA=DATA python benchmarks/offline.py --tasks {task} --methods {method} --seeds {seed}",
        **settings(method, task),
        **source,
    )
    write_result(result_file(method, task, seed), result)


def print_table() -> None:
    """One row a method."""
    rows = []
    for method in METHODS:
        files = [[result_file(method, task, seed) for seed in SEEDS if is_done(method, task, seed)] for task in TASKS]
        success = [[100 * json.loads(file.read_text())["success"] for file in of_task] for of_task in files]
        rows.append([method, *map(mean_and_interval, success)])
    write_table(RESULTS.with_suffix(".csv"), ["Success in %", *TASKS], rows)


def main() -> None:
    do_runs(__file__, __doc__, ("methods", METHODS), TASKS, SEEDS, run, result_file, is_done)
    print_table()


if __name__ == "__main__":
    main()
