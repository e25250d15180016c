"""
What two processes save, and what it costs them to communicate: `python benchmarks/distributed.py`

The same work is done by one process and by two of torchrun, with one torch thread each, in turn. Time is that of rank 0 for
one step: of environments and updates for FPO (`learn()` with the hyperparameters of dm_control/cheetah-run-v0, 16
environments), of the gradient on a dataset for FQL (batch 256). Communication is the time that rank 0 spends in collectives,
waiting for the other process included. Bytes are those of the gradients of one update.

The results go to benchmarks/results/distributed.json, and the table beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from runs import fpo_hyperparameters, provenance, write_result, write_table

RESULTS = Path(__file__).parent / "results" / "distributed.json"
TASK = "dm_control/cheetah-run-v0"
N_PROCESSES = (1, 2)
#: Name -> number of steps that are timed, after a tenth of them or a rollout
CASES = {"FPO learn()": 3 * 2048, "FQL 2x256": 150, "FQL 4x512": 30}


class Collectives:
    """What a process spends in the collectives of sb3_flow, in the body of a ``with``."""

    def __enter__(self) -> "Collectives":
        from sb3_flow import distributed

        self.seconds, self.sizes = 0.0, [0]
        self.functions = {name: getattr(distributed, name) for name in ("all_reduce", "gather", "broadcast")}
        for name, function in self.functions.items():
            setattr(distributed, name, self.timed(function))
        return self

    def __exit__(self, *_) -> None:
        from sb3_flow import distributed

        for name, function in self.functions.items():
            setattr(distributed, name, function)

    def timed(self, function):
        def call(value, *args):
            start = time.perf_counter()
            result = function(value, *args)
            self.seconds += time.perf_counter() - start
            if hasattr(value, "nbytes"):
                self.sizes.append(value.nbytes)
            return result

        return call


def make_fpo(n_processes: int):
    from gymnasium.wrappers import FlattenObservation
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.utils import LinearSchedule

    import sb3_flow.zoo
    from sb3_flow import FPO

    sb3_flow.zoo.register_envs(TASK)
    hyperparameters = fpo_hyperparameters(TASK)
    for name in ("n_timesteps", "env_wrapper"):
        del hyperparameters[name]
    hyperparameters.update(device="cpu", seed=0)
    hyperparameters["learning_rate"] = LinearSchedule(float(hyperparameters["learning_rate"].removeprefix("lin_")), 0.0, 1.0)
    env = make_vec_env(TASK, hyperparameters.pop("n_envs") // n_processes, wrapper_class=FlattenObservation)
    return FPO(env=env, **hyperparameters)


def make_fql(width: int, depth: int):
    from throughput import Still

    from sb3_flow import FQL

    n_transitions, obs_dim, action_dim = 10_000, 17, 6
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((n_transitions + 1, obs_dim)).astype(np.float32)
    dataset = dict(
        observations=observations[:-1],
        actions=rng.uniform(-1, 1, (n_transitions, action_dim)).astype(np.float32),
        rewards=rng.uniform(size=n_transitions).astype(np.float32),
        next_observations=observations[1:],
        terminals=np.arange(n_transitions) % 1000 == 999,
    )
    policy_kwargs = dict(net_arch=[width] * depth)
    return FQL(
        "MlpPolicy", Still(obs_dim, action_dim), dataset=dataset, buffer_size=1, policy_kwargs=policy_kwargs, device="cpu"
    )


def measure(case: str) -> dict[str, Any]:
    """In one of the processes."""
    from sb3_flow import distributed

    n_steps = CASES[case]
    if case.startswith("FPO"):
        model = make_fpo(distributed.world_size())
        learn, n_warm_up = model.learn, model.n_steps
    else:
        depth, width = case.split()[-1].split("x")
        model = make_fql(int(width), int(depth))
        learn, n_warm_up = model.learn_offline, n_steps // 10
    learn(n_warm_up)
    with Collectives() as collectives:
        start = time.perf_counter()
        learn(n_steps)
        seconds = time.perf_counter() - start
    return dict(
        name=case,
        milliseconds=1000 * seconds / n_steps,
        communication=collectives.seconds / seconds,
        bytes_per_update=max(collectives.sizes),
    )


HEADER = ("", "1 process, ms", "2 processes, ms", "1 / 2 processes", "bytes per update", "time in communication")


def table(rows: list[dict]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for row in rows:
        one, two = (statistics.median(run["milliseconds"] for run in row[f"{number}"]) for number in N_PROCESSES)
        share = statistics.median(run["communication"] for run in row["2"])
        size = row["2"][0]["bytes_per_update"]
        lines.append((row["name"], f"{one:.3g}", f"{two:.3g}", f"{one / two:.2f}", f"{size:,}", f"{share:.0%}"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        import torch as th

        th.set_num_threads(1)
        results = [measure(case) for case in args.only]
        if os.environ.get("RANK", "0") == "0":
            print("\n" + json.dumps(results), flush=True)
        return
    if args.table_only:
        write_table(args.results.with_suffix(".csv"), HEADER, table(json.loads(args.results.read_text())["rows"]))
        return

    rows: list[dict[str, Any]] = [dict(name=name, **{f"{number}": [] for number in N_PROCESSES}) for name in args.only]
    for _ in range(args.repeats):
        for number in N_PROCESSES:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{number}"] if number > 1 else []
            command = [sys.executable, *launcher, __file__, "--child", "--only", *args.only]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{number} processes failed, see above")
            for row, result in zip(rows, json.loads(done.stdout.splitlines()[-1]), strict=True):
                row[f"{number}"].append(result)
    source = dict(command=f"python benchmarks/distributed.py --repeats {args.repeats}", **provenance())
    write_result(args.results, dict(rows=rows, **source))
    write_table(args.results.with_suffix(".csv"), HEADER, table(rows))


if __name__ == "__main__":
    main()
