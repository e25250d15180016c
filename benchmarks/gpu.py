"""
What one captured graph brings on a GPU, and whether it computes the same: `python benchmarks/gpu.py`

  correctness   CUDA against the CPU, ``compile=True`` against without it, and what a graph must not do behind one's back
  fql           gradient steps of FQL, 4×512 and batch 256, without and with ``compile=True``, and of the authors' JAX code
                (with --official-fql, a checkout of it), at equal precision of the products: that of PyTorch's default
                (float32) and that of JAX's on a GPU (TF32)
  offline       the same of the other offline methods (TF32), beside the authors' IFQL
  forward       policy(obs) of FPO and of SB3's PPO, with the actions to the CPU, as a rollout is collected
  train         train() of FPO and of PPO after a rollout of 2048 environments, and the peak memory of it
  kernels       how many kernels an update of FQL is, and which of them take its time

Sections are independent of each other: one that fails prints why, and the others go on. The results go to --out as they come.
Where neither Stable-Baselines3 nor gymnasium are installed, --wheels names a folder with their wheels.
"""

import argparse
import contextlib
import copy
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

NET, BATCH = [512] * 4, 256
OBS_DIM, ACTION_DIM, N_ROWS = 28, 5, 100_000
#: Of PyTorch and of JAX
PRECISIONS = {"float32": ("highest", "float32"), "TF32": ("high", "tensorfloat32")}
#: Ratios that we hold ourselves to
BARS = {
    "FQL updates/s, compiled over official, float32": (">=", 1.2),
    "FQL updates/s, compiled over official, TF32": (">=", 1.2),
    "forward of 2048 observations, FPO compiled over PPO": ("<=", 1.5),
}

#: Offline methods: their classes and arguments
OFFLINE_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "FQL": ("FQL", dict(alpha=300.0, buffer_size=1)),
    "FQL, anchored": ("FQL", dict(alpha=300.0, buffer_size=1, distillation="anchor")),
    "FQL, ten critics": ("FQL", dict(alpha=300.0, buffer_size=1, rho=0.5, policy_kwargs=dict(n_critics=10))),
    "QC-FQL": ("FQL", dict(alpha=300.0, buffer_size=1, chunk_size=5)),
    "QC": ("QC", dict(buffer_size=1, chunk_size=5)),
    "FlowBC": ("FlowBC", {}),
    "IFQL": ("IFQL", dict(buffer_size=1)),
    "FBRAC": ("FBRAC", dict(alpha=300.0, buffer_size=1)),
    "FAWAC": ("FAWAC", dict(buffer_size=1)),
}

Row = dict[str, Any]


def use_wheels(folder: Path) -> None:
    """Pure Python wheels, from an unpacked copy, where there is no other installation."""
    unpacked = tempfile.mkdtemp()
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(unpacked)
    sys.path.append(unpacked)


def dataset(seed: int = 0, n: int = N_ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    observations = rng.standard_normal((n + 1, OBS_DIM), np.float32)
    return dict(
        observations=observations[:-1],
        next_observations=observations[1:],
        actions=rng.uniform(-1, 1, (n, ACTION_DIM)).astype(np.float32),
        rewards=rng.standard_normal(n, np.float32),
        terminations=np.zeros(n, bool),
        truncations=np.arange(n) % 100 == 99,
    )


def make_env(obs_dim: int, action_dim: int, n_envs: int) -> Any:
    """Environments that cost next to nothing."""
    from gymnasium import spaces
    from stable_baselines3.common.vec_env import VecEnv

    class Noise(VecEnv):
        def __init__(self) -> None:
            super().__init__(
                n_envs,
                spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32),
                spaces.Box(-1, 1, (action_dim,), np.float32),
            )
            self.rng = np.random.default_rng(0)

        def reset(self):
            return self.rng.standard_normal((n_envs, obs_dim), np.float32)

        def step_async(self, actions):
            self.actions = actions

        def step_wait(self):
            dones = self.rng.random(n_envs) < 0.01
            infos = [{} for _ in range(n_envs)]
            return self.reset(), -np.square(self.actions).sum(axis=1), dones, infos

        def close(self):
            pass

        def get_attr(self, name, indices=None):
            return [None] * n_envs

        # (abstract in VecEnv, and not called here)
        def set_attr(self, name, value, indices=None):
            raise NotImplementedError(f"there are no attributes to set, found {name!r}")

        def env_method(self, name, *args, indices=None, **kwargs):
            raise NotImplementedError(f"there are no methods to call, found {name!r}")

        def env_is_wrapped(self, wrapper_class, indices=None):
            return [False] * n_envs

    return Noise()


