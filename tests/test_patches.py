"""
What the command line changes in rl-zoo3, and what it relies on without a promise. Each fault is shown first, without the
patch: when a test fails there, rl-zoo3 has mended it, and the patch can go.
"""

import argparse
import inspect
import pickle
import re
import runpy
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium import spaces

pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')

import optuna
import rl_zoo3.enjoy
import rl_zoo3.exp_manager
import rl_zoo3.load_from_hub
import rl_zoo3.train
import rl_zoo3.utils
from huggingface_sb3 import EnvironmentName
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from sb3_contrib import CrossQ
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import sb3_flow.zoo
from sb3_flow import FQL
from sb3_flow.zoo import cli, patches
from sb3_flow.zoo.defaults import FLATTEN, normalization_for, policy_for
from sb3_flow.zoo.errors import InputError
from sb3_flow.zoo.experiment import FlowExperimentManager

PARSE_ARGS = argparse.ArgumentParser.parse_args
PACKAGE = Path(sb3_flow.__file__).parent


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sb3_flow.zoo.register()
    yield
    # Whatever happened, what was changed is as it was
    assert rl_zoo3.train.ExperimentManager is ExperimentManager and ALGOS["fql"] is FQL and ALGOS["crossq"] is CrossQ
    assert rl_zoo3.utils.make_vec_env is make_vec_env and argparse.ArgumentParser.parse_args is PARSE_ARGS


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["sb3-flow", *map(str, args)])
    cli.main()


def run_folder(algo, env_id, model, **hyperparams):
    """A run, as rl-zoo3 leaves it, whose training is of no interest."""
    name = EnvironmentName(env_id)
    folder = Path(f"logs/{algo}/{name}_1")
    (folder / name).mkdir(parents=True)
    model.save(folder / name)
    (folder / name / "config.yml").write_text(yaml.dump(dict(n_timesteps=1000, **hyperparams)))
    (folder / name / "args.yml").write_text(yaml.dump(dict(algo=algo, env=env_id, env_kwargs=None)))
    return folder


def test_all_patches_are_in_one_file():
    for path in (PACKAGE / "zoo").rglob("*.py"):
        text = path.read_text()
        assert "mock" not in text and (path.name == "patches.py" or "setattr(" not in text), path


def test_parsed_by(monkeypatch):
    """No program of rl-zoo3 takes arguments or a parser."""
    programs = [rl_zoo3.train.train, rl_zoo3.enjoy.enjoy]
    programs += [partial(runpy.run_module, f"rl_zoo3.{name}", run_name="__main__") for name in ("record_video", "benchmark")]
    monkeypatch.setattr(sys, "argv", ["program", "--no-such-option"])
    for program in programs:
        assert isinstance(program, partial) or not inspect.signature(program).parameters
        with pytest.raises(SystemExit):
            program()

        def parse(parser):
            assert {"env", "log_dir"} & {action.dest for action in parser._actions}
            # Other parsers are what they were
            assert argparse.ArgumentParser.parse_args is PARSE_ARGS
            raise NotImplementedError

        with pytest.raises(NotImplementedError), patches.parsed_by(parse):
            program()


def test_experiment_manager(monkeypatch):
    """train() takes no experiment manager: it makes the one of its module, with arguments that ours passes on."""
    assert not inspect.signature(rl_zoo3.train.train).parameters

    class Made(Exception):
        pass

    def manager(*args, **kwargs):
        bound = inspect.signature(ExperimentManager).bind(*args, **kwargs).arguments
        raise Made(bound["algo"], bound["env_id"], bound["log_folder"], bound["trained_agent"], bound["config"])

    monkeypatch.setattr(sys, "argv", ["train", "--algo", "fpo", "--env", "Pendulum-v1", "-conf", "mine.yml"])
    with pytest.raises(Made) as made, patches.experiment_manager(manager):
        rl_zoo3.train.train()
    assert made.value.args == ("fpo", "Pendulum-v1", "logs", "", "mine.yml")


