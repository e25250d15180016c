"""EnvPool's tasks as a ``VecEnv``, in Python and on the command line. What the tasks do is compared in benchmarks/."""

import os
import shlex
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, TimeLimit
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_flow import FPO
from sb3_flow.envs import envpool as module
from sb3_flow.envs import make_envpool
from sb3_flow.envs.envpool import DIFFERENT, MUJOCO, TASKS, make_ordinary

envpool = pytest.importorskip("envpool", reason='needs pip install "sb3-flow[envpool]", on Python 3.11 or later')
hypothesis = pytest.importorskip("hypothesis", reason='needs pip install "sb3-flow[tests]"')
st = hypothesis.strategies

#: One whose observations are several, one that ends by itself, one that does so within a few steps
CHEETAH, HOPPER, PENDULUM = "CheetahRun-v1", "Hopper-v5", "InvertedPendulum-v5"


class OneOfEnvPool(gym.Env):
    """A single environment of EnvPool, which is never reset by itself."""

    def __init__(self, name, seed):
        self.pool = envpool.make_gymnasium(name, num_envs=1, env_seed=[seed], max_episode_steps=10**6)
        self.observation_space, self.action_space = self.pool.observation_space, self.pool.action_space

    def _first(self, values):
        return {key: value[0] for key, value in values.items()} if isinstance(values, dict) else values[0]

    def reset(self, *, seed=None, options=None):
        return self._first(self.pool.reset()[0]), {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.pool.step(action[None])
        return self._first(obs), reward[0], bool(terminated[0]), bool(truncated[0]), {}


def ordinary_vec_env(name, seed, n_envs, limit):
    """The same, by SB3's and gymnasium's own means."""

    def make(index):
        env = FlattenObservation(OneOfEnvPool(name, seed + index))
        return lambda: Monitor(TimeLimit(env, limit))

    return DummyVecEnv([make(index) for index in range(n_envs)])


def sample(env, generator, scale=1.0):
    shape = (env.num_envs, *env.action_space.shape)
    return (scale * generator.uniform(env.action_space.low, env.action_space.high, shape)).astype(np.float32)


@hypothesis.settings(max_examples=16, deadline=None, derandomize=True)
@hypothesis.given(
    st.sampled_from([CHEETAH, HOPPER, PENDULUM]), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99), st.integers(1, 25)
)
def test_episodes_are_those_of_a_dummy_vec_env(name, limit, n_envs, seed, n_steps):
    env = make_envpool(name, n_envs, seed, max_episode_steps=limit)
    other = ordinary_vec_env(name, seed, n_envs, limit)
    assert env.observation_space.shape == other.observation_space.shape
    generator = np.random.default_rng(seed)
    for _ in range(2):
        np.testing.assert_array_equal(env.reset(), other.reset())
        for _ in range(n_steps):
            # Strong actions, so that it often ends in the last step of its limit
            actions = sample(env, generator, 3)
            obs, rewards, dones, infos = env.step(actions)
            expected_obs, expected_rewards, expected_dones, expected_infos = other.step(actions)
            np.testing.assert_array_equal(obs, expected_obs)
            np.testing.assert_array_equal(rewards, expected_rewards)
            np.testing.assert_array_equal(dones, expected_dones)
            assert (rewards.dtype, dones.dtype, obs.dtype) == (np.float32, bool, env.observation_space.dtype)
            for info, expected_info in zip(infos, expected_infos, strict=True):
                assert info["TimeLimit.truncated"] is expected_info["TimeLimit.truncated"]
                assert ("terminal_observation" in info) == ("terminal_observation" in expected_info)
                if "terminal_observation" in info:
                    np.testing.assert_array_equal(info["terminal_observation"], expected_info["terminal_observation"])
                    assert info["episode"]["l"] == expected_info["episode"]["l"]
                    assert info["episode"]["r"] == pytest.approx(expected_info["episode"]["r"], rel=1e-5, abs=1e-5)
    env.close()


