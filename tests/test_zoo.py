"""The command line, through rl-zoo3's own programs."""

import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from torch import nn

pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')

import optuna
from command_line import sb3_flow_main
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3 import ALGOS
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

import sb3_flow.zoo
from sb3_flow import DPPO, FPO, FQL
from sb3_flow.common.flow import CFM_LOSSES

TRAIN = ["train", "--algo", "fpo", "--env", "Pendulum-v1", "--num-threads", "1", "--seed", "1", "-params", "n_envs:2",
         "batch_size:64", "n_epochs:2", "n_steps:64", "normalize:True", "--verbose", "0"]  # fmt: skip
ROOT = Path(sb3_flow.__file__).parent.parent


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    """Nothing may depend on the working directory."""
    monkeypatch.chdir(tmp_path)


def test_register():
    sb3_flow.zoo.register()
    sb3_flow.zoo.register()
    assert ALGOS["fpo"] is FPO and ALGOS["dppo"] is DPPO and ALGOS["fql"] is FQL and "ppo" in ALGOS
    assert {"fpo", "dppo", "fql", "ppo"} <= HYPERPARAMS_SAMPLER.keys() & HYPERPARAMS_CONVERTER.keys()


@pytest.mark.parametrize("algo", sb3_flow.zoo.FLOW_ALGOS)
def test_hyperparameters_are_valid(algo):
    """Every block of the YAML files builds a model."""
    from rl_zoo3.exp_manager import ExperimentManager

    from sb3_flow.zoo.hyperparams import evaluate, expand_preset

    blocks = yaml.safe_load(Path(sb3_flow.zoo.default_conf_file(algo)).read_text())
    assert "default" in blocks
    # Those of the zoo, and those that need a dataset
    others = {"n_envs", "n_timesteps", "policy", "env_wrapper", "frame_stack"}
    others |= {"dataset", "dataset_kwargs", "offline_steps"}
    for env_id, hyperparams in blocks.items():
        if "dataset" in hyperparams:
            # Each has the dataset of its own task
            assert hyperparams["dataset"] in (env_id.replace("ogbench/", "ogbench:"), f"{env_id}.hdf5")
            assert hyperparams["offline_steps"] == (1_000_000 if "ogbench/" in env_id and "visual" not in env_id else 500_000)
            if env_id.startswith("ogbench/"):
                gym.spec(env_id)
        elif not env_id.startswith((".", "default", "dm_control/")):
            gym.spec(env_id)
        if hyperparams["policy"] == "CnnPolicy":
            assert "visual" in env_id and hyperparams["frame_stack"] == 3
            hyperparams["policy"] = "MlpPolicy"
        kwargs = {key: value for key, value in hyperparams.items() if key not in others}
        kwargs = ExperimentManager._preprocess_schedules(expand_preset(algo, kwargs, str))
        kwargs["policy_kwargs"] = evaluate(env_id, "policy_kwargs", kwargs.get("policy_kwargs", "{}"))
        model = sb3_flow.zoo.FLOW_ALGOS[algo](hyperparams["policy"], "Pendulum-v1", **kwargs)
        if isinstance(model, (FPO, DPPO)):
            assert model.n_steps * hyperparams.get("n_envs", 1) % model.batch_size == 0


def test_dm_control(monkeypatch, capsys):
    """Its tasks are found by their names, and train with their own hyperparameters."""
    pytest.importorskip("dm_control", reason='needs pip install "sb3-flow[dmc]"')
    pytest.importorskip("shimmy", reason='needs pip install "sb3-flow[dmc]"')
    blocks = yaml.safe_load(Path(sb3_flow.zoo.default_conf_file("fpo")).read_text())
    tasks = [env_id for env_id in blocks if env_id.startswith("dm_control/")]
    assert len(tasks) == 10
    for env_id in tasks:
        sb3_flow.zoo.register_envs(env_id)
        gym.spec(env_id)
    short = ["-n", 64, "--eval-freq", -1, "-params", "n_envs:2", "n_steps:32", "batch_size:32", "n_epochs:1"]
    sb3_flow_main(monkeypatch, "train", "--algo", "fpo", "--env", "dm_control/ball_in_cup-catch-v0", *short)
    model = FPO.load("logs/fpo/dm_control-ball_in_cup-catch-v0_1/dm_control-ball_in_cup-catch-v0.zip")
    # Position and velocity, flattened
    assert model.observation_space.shape == (8,) and model.gamma == 0.95
    sb3_flow_main(monkeypatch, "evaluate", "--algo", "fpo", "--env", "dm_control/ball_in_cup-catch-v0", "-n", 1)
    assert "deterministic return, 1 episodes" in capsys.readouterr().out