def test_runs_with_uuid():
    """The number of the latest run is looked for at the end of the names of folders."""
    folder = run_folder("ppo", "Pendulum-v1", PPO("MlpPolicy", "Pendulum-v1", n_steps=2, batch_size=2))
    folder = folder.rename(folder.with_name(f"{folder.name}_{uuid.uuid4()}"))
    latest = partial(rl_zoo3.utils.get_model_path, 0, "logs", "ppo", EnvironmentName("Pendulum-v1"))
    with pytest.raises(ValueError, match="No model found"):
        latest()
    with patches.runs_with_uuid():
        assert latest()[1:] == (str(folder / "Pendulum-v1.zip"), str(folder))


@pytest.mark.parametrize("algo", ["fql", "crossq"])
def test_without_replay_buffer(monkeypatch, algo):
    """enjoy allocates the whole replay buffer of an off-policy algorithm that it does not know."""
    model_class = ALGOS[algo]
    run_folder(algo, "Pendulum-v1", model_class("MlpPolicy", "Pendulum-v1", buffer_size=777))
    sizes = []
    load = model_class.load.__func__

    def load_and_look(cls, *args, **kwargs):
        model = load(cls, *args, **kwargs)
        sizes.append(model.replay_buffer.buffer_size)
        return model

    monkeypatch.setattr(model_class, "load", classmethod(load_and_look))
    argv = ["enjoy", "--algo", algo, "--env", "Pendulum-v1", "--no-render", "-n", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "-f", "logs"])
    rl_zoo3.enjoy.enjoy()
    with patches.without_replay_buffer(algo):
        rl_zoo3.enjoy.enjoy()
    main(monkeypatch, *argv)
    assert sizes[0] == 777 and set(sizes[1:]) == {1}


def test_without_replay_buffer_needs_one():
    """Algorithms without one, and names of no algorithm, which rl-zoo3's parser refuses."""
    for algo in ("ppo", "nothing"):
        with patches.without_replay_buffer(algo):
            assert ALGOS.get(algo) is dict(ppo=PPO).get(algo)


def test_timesteps_of_both_phases(monkeypatch):
    """A trial learns for as many timesteps as it is evaluated along: offline_steps would come on top."""
    np.savez("data.npz", observations=np.zeros((9, 3)), next_observations=np.ones((9, 3)), rewards=np.zeros(9),
             actions=np.zeros((9, 1)), terminated=np.ones(9))  # fmt: skip
    learned = []
    manager = FlowExperimentManager(
        argparse.Namespace(), "fql", "Pendulum-v1", "logs", n_timesteps=4, optimize_hyperparameters=True, n_evaluations=1,
        n_eval_episodes=1, hyperparams=dict(dataset="data.npz", offline_steps=6, buffer_size=100),
        config=sb3_flow.zoo.default_conf_file("fql"), verbose=0,
    )  # fmt: skip
    manager.setup_experiment()
    manager.n_timesteps = 10
    learn = FQL.learn

    def learn_and_look(self, *args, **kwargs):
        learned.append(learn(self, *args, **kwargs).num_timesteps)
        return self

    monkeypatch.setattr(FQL, "learn", learn_and_look)
    optuna.create_study().optimize(manager.objective, n_trials=1)
    with patches.timesteps_of_both_phases("fql", 6):
        optuna.create_study().optimize(manager.objective, n_trials=1)
    assert learned == [16, 10]