def test_an_end_at_the_limit():
    """An episode that comes to its end in the last step of the limit is not truncated, unless it is of dm_control."""
    ends = set()
    for limit in range(2, 12):
        env = make_envpool(PENDULUM, 8, seed=0, max_episode_steps=limit)
        env.reset()
        for _ in range(limit):
            infos = env.step(np.full((8, 1), 3.0))[3]
            ends |= {(i["episode"]["l"] == limit, i["TimeLimit.truncated"]) for i in infos if "episode" in i}
    assert ends == {(True, True), (True, False), (False, False)}

    # As dm_control's own environments: it looks at the limit first
    env = make_envpool(CHEETAH, 1, seed=0, max_episode_steps=1)
    env.reset()
    step = env._pool.step
    env._pool = SimpleNamespace(
        step=lambda actions: (*step(actions)[:2], np.array([True]), np.array([False]), {"elapsed_step": np.array([1])}),
        reset=env._pool.reset,
    )
    assert env.step(np.zeros((1, 6)))[3][0]["TimeLimit.truncated"]


def test_what_was_returned_stays_as_it_is():
    env = make_envpool(HOPPER, 2, seed=0, max_episode_steps=5)
    kept, copies = [env.reset()], []
    copies.append(kept[0].copy())
    for _ in range(100):
        obs, rewards, _, infos = env.step(np.zeros((2, 3)))
        kept += [obs, rewards] + [info["terminal_observation"] for info in infos if "terminal_observation" in info]
        copies += [array.copy() for array in kept[len(copies) :]]
    for array, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def run(env, n_steps=12):
    actions = np.random.default_rng(0)
    return np.concatenate([env.reset(), *(env.step(sample(env, actions))[0] for _ in range(n_steps))])


def test_seeds():
    env = make_envpool(HOPPER, 2, seed=3, max_episode_steps=5)
    first = run(env)
    assert not np.array_equal(first[0], first[1])
    # Not the same again, unless it is seeded
    assert not np.array_equal(first, run(env))
    assert env.seed(3) == [3, 4]
    np.testing.assert_array_equal(first, run(env))
    np.testing.assert_array_equal(first, run(make_envpool(HOPPER, 2, seed=3, max_episode_steps=5)))
    assert not np.array_equal(first, run(make_envpool(HOPPER, 2, seed=4, max_episode_steps=5)))
    # The numbers of an environment are those of its seed, whatever the others do
    np.testing.assert_array_equal(first[1], make_envpool(HOPPER, 1, seed=4).reset()[0])
    # EnvPool has always the same seed by default
    assert not np.array_equal(make_envpool(HOPPER).reset(), make_envpool(HOPPER).reset())
    # Those of NumPy are larger than EnvPool's
    largest = [run(make_envpool(HOPPER, 1, seed=seed)) for seed in (2**32 - 1, 2**32 - 1, 2**31)]
    np.testing.assert_array_equal(*largest[:2])
    assert not np.array_equal(*largest[1:])


def test_seed_of_a_model():
    """``FPO(..., seed=...)`` seeds environments that are there already."""

    def weights(seed):
        model = FPO("MlpPolicy", make_envpool(HOPPER, 2), n_steps=16, batch_size=16, n_epochs=1, seed=seed)
        return th.nn.utils.parameters_to_vector(model.learn(32).policy.parameters()).detach().numpy()

    np.testing.assert_array_equal(weights(1), weights(1))
    assert not np.array_equal(weights(1), weights(2))


def test_statistics(tmp_path):
    env = make_envpool(HOPPER, 3, 0, str(tmp_path), info_keywords=("x_position",), max_episode_steps=4)
    env.reset()
    total = np.zeros(3)
    for _ in range(4):
        _, rewards, _, infos = env.step(np.zeros((3, 3)))
        total += rewards
    for info, episode_return in zip(infos, total, strict=True):
        assert info["episode"]["r"] == pytest.approx(episode_return, abs=1e-6)
        assert info["episode"]["l"] == 4 and 0 < info["episode"]["t"] < 60
        assert info["episode"]["x_position"] == info["x_position"]
    assert all(info == {"x_position": 0, "x_velocity": 0} for info in env.reset_infos)
    # A reset in the middle begins anew
    env.step(np.zeros((3, 3)))
    env.reset()
    for _ in range(4):
        infos = env.step(np.zeros((3, 3)))[3]
    assert infos[0]["episode"]["l"] == 4 and infos[0]["episode"]["r"] < 6
    env.close()
    results = load_results(str(tmp_path))
    assert os.listdir(tmp_path) == ["0.monitor.csv"]
    assert len(results) == 6 and list(results["l"]) == [4] * 6 and "x_position" in results
    assert '"env_id": "envpool/Hopper-v5"' in (tmp_path / "0.monitor.csv").read_text()