def test_train_evaluate_enjoy(monkeypatch, capsys):
    sb3_flow_main(monkeypatch, *TRAIN, "-n", 512, "--eval-freq", 256, "--eval-episodes", 2, "-P")
    run = Path("logs/fpo/Pendulum-v1_1")
    assert (run / "Pendulum-v1.zip").is_file() and (run / "0.monitor.csv").is_file()
    # Our own hyperparameters, with those of the command line on top
    assert "hyperparams/fpo.yml" in capsys.readouterr().out
    config = yaml.unsafe_load((run / "Pendulum-v1" / "config.yml").read_text())
    assert config["n_steps"] == 64 and config["gamma"] == 0.9

    sb3_flow_main(monkeypatch, "evaluate", "--algo", "fpo", "--env", "Pendulum-v1", "-n", 3)
    out = capsys.readouterr().out
    result = json.loads((run / "evaluation.json").read_text())
    assert result["n_eval_episodes"] == 3 and result["deterministic"] and result["num_timesteps"] == 512
    assert f"{result['mean_return']:.2f} ± {result['std_return']:.2f}" in out
    image = (run / "learning_curve.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000

    sb3_flow_main(monkeypatch, "enjoy", "--algo", "fpo", "--env", "Pendulum-v1", "--no-render", "-n", 400)
    assert "2 Episodes" in capsys.readouterr().out


def test_fql_offline_then_online(monkeypatch, capsys):
    n = 200
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(n, 3)).astype(np.float32)
    np.savez(
        "data.npz", observations=observations, next_observations=observations, rewards=np.zeros(n), dones=np.zeros(n),
        actions=rng.uniform(-2, 2, size=(n, 1)),
    )  # fmt: skip
    train = ["train", "--algo", "fql", "--env", "Pendulum-v1", "--eval-freq", 40, "--eval-episodes", 1, "--save-freq", 50]
    params = ["-params", "dataset:'data.npz'", "offline_steps:100", "policy_kwargs:dict(net_arch=[16])", "batch_size:32"]
    sb3_flow_main(monkeypatch, *train, "-n", 60, *params)
    run = Path("logs/fql/Pendulum-v1_1")
    model = FQL.load(run / "Pendulum-v1.zip", buffer_size=1)
    assert model.num_timesteps == 160 and model._n_updates == 160
    # One axis for both phases
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [40, 80, 120, 160]
    assert checkpoint_steps(run) == [50, 100, 150]

    sb3_flow_main(monkeypatch, "evaluate", "--algo", "fql", "--env", "Pendulum-v1", "-n", 1)
    buffer_sizes = []
    load = FQL.load.__func__
    monkeypatch.setattr(
        FQL,
        "load",
        classmethod(lambda cls, *args, **kwargs: buffer_sizes.append(kwargs["buffer_size"]) or load(cls, *args, **kwargs)),
    )
    sb3_flow_main(monkeypatch, "enjoy", "--algo", "fql", "--env", "Pendulum-v1", "--no-render", "-n", 200)
    assert "1 Episodes" in capsys.readouterr().out and set(buffer_sizes) == {1}
    assert ALGOS["fql"] is FQL


@pytest.mark.parametrize("preset", [False, True])
def test_zero_timesteps(monkeypatch, capsys, preset):
    """``-n 0`` is not a step in the environment, whatever the hyperparameters say: only an offline phase."""
    np.savez("data.npz", observations=np.zeros((50, 3)), next_observations=np.ones((50, 3)), rewards=np.zeros(50),
             actions=np.zeros((50, 1)))  # fmt: skip
    options = ["--algo", "fql", "--env", "Pendulum-v1", "--eval-freq", -1, "--eval-episodes", 1, "-n", 0]
    if preset:
        Path("my.yml").write_text("Pendulum-v1:\n  policy: MlpPolicy\n  n_timesteps: 500\n")
        options += ["--conf-file", "my.yml"]
    small = ["-params", "buffer_size:100", "policy_kwargs:dict(net_arch=[16])", "batch_size:8"]
    offline = [*small, "dataset:'data.npz'", "offline_steps:5"]
    sb3_flow_main(monkeypatch, "train", *options, *offline)
    model = FQL.load("logs/fql/Pendulum-v1_1/Pendulum-v1.zip")
    assert model.num_timesteps == model._n_updates == 5
    search = ["--n-trials", 2, "--n-startup-trials", 1, "--no-optim-plots", "--seed", 0]
    net_archs = {size: [16] for size in ("small", "medium", "large")}
    monkeypatch.setattr("sb3_flow.zoo.search_spaces.NET_ARCHS", {"offline": net_archs})
    sb3_flow_main(monkeypatch, "optimize", *options, *search, *offline)
    assert "Number of finished trials:  2" in capsys.readouterr().out
    for command in (["train"], ["optimize", *search]):
        with pytest.raises(SystemExit, match="-n/--n-timesteps: 0 timesteps, and no `offline_steps`"):
            sb3_flow_main(monkeypatch, *command, *options, *small)
    with pytest.raises(SystemExit, match="-n/--n-timesteps: 0 timesteps"):
        sb3_flow_main(monkeypatch, "train", "--algo", "fpo", "--env", "Pendulum-v1", "-n", 0)
    assert [path.name for path in Path("logs").glob("*/Pendulum-v1_*")] == ["Pendulum-v1_1"]