def make_fql(device: str, net: list[int] = NET, data: dict | None = None, method: str = "FQL", **kwargs: Any) -> Any:
    import sb3_flow

    algorithm, of_method = OFFLINE_METHODS[method]
    settings: dict[str, Any] = dict(batch_size=BATCH, seed=0) | of_method | kwargs
    settings["policy_kwargs"] = dict(net_arch=net) | settings.get("policy_kwargs", {})
    data = dataset() if data is None else data
    return getattr(sb3_flow, algorithm)("MlpPolicy", make_env(OBS_DIM, ACTION_DIM, 1), data, device=device, **settings)


def make_on_policy(name: str, device: str, n_envs: int, **kwargs: Any) -> Any:
    import torch as th
    from stable_baselines3 import PPO

    from sb3_flow import DPPO, FPO, presets

    # Of FPO the settings of the paper, whose networks all have
    cls, settings = dict(PPO=(PPO, {}), DPPO=(DPPO, {}), FPO=(FPO, presets.PAPER))[name]
    policy_kwargs = dict(net_arch=dict(pi=[32] * 4, vf=[256] * 5), activation_fn=th.nn.SiLU)
    settings = {**settings, "policy_kwargs": {**settings.get("policy_kwargs", {}), **policy_kwargs}}
    return cls("MlpPolicy", make_env(17, 6, n_envs), device=device, seed=0, **settings | kwargs)


def weights(model: Any) -> np.ndarray:
    return np.concatenate([x.detach().cpu().numpy().ravel() for x in model.policy.state_dict().values()])


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def collect(model: Any) -> None:
    """A rollout, ready for train()."""
    total, callback = model._setup_learn(10**9)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    model._update_current_progress_remaining(0, total)


# --- Correctness


@contextlib.contextmanager
def noise_of_the_cpu() -> Iterator[None]:
    import torch as th

    generator = th.Generator().manual_seed(0)
    rand = th.rand

    def randn_like(x: Any) -> Any:
        return th.randn(x.shape, generator=generator).to(x)

    def rand_there(n: int, device: Any = None) -> Any:
        return rand(n, generator=generator).to(device)

    with patch.object(th, "randn_like", randn_like), patch.object(th, "rand", rand_there):
        yield


def cpu_against_cuda_fql(device: str) -> Row:
    import torch as th
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    data = dataset(n=BATCH)
    results: list[Any] = []
    parameters = None
    for where in ("cpu", device):
        model = make_fql(where, data=data)
        parameters = copy.deepcopy(model.get_parameters()) if parameters is None else parameters
        model.set_parameters(parameters)
        columns = (data["observations"], data["actions"], data["next_observations"], data["terminations"], data["rewards"])
        tensors = [th.as_tensor(column, dtype=th.float32, device=where) for column in columns]
        batch = ReplayBufferSamples(*tensors[:3], *(x.unsqueeze(1) for x in tensors[3:]))
        with noise_of_the_cpu():
            loss, values = model._losses(batch)
        gradient = th.autograd.grad(loss, [*model.policy.optimizer.param_groups[0]["params"]], retain_graph=True)
        model._optimization_step(loss)
        results.append(([x.item() for x in values.values()], th.cat([x.flatten().cpu() for x in gradient]), weights(model)))
    (losses, gradient, after), (other_losses, other_gradient, other_after) = results
    return dict(
        losses_relative=float(np.max(np.abs(np.subtract(losses, other_losses)) / np.abs(losses))),
        gradient_relative=((gradient - other_gradient).norm() / gradient.norm()).item(),
        weights_after_an_update=largest_difference(after, other_after),
        passed=bool(np.allclose(losses, other_losses, rtol=1e-4)) and largest_difference(after, other_after) < 7e-4,
    )


