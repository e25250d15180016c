"""Several processes that learn together. They are real ones, with gloo."""

import os
import signal
import socket
import subprocess
import sys
import time
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch as th
import torch.multiprocessing as mp
import yaml
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import ReplayBufferSamples, RolloutBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_flow import DPPO, FPO, FQL, QC, distributed
from sb3_flow.distributed import RankError
from sb3_flow.fpo import fpo as fpo_module

N_RANKS = 2
N_TRANSITIONS = 64

FPO_CONFIGS = {
    "default": dict(),
    "of the paper": dict(cfm_loss="fpo", ratio_type="averaged", n_baseline_actions=0, ent_coef=0.0, bounds_loss_coef=0.0),
    "value clipping": dict(normalize_advantage=False, clip_range_vf=0.2, max_grad_norm=None),
    "entropy": dict(ent_coef=0.05, n_baseline_actions=1),
    "early stopping": dict(target_kl=3.3e-4, learning_rate=1e-3, batch_size=4),
    "truncated minibatch": dict(batch_size=24, ratio_type="per_sample", trust_region="aspo", bounds_loss_coef=0.1),
    "one transition each": dict(batch_size=2, n_epochs=1),
    "advantages of the rollout and average": dict(normalize_advantage="rollout", ema_decay=0.9, ema_start=0),
    "critic alone": dict(critic_warmup=1),
    "critic at its own rate": dict(critic_learning_rate=1e-3, max_grad_norm=0.1),
}
DPPO_CONFIGS = {
    "default": dict(),
    "of its paper": dict(log_prob_reduction="mean", gamma_denoising=0.9, first_clip_range=0.1, normalize_advantage="rollout"),
}
FQL_CONFIGS = {
    "default": dict(),
    "normalized": dict(q_agg="min", normalize_q_loss=True, alpha=1.0),
}


def fpo_update(config, rank=None, algorithm=FPO):
    """One call of ``train()``, of a rank or (None) of one process with the transitions of all ranks."""
    n_ranks = N_RANKS if rank is None else 1
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2 * n_ranks)
    kwargs = dict(n_steps=16, batch_size=16, n_epochs=2, seed=0, device="cpu") | config
    model = algorithm("MlpPolicy", env, **kwargs)
    model.set_logger(Logger(None, []))

    generator = th.Generator().manual_seed(1)

    def draw(*shape):
        return th.randn((N_TRANSITIONS, *shape), generator=generator)

    samples = [draw(3), draw(1), draw(), draw(), 3 * draw() + 1, draw()]
    # Pairs, and baseline actions: for the ratio, and for the entropy
    pairs = [
        [draw(4, 1), 0.1 * th.randint(1, 11, (N_TRANSITIONS, 4), generator=generator), th.ones(N_TRANSITIONS, 4)]
        for _ in range(2)
    ]
    baseline_actions = [draw(model.n_baseline_actions, 1) for _ in range(2)] if algorithm is FPO else []
    if algorithm is DPPO:
        # Chains
        samples[3] = 0.1 * draw(model.policy.n_flow_steps + 1).cumsum(dim=1)

    # Those of a rank are together. Of each minibatch, a rank has its share
    share, size = N_TRANSITIONS // N_RANKS, model.batch_size // N_RANKS
    orders = [[th.randperm(share, generator=generator) + number * share for number in range(N_RANKS)] for _ in range(2)]
    orders[0] = [th.arange(share) + number * share for number in range(N_RANKS)]
    epochs = [
        [
            th.cat(parts)
            for parts in zip(*(part.split(size) for part in (order if rank is None else [order[rank]])), strict=True)
        ]
        for order in orders
    ]
    rows = th.cat(epochs[0])
    position = th.zeros(N_TRANSITIONS, dtype=th.long)
    position[rows] = th.arange(len(rows))

    data = RolloutBufferSamples(*(column[rows] for column in samples))
    draws, baseline_draws = iter(pairs), iter(baseline_actions)
    model.rollout_buffer.get = lambda batch_size: iter([data])
    model._draw_baseline_actions = lambda observations, n_transitions: next(baseline_draws)[rows]
    model._shuffled_minibatches = lambda n_transitions: iter([position[minibatch] for minibatch in epochs[1]])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(fpo_module, "draw_pairs", lambda *args: [column[rows] for column in next(draws)])
        model.train()
    return model.policy.state_dict(), dict(model.logger.name_to_value)