def test_benchmark(monkeypatch):
    """benchmark runs a file that is not there, and looks for the environment id in the name of a folder."""
    env_id = "sb3_flow/GridWorld-v0"
    run_folder("ppo", env_id, PPO("MlpPolicy", env_id, n_steps=2, batch_size=2))

    class NoSuchFolder(Exception):
        pass

    def download(**kwargs):
        raise NoSuchFolder

    # What it does when there is no such folder
    monkeypatch.setattr(rl_zoo3.load_from_hub, "download_from_hub", download)
    commands = []
    call = subprocess.call

    def call_and_look(command, *args, **kwargs):
        commands.append(command)
        return call(command, *args, **kwargs) if command[0] == sys.executable else 1

    monkeypatch.setattr(subprocess, "call", call_and_look)
    argv = ["benchmark", "-n", "200", "--log-dir", "logs", "--no-hub", "--num-threads", "1", "--test-mode"]
    monkeypatch.setattr(sys, "argv", argv)
    Path("logs/benchmark").mkdir()
    runpy.run_module("rl_zoo3.benchmark", run_name="__main__")
    assert commands[0][:2] == ["python", "enjoy.py"]
    with pytest.raises(NoSuchFolder), patches.enjoy_in_benchmark():
        runpy.run_module("rl_zoo3.benchmark", run_name="__main__")
    assert commands[1][:4] == [sys.executable, "-m", "sb3_flow.zoo", "enjoy"] and env_id in commands[1]
    with patches.enjoy_in_benchmark(), patches.folders_in_benchmark():
        runpy.run_module("rl_zoo3.benchmark", run_name="__main__")
    # (it has been evaluated already)
    assert len(commands) == 2 and "|ppo |sb3_flow-GridWorld-v0|" in Path("logs/benchmark/benchmark.md").read_text()


def test_title_of_final_performance(monkeypatch):
    """The figure of all environments has the title of some."""
    pytest.importorskip("seaborn", reason='needs pip install "sb3-flow[plots]"')
    from matplotlib import pyplot as plt
    from rl_zoo3.plots import plot_from_file

    plt.switch_backend("agg")
    plt.close("all")
    curve = dict(timesteps=np.arange(2), mean=np.zeros(2), std_error=np.zeros(2), last_evals=np.zeros(2))
    table = dict(headers=["Environments"], value_matrix=[["Pendulum-v1"]])
    Path("results.pkl").write_bytes(
        pickle.dumps({"Pendulum-v1": {"FPO-logs": {**curve, "mean_per_eval": np.zeros((2, 2))}}, "results_table": table})
    )
    argv = ["plot-from-file", "-i", "results.pkl"]

    def titles():
        return [axes.get_title() for number in plt.get_fignums() for axes in plt.figure(number).axes]

    monkeypatch.setattr(sys, "argv", argv)
    set_title = plt.title
    plot_from_file()
    assert titles() == ["Pendulum-v1", "PyBullet envs"]
    plt.close("all")
    with patches.title_of_final_performance():
        plot_from_file()
    assert titles() == ["Pendulum-v1", "Final performance"] and plt.title is set_title
    plt.close("all")
    # Without a screen they stay open until they are saved
    main(monkeypatch, *argv)
    assert len(list(Path().glob("plot-from-file_*.png"))) == 2 and not plt.get_fignums()


def deprecated_model(seed=0):
    """An environment of a model that MuJoCo warns about, and a warning of a simulation that diverges."""
    import mujoco

    xml = "<mujoco><compiler settotalmass='1'/><worldbody><body><freejoint/><geom size='.1'/></body></worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)

    class Model(gym.Env):
        observation_space = action_space = spaces.Box(-1, 1, (1,))

        def reset(self, seed=None, options=None):
            data.qvel[:] = 1e30
            mujoco.mj_step(model, data)
            return np.zeros(1, dtype=np.float32), {}

    return Model()


@pytest.mark.parametrize("vec_env_class", [DummyVecEnv, partial(SubprocVecEnv, start_method="fork")])
def test_mujoco_warnings_once(capfd, vec_env_class):
    """MuJoCo writes them from C, once for each model, to the standard error stream and to MUJOCO_LOG.TXT."""
    mujoco = pytest.importorskip("mujoco", reason='needs pip install "sb3-flow[mujoco]"')
    patches._shown_warnings.cache_clear()
    former = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(None)
    try:
        vec_env_class([deprecated_model] * 2).close()
        assert capfd.readouterr().err.count("'settotalmass' is deprecated") == 2
        log = Path("MUJOCO_LOG.TXT").read_text()
        for _ in range(2):
            env = patches.warned_once(vec_env_class)([deprecated_model] * 2)
            # What a simulation has to say comes as before, from all of them
            env.reset()
            env.close()
        err = capfd.readouterr().err
        assert err.count("WARNING: compiler attribute 'settotalmass' is deprecated") == 1
        assert err.count("The simulation is unstable") == 4
        assert Path("MUJOCO_LOG.TXT").read_text()[len(log) :].count("settotalmass") == 1
        assert mujoco.get_mju_user_warning() is None
    finally:
        mujoco.set_mju_user_warning(former)