def cpu_against_cuda_on_policy(device: str, name: str) -> Row:
    from sb3_flow.common.cuda_graphs import leaves

    settings: dict[str, Any] = dict(n_steps=64, batch_size=512, n_epochs=1)
    model = make_on_policy(name, "cpu", 8, **settings)
    collect(model)
    rollout = model._get_rollout()
    old = model._evaluate_old_policy(rollout)
    other = make_on_policy(name, device, 8, **settings)
    other.set_parameters(model.get_parameters())
    results = []
    for side in (model, other):
        inputs = [type(x)(*(leaf.to(side.device) for leaf in leaves(x))) for x in (rollout, old)]
        loss, values = side._losses(*inputs, side._clip_ranges(), needs_kl=True)
        grad_norm = side._backward(loss)
        side.policy.optimizer.step()
        numbers = [
            values["value_loss"].item(),
            values["cfm_loss" if name == "FPO" else "bounds_loss"].item(),
            grad_norm.item(),
        ]
        results.append((numbers, weights(side)))
    (numbers, after), (other_numbers, other_after) = results
    passed = np.allclose(numbers, other_numbers, rtol=1e-4) and largest_difference(after, other_after) < 7e-4
    return dict(numbers=numbers, cuda=other_numbers, weights=largest_difference(after, other_after), passed=bool(passed))


def relative_difference(after: np.ndarray, other: np.ndarray, before: np.ndarray) -> float:
    """How far apart two runs are, as a part of how far they went."""
    return float(np.linalg.norm(after - other) / np.linalg.norm(after - before))