def dppo_update(config, rank=None):
    """As :func:`fpo_update`."""
    return fpo_update(config, rank, DPPO)


def fql_update(config, rank=None):
    """As :func:`fpo_update`."""
    env = DummyVecEnv([lambda: gym.make("Pendulum-v1")])
    optimizer = dict(optimizer_kwargs=dict(eps=1e-5))
    model = FQL(
        "MlpPolicy", env, batch_size=16, seed=0, device="cpu", policy_kwargs=dict(net_arch=[32], **optimizer), **config
    )
    model.set_logger(Logger(None, []))
    generator = th.Generator().manual_seed(1)
    rows = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)

    def of_all(function):
        return lambda shape, **kwargs: function((16, *shape[1:]), generator=generator)[rows]

    randn, rand = of_all(th.randn), of_all(th.rand)
    columns = [3, 1, 3]
    with pytest.MonkeyPatch.context() as monkeypatch:
        batch = [th.randn((16, size), generator=generator)[rows].clamp(-1, 1) for size in columns]
        rewards = 5 * th.randn((16, 1), generator=generator)[rows]
        model._sample = lambda batch_size: ReplayBufferSamples(*batch, th.zeros_like(rewards), rewards)
        monkeypatch.setattr(th, "randn_like", lambda tensor: randn(tensor.shape))
        monkeypatch.setattr(th, "rand", lambda size, **kwargs: rand((size,)))
        model.train(gradient_steps=2, batch_size=16)
    return model.policy.state_dict(), dict(model.logger.name_to_value)


class Record(BaseCallback):
    """The observations that ``VecNormalize`` has seen, and when it is called."""

    def __init__(self, stop_at=np.inf):
        super().__init__()
        self.stop_at = stop_at
        self.observations, self.timesteps, self.ends = [], [], 0

    def _on_training_start(self):
        self._see()

    def _see(self):
        normalization = self.model.get_vec_normalize_env()
        # (offline there are none)
        if normalization is not None and hasattr(normalization, "old_obs"):
            self.observations.append(self.model.get_vec_normalize_env().get_original_obs())

    def _on_step(self):
        self._see()
        self.timesteps.append(self.num_timesteps)
        # One rank decides
        return not (distributed.rank() == 0 and self.num_timesteps >= self.stop_at)

    def _on_training_end(self):
        self.ends += 1


def state(model, callback):
    running = distributed.running_statistics(model.get_vec_normalize_env())
    return dict(
        weights=model.policy.state_dict(),
        statistics=[(item.mean, item.var, item.count) for item in running],
        num_timesteps=model.num_timesteps,
        timesteps=callback.timesteps,
        observations=callback.observations,
        episodes=sorted(info["r"] for info in model.ep_info_buffer),
        noise=th.rand(1).item(),
        action=model.action_space.sample(),
    )


def learn_fpo(n_timesteps=512, stop_at=np.inf, **kwargs):
    env = VecNormalize(make_vec_env("Pendulum-v1", 2, env_kwargs=dict(max_episode_steps=100)))
    kwargs = (
        dict(n_steps=64, batch_size=64, n_epochs=2, seed=3, device="cpu", ent_coef=0.01, ema_decay=0.9, ema_start=1) | kwargs
    )
    model, callback = FPO("MlpPolicy", env, **kwargs), Record(stop_at)
    if distributed.rank() > 0:
        # Whatever has happened before
        with th.no_grad():
            for parameter in model.policy.parameters():
                parameter.add_(1)
    return state(model.learn(n_timesteps, callback=callback), callback)