def test_evaluation_with_and_without_noise(monkeypatch, capsys):
    """FQL is evaluated with noise, as its authors do, unless told otherwise. Successes are counted."""
    Path("my_tasks.py").write_text(
        "import gymnasium as gym\n"
        "class Task(gym.Wrapper):\n"
        "    def step(self, action):\n"
        "        *outcome, info = self.env.step(action)\n"
        "        return *outcome, info | dict(is_success=True)\n"
        "gym.register('MyTask-v0', lambda **kwargs: Task(gym.make('Pendulum-v1', **kwargs)))\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    calls = []
    predict = FQL.predict
    monkeypatch.setattr(
        FQL, "predict", lambda self, *args, **kwargs: calls.append(kwargs["deterministic"]) or predict(self, *args, **kwargs)
    )
    mine = ["--algo", "fql", "--env", "MyTask-v0", "--gym-packages", "my_tasks"]
    params = ["-params", "learning_starts:1000", "policy_kwargs:dict(net_arch=[16])", "buffer_size:100"]

    def noise_of(*args):
        calls.clear()
        sb3_flow_main(monkeypatch, *args)
        return {not deterministic for deterministic in calls}

    train = ["train", *mine, "--eval-freq", 20, "--eval-episodes", 1, "--save-freq", 20, "-n"]
    assert noise_of(*train, 20, *params) == {True}
    # A run that goes on has its former successes
    sb3_flow_main(monkeypatch, *train, 40, *params, "--resume")
    assert np.load("logs/fql/MyTask-v0_1/evaluations.npz")["successes"].tolist() == [[True], [True]]
    assert noise_of("evaluate", *mine, "-n", 1) == {True}
    assert "Success rate: 100 %" in capsys.readouterr().out
    assert noise_of("evaluate", *mine, "-n", 1, "--deterministic") == {False}
    assert noise_of("enjoy", *mine, "-n", 10, "--no-render") == {True}
    assert noise_of("enjoy", *mine, "-n", 10, "--no-render", "--deterministic") == {False}


def test_datasets_info(monkeypatch, capsys):
    arrays = dict(observations=np.zeros((6, 3)), actions=np.ones((6, 1)), rewards=np.arange(6), dones=np.array([0, 0, 1] * 2))
    np.savez("data.npz", **arrays, next_observations=np.zeros((6, 3)))
    sb3_flow_main(monkeypatch, "datasets", "info", "data.npz")
    out = capsys.readouterr().out
    assert "transitions:   6" in out and "episodes:      2, 2 terminal" in out and "7.50 ± 4.50, from 3.00 to 12.00" in out
    np.savez("bad.npz", **arrays | dict(rewards=np.full(6, np.nan)), next_observations=np.zeros((6, 3)))
    for spec, message in [
        ("nothing.npz", "no dataset file"),
        ("bad.npz", "rewards, row 0: NaN"),
        ("foo:bar", "Unknown dataset"),
    ]:
        with pytest.raises(SystemExit, match=message):
            sb3_flow_main(monkeypatch, "datasets", "info", spec)


def test_other_algorithms_still_train(monkeypatch):
    sb3_flow_main(
        monkeypatch, "train", "--algo", "ppo", "--env", "Pendulum-v1", "-n", 64, "-params", "n_envs:1", "n_steps:64",
        "--eval-freq", -1,
    )  # fmt: skip
    assert Path("logs/ppo/Pendulum-v1_1/Pendulum-v1.zip").is_file()


def test_env_kwargs_and_gym_packages(monkeypatch, capsys):
    """An environment of the user's own, with arguments, is trained, evaluated and shown as it was made."""
    Path("my_package.py").write_text(
        "import gymnasium as gym\n"
        "def make(scale=1.0, **kwargs):\n"
        "    return gym.wrappers.TransformReward(gym.make('Pendulum-v1', **kwargs), lambda reward: scale + 0 * reward)\n"
        "gym.register('MyEnv-v0', make)\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    mine = ["--env", "MyEnv-v0", "--gym-packages", "my_package"]
    train = ["train", "--algo", "fpo", *mine, "-n", 64, "--eval-freq", -1, "--env-kwargs", "scale:5.0"]
    sb3_flow_main(monkeypatch, *train, "-params", "n_envs:1", "n_steps:64", "batch_size:64", "n_epochs:1")
    sb3_flow_main(monkeypatch, "evaluate", "--algo", "fpo", *mine, "-n", 1)
    assert json.loads(Path("logs/fpo/MyEnv-v0_1/evaluation.json").read_text())["mean_return"] == 1000.0
    # Others, beside those of the training
    sb3_flow_main(monkeypatch, "evaluate", "--algo", "fpo", *mine, "-n", 1, "--env-kwargs", "g:9.0")
    result = json.loads(Path("logs/fpo/MyEnv-v0_1/evaluation.json").read_text())
    assert result["mean_return"] == 1000.0 and result["env_kwargs"] == dict(g=9.0)
    sb3_flow_main(monkeypatch, "evaluate", "--algo", "fpo", *mine, "-n", 1, "--env-kwargs", "scale:2.0")
    assert json.loads(Path("logs/fpo/MyEnv-v0_1/evaluation.json").read_text())["mean_return"] == 400.0
    sb3_flow_main(monkeypatch, "enjoy", "--algo", "fpo", *mine, "--no-render", "-n", 200)
    assert "Episode Reward: 1000.00" in capsys.readouterr().out


def test_trained_agent(monkeypatch):
    """-i goes on with the statistics of VecNormalize and the replay buffer, of the end of a run or of a checkpoint."""
    for algo, params in [
        ("fpo", ["n_steps:32", "batch_size:32", "n_epochs:1", "n_envs:1"]),
        ("dppo", ["n_steps:32", "batch_size:32", "n_epochs:1", "n_envs:1"]),
        ("fql", ["learning_starts:10", "policy_kwargs:dict(net_arch=[16])", "batch_size:8", "buffer_size:1000"]),
    ]:
        train = ["train", "--algo", algo, "--env", "Pendulum-v1", "--save-replay-buffer", "--save-freq", 64, "--eval-freq", -1]
        params = ["-params", "normalize:True", *params]
        first, second, third = (Path(f"logs/{algo}/Pendulum-v1_{number}") for number in (1, 2, 3))
        sb3_flow_main(monkeypatch, *train, "-n", 96, *params)
        sb3_flow_main(monkeypatch, *train, "-n", 32, *params, "-i", first / "Pendulum-v1.zip")
        sb3_flow_main(monkeypatch, *train, "-n", 32, *params, "-i", first / "rl_model_64_steps.zip")
        # (SB3 saves a checkpoint before it learns from its last step, and before the replay buffer has it)
        for run, num_timesteps, n_stored, n_updates in [
            (first, 96, 96, dict(fpo=3, dppo=3, fql=86)),
            (second, 128, 128, dict(fpo=4, dppo=4, fql=108)),
            (third, 96, 95, dict(fpo=2, dppo=2, fql=75)),
        ]:
            statistics = pickle.loads((run / "Pendulum-v1" / "vecnormalize.pkl").read_bytes())
            assert statistics.ret_rms.count == pytest.approx(num_timesteps, abs=1)
            model = ALGOS[algo].load(run / "Pendulum-v1.zip")
            assert model._n_updates == n_updates[algo]
            if algo == "fql":
                model.load_replay_buffer(run / "replay_buffer.pkl")
                assert model.replay_buffer.size() == n_stored
    with pytest.raises(SystemExit, match="argument -i/--trained-agent: there is no model"):
        sb3_flow_main(monkeypatch, *train, "-i", "nothing.zip")


def test_search_space():
    """All that is sampled is valid, minibatches divide the rollout, and the sampler sees the same bounds in each trial."""
    sb3_flow.zoo.register()
    for n_envs in (1, 10, 16, 4096):
        study = optuna.create_study()
        distributions = set()
        for _ in range(20):
            trial = study.ask()
            hyperparams = HYPERPARAMS_SAMPLER["fpo"](trial, 1, n_envs, {})
            assert hyperparams["n_steps"] * n_envs % hyperparams["batch_size"] == 0
            # Below, there would be no trust region
            assert FPO("MlpPolicy", "Pendulum-v1").log_ratio_clip > -np.log(1 - trial.distributions["clip_range"].high)
            distributions.add(str(trial.distributions))
        assert len(distributions) == 1
    for algo, model_class in sb3_flow.zoo.FLOW_ALGOS.items():
        for _ in range(10):
            hyperparams = HYPERPARAMS_SAMPLER[algo](optuna.create_study().ask(), 1, 1, {})
            model_class("MlpPolicy", "Pendulum-v1", **hyperparams)


def test_offline_trials_are_evaluated_along_the_way():
    from sb3_flow.zoo.experiment import FlowExperimentManager

    manager = FlowExperimentManager(
        SimpleNamespace(seed=0),
        "fql",
        "Pendulum-v1",
        "logs",
        n_timesteps=-1,
        optimize_hyperparameters=True,
        n_evaluations=None,
    )
    manager._preprocess_hyperparams({"policy": "MlpPolicy", "n_timesteps": 200_000, "offline_steps": 500_000})
    assert manager.n_evaluations == 7


def test_optimize(monkeypatch, capsys):
    """Two trials of each search space in a study of their own, the report, and a training with one of them."""
    np.savez("data.npz", observations=np.zeros((50, 3)), next_observations=np.ones((50, 3)), rewards=np.zeros(50),
             actions=np.zeros((50, 1)))  # fmt: skip
    # (with this seed trials are short)
    for algo, trial_id, seed, n_timesteps, params in [
        ("fpo", 1, 5, 1024, ["n_envs:2"]),
        ("dppo", 1, 11, 1024, ["n_envs:2"]),
        # The first trial is a trial like any other
        ("fql", 0, 0, 4, ["dataset:'data.npz'", "offline_steps:4", "buffer_size:100"]),
    ]:
        study = ["--algo", algo, "--env", "Pendulum-v1", "--storage", "study.log", "--study-name", algo, "-n", n_timesteps]
        options = ["--n-trials", 2, "--n-startup-trials", 2, "--n-evaluations", 1, "--eval-episodes", 1, "--no-optim-plots"]
        sb3_flow_main(monkeypatch, "optimize", *study, *options, "--seed", seed, "-params", *params)
        out = capsys.readouterr().out
        assert "Number of finished trials:  2" in out and "The best trial is number" in out
        (report,) = Path(f"logs/{algo}").glob("report_*.csv")
        assert len(report.read_text().splitlines()) == 3
        # A search is not a run
        assert not list(Path(f"logs/{algo}").glob("Pendulum-v1_*"))
        sb3_flow_main(monkeypatch, "train", *study, "--trial-id", trial_id, "--eval-freq", -1, "-params", *params)
        model = sb3_flow.zoo.FLOW_ALGOS[algo].load(f"logs/{algo}/Pendulum-v1_1/Pendulum-v1.zip")
        trials = optuna.load_study(study_name=algo, storage=JournalStorage(JournalFileBackend("study.log"))).trials
        assert model.gamma == pytest.approx(1 - trials[trial_id].params["one_minus_gamma"])
        assert model.batch_size == 2 ** trials[trial_id].params["batch_size_pow"]
        assert model.num_timesteps == (8 if algo == "fql" else model.n_steps * 2)
        assert ALGOS[algo] is sb3_flow.zoo.FLOW_ALGOS[algo]
    # A search that goes on does not suggest the same again, with the same seed
    sb3_flow_main(monkeypatch, "optimize", *study, *options, "--seed", seed, "-params", *params)
    trials = optuna.load_study(study_name=algo, storage=JournalStorage(JournalFileBackend("study.log"))).trials
    assert len({str(trial.params) for trial in trials}) == 4


@pytest.mark.parametrize("algo", [algo for algo in sb3_flow.zoo.FLOW_ALGOS if algo != "flow_bc"])
def test_nan_is_pruned(monkeypatch, capsys, algo):
    Path("nan_task.py").write_text(
        "import gymnasium as gym\n"
        "def make(**kwargs):\n"
        "    return gym.wrappers.TransformReward(gym.make('Pendulum-v1', **kwargs), lambda reward: float('nan'))\n"
        "gym.register('NaN-v0', make)\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    study = ["--algo", algo, "--env", "NaN-v0", "--gym-packages", "nan_task", "--storage", "study.log", "--study-name", algo]
    params = ["learning_starts:10", "buffer_size:100"] if algo not in ("fpo", "dppo") else ["n_envs:16"]
    with pytest.raises(SystemExit, match="no trial was completed"):
        sb3_flow_main(monkeypatch, "optimize", *study, "-n", 9999, "--seed", 11, "--max-total-trials", 2, "-params", *params)
    trials = optuna.load_study(study_name=algo, storage=JournalStorage(JournalFileBackend("study.log"))).trials
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.PRUNED] * 2
    assert "NaN" in capsys.readouterr().out


def test_programs_of_rl_zoo3(monkeypatch, capsys):
    """Videos, plots and the table of all trained agents."""
    for package in ("moviepy", "pygame", "seaborn"):
        pytest.importorskip(package, reason='needs pip install "sb3-flow[zoo,plots]"')
    import imageio.v2 as imageio
    from matplotlib import pyplot as plt

    # Without a screen
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    plt.switch_backend("agg")
    # The name of a folder is not that of the environment
    Path("my_pendulum.py").write_text(
        "import gymnasium as gym; gym.register('my/Pendulum-v0', lambda **kw: gym.make('Pendulum-v1', **kw))"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    mine = ["--algo", "fpo", "--env", "my/Pendulum-v0", "--gym-packages", "my_pendulum"]
    params = ["-params", "n_steps:64", "batch_size:64", "n_envs:1", "n_epochs:1"]
    sb3_flow_main(monkeypatch, "train", *mine, "-n", 256, "--eval-freq", 128, "--eval-episodes", 2, *params)
    sb3_flow_main(monkeypatch, "record-video", *mine, "-n", 5)
    (video,) = Path("logs/fpo/my-Pendulum-v0_1/videos").glob("*.mp4")
    frames = [frame for frame in imageio.get_reader(video)]
    # The pendulum, on white
    assert len(frames) >= 5 and frames[-1].mean() > 200 and frames[-1].min() < 100
    sb3_flow_main(monkeypatch, "plot-train", "-a", "fpo", "-e", "my/Pendulum-v0", "-f", "logs", "-w", "1")
    sb3_flow_main(monkeypatch, "all-plots", "-a", "fpo", "-e", "my/Pendulum-v0", "-f", "logs", "-o", "res")
    assert "|my-Pendulum-v0|" in capsys.readouterr().out
    # (of a single run)
    sb3_flow_main(monkeypatch, "plot-from-file", "-i", "res.pkl", "-b")
    for figure in ("plot-train_1", "all-plots_1", "plot-from-file_1", "plot-from-file_2", "plot-from-file_3"):
        assert Path(f"{figure}.png").stat().st_size > 5000
    for args, message in [
        (["all-plots", "-a", "fpo"], "required: -e/--env, -f/--exp-folders"),
        (["plot-from-file"], "required: -i/--input"),
        (["record-video", "--algo", "fpo", "--env", "Pendulum-v1"], "No model found for fpo on Pendulum-v1"),
    ]:
        with pytest.raises(SystemExit, match=message):
            sb3_flow_main(monkeypatch, *args)


def test_benchmark(monkeypatch):
    for algo in ("fpo", "ppo"):
        sb3_flow_main(
            monkeypatch, "train", "--algo", algo, "--env", "Pendulum-v1", "-n", 64, "--eval-freq", -1,
            "-params", "n_envs:1", "n_steps:64", "batch_size:64",
        )  # fmt: skip
    sb3_flow_main(monkeypatch, "benchmark", "-n", 200, "--num-threads", 1)
    table = Path("benchmark.md").read_text().replace("  ", " ")
    assert "|fpo |Pendulum-v1|" in table and "|ppo |Pendulum-v1|" in table


def test_own_conf_file(monkeypatch):
    hyperparams = dict(n_timesteps=64, policy="MlpPolicy", n_steps=64, batch_size=64, n_epochs=1)
    Path("mine.yml").write_text(yaml.safe_dump({"Pendulum-v1": hyperparams}))
    sb3_flow_main(monkeypatch, "train", "--algo", "fpo", "--env", "Pendulum-v1", "-conf", "mine.yml", "--eval-freq", -1)
    config = yaml.unsafe_load(Path("logs/fpo/Pendulum-v1_1/Pendulum-v1/config.yml").read_text())
    assert dict(config) == hyperparams


def read_config(run):
    return dict(yaml.unsafe_load(Path(f"logs/fpo/{run}/Pendulum-v1/config.yml").read_text()))


def test_preset_of_a_file(monkeypatch):
    """What is beside it wins, also within policy_kwargs. The run has its values, not its name."""
    hyperparams = dict(preset="fpo++", n_timesteps=64, policy="MlpPolicy", n_steps=64, batch_size=64, n_epochs=1, n_envs=1)
    policy_kwargs = "dict(net_arch=[8], n_flow_steps=2, activation_fn=nn.Tanh)"
    Path("mine.yml").write_text(yaml.safe_dump({"Pendulum-v1": dict(hyperparams, policy_kwargs=policy_kwargs)}))
    train = ["train", "--algo", "fpo", "--env", "Pendulum-v1", "-conf", "mine.yml", "--eval-freq", -1, "--num-threads", 1]
    sb3_flow_main(monkeypatch, *train)
    model = FPO.load("logs/fpo/Pendulum-v1_1/Pendulum-v1.zip")
    assert model.trust_region == "aspo" and model.n_mc_samples == 16 and model.n_epochs == 1
    assert model.policy.net_arch == [8] and model.policy.n_flow_steps == 2 and not model.policy.skip_connection
    assert model.policy.activation_fn is nn.Tanh and model.policy.optimizer_class is th.optim.AdamW
    config = read_config("Pendulum-v1_1")
    assert "preset" not in config and config["cfm_loss"] == "fpo++" and config["policy_kwargs"]["output_scale"] == 1.0

    # It reproduces the run, as does the file, which a run that goes on is compared with
    Path("again.yml").write_text(yaml.dump({"Pendulum-v1": {**config, "policy_kwargs": str_of(config["policy_kwargs"])}}))
    sb3_flow_main(monkeypatch, *["again.yml" if arg == "mine.yml" else arg for arg in train])
    again = read_config("Pendulum-v1_2")
    assert again | dict(policy_kwargs=eval(again["policy_kwargs"])) == config
    sb3_flow_main(monkeypatch, *train, "-n", 128, "--resume", "logs/fpo/Pendulum-v1_1")
    assert FPO.load("logs/fpo/Pendulum-v1_1/Pendulum-v1.zip").num_timesteps == 128
    Path("mine.yml").write_text(Path("mine.yml").read_text().replace("fpo++", "paper"))
    with pytest.raises(SystemExit, match=r"-conf/--conf-file: the run has trust_region:'aspo', given trust_region:'ppo'"):
        sb3_flow_main(monkeypatch, *train, "-n", 256, "--resume", "logs/fpo/Pendulum-v1_1")
    sb3_flow_main(monkeypatch, "enjoy", "--algo", "fpo", "--env", "Pendulum-v1", "--exp-id", 1, "--no-render", "-n", 5)


def str_of(policy_kwargs):
    classes = {nn.Tanh: "nn.Tanh", th.optim.AdamW: "th.optim.AdamW"}
    parts = [f"{name}={classes[x] if isinstance(x, type) else repr(x)}" for name, x in policy_kwargs.items()]
    return f"dict({', '.join(parts)})"


def test_preset_of_the_command_line(monkeypatch):
    """It is above the file, and what is beside it above it."""
    params = ["-params", "preset:'paper'", "n_steps:64", "n_envs:1", "n_epochs:1", "policy_kwargs:dict(net_arch=[8])"]
    train = ["train", "--algo", "fpo", "--env", "Pendulum-v1", "-n", 64, "--eval-freq", -1, "--num-threads", 1]
    Path("mine.yml").write_text(
        yaml.safe_dump({"Pendulum-v1": dict(preset="fpo++", policy="MlpPolicy", n_timesteps=9, vf_coef=0.7, batch_size=32,
                                            policy_kwargs="dict(n_flow_steps=3)")})
    )  # fmt: skip
    sb3_flow_main(monkeypatch, *train, "-conf", "mine.yml", *params)
    model = FPO.load("logs/fpo/Pendulum-v1_1/Pendulum-v1.zip")
    assert model.vf_coef == 0.25 and model.cfm_loss == CFM_LOSSES["fpo"] and model.ema_decay is None
    assert model.batch_size == 32 and model.n_epochs == 1
    assert model.policy.net_arch == [8] and model.policy.n_flow_steps == 10 and model.policy.squash_type == "tanh"
    for same in (["-conf", "mine.yml"], params, ["-conf", "mine.yml", *params], ["-params", "preset:'paper'", *params[2:]]):
        sb3_flow_main(monkeypatch, *train, *same, "--resume")
    for other in ("preset:'fpo++'", "policy_kwargs:dict(net_arch=[9])"):
        with pytest.raises(SystemExit, match="-params/--hyperparams: the run has"):
            sb3_flow_main(monkeypatch, *train, "-params", other, "--resume")


@pytest.mark.parametrize("preset_of", ["file", "command line"])
def test_preset_in_a_search(monkeypatch, preset_of):
    """Trials have its values but for those that are sampled, and are trained with those again."""
    block, params = dict(policy="MlpPolicy", n_timesteps=9, vf_coef=0.7), ["n_envs:1"]
    if preset_of == "file":
        block["preset"] = "paper"
    else:
        params.append("preset:'paper'")
    Path("mine.yml").write_text(yaml.safe_dump({"Pendulum-v1": block}))
    study = ["--algo", "fpo", "--env", "Pendulum-v1", "--storage", "study.log", "--study-name", "s", "-n", 32]
    study += ["-conf", "mine.yml", "--num-threads", 1, "-params", *params]
    # (with this seed a trial is short)
    options = ["--n-trials", 1, "--n-evaluations", 1, "--eval-episodes", 1, "--no-optim-plots", "--seed", 21]
    models, init = [], FPO.__init__

    @functools.wraps(init)
    def keep(model, *args, **kwargs):
        init(model, *args, **kwargs)
        models.append(model)

    with monkeypatch.context() as patched:
        patched.setattr(FPO, "__init__", keep)
        sb3_flow_main(patched, "optimize", *study, *options)
        sb3_flow_main(patched, "train", *study, "--trial-id", 0, "--eval-freq", -1)
    trial, again = models[-2:]
    assert trial.cfm_loss == CFM_LOSSES["fpo"] and trial.vf_coef == (0.7 if preset_of == "file" else 0.25)
    for name in ("cfm_loss", "vf_coef", "n_steps", "batch_size", "n_epochs", "policy_kwargs", "gamma", "ent_coef"):
        assert getattr(again, name) == getattr(trial, name)
    assert again.policy_kwargs.keys() == {"net_arch", "action_scale", "action_perturbation_std"}


def checkpoint_steps(run):
    return sorted(int(path.stem.split("_")[-2]) for path in run.glob("rl_model_*_steps.zip"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fly"], "unknown command 'fly', it must be one of train"),
        (["train", "--algo", "fpo", "--env", "Pendolum-v1"], "argument --env: .*Pendulum"),
        (["train", "--algo", "fpo", "--env", "CartPole-v1"], "only supports .*Box.* but Discrete"),
        ([*TRAIN[:5], "-params", "trust_region:'foo'"], "Unknown `trust_region`: 'foo', .* 'ppo', 'aspo'"),
        ([*TRAIN[:5], "-params", "use_sde:True"], "found 'use_sde', which is unknown"),
        (["evaluate", "--algo", "fpo", "--env", "Pendulum-v1"], "folder was not found"),
    ],
)
def test_errors_before_anything_is_written(monkeypatch, args, message):
    with pytest.raises(SystemExit, match=message):
        sb3_flow_main(monkeypatch, *args)
    assert not list(Path().glob("logs/fpo/*"))


def test_help(monkeypatch, capsys):
    sb3_flow_main(monkeypatch, "--help")
    assert "enjoy" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sb3_flow_main(monkeypatch, "train", "--help")
    out = capsys.readouterr().out
    assert "--resume" in out and "--optimize-hyperparameters" in out and "fpo" in out


def test_imports_are_lazy():
    """Importing the package must not import what only some of its parts need."""
    heavy = ["rl_zoo3", "dm_control", "envpool", "ogbench", "minari", "matplotlib.pyplot", "optuna"]
    code = f"import sb3_flow, sys; print([name for name in {heavy} if name in sys.modules])"
    # SB3 itself imports matplotlib if it is there
    base = f"import stable_baselines3, sys; print([name for name in {heavy} if name in sys.modules])"
    outputs = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout for c in (code, base)
    ]
    assert outputs[0] == outputs[1]


def test_citation():
    """Is that of the version."""
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == sb3_flow.__version__


def test_wheel_holds_hyperparameters_and_agents(tmp_path):
    # From a copy, so that what an earlier build left behind does not matter
    source = tmp_path / "source"
    for folder in ("sb3_flow", "hyperparams", "trained_agents"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sb3_flow/hyperparams/fpo.yml" in names and "sb3_flow/py.typed" in names and "sb3_flow/version.txt" in names
    # They are found from an installed wheel, anywhere
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)

    def run(*args):
        command = [sys.executable, "-m", "sb3_flow.zoo", *args]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True).stdout

    agent = "fpo/sb3_flow-GridWorld-v0_1/sb3_flow-GridWorld-v0.zip"
    assert f"Loading {site / 'sb3_flow' / 'trained_agents' / agent}" in run(
        "evaluate", "--algo", "fpo", "--env", "sb3_flow/GridWorld-v0", "-n", "1"
    )
    train = ["train", "--algo", "fpo", "--env", "Pendulum-v1", "-n", "4", "--eval-freq", "-1", "-params", "n_steps:64"]
    assert f"Loading hyperparameters from: {site / 'sb3_flow' / 'hyperparams' / 'fpo.yml'}" in run(*train)
    assert Path("logs/fpo/Pendulum-v1_1/Pendulum-v1.zip").is_file()