def test_wrappers_of_sb3():
    env = VecFrameStack(VecNormalize(make_envpool(CHEETAH, 2, 0, max_episode_steps=3)), 2)
    assert env.reset().shape == (2, 34)
    for _ in range(3):
        obs, _, dones, infos = env.step(np.zeros((2, 6)))
    assert dones.all() and obs.shape == (2, 34)
    # The first frame of the new episode, and the last two of the old one
    assert not obs[:, :17].any() and infos[0]["terminal_observation"].shape == (34,)
    assert infos[0]["terminal_observation"][:17].any()
    assert env.env_is_wrapped(Monitor) == [True, True] and env.env_is_wrapped(TimeLimit, indices=0) == [False]
    assert env.get_attr("render_mode") == [None, None] and env.get_attr("action_space", indices=[1]) == [env.action_space]
    assert env.has_attr("action_space") and not env.has_attr("model")
    env.close()
    env.close()


def test_close_ends_the_threads():
    def n_threads():
        return len(os.listdir("/proc/self/task"))

    if not Path("/proc/self/task").is_dir():
        pytest.skip("no list of threads here")
    env = make_envpool(HOPPER, 2, num_threads=2)
    before = n_threads()
    env.reset()
    assert n_threads() >= before + 2
    env.close()
    assert n_threads() == before
    with pytest.raises(RuntimeError, match=r"`reset\(\)` must be called before `step\(\)`"):
        env.step(np.zeros((2, 3)))


ORDINARY_TASKS = ["dm_control/cheetah-run-v0", "dm_control/ball_in_cup-catch-v0", "dm_control/reacher-hard-v0", *MUJOCO]


@pytest.mark.parametrize(
    "env_id", [pytest.param(env_id, marks=[] if env_id in ORDINARY_TASKS else pytest.mark.slow) for env_id in TASKS]
)
def test_spaces_and_limits_are_those_of_the_ordinary_environment(env_id):
    pytest.importorskip("mujoco", reason='needs pip install "sb3-flow[mujoco]"')
    if env_id.startswith("dm_control/"):
        pytest.importorskip("shimmy", reason='needs pip install "sb3-flow[dmc]"')
    env, ordinary = make_envpool(f"envpool/{TASKS[env_id]}"), make_ordinary(env_id)
    assert env.observation_space == ordinary.observation_space
    assert env.action_space == ordinary.action_space
    limit = ordinary.spec.max_episode_steps or ordinary.unwrapped._env._step_limit
    assert env._limit == limit
    ordinary.close()


def test_order_of_the_observations():
    """Each part is where ``FlattenObservation`` has it, and what only EnvPool observes is left out."""
    env = make_envpool("FingerSpin-v1", 2, seed=5)
    obs = env.reset()
    parts = envpool.make_gymnasium("FingerSpin-v1", num_envs=2, env_seed=[5, 6]).reset()[0]
    assert parts.keys() > {"position", "touch", "velocity"}
    np.testing.assert_array_equal(obs, np.concatenate([parts[key] for key in ("position", "touch", "velocity")], axis=1))


