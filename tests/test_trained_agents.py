"""The agents that come with the package, and where they are taken."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')

import make_trained_agents as benchmark
from command_line import sb3_flow_main
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_flow.zoo import EVALUATED_WITH_NOISE, FLOW_ALGOS, register, register_envs, trained_agents
from sb3_flow.zoo.evaluate import load_run

#: What brings the environments
NEEDED = {"dm_control/": "dm_control", "ogbench/": "ogbench", "-v5": "mujoco"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and what is kept of it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        params = ["n_envs:1", "n_steps:64", "batch_size:64", "n_epochs:1"]
        sb3_flow_main(
            monkeypatch, "train", "--algo", "fpo", "--env", "Pendulum-v1", "-n", 64, "-f", "elsewhere", "-params", *params
        )  # fmt: skip
        monkeypatch.setattr(benchmark, "ROOT", folder)
        of_benchmark = benchmark.Agent("fpo", "Pendulum-v1")
        benchmark.leave(of_benchmark, Path("elsewhere/fpo/Pendulum-v1_1/Pendulum-v1.zip"), dict(mean_return=1.0))
        shutil.move("trained_agents", "came_with_it")
    return folder


@pytest.fixture
def agent(trained, monkeypatch, tmp_path):
    """One that came with the package."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trained_agents, "trained_agents_folder", lambda: tmp_path / "came_with_it")
    return tmp_path / "came_with_it" / "fpo" / "Pendulum-v1_1"


def test_what_is_kept_of_a_run(agent):
    """The model acts as it did, but is smaller."""
    files = {str(file.relative_to(agent)) for file in agent.rglob("*") if file.is_file()}
    assert files == {"Pendulum-v1.zip", "Pendulum-v1/args.yml", "Pendulum-v1/config.yml", "evaluation.json"}
    model, env, _ = load_run("fpo", "Pendulum-v1", str(agent.parents[1]))
    before, _, path = load_run("fpo", "Pendulum-v1", "elsewhere")
    obs = env.observation_space.sample()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], before.predict(obs, deterministic=True)[0])
    assert (agent / "Pendulum-v1.zip").stat().st_size < 0.6 * path.stat().st_size
    # It can be trained further
    model.set_env(env)
    model.learn(64)


def test_without_a_run_of_ones_own(agent, monkeypatch, capsys):
    """It is taken, which is said, and nothing is written into its folder."""
    before = {file: file.stat().st_mtime_ns for file in agent.rglob("*")}
    arguments = ["--algo", "fpo", "--env", "Pendulum-v1"]
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    for command, *more in [
        ("enjoy", "--no-render", "-n", 5),
        ("evaluate", "-n", 1),
        ("plot-flow", "--n-samples", 10),
        ("record-video", "-n", 5),
        *([("export",)] if importlib.util.find_spec("onnxscript") else []),
    ]:
        sb3_flow_main(monkeypatch, command, *arguments, *more)
        assert "No run of fpo on Pendulum-v1 in logs/: this is the agent that comes with sb3-flow" in capsys.readouterr().out
        assert not Path("logs").exists()
    assert {file: file.stat().st_mtime_ns for file in agent.rglob("*")} == before
    assert Path("flow.png").is_file() and list(Path("videos").glob("*.mp4"))


def test_by_way_of_the_hub(agent, monkeypatch, capsys):
    """It is a run without logs then."""
    arguments = ["--algo", "fpo", "--env", "Pendulum-v1"]
    sb3_flow_main(monkeypatch, "push-to-hub", *arguments, "-n", 2, "--dry-run")
    sb3_flow_main(monkeypatch, "load-from-hub", *arguments, "--from-folder", "hub/fpo-Pendulum-v1")
    sb3_flow_main(monkeypatch, "evaluate", *arguments, "-n", 1)
    assert Path("logs/fpo/Pendulum-v1_1/evaluation.json").is_file()
    assert "No learning curve: there are no Monitor logs in logs/fpo/Pendulum-v1_1" in capsys.readouterr().out