def perturb(model: Any) -> None:
    """Rounding errors of float32."""
    import torch as th

    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.mul_(1 + 1e-7 * th.randn(parameter.shape, generator=th.Generator().manual_seed(1)).to(parameter))


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Of how the branches of an update of FQL are captured."""
    from sb3_flow.common import cuda_graphs
    from sb3_flow.fql import fql as algorithm

    with contextlib.ExitStack() as patches:
        if name == "one stream":
            patches.enter_context(patch.object(algorithm, "in_parallel", in_turn))
        elif name == "nothing kept":
            patches.enter_context(patch.object(cuda_graphs, "saved_tensors_hooks", lambda *hooks: contextlib.nullcontext()))
        yield


def compiled_against_eager_fql(device: str, n: int, how: str = "side by side", online: int = 0, **kwargs: Any) -> Row:
    """Beside the difference that rounding errors make."""
    results = {}
    for name in ("eager", "perturbed", "compiled"):
        model = make_fql(device, compile=name == "compiled", **kwargs)
        before = weights(model)
        if name == "perturbed":
            perturb(model)
        with variant(how):
            model.learn_offline(n, log_interval=None)
            if online:
                model.learn(online)
        results[name] = weights(model)
    captured = [update.function.graph is not None for _, update in model._graphs.values()]
    return compared(results, before, captured == [device == "cuda"])


def control(device: str) -> Row:
    """The comparison tells a race of two streams from rounding errors (on a GPU, where there are streams)."""
    result = compiled_against_eager_fql(device, 10, "nothing kept")
    return result | dict(passed=result["passed"] == (device != "cuda"))


def compared(results: dict[str, np.ndarray], before: np.ndarray, as_expected: bool) -> Row:
    difference, of_rounding = (
        relative_difference(results["eager"], results[name], before) for name in ("compiled", "perturbed")
    )
    passed = as_expected and difference < max(1e-4, 3 * of_rounding)
    largest = largest_difference(results["eager"], results["compiled"])
    return dict(difference=difference, of_rounding_errors=of_rounding, largest=largest, captured=as_expected, passed=passed)


def in_turn(*functions: Callable[[], Any]) -> list[Any]:
    return [function() for function in functions]


def compiled_against_eager_fpo(device: str) -> Row:
    results = {}
    for name in ("eager", "perturbed", "compiled"):
        # (the last minibatch is a smaller one)
        settings: dict[str, Any] = dict(n_steps=32, batch_size=600, n_epochs=6, clip_range_vf=0.5)
        model = make_on_policy("FPO", device, 64, compile=name == "compiled", **settings)
        before = weights(model)
        if name == "perturbed":
            perturb(model)
        model.learn(64 * 32 * 4)
        results[name] = weights(model)
    updates = model._graphs["updates"].updates
    captured = [update.function.graph is not None for _, update in updates.values()]
    captured += [function.graph is not None for _, function in model.policy._graphs.values()]
    return compared(results, before, captured == [device == "cuda"] * 3)


def capture_that_fails(device: str) -> Row:
    """It must leave no trace: the run is the eager one."""
    import torch as th

    from sb3_flow.offline import algorithm

    cfm_loss, results = algorithm.cfm_loss, {}

    def waits(*args: Any) -> Any:
        th.zeros((), device=device).item()
        return cfm_loss(*args)

    with patch.object(algorithm, "cfm_loss", waits):
        for name in ("eager", "perturbed", "compiled"):
            model = make_fql(device, data=dataset(n=2000), net=[64, 64], compile=name == "compiled")
            before = weights(model)
            if name == "perturbed":
                perturb(model)
            model.learn_offline(20, log_interval=None)
            results[name] = weights(model)
    captured = [update.function.graph is not None for _, update in model._graphs.values()]
    return compared(results, before, captured == [False])


def not_finite(device: str) -> Row:
    data = dataset(n=1000)
    model = make_fql(device, data=data, compile=True)
    model.learn_offline(20, log_interval=None)
    before = weights(model)
    model.offline_buffer.rewards.fill_(np.inf)
    try:
        model.learn_offline(20, log_interval=None)
    except ValueError as error:
        unchanged = bool((weights(model) == before).all())
        model.offline_buffer.rewards.zero_()
        model.learn_offline(20, log_interval=None)
        goes_on = bool((weights(model) != before).any()) and bool(np.isfinite(weights(model)).all())
        return dict(error=str(error), unchanged=unchanged, goes_on=goes_on, passed=unchanged and goes_on)
    return dict(passed=False)


def what_changes(device: str) -> Row:
    """Each is changed after the capture, and again when a graph with it has been captured."""

    def run(compiled: bool) -> list[float]:
        moved = []
        model = make_fql(device, data=dataset(n=2000), net=[64, 64], learning_rate=lambda p: 3e-4 * p, compile=compiled)
        other = {key: value for key, value in make_fql("cpu", net=[64, 64], seed=7).get_parameters().items()}

        def more() -> None:
            before = weights(model)
            model.learn_offline(10, log_interval=None)
            moved.append(float(np.abs(weights(model) - before).sum()))

        more()
        model.set_parameters(other)
        more()
        model.alpha, model.tau = 1.0, 0.5
        more()
        model.policy.set_sampler(n_flow_steps=3)
        more()
        model.actor.requires_grad_(False)
        more()
        model.actor.requires_grad_(True)
        model.set_dataset(dataset(seed=1, n=3000))
        more()
        model.batch_size = 32
        more()
        model.lr_schedule = lambda _: 0.0
        more()
        return moved

    eager, compiled = run(False), run(True)
    return dict(eager=eager, compiled=compiled, passed=bool(np.allclose(eager, compiled, rtol=1e-3)))


def exported(device: str, name: str) -> Row:
    """Files that are made of a model on the device act as the model does: the export raises where they differ."""
    from sb3_flow.export import FORMATS, export_policy

    if name in OFFLINE_METHODS:
        model = make_fql(device, data=dataset(n=1000), net=[64, 64], method=name)
    else:
        model = make_on_policy(name, device, 2)
    sizes: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        for format in FORMATS:
            try:
                sizes[format] = export_policy(model, f"{folder}/policy", format, True).stat().st_size
            except ImportError as error:
                sizes[format] = str(error)
    return dict(sizes=sizes, passed=True)


def saved(device: str) -> Row:
    import pickle

    from sb3_flow import FQL

    env, checks = make_env(OBS_DIM, ACTION_DIM, 1), {}
    for compiled in (False, True):
        model = make_fql(device, data=dataset(n=2000), net=[64, 64], compile=compiled).learn_offline(10)
        with tempfile.TemporaryDirectory() as folder:
            model.save(f"{folder}/model")
            loaded = FQL.load(f"{folder}/model", env=env, device=device, compile=not compiled)
        checks[f"loaded {compiled}"] = bool((weights(loaded) == weights(model)).all()) and loaded.compile is not compiled
        group = model.policy.optimizer.state_dict()["param_groups"][0]
        checks[f"optimizer {compiled}"] = type(group["lr"]) is float and not group["capturable"]
        loaded.set_dataset(dataset(n=2000))
        loaded.learn_offline(10)
        model.learn_offline(10)
        pickle.dumps(model.policy)
        checks[f"copied {compiled}"] = not copy.deepcopy(model)._graphs
        checks[f"goes on {compiled}"] = bool(np.isfinite(weights(loaded)).all())
    return dict(checks, passed=all(checks.values()))


def correctness(device: str, quick: bool) -> Row:
    n = 10 if quick else 100
    cases: dict[str, Callable[[], Row]] = {
        "FQL, compiled and eager": lambda: compiled_against_eager_fql(device, n),
        "FQL, compiled and eager, after 10 updates": lambda: compiled_against_eager_fql(device, 10),
        "FQL, compiled and eager, 2x64": lambda: compiled_against_eager_fql(device, n, net=[64, 64]),
        "FQL, compiled and eager, several steps and normalized": lambda: compiled_against_eager_fql(
            device, n // 4, n_steps=3, q_agg="min", normalize_q_loss=True, net=[64, 64]
        ),
        "FQL, compiled and eager, online": lambda: compiled_against_eager_fql(
            device, n // 10, online=n // 4, buffer_size=1000, balanced_sampling=True
        ),
        "FQL, compiled and eager, one stream": lambda: compiled_against_eager_fql(device, n, "one stream"),
        "FQL, compiled and eager, several steps and normalized, one stream": lambda: compiled_against_eager_fql(
            device, n // 4, "one stream", n_steps=3, q_agg="min", normalize_q_loss=True, net=[64, 64]
        ),
        "FPO, compiled and eager": lambda: compiled_against_eager_fpo(device),
        **{
            f"{method}, compiled and eager, 2x64": partial(compiled_against_eager_fql, device, n, net=[64, 64], method=method)
            for method in OFFLINE_METHODS
            if method != "FQL"
        },
        **{f"{name}, exported": partial(exported, device, name) for name in ("FPO", "IFQL")},
        "DPPO, CPU and device": lambda: cpu_against_cuda_on_policy(device, "DPPO"),
        "FQL, CPU and device": lambda: cpu_against_cuda_fql(device),
        "FPO, CPU and device": lambda: cpu_against_cuda_on_policy(device, "FPO"),
        "FQL, not finite": lambda: not_finite(device),
        "FQL, changed after the capture": lambda: what_changes(device),
        "FQL, saved and copied": lambda: saved(device),
        "FQL, a capture that fails": lambda: capture_that_fails(device),
        "FQL, the control: with memory that is used again too early, it is another run": lambda: control(device),
    }
    results: Row = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except Exception:
            traceback.print_exc()
            results[name] = dict(passed=False, error=traceback.format_exc(limit=-2))
        print(f"  {name}: {results[name]}", flush=True)
    return results


# --- Speed


def seconds(sides: Mapping[str, Callable[[], Any]], synchronize: Callable[[], None], repeats: int) -> dict[str, list[float]]:
    """Of repeats that alternate between the sides."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for function in sides.values():
        function()
    for _ in range(repeats):
        for name, function in sides.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def synchronizer(device: str) -> Callable[[], None]:
    import torch as th

    return th.cuda.synchronize if device == "cuda" else lambda: None


