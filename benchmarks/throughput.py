"""
What a flow policy costs, against its Gaussian peers on the same machine: `python benchmarks/throughput.py`

Each row is a ratio of two medians, of repeats that alternate between ours and the peer in one process, first with one torch
thread, then with as many as torch takes by itself. Beside it, the limit: the time that the products of matrices which the
mathematics needs would take at the rate this machine multiplies two matrices of 1024×1024.

  forward   policy(obs) of FPO and of SB3's PPO, as it is called to collect a rollout
  train     one epoch of train() on a rollout of 16 × 128 steps, FPO with 8 Monte-Carlo pairs, per transition
  learn     learn() with 16 environments, per step
  fql       one gradient step of FQL, and of SB3's SAC and TD3 at the same width, batch 256
            (and the authors' code, with --official-fql, a checkout of it, and --official-python, an interpreter with JAX);
            "medium" is with products of bfloat16, for all of them
  update    one gradient step of another offline method at the same width, against FQL's
  act       one action for one observation of an offline method, against FQL's (with chunks: a fifth of a chunk)
  onnx      one action for one observation by onnxruntime, of an exported policy, against predict() (FPO and DPPO with their
            default networks, FQL and IFQL with 4×512)
  step      a step of 16 environments of EnvPool in one thread, and of the ordinary ones in DummyVecEnv, with random actions
  envpool   learn() of FPO in EnvPool with its hyperparameters of the task, per step, against PPO's with the same rollouts,
            minibatches, epochs and networks, and FPO's own in the ordinary environments

The results, with the peak memory of each side in a process of its own, go to benchmarks/results/throughput.json, and the table
and a plot of the ratios beside it.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from dmc import DMC
from gymnasium import spaces
from runs import fpo_hyperparameters, provenance, write_table

RESULTS = Path(__file__).parent / "results" / "throughput.json"
SHAPES = {"HalfCheetah": (17, 6), "Humanoid": (348, 17)}
DMC_TASKS = list(DMC)
#: Ratios that we hold ourselves to (of time, ours over the peer's)
BARS = {
    "forward HalfCheetah 4x32 16": 1.5,
    "forward HalfCheetah 4x32 2048": 3.0,
    "train HalfCheetah": 2.5,
    "train Humanoid": 2.0,
    "learn HalfCheetah-v5": 1.6,
    "fql 4x512 official": 1 / 1.5,
    **{f"update anchor {net} FQL": 0.75 for net in ("2x256", "4x512")},
    **{f"update ten-critics {net} FQL": 2.5 for net in ("2x256", "4x512")},
    **{f"update {name} official": 1.0 for name in ("ifql 2x256", "ifql 4x512")},
    **{f"step {task} DummyVecEnv": 1 / 4 for task in DMC_TASKS},
    "envpool cheetah-run": 1.45,
    "envpool cheetah-run DummyVecEnv": 1 / 1.25,
    "envpool finger-turn_hard DummyVecEnv": 1 / 1.45,
}
NETS = {"4x32": [32] * 4, "2x256": [256] * 2, "4x512": [512] * 4}
#: Observations and actions of cube-single
OFFLINE_SHAPE = (28, 5)
N_TRANSITIONS = 20_000
#: Of these, the authors' code of FQL has an agent too
OFFICIAL = ("ifql",)
N_MC, N_FLOW_STEPS, BATCH, N_ENVS = 8, 10, 256, 16


#: Offline methods: the class, its arguments, and those of its policy
OFFLINE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "flow_bc": ("FlowBC", {}, {}),
    "anchor": ("FQL", dict(distillation="anchor"), {}),
    "ten-critics": ("FQL", dict(rho=0.5), dict(n_critics=10)),
    "qc-fql": ("FQL", dict(chunk_size=5), {}),
    "qc": ("QC", {}, {}),
    "ifql": ("IFQL", {}, {}),
    "fbrac": ("FBRAC", {}, {}),
    "fawac": ("FAWAC", {}, {}),
}


class Still(gym.Env):
    """An environment that costs nothing."""

    def __init__(self, obs_dim: int, action_dim: int):
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = spaces.Box(-1, 1, (action_dim,), np.float32)
        self.obs = np.zeros(obs_dim, np.float32)

    def reset(self, *, seed=None, options=None):
        return self.obs, {}

    def step(self, action):
        return self.obs, 0.0, False, False, {}


# --- Floating point operations of the products of matrices, for one observation


def mlp(*sizes: int) -> int:
    return sum(2 * n_in * n_out for n_in, n_out in itertools.pairwise(sizes))


def flow_flops(obs_dim: int, action_dim: int, net: list[int], n_points: int) -> int:
    """A flow network at several points, with what the observation contributes computed once."""
    return 2 * obs_dim * net[0] + n_points * (2 * action_dim * net[0] + mlp(*net, action_dim))


# --- Cases: name -> function that returns (ours, peers, limit in FLOP, unit per call)


def policies(obs_dim: int, action_dim: int, pi: list[int], vf: list[int]) -> tuple[Any, Any]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sb3_flow import FPO

    settings: dict[str, Any] = dict(n_steps=128, batch_size=BATCH, n_epochs=1, learning_rate=1e-6, device="cpu", seed=0)
    env = DummyVecEnv([lambda: Still(obs_dim, action_dim)] * 16)
    fpo, ppo = (cls("MlpPolicy", env, **of_the_paper(cls, pi, vf) | settings) for cls in (FPO, PPO))
    return fpo, ppo


def of_the_paper(cls: Any, pi: list[int], vf: list[int]) -> dict[str, Any]:
    """FPO's settings of the paper, and PPO's own, with these networks."""
    import torch as th

    from sb3_flow import FPO, presets

    preset = presets.PAPER if cls is FPO else {}
    policy_kwargs = dict(net_arch=dict(pi=pi, vf=vf), activation_fn=th.nn.SiLU)
    return {**preset, "policy_kwargs": {**preset.get("policy_kwargs", {}), **policy_kwargs}}


class Timed:
    """What is timed, and how many units of it one call is."""

    def __init__(self, function: Callable[[], Any], units: int):
        self.function, self.units = function, units

    def __call__(self) -> None:
        self.function()


def forward(shape: str, net_name: str, n_obs: str) -> tuple[Timed, dict[str, Any], float]:
    import torch as th

    (obs_dim, action_dim), net = SHAPES[shape], NETS[net_name]
    obs = th.randn(int(n_obs), obs_dim)
    n_calls = max(3, int(1000 / (1 + len(obs) * sum(net) / 2000)))

    def call(policy) -> Timed:
        def run() -> None:
            with th.no_grad():
                for _ in range(n_calls):
                    policy(obs)

        return Timed(run, n_calls)

    fpo, ppo = policies(obs_dim, action_dim, net, net)
    for model in (fpo, ppo):
        model.policy.set_training_mode(False)
    flops = flow_flops(obs_dim, action_dim, net, N_FLOW_STEPS) + mlp(obs_dim, *net, 1)
    return call(fpo.policy), {"PPO": call(ppo.policy)}, flops * len(obs)


def train(shape: str) -> tuple[Timed, dict[str, Any], float]:
    obs_dim, action_dim = SHAPES[shape]
    pi, vf = NETS["4x32"], NETS["2x256"]
    rng = np.random.default_rng(0)

    def call(model) -> Timed:
        _, callback = model._setup_learn(10**9)
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        for name in ("observations", "advantages", "returns"):
            array = getattr(model.rollout_buffer, name)
            array[:] = rng.standard_normal(array.shape)

        def run() -> None:
            model.train()

        return Timed(run, 16 * 128)

    fpo, ppo = policies(obs_dim, action_dim, pi, vf)
    # Forward and backward; the losses under the old policy once more forward, in this one epoch
    flops = 4 * flow_flops(obs_dim, action_dim, pi, N_MC) + 3 * mlp(obs_dim, *vf, 1)
    return call(fpo), {"PPO": call(ppo)}, flops


def learn(env_id: str) -> tuple[Timed, dict[str, Any], float]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    from sb3_flow import FPO

    pi, vf = NETS["4x32"], NETS["2x256"]

    def call(cls) -> Timed:
        settings = dict(n_steps=128, batch_size=BATCH, n_epochs=10, device="cpu", seed=0)
        env = make_vec_env(env_id, 16, seed=0)
        model = cls("MlpPolicy", env, **of_the_paper(cls, pi, vf) | settings)
        model.learn(1)

        def run() -> None:
            model.learn(2 * 16 * 128, reset_num_timesteps=False)

        return Timed(run, 2 * 16 * 128)

    env = gym.make(env_id)
    obs_dim, action_dim = spaces.flatdim(env.observation_space), spaces.flatdim(env.action_space)
    collect = flow_flops(obs_dim, action_dim, pi, N_FLOW_STEPS) + mlp(obs_dim, *vf, 1)
    update = (3 + 1 / 10) * flow_flops(obs_dim, action_dim, pi, N_MC) + 3 * mlp(obs_dim, *vf, 1)
    return call(FPO), {"PPO": call(PPO)}, collect + 10 * update


def random_transitions(obs_dim: int, action_dim: int, n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((n + 1, obs_dim), np.float32)
    return dict(
        observations=observations[:-1],
        next_observations=observations[1:],
        actions=rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        rewards=rng.standard_normal(n, np.float32),
        timeouts=np.arange(n) % 1000 == 999,
    )


def offline_model(cls: Any, net_name: str, arguments: dict[str, Any], policy_kwargs: dict[str, Any]) -> Any:
    """With a dataset of the shapes of cube-single."""
    obs_dim, action_dim = OFFLINE_SHAPE
    kwargs: dict[str, Any] = dict(
        batch_size=BATCH, device="cpu", seed=0, policy_kwargs=policy_kwargs | dict(net_arch=NETS[net_name])
    )
    if cls.learns_online:
        kwargs["buffer_size"] = 1
    data = random_transitions(obs_dim, action_dim, N_TRANSITIONS)
    model = cls("MlpPolicy", Still(obs_dim, action_dim), dataset=data, **kwargs, **arguments)
    _, _ = model._setup_learn(10**9)
    return model


def updates(model: Any, net_name: str) -> Timed:
    n_updates = 4 if net_name == "4x512" else 20

    def run() -> None:
        model.train(gradient_steps=n_updates, batch_size=BATCH)

    return Timed(run, n_updates)


def fql(net_name: str, precision: str = "highest") -> tuple[Timed, dict[str, Any], float]:
    import torch as th
    from stable_baselines3 import SAC, TD3

    from sb3_flow import FQL

    th.set_float32_matmul_precision(precision)
    (obs_dim, action_dim), n, net = OFFLINE_SHAPE, N_TRANSITIONS, NETS[net_name]
    data = random_transitions(obs_dim, action_dim, n)

    def peer(cls: Any) -> Timed:
        kwargs: dict = dict(batch_size=BATCH, device="cpu", seed=0, buffer_size=n, policy_kwargs=dict(net_arch=net))
        model = cls("MlpPolicy", Still(obs_dim, action_dim), **kwargs)
        buffer = model.replay_buffer
        for name in ("observations", "next_observations", "actions", "rewards"):
            array = getattr(buffer, name)
            array[:] = data[name].reshape(array.shape)
        buffer.full = True
        _, _ = model._setup_learn(10**9)
        return updates(model, net_name)

    actor, flow = mlp(obs_dim + action_dim, *net, action_dim), flow_flops(obs_dim, action_dim, net, N_FLOW_STEPS)
    critics = 2 * mlp(obs_dim + action_dim, *net, 1)
    bc = mlp(obs_dim + action_dim + 1, *net, action_dim)
    # Target; critics; flow; distillation; Q term, whose backward pass needs no gradient of the weights
    flops = (actor + critics) + 3 * critics + 3 * bc + (3 * actor + flow) + 2 * critics
    ours = updates(offline_model(FQL, net_name, dict(alpha=300), {}), net_name)
    return ours, {"SAC": peer(SAC), "TD3": peer(TD3)}, flops * BATCH


def update(method: str, net_name: str) -> tuple[Timed, dict[str, Any], float]:
    import sb3_flow

    name, arguments, policy_kwargs = OFFLINE[method]
    ours, peer = (
        updates(offline_model(getattr(sb3_flow, one[0]), net_name, *one[1:]), net_name)
        for one in ((name, arguments, policy_kwargs), ("FQL", {}, {}))
    )
    return ours, {"FQL": peer}, 0


def act(method: str, net_name: str) -> tuple[Timed, dict[str, Any], float]:
    import sb3_flow

    obs = np.zeros(OFFLINE_SHAPE[0], np.float32)

    def call(name: str, arguments: dict[str, Any], policy_kwargs: dict[str, Any]) -> Timed:
        model = offline_model(getattr(sb3_flow, name), net_name, arguments, policy_kwargs)

        def run() -> None:
            state = None
            for _ in range(50):
                _, state = model.predict(obs, state)

        return Timed(run, 50)

    return call(*OFFLINE[method]), {"FQL": call("FQL", {}, {})}, 0


def onnx(algo: str) -> tuple[Timed, dict[str, Any], float]:
    import onnxruntime
    import torch as th

    import sb3_flow
    from sb3_flow.export import export_policy

    obs_dim, action_dim = SHAPES["HalfCheetah"]
    cls = getattr(sb3_flow, algo.upper())
    kwargs = dict(device="cpu") | (dict(buffer_size=1) if hasattr(cls, "learns_online") else {})
    model = cls("MlpPolicy", Still(obs_dim, action_dim), **kwargs)
    obs = np.zeros((1, obs_dim), np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = th.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = export_policy(model, Path(folder) / "policy.onnx")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    noise = np.random.default_rng(0).standard_normal((1, *model.policy.noise_shape), np.float32)
    n_calls = 200

    def exported() -> None:
        for _ in range(n_calls):
            session.run(["action"], {"observation": obs, "noise": noise})

    def predict() -> None:
        for _ in range(n_calls):
            model.predict(obs)

    return Timed(exported, n_calls), {"predict": Timed(predict, n_calls)}, 0


def step(task: str) -> tuple[Timed, dict[str, Any], float]:
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sb3_flow.envs.envpool import TASKS, make_envpool, make_ordinary

    env_id, n_steps = f"dm_control/{task}-v0", 100
    ordinary = DummyVecEnv([lambda: make_ordinary(env_id)] * N_ENVS)
    space = ordinary.action_space
    assert isinstance(space, spaces.Box)
    actions = np.random.default_rng(0).uniform(space.low, space.high, (n_steps, N_ENVS, *space.shape)).astype(space.dtype)

    def call(env) -> Timed:
        env.reset()

        def run() -> None:
            for action in actions:
                env.step(action)

        return Timed(run, n_steps)

    return call(make_envpool(TASKS[env_id], n_envs=N_ENVS, num_threads=1)), {"DummyVecEnv": call(ordinary)}, 0


def envpool(task: str) -> tuple[Timed, dict[str, Any], float]:
    import torch as th
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from sb3_flow import FPO
    from sb3_flow.envs.envpool import TASKS, make_envpool, make_ordinary

    env_id = f"dm_control/{task}-v0"
    settings = fpo_hyperparameters(env_id)
    settings.update(learning_rate=float(settings["learning_rate"].removeprefix("lin_")), device="cpu", seed=0)
    n_envs, policy, _, _ = map(settings.pop, ("n_envs", "policy", "n_timesteps", "env_wrapper"))
    n_steps, net_arch, n_epochs = settings["n_steps"], settings["policy_kwargs"]["net_arch"], settings["n_epochs"]
    of_ppo = ("n_steps", "batch_size", "n_epochs", "gamma", "learning_rate", "clip_range")

    def call(model) -> Timed:
        model.learn(1)

        def run() -> None:
            model.learn(2 * n_envs * n_steps, reset_num_timesteps=False)

        return Timed(run, 2 * n_envs * n_steps)

    def fpo(env) -> Timed:
        return call(FPO(policy, env, **settings))

    def ppo(env) -> Timed:
        env = VecNormalize(env, gamma=settings["gamma"])
        kwargs: dict[str, Any] = {key: settings[key] for key in of_ppo}
        kwargs["policy_kwargs"] = dict(net_arch=net_arch, activation_fn=th.nn.SiLU)
        return call(PPO(policy, env, device="cpu", seed=0, **kwargs))

    def pool():
        return make_envpool(TASKS[env_id], n_envs=n_envs, num_threads=1)

    env = make_ordinary(env_id)
    obs_dim, action_dim = spaces.flatdim(env.observation_space), spaces.flatdim(env.action_space)
    n_points = settings["n_mc_samples"] * (1 + settings["n_baseline_actions"])
    collect = flow_flops(obs_dim, action_dim, net_arch["pi"], N_FLOW_STEPS) + mlp(obs_dim, *net_arch["vf"], 1)
    losses = flow_flops(obs_dim, action_dim, net_arch["pi"], n_points)
    flops = collect + losses + 3 * n_epochs * (losses + mlp(obs_dim, *net_arch["vf"], 1))
    peers = {"PPO": ppo(pool()), "DummyVecEnv": fpo(make_vec_env(lambda: make_ordinary(env_id), n_envs))}
    return fpo(pool()), peers, flops


CASES: dict[str, Callable] = {
    "forward": forward,
    "train": train,
    "learn": learn,
    "fql": fql,
    "update": update,
    "act": act,
    "onnx": onnx,
    "step": step,
    "envpool": envpool,
}
NAMES = [
    *(f"forward {shape} {net} {n}" for shape in SHAPES for net in ("4x32", "2x256") for n in (1, 16, 256, 2048)),
    *(f"train {shape}" for shape in SHAPES),
    "learn HalfCheetah-v5",
    "learn Humanoid-v5",
    "fql 2x256",
    "fql 4x512",
    "fql 4x512 medium",
    *(f"{case} {method} {net}" for case in ("update", "act") for net in ("2x256", "4x512") for method in OFFLINE),
    *(f"onnx {algo}" for algo in ("fpo", "dppo", "fql", "ifql")),
    *(f"step {task}" for task in DMC_TASKS),
    "envpool cheetah-run",
    "envpool finger-turn_hard",
]
#: What PyTorch calls "medium" (th.set_float32_matmul_precision), JAX calls by its name
JAX_PRECISIONS = {"highest": "float32", "medium": "bfloat16"}


class Official:
    """The authors' code in a process of its own, which answers each line with the seconds that its updates took."""

    def __init__(self, path: Path, python: str, agent: str, net: list[int], precision: str, n_updates: int, threads: int):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(path)}
        environment["JAX_DEFAULT_MATMUL_PRECISION"] = JAX_PRECISIONS[precision]
        if threads == 1:
            environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        worker = str(Path(__file__).parent / "official_fql.py")
        # One thread of XLA is one core of the machine
        prefix = ["taskset", "-c", "0"] if threads == 1 else []
        command = [*prefix, python, worker, agent, json.dumps(net), str(n_updates), str(BATCH)]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.units = n_updates
        self()

    def __call__(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise RuntimeError("The authors' code stopped, see above")


def seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) / function.units