def test_mujoco_warnings_keep_what_dm_control_installs():
    mujoco = pytest.importorskip("mujoco", reason='needs pip install "sb3-flow[mujoco]"')
    former = mujoco.get_mju_user_warning()
    others = [print, repr]

    def importing_dm_control():
        mujoco.set_mju_user_warning(others[1])
        return deprecated_model()

    try:
        mujoco.set_mju_user_warning(others[0])
        patches.warned_once(DummyVecEnv)([deprecated_model])
        assert mujoco.get_mju_user_warning() is others[0]
        patches.warned_once(DummyVecEnv)([importing_dm_control])
        assert mujoco.get_mju_user_warning() is others[1]
    finally:
        mujoco.set_mju_user_warning(former)


@pytest.mark.parametrize("args", [["train"], pytest.param(["train", "--vec-env", "subproc"], marks=pytest.mark.slow)])
def test_mujoco_warnings_of_commands(args):
    """Once in the whole output, whatever the command makes; nor more by what looks at the run."""
    pytest.importorskip("mujoco", reason='needs pip install "sb3-flow[mujoco]"')
    common = ["--algo", "fpo", "--env", "HalfCheetah-v5", "-n", "32"]
    train = [*args, *common, "--eval-freq", "32", "--eval-episodes", "1", "--num-threads", "1"]
    commands = [[*train, "-params", "n_envs:2", "n_steps:16", "batch_size:32", "n_epochs:1"]]
    if args == ["train"]:
        commands.append(["enjoy", *common, "--no-render", "--n-envs", "2"])
    for command in commands:
        process = subprocess.run([sys.executable, "-m", "sb3_flow.zoo", *command], capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert (process.stdout + process.stderr).count("settotalmass") == 1


def manager_of(env_id, algo="fpo", config=None, **hyperparams):
    return FlowExperimentManager(
        argparse.Namespace(), algo, env_id, "logs", n_timesteps=2, eval_freq=-1, hyperparams=hyperparams, verbose=0,
        log_interval=-1, config=config,
    )  # fmt: skip


class Observations(gym.Env):
    """Random observations of any space."""

    action_space = spaces.Box(-1, 1, (2,))

    def __init__(self, observation_space):
        self.observation_space = observation_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


VECTOR, IMAGE = spaces.Box(-1, 1, (3,)), spaces.Box(0, 255, (36, 40, 3), np.uint8)
SPACES = {
    "Vector": (VECTOR, "MlpPolicy", {}),
    "Dict": (spaces.Dict(a=VECTOR, b=VECTOR), "MultiInputPolicy", {}),
    "DictImage": (spaces.Dict(a=VECTOR, b=IMAGE, c=spaces.Discrete(3)), "MultiInputPolicy", {"norm_obs_keys": ["a"]}),
    "DictOfImages": (spaces.Dict(b=IMAGE), "MultiInputPolicy", {"norm_obs": False}),
    "Image": (IMAGE, "CnnPolicy", {"norm_obs": False}),
    "ImageChannelsFirst": (spaces.Box(0, 255, (3, 36, 40), np.uint8), "CnnPolicy", {"norm_obs": False}),
    # Too small for the CNN
    "SmallImage": (spaces.Box(0, 255, (7, 7, 3), np.uint8), "MlpPolicy", {"norm_obs": False}),
    "Discrete": (spaces.Discrete(5), "MlpPolicy", {"norm_obs": False}),
}


@pytest.fixture
def envs_of_all_spaces():
    ids = [f"{name}Obs-v0" for name in SPACES] + ["dm_control/mine-task-v3"]
    for env_id, (space, *_) in zip(ids, [*SPACES.values(), SPACES["Dict"]], strict=True):
        gym.register(env_id, lambda render_mode=None, space=space: Observations(space), max_episode_steps=5)
    yield
    for env_id in ids:
        gym.registry.pop(env_id)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("algo", ["fpo", "ppo", "fql"])
def test_default_policy_fits_the_observations(capsys, envs_of_all_spaces, algo, name):
    space, policy, normalization = SPACES[name]
    assert policy_for(space, "MlpPolicy") == policy and normalization_for(space) == normalization
    short = dict(buffer_size=10, learning_starts=10) if algo == "fql" else dict(n_steps=2, batch_size=2)
    config = sb3_flow.zoo.default_conf_file(algo) if algo in sb3_flow.zoo.FLOW_ALGOS else None
    if algo == "fpo":
        config = "normalized.yml"
        Path(config).write_text(yaml.safe_dump({"default": dict(policy="MlpPolicy", n_timesteps=2, normalize=True)}))
    manager = manager_of(f"{name}Obs-v0", algo, config, n_envs=1, **short)
    model, _ = manager.setup_experiment()
    assert (f"Policy for these observations: {policy}" in capsys.readouterr().out) == (policy != "MlpPolicy")
    assert isinstance(model.policy, model.policy_aliases[policy])
    config = yaml.unsafe_load(Path(manager.params_path, "config.yml").read_text())
    assert config["policy"] == policy
    if algo == "fpo":
        vec_normalize = model.get_vec_normalize_env()
        assert vec_normalize.norm_reward and vec_normalize.norm_obs == normalization.get("norm_obs", True)
        if "norm_obs_keys" in normalization:
            assert vec_normalize.norm_obs_keys == normalization["norm_obs_keys"]
    manager.learn(model)


def test_policy_of_the_user_is_kept(envs_of_all_spaces):
    """From the command line, or from hyperparameters of this environment: SB3 says what is wrong with it."""
    for config, hyperparams in [(None, dict(policy="MlpPolicy")), ("mine.yml", {})]:
        Path("mine.yml").write_text(yaml.safe_dump({"DictObs-v0": dict(policy="MlpPolicy", n_timesteps=2)}))
        with pytest.raises(InputError, match="must use `MultiInputPolicy`"):
            manager_of("DictObs-v0", "ppo", config, **hyperparams).setup_experiment()
    manager = manager_of("ImageObs-v0", "ppo", policy="MlpPolicy", n_steps=2, batch_size=2)
    assert type(manager.setup_experiment()[0].policy) is PPO.policy_aliases["MlpPolicy"]


def test_policy_of_a_recurrent_algorithm():
    assert policy_for(SPACES["Dict"][0], "MlpLstmPolicy") == "MultiInputLstmPolicy" in ALGOS["ppo_lstm"].policy_aliases
    assert policy_for(IMAGE, "MlpLstmPolicy") == "CnnLstmPolicy" in ALGOS["ppo_lstm"].policy_aliases


@pytest.mark.parametrize("algo", ["fpo", "dppo", "fql", "ppo", "sac", "crossq"])
def test_dm_control_namespace(capsys, envs_of_all_spaces, algo):
    """Any id of dm_control is flattened, and FPO and DPPO have the block of DMC for it."""
    config = sb3_flow.zoo.default_conf_file(algo) if algo in sb3_flow.zoo.FLOW_ALGOS else None
    manager = manager_of("dm_control/mine-task-v3", algo, config)
    hyperparams, saved = manager.read_hyperparameters()
    assert (
        hyperparams["env_wrapper"] == saved["env_wrapper"] == FLATTEN and manager.env_name.gym_id == "dm_control/mine-task-v3"
    )
    out = capsys.readouterr().out
    has_block = algo in ("fpo", "dppo")
    if has_block:
        assert "Using 'default/dm_control' hyperparameters" in out
        blocks = yaml.safe_load(Path(config).read_text())
        assert hyperparams == blocks["default/dm_control"] != blocks["default"]
    else:
        assert "Observations of dm_control are flattened" in out
    # What the user has chosen
    assert (
        manager_of("dm_control/mine-task-v3", algo, config, env_wrapper=None).read_hyperparameters()[0]["env_wrapper"] is None
    )
    assert manager_of("dm_control/mine-task-v3", algo, config, gamma=0.5).read_hyperparameters()[0]["gamma"] == 0.5
    if "MultiInputPolicy" in ALGOS[algo].policy_aliases and not has_block:
        hyperparams, _ = manager_of("dm_control/mine-task-v3", algo, config, policy="MultiInputPolicy").read_hyperparameters()
        assert "env_wrapper" not in hyperparams


def test_dm_control_tasks_without_an_entry(monkeypatch, capsys):
    """They are trained, searched, evaluated and shown like any other."""
    pytest.importorskip("dm_control", reason='needs pip install "sb3-flow[dmc]"')
    pytest.importorskip("shimmy", reason='needs pip install "sb3-flow[dmc]"')
    env = ["--env", "dm_control/walker-walk-v0"]
    train = ["-n", 32, "--eval-freq", -1, "--num-threads", 1, "-params", "n_envs:2", "n_steps:16", "batch_size:32"]
    main(monkeypatch, "train", "--algo", "fpo", *env, *train, "n_epochs:1")
    main(monkeypatch, "train", "--algo", "sac", *env, "-n", 4, "--eval-freq", -1, "-params", "buffer_size:100")
    for algo in ("fpo", "sac"):
        model = ALGOS[algo].load(f"logs/{algo}/dm_control-walker-walk-v0_1/dm_control-walker-walk-v0.zip")
        assert model.observation_space.shape == (24,) and model.gamma == dict(fpo=0.995, sac=0.99)[algo]
        main(monkeypatch, "evaluate", "--algo", algo, *env, "-n", 1)
        assert "deterministic return, 1 episodes" in capsys.readouterr().out
    main(monkeypatch, "enjoy", "--algo", "fpo", *env, "--no-render", "-n", 1000)
    assert "1 Episodes" in capsys.readouterr().out
    search = ["--n-trials", 1, "--n-evaluations", 1, "--eval-episodes", 1, "--no-optim-plots", "-params", "buffer_size:100"]
    main(monkeypatch, "optimize", "--algo", "fql", *env, "-n", 4, *search, "learning_starts:100")
    assert "Number of finished trials:  1" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["fpo", "fql", "ppo"])