def peak_memory(device: str, function: Callable[[], Any]) -> float | None:
    """In MiB, of what PyTorch has allocated."""
    import torch as th

    if device != "cuda":
        function()
        return None
    th.cuda.empty_cache()
    th.cuda.reset_peak_memory_stats()
    function()
    return th.cuda.max_memory_allocated() / 2**20


def make_official(path: Path, name: str = "fql") -> tuple[Callable[[int], None], Callable[[int], None]]:
    """
    :param path: Checkout of the authors' code
    :param name: of the agent
    :return: updates of the authors' code: with batches drawn beforehand, and as their users run it, from arrays of NumPy
    """
    sys.path.insert(0, str(path))
    # (for distributions that FQL does not have; to mypy, a module is no other class)
    sys.modules.setdefault("distrax", types.SimpleNamespace(Transformed=object))  # type: ignore[arg-type]
    import jax
    from official_fql import create_agent

    rng = np.random.default_rng(0)
    data = {name: dataset()[name] for name in ("observations", "next_observations", "actions", "rewards")}
    data["masks"] = np.ones(N_ROWS, np.float32)
    agent = create_agent(name, NET, data, BATCH)

    def batch() -> dict[str, np.ndarray]:
        rows = rng.integers(N_ROWS, size=BATCH)
        return {name: array[rows] for name, array in data.items()}

    batches = [jax.device_put(batch()) for _ in range(64)]

    def on_the_device(n: int) -> None:
        nonlocal agent
        for i in range(n):
            agent, info = agent.update(batches[i % len(batches)])
        jax.block_until_ready((agent, info))

    def from_the_host(n: int) -> None:
        nonlocal agent
        for _ in range(n):
            agent, info = agent.update(batch())
        jax.block_until_ready((agent, info))

    return on_the_device, from_the_host