def measure(name: str, threads: int, repeats: int, official: tuple[Path, str] | None) -> dict:
    """Alternate between ours and the peers, in this process."""
    import torch as th

    if threads:
        th.set_num_threads(threads)
    kind, *arguments = name.split()
    ours, peers, flops = CASES[kind](*arguments)
    if kind == "fql" and official is not None:
        net_name, precision = [*arguments, "highest"][:2]
        peers["official"] = Official(*official, "fql", NETS[net_name], precision, ours.units, threads)
    elif kind == "update" and arguments[0] in OFFICIAL and official is not None:
        peers["official"] = Official(*official, arguments[0], NETS[arguments[1]], "highest", ours.units, threads)
    a, b = th.randn(1024, 1024), th.randn(1024, 1024)

    functions = {"ours": ours, **peers, "matmul": Timed(lambda: a @ b, 1)}
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {key: [] for key in functions}
    for _ in range(repeats):
        for key, function in functions.items():
            times[key].append(seconds(function))
    medians = {key: statistics.median(values) for key, values in times.items()}
    rate = 2 * 1024**3 / medians.pop("matmul")
    return dict(
        name=name,
        threads=th.get_num_threads(),
        repeats=repeats,
        milliseconds={key: 1e3 * value for key, value in medians.items()},
        ratios={key: medians["ours"] / value for key, value in medians.items() if key != "ours"},
        limit_milliseconds=1e3 * flops / rate,
        gflops_of_this_machine=rate / 1e9,
        all_milliseconds={key: [1e3 * value for value in values] for key, values in times.items()},
    )