def test_a_model_changes_to_the_ordinary_environment(tmp_path):
    pytest.importorskip("shimmy", reason='needs pip install "sb3-flow[dmc]"')
    env_id = "dm_control/cheetah-run-v0"
    env = VecNormalize(make_envpool(env_id, 2, 0, max_episode_steps=20))
    kwargs = dict(wrapper_class=FlattenObservation, env_kwargs=dict(max_episode_steps=20))
    eval_env = VecNormalize(make_vec_env(env_id, 1, 0, **kwargs), training=False, norm_reward=False)
    model = FPO("MlpPolicy", env, n_steps=32, batch_size=64, n_epochs=1)
    # Which takes over the statistics, and so needs environments that are wrapped in the same way
    model.learn(64, callback=EvalCallback(eval_env, eval_freq=32, n_eval_episodes=1, verbose=0))
    assert eval_env.obs_rms.count == env.obs_rms.count > 60
    assert model.ep_info_buffer and {info["l"] for info in model.ep_info_buffer} == {20}
    model.save(tmp_path / "model")
    model.set_env(make_vec_env(env_id, 2, 0, **kwargs))
    FPO.load(tmp_path / "model", env=make_vec_env(env_id, 1, 0, **kwargs)).learn(32)
    with warnings.catch_warnings():
        # Of an environment without Monitor
        warnings.simplefilter("error")
        evaluate_policy(model, make_envpool(CHEETAH, 2, max_episode_steps=5), n_eval_episodes=3)


def test_threads_are_not_more_than_the_cores_of_this_process():
    if not hasattr(os, "sched_getaffinity"):
        # (on macOS and Windows)
        pytest.skip("this operating system has no way to choose the cores of a process")
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, [min(cores)])
        assert make_envpool(HOPPER, 4)._options_of_task["num_threads"] == 1
        assert make_envpool(HOPPER, 4, num_threads=3)._options_of_task["num_threads"] == 3
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("actions", [[0, 2], [-1, 0], [0.0, 1.0], [True, False]])
def test_discrete_actions(actions):
    env = make_envpool("CartPole-v1", 2)
    env.reset()
    env.step(np.array([0, 1]))
    with pytest.raises(ValueError, match="integers from 0 to 1, they are"):
        env.step(np.array(actions))


def test_other_tasks_of_envpool():
    """Discrete actions, images."""
    PPO("MlpPolicy", make_envpool("CartPole-v1", 2), n_steps=16, batch_size=16, n_epochs=1).learn(32)
    env = make_envpool("CarRacing-v3", 1, max_episode_steps=2)
    assert env.reset().dtype == np.uint8 and isinstance(env.observation_space, spaces.Box)
    env = make_envpool("LunarLanderContinuous-v3", 1)
    assert np.isneginf(env.observation_space.low).all() and np.isposinf(env.observation_space.high).all()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (dict(env_id="CheetahRan-v1"), "no task 'CheetahRan-v1'.*did you mean 'CheetahRun-v1'"),
        (dict(env_id="dm_control/cheetah-runs-v0"), "did you mean 'dm_control/cheetah-run-v0'"),
        (
            dict(env_id="dm_control/finger-spin-v0"),
            "does not stand for dm_control/finger-spin-v0: .*stiffer.*envpool/FingerSpin",
        ),
        (dict(env_id="dm_control/walker-walk-v0"), "not been compared.*envpool/WalkerWalk-v1"),
        (dict(env_id="IntersectionMultiAgent-v0"), "several players"),
        (dict(env_id="MiniGrid-Empty-5x5-v0"), "Dict of more than vectors"),
        (dict(n_envs=0), "`n_envs` must be at least 1"),
        (dict(n_envs=2.5), "`n_envs` must be an integer"),
        (dict(seed=-1), "`seed` must not be negative"),
        (dict(seed="a"), "`seed` must be an integer"),
        (dict(seed=2**32), r"`seed` must be less than 2\*\*32, it is 4294967296"),
        (dict(ctrl_cost_wait=1.0), r"`ctrl_cost_wait` is not an option of Hopper-v5.*did you mean 'ctrl_cost_weight'\?"),
        (dict(ctrl_cost_weight="high"), "`ctrl_cost_weight` must be a float, it is 'high'"),
        (dict(ctrl_cost_weight=True), "`ctrl_cost_weight` must be a float, it is True"),
        (dict(terminate_when_unhealthy=1), "`terminate_when_unhealthy` must be a bool, it is 1"),
        (dict(max_episode_steps=0), "`max_episode_steps` must be at least 1"),
        (dict(max_episode_steps=1.5), "`max_episode_steps` must be an integer"),
        (dict(max_episode_steps=2**31), "`max_episode_steps` must be at most 2147483647, it is 2147483648"),
        (dict(num_threads=-1), "`num_threads` must be at least 0"),
        (dict(num_threads=None), "`num_threads` must be an integer"),
        (dict(frame_skip=0), "`frame_skip` must be at least 1"),
        (dict(info_keywords=("is_success",)), "no 'is_success' in the info of Hopper-v5, it has x_position, x_velocity"),
        *((dict([(name, 1)]), f"`{name}` is not an option.*: {why[:20]}") for name, why in module.NOT_OPTIONS.items()),
    ],
    ids=str,
)
def test_wrong_arguments(kwargs, text):
    with pytest.raises(ValueError, match=text):
        make_envpool(**{"env_id": HOPPER, **kwargs})