def fql(device: str, quick: bool, official: Path | None) -> Row:
    import torch as th

    n, n_eager, repeats = (4, 4, 1) if quick else (200, 40, 3)
    results: Row = {}
    for precision, (torch_precision, jax_precision) in PRECISIONS.items():
        th.set_float32_matmul_precision(torch_precision)
        sides: dict[str, tuple[int, Callable[[int], Any]]] = {}
        for name, compiled, how in (
            ("eager", False, ""),
            ("compiled", True, ""),
            ("compiled, one stream", True, "one stream"),
        ):
            model = make_fql(device, compile=compiled)
            with variant(how):
                model.learn_offline(10, log_interval=None)
            sides[name] = n if compiled else n_eager, model.learn_offline
            if precision == "float32" and not how:
                peak = peak_memory(device, partial(model.learn_offline, 10))
                results[f"{name}, peak memory (MiB)"] = peak
            if name == "compiled":
                # How long the host needs to queue them: it must be less than what the device needs to run them
                start = time.perf_counter()
                model._graphs.is_queue = True
                model.train(50, BATCH)
                results[f"{name}, milliseconds to queue an update, {precision}"] = 20 * (time.perf_counter() - start)
                model._graphs.is_queue = False
        with contextlib.ExitStack() as stack:
            if official is not None:
                import jax

                stack.enter_context(jax.default_matmul_precision(jax_precision))
                sides["official"], sides["official, batches from the host"] = ((n, side) for side in make_official(official))
            functions = {name: partial(side, n) for name, (n, side) in sides.items()}
            times = seconds(functions, synchronizer(device), repeats)
        for name, (count, _) in sides.items():
            rates = sorted(count / x for x in times[name])
            results[f"{name}, {precision}"] = statistics.median(rates)
            results[f"{name}, {precision}, from and to"] = [rates[0], rates[-1]]
        if official is not None:
            ratio = results[f"compiled, {precision}"] / results[f"official, {precision}"]
            results[f"FQL updates/s, compiled over official, {precision}"] = ratio
        print(f"  {results}", flush=True)
    th.set_float32_matmul_precision("highest")
    return results