def peak_memory(name: str, side: str) -> dict[str, float]:
    """Peak resident memory while one side runs, in MiB, and what of it was not there before, in this process."""
    import torch as th

    th.set_num_threads(1)
    kind, *arguments = name.split()
    ours, peers, _ = CASES[kind](*arguments)
    function = {"ours": ours, **peers}[side]
    before = resident("VmRSS")
    # Linux: the peak starts again from here
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        function()
    peak = resident("VmHWM")
    return dict(peak=peak, added=peak - before)


def resident(name: str) -> float:
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024


HEADER = ("", "threads", "ours, ms", "limit, ms", "peer", "peer, ms", "ours / peer", "we want")


def table(rows: list[dict]) -> list[tuple[str, ...]]:
    return [
        (
            row["name"],
            str(row["threads"]),
            f"{row['milliseconds']['ours']:.3g}",
            f"{row['limit_milliseconds']:.3g}" if row["limit_milliseconds"] else "",
            peer,
            f"{row['milliseconds'][peer]:.3g}",
            f"{ratio:.2f}",
            "" if (bar := bar_of(row, peer)) is None else f"≤ {bar:.2f}",
        )
        for row in rows
        for peer, ratio in row["ratios"].items()
    ]


def bar_of(row: dict, peer: str) -> float | None:
    return BARS.get(row["name"] if peer == "PPO" else f"{row['name']} {peer}")