def test_a_run_of_ones_own(agent, monkeypatch, capsys):
    """Comes first, and a folder that was asked for is the one that is looked into."""
    shutil.copytree("elsewhere", "logs")
    arguments = ["evaluate", "--algo", "fpo", "--env", "Pendulum-v1", "-n", 1]
    sb3_flow_main(monkeypatch, *arguments)
    assert "comes with" not in capsys.readouterr().out and Path("logs/fpo/Pendulum-v1_1/evaluation.json").is_file()
    # (a model that is not in the folder of a run)
    shutil.rmtree("logs/fpo/Pendulum-v1_1")
    assert trained_agents.folder_with_run("fpo", "Pendulum-v1", trained_agents.Default("logs")) == str(agent.parents[1])
    Path("logs/fpo/Pendulum-v1.zip").touch()
    assert trained_agents.folder_with_run("fpo", "Pendulum-v1", trained_agents.Default("logs")) == "logs"
    shutil.rmtree("logs")
    Path("logs").mkdir()
    with pytest.raises(SystemExit, match="The logs/fpo folder was not found, expected an algorithm with runs"):
        sb3_flow_main(monkeypatch, *arguments, "-f", "logs")
    Path("logs").rmdir()
    with pytest.raises(SystemExit, match="the 'logs' folder was not found"):
        sb3_flow_main(monkeypatch, *arguments, "-f", "logs")


def test_without_matplotlib(agent, monkeypatch, capsys):
    """The result is there, and what is not says why."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "matplotlib" else find_spec(name, *args)
    )
    sb3_flow_main(monkeypatch, "evaluate", "--algo", "fpo", "--env", "Pendulum-v1", "-n", 1)
    assert "(deterministic return, 1 episodes)" in capsys.readouterr().out
    sb3_flow_main(monkeypatch, "evaluate", "--algo", "fpo", "--env", "Pendulum-v1", "-n", 1, "-f", "elsewhere")
    assert (
        'No learning curve: matplotlib is not installed, it comes with: pip install "sb3-flow[plots]"'
        in capsys.readouterr().out
    )


def test_no_such_agent(agent, monkeypatch):
    """What there is, is named. It is not taken for a certain run."""
    for certain in (["--exp-id", 1], ["--load-best"]):
        with pytest.raises(SystemExit, match="the 'logs' folder was not found"):
            sb3_flow_main(monkeypatch, "evaluate", "--algo", "fpo", "--env", "Pendulum-v1", *certain)
    with pytest.raises(SystemExit, match="argument --env: found 'Pendulm-v1'"):
        sb3_flow_main(monkeypatch, "evaluate", "--algo", "fpo", "--env", "Pendulm-v1")
    with pytest.raises(SystemExit, match=r"the 'logs' folder was not found.*trained agents of fpo are there for Pendulum-v1"):
        sb3_flow_main(monkeypatch, "evaluate", "--algo", "fpo", "--env", "MountainCarContinuous-v0")
    with pytest.raises(SystemExit, match=r"the 'logs' folder was not found, expected a log folder$"):
        sb3_flow_main(monkeypatch, "evaluate", "--algo", "ppo", "--env", "Pendulum-v1")


def test_agents():
    """There are some, and each can be made again."""
    agents = trained_agents.trained_agents()
    assert agents and set(agents) <= {(agent.algo, agent.env) for agent in benchmark.AGENTS}


@pytest.mark.parametrize(("algo", "env"), trained_agents.trained_agents())
def test_returns(algo, env, monkeypatch, tmp_path):
    """Are those that were recorded."""
    monkeypatch.chdir(tmp_path)
    for name, package in NEEDED.items():
        if name in env:
            pytest.importorskip(package)
    register()
    register_envs(env)
    folder = trained_agents.trained_agents_folder()
    model, vec_env, path = load_run(algo, env, str(folder), device="cpu")
    mean, _ = evaluate_policy(model, vec_env, benchmark.N_FEW, deterministic=algo not in EVALUATED_WITH_NOISE)
    recorded = json.loads((path.parent / "evaluation.json").read_text())
    low, high = recorded["interval_of_the_mean_of_5"]
    assert low <= mean <= high
    # (what made it)
    assert recorded["command"].startswith(f"sb3-flow train --algo {algo} --env {env} ")
    assert type(model) is FLOW_ALGOS[algo]