def offline(device: str, quick: bool, official: Path | None) -> Row:
    import torch as th

    n, n_eager, repeats = (4, 4, 1) if quick else (200, 40, 3)
    torch_precision, jax_precision = PRECISIONS["TF32"]
    th.set_float32_matmul_precision(torch_precision)
    results: Row = {}
    for method in [method for method in OFFLINE_METHODS if method != "FQL"]:
        sides: dict[str, tuple[int, Callable[[int], Any]]] = {}
        for name, compiled in (("eager", False), ("compiled", True)):
            model = make_fql(device, method=method, compile=compiled)
            model.learn_offline(10, log_interval=None)
            sides[name] = n if compiled else n_eager, partial(model.learn_offline, log_interval=None)
        with contextlib.ExitStack() as stack:
            if official is not None and method == "IFQL":
                import jax

                stack.enter_context(jax.default_matmul_precision(jax_precision))
                sides["official"] = n, make_official(official, "ifql")[0]
            times = seconds({name: partial(side, n) for name, (n, side) in sides.items()}, synchronizer(device), repeats)
        for name, (count, _) in sides.items():
            rates = sorted(count / x for x in times[name])
            results[f"{method} updates/s, {name}, TF32"] = statistics.median(rates)
            results[f"{method} updates/s, {name}, TF32, from and to"] = [rates[0], rates[-1]]
            print(f"  {method}, {name}: {rates}", flush=True)
    th.set_float32_matmul_precision("highest")
    return results


def compared_with_ppo(what: str, times: dict[str, list[float]], n: int = 1) -> Row:
    medians = {name: 1e3 * statistics.median(values) / n for name, values in times.items()}
    results: Row = {f"{what}, {name} (ms)": value for name, value in medians.items()}
    for name, values in times.items():
        results[f"{what}, {name}, from and to (ms)"] = [1e3 * min(values) / n, 1e3 * max(values) / n]
    for name in ("FPO eager", "FPO compiled"):
        results[f"{what}, {name} over PPO"] = medians[name] / medians["PPO"]
    return results


def forward(device: str, quick: bool) -> Row:
    import torch as th

    n, repeats = (3, 1) if quick else (100, 7)
    results: Row = {}
    for n_obs in (16, 2048):
        obs = th.randn(n_obs, 17, device=device)
        policies = {
            "PPO": make_on_policy("PPO", device, 1).policy,
            "FPO eager": make_on_policy("FPO", device, 1).policy,
            "FPO compiled": make_on_policy("FPO", device, 1, compile=True).policy,
        }

        def call(policy: Any, obs: Any = obs) -> None:
            with th.no_grad():
                for _ in range(n):
                    # (as a rollout does)
                    policy(obs)[0].cpu()

        for policy in policies.values():
            policy.set_training_mode(False)
        what = f"forward of {n_obs} observations"
        sides = {name: partial(call, policy) for name, policy in policies.items()}
        results |= compared_with_ppo(what, seconds(sides, synchronizer(device), repeats), n)
    return results


def train(device: str, quick: bool) -> Row:
    n_envs, n_steps, batch_size, repeats = (16, 30, 60, 1) if quick else (2048, 30, 7680, 5)
    settings: dict[str, Any] = dict(n_steps=n_steps, batch_size=batch_size, n_epochs=4)
    models = {
        "PPO": make_on_policy("PPO", device, n_envs, **settings),
        "FPO eager": make_on_policy("FPO", device, n_envs, **settings),
        "FPO compiled": make_on_policy("FPO", device, n_envs, compile=True, **settings),
    }
    results: Row = dict(environments=n_envs, **settings)

    def collect_and_train(model: Any) -> None:
        collect(model)
        model.train()

    for name, model in models.items():
        results[f"{name}, peak memory (MiB)"] = peak_memory(device, partial(collect_and_train, model))
    times = seconds({name: model.train for name, model in models.items()}, synchronizer(device), repeats)
    return results | compared_with_ppo("train()", times)