@pytest.mark.parametrize(
    ("use", "error", "text"),
    [
        (lambda env: env.set_attr("gravity", 1), NotImplementedError, "'gravity'"),
        (lambda env: env.env_method("compute_reward"), NotImplementedError, "'compute_reward'"),
        (lambda env: env.get_attr("model"), AttributeError, "'model'"),
        (lambda env: env.render(), NotImplementedError, "ordinary environment"),
        (lambda env: env.set_options({"x": 1}), ValueError, r"no options of `reset\(\)`, found \{'x': 1\}"),
        (lambda env: env.set_options([{}, {"x": 1}]), ValueError, "'x': 1"),
        (lambda env: env.step(np.zeros((1, 3))), ValueError, r"shape \(1, 3\), expected \(2, 3\)"),
        (lambda env: env.step(np.zeros((2, 4))), ValueError, r"shape \(2, 4\), expected \(2, 3\)"),
        (lambda env: env.step(np.full((2, 3), np.nan)), ValueError, "not all finite"),
        (lambda env: env.step(np.full((2, 3), np.inf)), ValueError, "not all finite"),
    ],
)
def test_what_envpool_cannot_do(use, error, text):
    env = make_envpool(HOPPER, 2)
    env.reset()
    env.step(np.zeros((2, 3)))
    with pytest.raises(error, match=text):
        use(env)
    env.set_options()
    env.set_options({})


def test_actions_out_of_bounds():
    """As in gymnasium: not clipped in the cost of the control."""
    rewards = []
    for action in (1.0, 5.0):
        env = make_envpool("HalfCheetah-v5", 1, seed=0)
        env.reset()
        infos = env.step(np.full((1, 6), action))[3]
        rewards.append(infos[0]["reward_ctrl"])
    assert rewards == pytest.approx([-0.6, -15.0])


def test_options_reach_the_task():
    infos = []
    for weight in (0.1, 1):
        env = make_envpool("HalfCheetah-v5", 1, seed=0, ctrl_cost_weight=weight)
        env.reset()
        infos.append(env.step(np.ones((1, 6)))[3][0])
    assert infos[1]["reward_ctrl"] == pytest.approx(10 * infos[0]["reward_ctrl"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, 'pip install "sb3-flow\\[envpool\\]"'),
        ({"sys.version_info": (3, 10, 4)}, "needs Python 3.11 or later.*0.8.4, is too old"),
        ({"platform.machine": lambda: "x86_64", "platform.system": lambda: "Darwin"}, "no wheel for Darwin on x86_64"),
    ],
)
def test_without_envpool(monkeypatch, changes, text):
    monkeypatch.setitem(sys.modules, "envpool", None)
    for name, value in changes.items():
        monkeypatch.setattr(name, value)
    with pytest.raises(ImportError, match=text):
        make_envpool(HOPPER)


def test_an_old_envpool(monkeypatch):
    monkeypatch.setattr(envpool, "__version__", "0.8.4")
    with pytest.raises(ImportError, match=r"EnvPool 0.8.4 is too old, 1.2.5 or later"):
        make_envpool(HOPPER)