def make_fql(**kwargs):
    kwargs = (
        dict(learning_starts=100, batch_size=32, buffer_size=301, seed=3, device="cpu", policy_kwargs=dict(net_arch=[16]))
        | kwargs
    )
    return FQL("MlpPolicy", make_vec_env("Pendulum-v1", 2), **kwargs)


class Drift(Record):
    """Changes the weights of one rank."""

    def _on_rollout_end(self):
        if distributed.rank() == 1:
            with th.no_grad():
                self.model.policy.value_net.bias.add_(1)


class BadReward(gym.RewardWrapper):
    def reward(self, reward):
        return np.nan


def scenarios(folder):
    """What a rank does, and what has become of it."""
    rank = distributed.rank()
    results = dict(rank=rank, world_size=distributed.world_size())
    results |= {("fpo", name): fpo_update(config, rank) for name, config in FPO_CONFIGS.items()}
    results |= {("fql", name): fql_update(config, rank) for name, config in FQL_CONFIGS.items()}
    results |= {("dppo", name): dppo_update(config, rank) for name, config in DPPO_CONFIGS.items()}

    results["learn"], results["again"] = learn_fpo(), learn_fpo()
    results["stopped in a rollout"] = learn_fpo(stop_at=300)

    callback = Record(stop_at=300)
    # (evaluations and checkpoints are those of rank 0)
    others = [
        EvalCallback(
            make_vec_env("Pendulum-v1"), eval_freq=50, n_eval_episodes=1, log_path=f"{folder}/eval_{rank}", verbose=0
        ),
        CheckpointCallback(50, f"{folder}/checkpoints_{rank}"),
    ]
    model = make_fql(verbose=1, tensorboard_log=f"{folder}/tensorboard_{rank}").learn(1000, callback=[*others, callback])
    results["stopped"] = state(model, callback)
    results["buffer_size"] = model.buffer_size, model.replay_buffer.buffer_size * model.n_envs
    model.save(f"{folder}/same_name")
    results["saved"] = [path.name for path in Path(folder).iterdir()]

    rng = np.random.default_rng(0)
    dataset = dict(
        observations=rng.uniform(-1, 1, (50, 3)).astype(np.float32), actions=rng.uniform(-1, 1, (50, 1)).astype(np.float32),
        rewards=rng.uniform(size=50).astype(np.float32), terminals=np.arange(50) % 10 == 9,
        next_observations=rng.uniform(-1, 1, (50, 3)).astype(np.float32),
    )  # fmt: skip
    callback = Record(stop_at=30)
    model = make_fql(dataset=dataset, dataset_kwargs=dict(validation=0.2)).learn_offline(
        100, callback=callback, log_interval=10
    )
    results["offline"] = state(model, callback)

    callback = Record()
    options = dict(dataset=dataset, offline_steps=20, balanced_sampling=True, batch_size=34)
    results["both"] = state(make_fql(**options).learn(200, callback=callback), callback)

    callback = Record()
    small = dict(policy_kwargs=dict(net_arch=[16], n_samples=4), batch_size=32, buffer_size=300, seed=3, device="cpu")
    in_a_row = dataset | dict(next_observations=np.roll(dataset["observations"], -1, axis=0))
    model = QC("MlpPolicy", make_vec_env("Pendulum-v1", 2), dataset=in_a_row, offline_steps=10, chunk_size=3, **small)
    results["chunks"] = state(model.learn(200, callback=callback), callback)

    callback, env = Record(), VecNormalize(make_vec_env("Pendulum-v1", 2))
    model = FPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, seed=3, device="cpu")
    model.pretrain(dataset, 20, batch_size=32, callback=callback)
    results["clone"] = dict(weights=deepcopy(model.policy.state_dict()), statistics=env.obs_rms.mean.copy())
    results["fine-tuned"] = state(model.learn(64), callback)

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.warns(UserWarning, match="no longer the same"):
        monkeypatch.setattr(FPO, "_check_every", 1)
        env, callback = make_vec_env("Pendulum-v1"), Drift()
        model = FPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(64, callback=callback)
    results["drift"] = state(model, callback)

    # What is refused, by all of them
    refused = {
        "BatchNorm1d": make_fql(),
        "`n_transitions`": make_fql(dataset=dataset) if rank == 0 else make_fql(learning_starts=0),
        "`gamma`": make_fql(gamma=0.9 if rank == 0 else 0.8),
        "`n_envs`": FPO("MlpPolicy", make_vec_env("Pendulum-v1", 1 + rank), n_steps=16, batch_size=16, device="cpu"),
        "`train_freq`": FQL("MlpPolicy", make_vec_env("Pendulum-v1"), buffer_size=10, train_freq=(1, "episode"), device="cpu"),
    }
    refused["BatchNorm1d"].policy.critic.add_module("norm", nn.BatchNorm1d(3))
    for name, model in refused.items():
        with pytest.raises(ValueError, match=name):
            model._begin_together(10)
    with pytest.raises(ValueError, match="`batch_size` must be a multiple of the number of processes"):
        make_fql(batch_size=33)
    with pytest.raises(ValueError, match="save_replay_buffer"):
        make_fql()._init_callback(CheckpointCallback(10, folder, save_replay_buffer=True))

    # One of them fails, and all end
    make_env = [lambda: Monitor(BadReward(gym.make("Pendulum-v1")) if rank == 1 else gym.make("Pendulum-v1"))]
    try:
        FPO("MlpPolicy", DummyVecEnv(make_env), n_steps=16, batch_size=16, device="cpu").learn(64)
    except Exception as error:
        results["error"] = error
    return results