def test_every_task_of_the_suite(algo):
    pytest.importorskip("dm_control", reason='needs pip install "sb3-flow[dmc]"')
    pytest.importorskip("shimmy", reason='needs pip install "sb3-flow[dmc]"')
    sb3_flow.zoo.register_envs("dm_control/")
    config = sb3_flow.zoo.default_conf_file(algo) if algo in sb3_flow.zoo.FLOW_ALGOS else None
    short = dict(buffer_size=10, learning_starts=10) if algo == "fql" else dict(n_steps=2, batch_size=2)
    from shimmy.utils.envs_configs import DM_CONTROL_SUITE_ENVS

    tasks = [f"dm_control/{domain}-{task}-v0" for domain, task in DM_CONTROL_SUITE_ENVS]
    # (which renders)
    tasks.remove("dm_control/quadruped-escape-v0")
    assert len(tasks) > 40
    for env_id in tasks:
        manager = manager_of(env_id, algo, config, n_envs=1, **short)
        model, saved = manager.setup_experiment()
        assert saved["env_wrapper"] == FLATTEN and len(model.observation_space.shape) == 1
        manager.learn(model)


def test_atari_has_the_default_of_algorithms_without_an_entry(monkeypatch):
    """rl-zoo3 takes ``atari`` from the file, whether it is there or not."""
    gym.register("MyAtari-v0", "ale_py.env:AtariEnv")
    try:
        config = sb3_flow.zoo.default_conf_file("fpo")
        with pytest.raises(KeyError, match="atari"):
            ExperimentManager(argparse.Namespace(), "fpo", "MyAtari-v0", "logs", config=config).read_hyperparameters()
        assert manager_of("MyAtari-v0", config=config).read_hyperparameters()[0]["policy"] == "MlpPolicy"
        assert manager_of("MyAtari-v0", "ppo").read_hyperparameters()[0]["policy"] == "CnnPolicy"
    finally:
        gym.registry.pop("MyAtari-v0")