def test_tasks_that_are_refused_have_a_reason():
    assert DIFFERENT.keys() < TASKS.keys() and all(DIFFERENT.values())
    assert len(set(TASKS.values())) == len(TASKS) and set(TASKS.values()) <= set(envpool.list_all_envs())


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The command line, in a folder of its own."""
    pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')
    from sb3_flow.zoo import cli, register

    register()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "egl")

    def run(command_line):
        monkeypatch.setattr(sys, "argv", ["sb3-flow", *shlex.split(command_line)])
        cli.main()

    return run


@pytest.fixture
def made(monkeypatch):
    """What the environments that the command line makes are for, their class, and their number."""
    from sb3_flow.zoo import experiment

    made = []
    create_envs = experiment.FlowExperimentManager.create_envs

    def create(self, n_envs, eval_env=False, no_log=False):
        env = create_envs(self, n_envs, eval_env, no_log)
        made.append(("evaluation" if eval_env else "training", type(env.unwrapped).__name__, n_envs))
        return env

    monkeypatch.setattr(experiment.FlowExperimentManager, "create_envs", create)
    return made


SMALL = "n_envs:2 n_steps:64 batch_size:64 n_epochs:1"
OPTIONS = "--num-threads 1 --seed 1 --verbose 0"
IN_BOTH = [("training", "EnvPoolVecEnv", 2), ("evaluation", "DummyVecEnv", 1)]


def test_train_in_envpool_and_evaluate_in_the_ordinary_environment(main, made, capfd):
    """With the id that users know: its runs are those of the ordinary environment, and go on there."""
    pytest.importorskip("mujoco", reason='needs pip install "sb3-flow[mujoco]"')
    run = "--algo ppo --env InvertedPendulum-v5"
    main(f"train {run} --vec-env envpool -n 256 --eval-freq 128 --eval-episodes 1 {OPTIONS} -params {SMALL} normalize:True")
    assert sorted(made) == sorted(IN_BOTH)
    assert "not of the same type" not in capfd.readouterr().err
    folder = Path("logs/ppo/InvertedPendulum-v5_1")
    assert len(np.load(folder / "evaluations.npz")["results"]) == 2
    lengths = load_results(str(folder))["l"]
    assert 0 < lengths.sum() <= 256 and len(list(folder.glob("*.monitor.csv"))) == 1
    main(f"evaluate {run} -n 2")
    assert (folder / "learning_curve.png").is_file() and (folder / "evaluation.json").is_file()
    main(f"train {run} --resume -n 384")
    main(f"train {run} --resume -n 512 --vec-env dummy")
    assert [kind for _, kind, _ in made[2:]] == ["DummyVecEnv", "EnvPoolVecEnv", "DummyVecEnv", "DummyVecEnv"]
    assert load_results(str(folder))["l"].sum() > lengths.sum()


@pytest.mark.parametrize(
    ("algo", "params"),
    [
        ("fpo", f"{SMALL} frame_stack:2 vec_env_wrapper:'\"stable_baselines3.common.vec_env.VecCheckNan\"'"),
        ("fql", "n_envs:2 learning_starts:32 batch_size:16 'policy_kwargs:dict(net_arch=[8])'"),
        ("sac", "n_envs:2 learning_starts:32 batch_size:16 'policy_kwargs:dict(net_arch=[8])'"),
    ],
)
def test_id_of_envpool(main, made, algo, params):
    pytest.importorskip("mujoco", reason='needs pip install "sb3-flow[mujoco]"')
    run = f"--algo {algo} --env envpool/InvertedPendulum-v5"
    main(f"train {run} -n 128 --eval-freq 128 --eval-episodes 1 {OPTIONS} -params {params}")
    assert sorted(made) == sorted(IN_BOTH)
    assert Path(f"logs/{algo}/envpool-InvertedPendulum-v5_1/envpool-InvertedPendulum-v5.zip").is_file()
    main(f"enjoy {run} --no-render -n 20 --verbose 0")


def test_a_run_with_a_wrapper_does_not_go_on_in_envpool(main, capsys):
    pytest.importorskip("mujoco", reason='needs pip install "sb3-flow[mujoco]"')
    run = "--algo ppo --env InvertedPendulum-v5"
    wrapper = "env_wrapper:'\"rl_zoo3.wrappers.TimeFeatureWrapper\"'"
    main(f"train {run} -n 128 --eval-freq -1 {OPTIONS} -params {SMALL} {wrapper}")
    with pytest.raises(SystemExit):
        main(f"train {run} --resume -n 256 --vec-env envpool")
    assert "found env_wrapper:'rl_zoo3.wrappers.TimeFeatureWrapper'" in capsys.readouterr().err
    main(f"train {run} --resume -n 256")


def test_search_in_envpool(main, made):
    pytest.importorskip("mujoco", reason='needs pip install "sb3-flow[mujoco]"')
    search = "optimize --algo fql --env envpool/InvertedPendulum-v5 -n 64 --n-trials 1 --n-evaluations 1 --eval-episodes 1"
    main(f"{search} --no-optim-plots {OPTIONS} -params n_envs:2")
    assert made[-2:] == IN_BOTH and all(kind == "EnvPoolVecEnv" for when, kind, _ in made if when == "training")


@pytest.mark.parametrize("env_id", ["envpool/CartpoleBalance-v1", "dm_control/cartpole-balance-v0"])
def test_hyperparameters_and_environments_of_dm_control(main, tmp_path, env_id):
    """The block of the known id. With either id, observations are the same in training and evaluations."""
    pytest.importorskip("shimmy", reason='needs pip install "sb3-flow[dmc]"')
    from sb3_flow.zoo import default_conf_file, register_envs
    from sb3_flow.zoo.experiment import FlowExperimentManager

    def manager(conf_file=None, **kwargs):
        kwargs |= dict(config=conf_file or default_conf_file("fpo"), vec_env_type="envpool", n_timesteps=64, verbose=0)
        return FlowExperimentManager(None, "fpo", env_id, "logs", **kwargs)

    register_envs(env_id)
    for hyperparams in ({}, dict(env_wrapper=None)):
        made = manager(hyperparams=hyperparams)
        found = made.read_hyperparameters()[0]
        # (0.06 in the block of this task, 0.02 in that of dm_control)
        assert found["ent_coef"] == 0.06 and made.has_own_hyperparams
        _, made.env_wrapper, *_ = made._preprocess_hyperparams(found)
        envs = [made.create_envs(2, eval_env=is_eval, no_log=True) for is_eval in (False, True)]
        assert [type(env.unwrapped).__name__ for env in envs] == ["EnvPoolVecEnv", "DummyVecEnv"]
        assert envs[0].observation_space == envs[1].observation_space and envs[0].action_space == envs[1].action_space
        assert envs[0].observation_space.shape == (5,)
    # From the nearest to the farthest
    blocks = list(dict.fromkeys(["default", "default/dm_control", "dm_control/cartpole-balance-v0", env_id]))
    conf_file = tmp_path / "conf.yml"
    for n_blocks in range(1, len(blocks) + 1):
        conf = {name: dict(policy="MlpPolicy", n_timesteps=1, n_envs=i) for i, name in enumerate(blocks[:n_blocks], 1)}
        conf_file.write_text(yaml.safe_dump(conf))
        assert manager(str(conf_file)).read_hyperparameters()[0]["n_envs"] == len(conf)


def test_note_on_a_task_that_differs(main, capsys):
    from sb3_flow.zoo.commands.common import check_env

    check_env("envpool/FingerSpin-v1")
    assert "Evaluations of envpool/FingerSpin-v1 are in dm_control/finger-spin-v0: contacts" in capsys.readouterr().out
    check_env("envpool/CheetahRun-v1")
    assert capsys.readouterr().out == ""


def test_command_line_without_envpool(main, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "envpool", None)
    for options in ("--env envpool/CheetahRun-v1", "--env HalfCheetah-v5 --vec-env envpool"):
        with pytest.raises(SystemExit):
            main(f"train --algo fpo {options} -n 64")
        assert capsys.readouterr().err == 'sb3-flow: error: EnvPool is needed for this: pip install "sb3-flow[envpool]"\n'
    assert not Path("logs").exists()