def kernels(device: str, quick: bool) -> Row:
    import torch as th
    from torch.profiler import ProfilerActivity, profile

    if device != "cuda":
        return {}
    results: Row = {}
    model = make_fql(device, compile=True).learn_offline(20)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        model.train(10, BATCH)
        th.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_time_total > 0]
    results["kernels of an update"] = sum(event.count for event in events) / 10
    results["their time (us)"] = sum(event.device_time_total for event in events) / 10
    events.sort(key=lambda event: -event.device_time_total)
    results["longest"] = [(event.key[:90], event.count / 10, event.device_time_total / 10) for event in events[:20]]
    for row in results["longest"]:
        print("  ", row, flush=True)
    return results


# --- Output


def provenance(device: str) -> Row:
    import platform

    import torch as th

    versions = {"python": platform.python_version(), "torch": th.__version__, "numpy": np.__version__}
    with contextlib.suppress(ImportError):
        import jax

        versions["jax"] = jax.__version__
    name = th.cuda.get_device_name() if device == "cuda" else f"CPU, {th.get_num_threads()} threads"
    return dict(command=" ".join(["python", *sys.argv]).split(" --only")[0], device=name, versions=versions)


def table(results: Row) -> list[tuple[str, str, str]]:
    rows = []
    for section in ("fql", "offline", "forward", "train"):
        for name, value in results.get(section, {}).items():
            if isinstance(value, float):
                bar = "" if name not in BARS else "{} {}".format(*BARS[name])
                if section == "fql" and not name.startswith("FQL"):
                    name = f"FQL, {name}" if "(MiB)" in name or "milliseconds" in name else f"FQL updates/s, {name}"
                elif section == "train" and "memory" in name:
                    name = f"train(), {name}"
                rows.append((name, f"{value:.4g}", bar))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="a folder with wheels of Stable-Baselines3 and gymnasium")
    parser.add_argument("--official-fql", type=Path, help="a checkout of the FQL authors' code")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where gpu.json and gpu.csv go")
    parser.add_argument("--only", help="one of the sections")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few repeats of everything, to see that it runs")
    args = parser.parse_args()
    # (what there is to say of random numbers in place of a dataset)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if args.wheels is not None:
        use_wheels(args.wheels)
    args.out.mkdir(parents=True, exist_ok=True)

    sections: dict[str, Callable[[], Row]] = {
        "correctness": lambda: correctness(args.device, args.quick),
        "fql": lambda: fql(args.device, args.quick, args.official_fql),
        "offline": lambda: offline(args.device, args.quick, args.official_fql),
        "forward": lambda: forward(args.device, args.quick),
        "train": lambda: train(args.device, args.quick),
        "kernels": lambda: kernels(args.device, args.quick),
    }
    file = args.out / "gpu.json"
    if args.only is None:
        # Each section in a process of its own
        file.unlink(missing_ok=True)
        for name in sections if args.device == "cuda" else [name for name in sections if name != "kernels"]:
            subprocess.run([sys.executable, *sys.argv, "--only", name])
    else:
        print(f"--- {args.only}", flush=True)
        start = time.perf_counter()
        try:
            result = sections[args.only]()
        except Exception:
            traceback.print_exc()
            result = dict(error=traceback.format_exc(limit=-2))
        print(f"--- {args.only}: {time.perf_counter() - start:.1f} s", flush=True)
        results = json.loads(file.read_text()) if file.exists() else {}
        results |= {**provenance(args.device), args.only: result}
        file.write_text(json.dumps(results, indent=1, default=str) + "\n")
        with (args.out / "gpu.csv").open("w", newline="") as table_file:
            csv.writer(table_file).writerows([("measurement", "value", "bar"), *table(results)])
        return

    results = json.loads(file.read_text())
    print(f"\n{results['device']}, {results['versions']}")
    for name, case in results.get("correctness", {}).items():
        print(f"{'passed' if isinstance(case, dict) and case['passed'] else 'FAILED'}  {name}")
    for measurement, value, bar in table(results):
        print(f"{value:>10}  {measurement}  {bar}")


if __name__ == "__main__":
    main()