def write(rows: list[dict], results: Path) -> None:
    """Print the table, and leave it, for the docs, and a plot beside the results."""
    write_table(results.with_suffix(".csv"), HEADER, table(rows))
    plot(rows, results.with_suffix(".png"))


def command_line(args: argparse.Namespace) -> str:
    official = "" if args.official_fql is None else " --official-fql PATH --official-python PYTHON"
    only = "" if args.only == NAMES else " --only " + " ".join(map(repr, args.only))
    threads = " ".join(map(str, args.threads))
    return f"python benchmarks/throughput.py --threads {threads} --repeats {args.repeats}{official}{only}"


def plot(rows: list[dict], path: Path) -> None:
    """Ratios with one thread, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{row['name']} / {peer}", ratio, bar_of(row, peer))
        for row in rows
        if row["threads"] == 1
        for peer, ratio in row["ratios"].items()
    ]
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(bars) + 1), layout="constrained")
    positions = range(len(bars))
    axes.barh(positions, [ratio for _, ratio, _ in bars], color="tab:blue", height=0.6)
    for position, (_, ratio, bar) in enumerate(bars):
        axes.text(ratio, position, f" {ratio:.2f}", va="center", fontsize=7)
        if bar is not None:
            axes.plot([bar, bar], [position - 0.4, position + 0.4], color="tab:red")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(positions, [name for name, _, _ in bars], fontsize=7)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel("time, ours / peer, one thread (red: what we hold ourselves to)")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="CASE", help="; ".join(NAMES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 0], help="torch threads (0: torch's own choice)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--official-fql", type=Path, help="a checkout of the FQL authors' code")
    parser.add_argument("--official-python", default=sys.executable, help="an interpreter that it runs with")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    official = None if args.official_fql is None else (args.official_fql, args.official_python)
    if args.child is not None:
        what, name = args.child
        result = measure(name, int(what), args.repeats, official) if what.isdigit() else peak_memory(name, what)
        print("\n" + json.dumps(result))
        return
    if args.table_only:
        write(json.loads(args.results.read_text())["rows"], args.results)
        return

    def child(what: str, name: str) -> Any:
        command = [sys.executable, __file__, "--child", what, name, "--repeats", str(args.repeats)]
        if official is not None:
            command += ["--official-fql", str(official[0]), "--official-python", official[1]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} if what == "1" or not what.isdigit() else None
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{name} failed, see above")
        return json.loads(done.stdout.splitlines()[-1])

    rows = []
    for name in args.only:
        for threads in args.threads:
            row = child(str(threads), name)
            if threads == 1 and not name.startswith("forward"):
                row["peak_memory_mib"] = {
                    side: child(side, name) for side in ("ours", *row["ratios"]) if side != "official"
                }  # fmt: skip
            rows.append(row)
            ratios = ", ".join(f"{ratio:.2f} × {peer}" for peer, ratio in row["ratios"].items())
            print(f"{name}, {row['threads']} threads: {ratios}", flush=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(dict(rows=rows, command=command_line(args), **provenance()), indent=1) + "\n")
    write(rows, args.results)


if __name__ == "__main__":
    main()