def test_first_trial_is_taken_for_none(monkeypatch):
    """``--trial-id 0``: rl-zoo3 asks whether the number is true."""
    asked = []
    for manager_class in (ExperimentManager, FlowExperimentManager):
        monkeypatch.setattr(manager_class, "load_trial", lambda self, *args: asked.append(args) or {})
    for manager_class, expected in ((ExperimentManager, []), (FlowExperimentManager, [("study.log", "mine", 0)])):
        manager_class(
            argparse.Namespace(), "ppo", "Pendulum-v1", "logs", storage="study.log", study_name="mine", trial_id=0
        ).read_hyperparameters()
        assert asked == expected


def test_experiment_manager_has_what_ours_overrides_and_uses():
    """Methods with their arguments, and attributes, of which rl-zoo3 promises nothing."""
    source = inspect.getsource(FlowExperimentManager)
    for name, method in vars(FlowExperimentManager).items():
        if not inspect.isfunction(method) or name == "__init__":
            continue
        overridden = getattr(ExperimentManager, name, None)
        if overridden is None:
            # One of our own: else it would never be called
            assert f"self.{name}" in source
        else:
            assert list(inspect.signature(method).parameters) == list(inspect.signature(overridden).parameters), name
    made = vars(ExperimentManager(argparse.Namespace(), "ppo", "Pendulum-v1", "logs")).keys()
    ours = vars(manager_of("Pendulum-v1")).keys() - made
    used = set(re.findall(r"self\.(\w+)", source))
    assert used and used <= made | ours | set(dir(FlowExperimentManager))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("rl_zoo3.train", ["--algo", "--env", "--gym-packages", "--log-folder", "-i", "--trained-agent", "--save-freq",
                           "--conf-file", "--optimize-hyperparameters", "-n"]),
        ("rl_zoo3.enjoy", ["--algo", "--env", "--gym-packages", "--folder", "--stochastic", "--deterministic"]),
        ("rl_zoo3.record_video", ["--algo", "--env", "--folder", "--stochastic", "--deterministic"]),
        ("rl_zoo3.benchmark", ["--log-dir", "--no-hub"]),
        ("rl_zoo3.plots.plot_train", ["-e", "--env"]),
        ("rl_zoo3.plots.all_plots", ["-e", "--env", "-a", "--algos", "-f", "--exp-folders", "-o", "--output", "--no-display"]),
        ("rl_zoo3.plots.plot_from_file", ["-i", "--input", "-latex", "--latex", "--keep-envs", "-skip", "--skip-envs"]),
    ],
)  # fmt: skip
def test_options_of_rl_zoo3(monkeypatch, capsys, program, options):
    """Those that are read, or put in front of the user's, before rl-zoo3's parser gets them."""
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(program, run_name="__main__")
    text = capsys.readouterr().out.replace(",", " ").replace("]", " ").replace("[", " ").split()
    assert set(options) <= set(text)
    # record_video alone does not take it
    assert ("--gym-packages" in text) == (program in ("rl_zoo3.train", "rl_zoo3.enjoy"))


def test_envs_of_one_of_several_processes(tmp_path):
    """Their Monitor files have other names than those of the first one."""

    def monitor_files():
        rl_zoo3.exp_manager.make_vec_env("Pendulum-v1", 2, monitor_dir=str(tmp_path)).close()
        return sorted(path.name for path in tmp_path.glob("*.monitor.csv"))

    assert "start_index" not in inspect.getsource(ExperimentManager.create_envs)
    assert monitor_files() == ["0.monitor.csv", "1.monitor.csv"]
    with patches.envs_from(2):
        assert monitor_files() == [f"{index}.monitor.csv" for index in range(4)]
    assert rl_zoo3.exp_manager.make_vec_env is make_vec_env
