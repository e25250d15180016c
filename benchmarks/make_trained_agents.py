"""
The agents in trained_agents/, which come with the package: `python benchmarks/make_trained_agents.py`

Each is one `sb3-flow train`, in a process of its own with one thread and seed 0 (the only one: none was chosen), then 100
episodes as its algorithm is evaluated. What is left of a run is its model, without the state of its optimizers and replay
buffer, its hyperparameters and options, and ``evaluation.json``: the command, returns, and the interval that the mean of five
episodes is in (99.9 %, bootstrap). Those that are there are not trained again, unless their files are removed. Datasets of
OGBench are in the folder DATASETS of the working directory (benchmarks/make_ogbench_data.py makes such ones, of 200,000
transitions).
"""

import argparse
import functools
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_sb3 import EnvironmentName
from runs import ROOT, Job, provenance, run_jobs, write_result

N_EPISODES, N_FEW = 100, 5
CUBE, MAZE = "ogbench/cube-single-play-singletask-v0", "ogbench/pointmaze-medium-navigate-singletask-v0"
#: Networks that two cores can train on such a dataset
OFFLINE = 'offline_steps:{steps} "policy_kwargs:dict(net_arch=[128]*4)" "dataset:\'ogbench:{data}@DATASETS\'"'


def of_dataset(env: str, steps: int) -> str:
    return f"-params {OFFLINE.format(steps=steps, data=env.removeprefix('ogbench/'))}"


class Agent(NamedTuple):
    """Algorithm, environment, and the other options of `sb3-flow train`."""

    algo: str
    env: str
    options: str = ""

    @property
    def folder(self) -> Path:
        return ROOT / "trained_agents" / self.algo / f"{EnvironmentName(self.env)}_1"

    @property
    def name(self) -> str:
        return f"{self.algo}-{EnvironmentName(self.env)}"


AGENTS = [
    *(Agent("fpo", env, "-n 1000000 --vec-env envpool") for env in ("HalfCheetah-v5", "Walker2d-v5", "Hopper-v5")),
    *(Agent("fpo", f"dm_control/{task}-v0", "-n 1000000 --vec-env envpool") for task in ("cheetah-run", "ball_in_cup-catch")),
    *(Agent("fpo", f"sb3_flow/{task}-v0") for task in ("GridWorld", "GridWorld-two_slits", "MultiGoal-8")),
    Agent("dppo", "HalfCheetah-v5", "-n 1000000 --vec-env envpool"),
    Agent("fql", CUBE, of_dataset(CUBE, 250_000)),
    Agent("ifql", CUBE, of_dataset(CUBE, 250_000)),
    Agent("flow_bc", CUBE, of_dataset(CUBE, 250_000)),
    Agent("fql", MAZE, of_dataset(MAZE, 100_000)),
]


def train(agent: Agent, logs: Path) -> None:
    """One agent, in this process."""
    from sb3_flow.zoo import cli
    from sb3_flow.zoo.evaluate import evaluate, mean_interval

    source = provenance()
    command = f"sb3-flow train --algo {agent.algo} --env {agent.env} --seed 0 {agent.options}".rstrip()
    here = f"--num-threads 1 --device cpu --verbose 0 --eval-freq -1 -f {logs}"
    sys.argv = shlex.split(f"{command} {here}")
    cli.main()
    result = evaluate(agent.algo, agent.env, str(logs), n_eval_episodes=N_EPISODES, device="cpu")
    path = Path(result.pop("model"))
    few = mean_interval(result["returns"], N_FEW, 0.999)
    leave(agent, path, dict(command=command, interval_of_the_mean_of_5=few) | result | source)


def leave(agent: Agent, model_path: Path, result: dict[str, Any]) -> None:
    """What is kept of a run: all of it, or nothing."""
    from sb3_flow.zoo import FLOW_ALGOS

    agent.folder.parent.mkdir(parents=True, exist_ok=True)
    env_name = str(EnvironmentName(agent.env))
    with tempfile.TemporaryDirectory(dir=agent.folder.parent) as unfinished:
        folder = Path(unfinished) / agent.folder.name
        (folder / env_name).mkdir(parents=True)
        model = FLOW_ALGOS[agent.algo].load(model_path, device="cpu")
        names, _ = model._get_torch_save_params()
        for name in names:
            if name.endswith("optimizer"):
                optimizer: Any = functools.reduce(getattr, name.split("."), model)
                optimizer.state.clear()
        model.save(folder / f"{env_name}.zip")
        for file in ("args.yml", "config.yml"):
            # (without the paths of this machine)
            text = (model_path.parent / env_name / file).read_text().replace(f"{ROOT}/", "")
            (folder / env_name / file).write_text(text)
        statistics = model_path.parent / env_name / "vecnormalize.pkl"
        if statistics.exists():
            shutil.copy(statistics, folder / env_name)
        write_result(folder / "evaluation.json", result)
        folder.rename(agent.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", choices=[agent.name for agent in AGENTS], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--logs", type=Path, default=Path("logs") / "trained_agents")
    parser.add_argument("--run-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    agents = [agent for agent in AGENTS if args.agents is None or agent.name in args.agents]
    if args.run_one:
        train(agents[0], args.logs)
        return
    missing = [agent for agent in agents if not agent.folder.exists()]
    jobs = [Job(agent.name, [__file__, "--run-one", "--agents", agent.name, "--logs", str(args.logs)]) for agent in missing]
    print(f"{len(jobs)} agents to train", flush=True)
    run_jobs(jobs, args.jobs, args.logs)
    for agent in agents:
        result = json.loads((agent.folder / "evaluation.json").read_text())
        cells = [agent.algo, agent.env, f"{result['mean_return']:.1f} ± {result['std_return']:.1f}", f"`{result['command']}`"]
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