def long_run(folder):
    return learn_fpo(20_000)


def process(local_rank, scenario, folder, port):
    os.environ.update(
        RANK=str(local_rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(N_RANKS), MASTER_ADDR="localhost", MASTER_PORT=port
    )
    th.set_num_threads(1)
    th.save(scenario(folder), f"{folder}/results_{local_rank}.pt")


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return str(sock.getsockname()[1])


def run(scenario, folder, timeout=300):
    """What each rank returns."""
    context = mp.spawn(process, (scenario, str(folder), free_port()), nprocs=N_RANKS, join=False)
    end = time.monotonic() + timeout
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for child in context.processes:
                child.kill()
            pytest.fail("the processes do not end")
    return [th.load(f"{folder}/results_{rank}.pt", weights_only=False) for rank in range(N_RANKS)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run(scenarios, tmp_path_factory.mktemp("ranks"))


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert th.equal(first[name], second[name]), name


UPDATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "fpo": (fpo_update, FPO_CONFIGS),
    "dppo": (dppo_update, DPPO_CONFIGS),
    "fql": (fql_update, FQL_CONFIGS),
}


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("algo, name", [(algo, name) for algo, (_, configs) in UPDATES.items() for name in configs])
def test_update_is_that_of_one_process(ranks, algo, name):
    """With the transitions of all of them."""
    update, configs = UPDATES[algo]
    weights, logged = update(configs[name])
    for results in ranks:
        of_rank, logged_by_rank = results[algo, name]
        for key in weights:
            np.testing.assert_allclose(of_rank[key].numpy(), weights[key].numpy(), rtol=0, atol=1e-6, err_msg=key)
        for key in logged_by_rank.keys() - {"train/explained_variance"}:
            assert logged_by_rank[key] == pytest.approx(logged[key], rel=1e-4, abs=1e-6), key
    assert_equal(*(results[algo, name][0] for results in ranks))


def test_early_stopping_stops_all(ranks):
    """The configuration of the test above does stop early."""
    assert [results["fpo", "early stopping"][1]["train/n_updates"] for results in ranks] == [1, 1]


def test_learning(ranks):
    """Of the same seeds the same comes; weights, statistics and episodes are those of all, random numbers are not."""
    first, second = (results["learn"] for results in ranks)
    assert_equal(first["weights"], second["weights"])
    for results in ranks:
        assert_equal(results["learn"]["weights"], results["again"]["weights"])
        assert results["learn"]["timesteps"] == list(range(4, 513, 4))
    assert first["noise"] != second["noise"] and first["action"] != second["action"]
    assert len(first["episodes"]) == 4 and first["episodes"] == second["episodes"] and len(set(first["episodes"])) == 4

    observations = np.concatenate([*first["observations"], *second["observations"]])
    # (no two environments begin in the same state)
    assert len(np.unique(np.concatenate([first["observations"][0], second["observations"][0]]), axis=0)) == 4
    for results in first, second:
        mean, var, count = results["statistics"][0]
        assert count == pytest.approx(len(observations) + 1e-4) and len(observations) == 512 + 4
        np.testing.assert_allclose(mean, observations.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(var, observations.var(axis=0), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(results["statistics"][1], first["statistics"][1])


def test_callback_of_one_stops_all(ranks):
    for phase, n_timesteps in (("stopped", 300), ("stopped in a rollout", 300), ("offline", 30)):
        first, second = (results[phase] for results in ranks)
        assert first["num_timesteps"] == second["num_timesteps"] == n_timesteps
        assert_equal(first["weights"], second["weights"])


def test_offline_to_online(ranks):
    """Timesteps are gradient steps first, and those of all environments after that."""
    first, second = (results["both"] for results in ranks)
    assert first["timesteps"] == second["timesteps"] == [*range(1, 21), *range(24, 221, 4)]
    assert_equal(first["weights"], second["weights"])


def test_chunks_online(ranks):
    first, second = (results["chunks"] for results in ranks)
    assert first["timesteps"] == second["timesteps"] == [*range(1, 11), *range(14, 211, 4)]
    assert_equal(first["weights"], second["weights"])


def test_pretraining(ranks):
    """The same clone, with the statistics of the dataset, which each process has as a whole."""
    for phase in ("clone", "fine-tuned"):
        assert_equal(*(results[phase]["weights"] for results in ranks))
    first, second = (results["fine-tuned"] for results in ranks)
    assert first["timesteps"] == second["timesteps"] == list(range(1, 21)) and first["noise"] != second["noise"]
    observations = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    for results in ranks:
        np.testing.assert_allclose(results["clone"]["statistics"], observations.mean(axis=0), atol=1e-4)


def test_rank_zero_logs_evaluates_and_saves(ranks):
    assert set(ranks[0]["saved"]) >= {"eval_0", "checkpoints_0", "tensorboard_0", "same_name.zip"}
    assert not set(ranks[0]["saved"]) & {"eval_1", "checkpoints_1", "tensorboard_1"}


def test_weights_that_drift_apart(ranks):
    assert_equal(*(results["drift"]["weights"] for results in ranks))


def test_hyperparameters_are_those_of_all(ranks):
    assert ranks[0]["buffer_size"] == (301, 150)


def test_failure_of_one_ends_all(ranks):
    assert isinstance(ranks[1]["error"], ValueError) and not isinstance(ranks[1]["error"], RankError)
    assert isinstance(ranks[0]["error"], RankError)
    assert str(ranks[0]["error"]) == f"rank 1 has stopped: {ranks[1]['error']}"


def test_one_process_is_as_without():
    """Nothing of it is there."""
    assert distributed.world_size() == 1 and distributed.rank() == 0
    assert not th.distributed.is_initialized()
    values = th.randn(10)
    assert distributed.mean(values) is values and distributed.share("n", 7) == 7 and distributed.broadcast(values) is values
    assert th.equal(distributed.normalize(values), (values - values.mean()) / (values.std() + 1e-8))


@pytest.mark.parametrize(
    "where, text",
    [
        (dict(MASTER_ADDR="localhost", MASTER_PORT="0"), "MASTER_ADDR=localhost.* 1/2 clients joined"),
        (dict(), "MASTER_ADDR=None.* MASTER_ADDR expected"),
    ],
)
def test_no_others(monkeypatch, where, text):
    """The environment tells of others, who do not come: neither an endless wait nor a training alone."""
    for name, value in dict(RANK="0", WORLD_SIZE="2", **where).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "WAIT_TO_BEGIN", timedelta(seconds=1))
    with pytest.raises(RankError, match=f"not found, with RANK=0, WORLD_SIZE=2, {text}"):
        distributed.gather(None)
    assert not th.distributed.is_initialized()


def test_alone_though_launched(monkeypatch):
    """By torchrun with one process."""
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, value)
    FPO("MlpPolicy", make_vec_env("Pendulum-v1"), n_steps=16, batch_size=16, device="cpu").learn(16)
    assert distributed.world_size() == 1 and not th.distributed.is_initialized()


@pytest.mark.slow
def test_weights_stay_equal(tmp_path):
    first, second = run(long_run, tmp_path)
    assert_equal(first["weights"], second["weights"])
    assert first["num_timesteps"] == second["num_timesteps"] and first["num_timesteps"] >= 20_000


# The command line

PARAMS = ["-params", "n_envs:4", "batch_size:64", "n_epochs:1", "n_steps:64", "normalize:True"]
TRAIN = ["train", "--algo", "fpo", "--env", "Pendulum-v1", "--num-threads", "1", "--seed", "1", "--verbose", "0"]
RUN = Path("logs/fpo/Pendulum-v1_1")


@pytest.fixture
def in_an_empty_folder(monkeypatch, tmp_path):
    pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')
    monkeypatch.chdir(tmp_path)


def torchrun(*args):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(N_RANKS),
        "-m",
        "sb3_flow.zoo",
    ]
    return subprocess.Popen([*command, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(agent):
    """Process of each rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1] == str(agent.pid):
                variables = path.joinpath("environ").read_bytes().split(b"\0")
                found |= {int(variable[5:]): int(path.name) for variable in variables if variable.startswith(b"RANK=")}
        except OSError:
            pass
    return found


def own_lines(output):
    return [line for line in output.splitlines() if line.startswith(("sb3-flow:", "Interrupted"))]


def wait_for_checkpoint(agent):
    end = time.monotonic() + 200
    while not list(RUN.glob("rl_model_*_steps.zip")):
        assert time.monotonic() < end and agent.poll() is None
        time.sleep(0.1)


def killed(rank):
    """A run, one of whose ranks is killed after its first checkpoint."""
    agent = torchrun(*TRAIN, "-n", 1_000_000, "--save-freq", 256, "--eval-freq", -1, *PARAMS)
    try:
        wait_for_checkpoint(agent)
        os.kill(workers(agent)[rank], signal.SIGKILL)
        output = agent.communicate(timeout=60)[0]
    finally:
        agent.kill()
    assert agent.returncode != 0
    # It was for fewer timesteps
    args = RUN / "Pendulum-v1" / "args.yml"
    args.write_text(args.read_text().replace("1000000", "512"))
    assert sorted(path.name for path in RUN.glob("*monitor.csv")) == [f"{index}.monitor.csv" for index in range(4)]
    return own_lines(output)


def resume(*args):
    from sb3_flow.zoo import cli

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["sb3-flow", *TRAIN[:5], "--resume", *map(str, args)])
        cli.main()


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="looks for the processes in /proc")


@needs_proc
def test_killed_process(in_an_empty_folder):
    """The others end within a minute, with a line that names it. One process goes on, then several, one of them new."""
    first, last = killed(1)
    assert first.startswith("sb3-flow: error: rank 1 was killed")
    assert last.startswith("Interrupted after") and last.endswith(f"sb3-flow train --resume {RUN}")
    n_timesteps = FPO.load(RUN / "Pendulum-v1.zip").num_timesteps
    resume("-n", n_timesteps + 256)
    assert FPO.load(RUN / "Pendulum-v1.zip").num_timesteps >= n_timesteps + 256


@needs_proc
@pytest.mark.slow
def test_killed_rank_zero(in_an_empty_folder):
    (line,) = killed(0)
    assert line.startswith("sb3-flow: error: rank 0 was killed") and line.endswith(f"sb3-flow train --resume {RUN}")
    checkpoints = len(list(RUN.glob("rl_model_*_steps.zip")))
    agent = torchrun(*TRAIN[:5], "--resume", "-n", 4096)
    output = agent.communicate(timeout=200)[0]
    assert agent.returncode == 0, output
    assert FPO.load(RUN / "Pendulum-v1.zip").num_timesteps >= 4096
    assert len(list(RUN.glob("rl_model_*_steps.zip"))) > checkpoints
    assert yaml.unsafe_load((RUN / "Pendulum-v1" / "config.yml").read_text())["n_envs"] == 4


@pytest.mark.slow
def test_envpool(in_an_empty_folder):
    """Each rank has a Monitor file of all of its environments, also when the run is resumed."""
    pytest.importorskip("envpool", reason='needs pip install "sb3-flow[envpool]"')
    train, folder = ["train", "--algo", "fpo", "--env", "HalfCheetah-v5"], Path("logs/fpo/HalfCheetah-v5_1")
    params = ["-params", "n_envs:4", "batch_size:500", "n_epochs:1", "n_steps:1000"]
    for args in (["--vec-env", "envpool", "-n", 4000, "--seed", 1, "--num-threads", 1, *params], ["--resume", "-n", 8000]):
        agent = torchrun(*train, *args, "--eval-freq", -1)
        output = agent.communicate(timeout=200)[0]
        assert agent.returncode == 0, output
    paths = [folder / f"{prefix}{rank}.monitor.csv" for prefix in ("", "before_1.") for rank in range(N_RANKS)]
    assert set(folder.glob("*.monitor.csv")) == set(paths)
    # One episode of each environment, none of which is as another
    rewards = [pd.read_csv(path, skiprows=1)["r"].tolist() for path in paths]
    assert np.shape(rewards) == (len(paths), 2) and len(np.unique(rewards)) == 2 * len(paths)
    assert FPO.load(folder / "HalfCheetah-v5.zip").num_timesteps == 8000


@pytest.mark.slow
def test_terminated(in_an_empty_folder):
    """As clusters do it: rank 0 saves."""
    agent = torchrun(*TRAIN, "-n", 1_000_000, "--save-freq", 256, "--eval-freq", -1, *PARAMS)
    try:
        wait_for_checkpoint(agent)
        agent.send_signal(signal.SIGTERM)
        output = agent.communicate(timeout=60)[0]
    finally:
        agent.kill()
    assert len(own_lines(output)) == 1 and "Interrupted after" in output
    assert FPO.load(RUN / "Pendulum-v1.zip").num_timesteps > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, texts",
    [
        (["train", "--algo", "ppo", "--env", "Pendulum-v1"], ["argument --algo", "'ppo'", "fpo"]),
        (["optimize", "--algo", "fpo", "--env", "Pendulum-v1"], ["optimize", "one process"]),
        ([*TRAIN, "-optimize"], ["argument -optimize", "--storage"]),
        ([*TRAIN, "-params", "n_envs:3"], ["`n_envs`", "2, it is 3"]),
        ([*TRAIN, "-params", "batch_size:63"], ["`batch_size`", "63"]),
        (["train", "--algo", "fql", "--env", "Pendulum-v1", "--save-replay-buffer"], ["argument --save-replay-buffer"]),
        (["train", "--algo", "fpo", "--env", "Pendulum-v9"], ["argument --env", "'Pendulum-v9'"]),
    ],
)
def test_bad_input(in_an_empty_folder, args, texts):
    """One line of all of them, and nothing is left."""
    agent = torchrun(*args)
    output = agent.communicate(timeout=200)[0]
    (line,) = own_lines(output)
    assert agent.returncode != 0 and line.startswith("sb3-flow: error: ") and all(text in line for text in texts)
    assert not Path("logs").exists()
