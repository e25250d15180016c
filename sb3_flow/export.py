"""
Trained policies in one file, which needs neither this package nor its environment: an observation goes in, as the environment
has it, and an action in the units of the environment comes out.

Inside are the normalization of observations (of the policy, and of ``VecNormalize``), the features extractor, all steps of the
flow, and the bounds of the action space.
"""

import copy
import json
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_flow.common.bounds import is_bounded, middle_and_half_range
from sb3_flow.common.flow import check_choice
from sb3_flow.common.samplers import ADAPTIVE

#: Suffixes of the files
FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "torch-export": ".pt2"}
#: Of the inputs and the output (those of a ``Dict`` have its keys)
OBSERVATION, NOISE, ACTION = "observation", "noise", "action"
#: Largest difference from ``predict`` that is not a fault, of actions in [-1, 1]
TOLERANCE = 1e-4


def export_policy(
    model: BaseAlgorithm,
    path: str | Path,
    format: str = "onnx",
    deterministic: bool = False,
    vec_normalize: VecNormalize | None = None,
) -> Path:
    """
    Write a policy that runs without this package: by onnxruntime ("onnx") or by PyTorch alone ("torchscript", "torch-export").

    :param model: A trained model
    :param path: Where to write it. The suffix of the format (.onnx, .pt, .pt2) is added if it has none of these.
    :param format: "onnx" (extra ``export``), "torchscript" or "torch-export"
    :param deterministic: Whether to act as ``predict(deterministic=True)``. Otherwise standard normal noise is a further
        input, (batch, \\*model.policy.noise_shape).
    :param vec_normalize: What normalized the observations that it learned from, that of the environment of the model if None
    :return: path of the file, which is compared with ``predict`` before it is there
    :raises ValueError: if the policy cannot be exported, naming what stands in the way
    :raises ImportError: if the format needs onnxruntime, and it is not installed
    """
    check_choice("format", format, FORMATS)
    vec_normalize = model.get_vec_normalize_env() if vec_normalize is None else vec_normalize
    policy = ExportablePolicy(model, deterministic, vec_normalize)
    policy.check(format)
    path = Path(path)
    if path.suffix in FORMATS.values() and path.suffix != FORMATS[format]:
        raise ValueError(f'`path` must end in {FORMATS[format]} with `format="{format}"`, it is {path}')
    if path.suffix not in FORMATS.values():
        path = path.with_name(path.name + FORMATS[format])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    # (of a batch of one, or two, an exporter would think that it has always one)
    examples = policy.examples(3)
    try:
        with th.no_grad():
            try:
                run = WRITERS[format](policy, examples, unfinished)
            except ImportError:
                raise
            except Exception as error:
                reason = str(error).strip().split("\n")[0]
                raise ValueError(f'The policy cannot be exported as "{format}": {reason}') from error
            for batch_size in (1, 2, 64):
                policy.compare(run, model, batch_size, vec_normalize)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


Run = Callable[[tuple[th.Tensor, ...]], th.Tensor]


class ExportablePolicy(nn.Module):
    """
    A policy as a function of tensors.

    :param model: A trained model
    :param deterministic: Whether to act as ``predict(deterministic=True)``
    :param vec_normalize: What normalized the observations that it learned from
    :raises ValueError: if it has no flow policy
    """

    noise: th.Tensor
    _low: th.Tensor
    _high: th.Tensor
    _least: th.Tensor
    _most: th.Tensor
    _middle: th.Tensor
    _bounded: th.Tensor

    def __init__(self, model: BaseAlgorithm, deterministic: bool, vec_normalize: VecNormalize | None = None):
        super().__init__()
        if not hasattr(model.policy, "act"):
            found = type(model.policy).__name__
            raise ValueError(f"{type(model).__name__} has no flow policy to export: its policy is a {found}")
        policy: Any = copy.deepcopy(model.policy).to("cpu")
        policy.set_training_mode(False)
        if hasattr(policy, "critic_target"):
            # It does not act
            del policy.critic_target
        self.policy = policy
        self.algorithm = type(model).__name__
        self.deterministic = deterministic
        self.observation_space, self.action_space = model.observation_space, model.action_space
        if vec_normalize is not None and vec_normalize.norm_obs:
            check_statistics(vec_normalize, self.observation_space)
            self.observation_space = space_before(vec_normalize, self.observation_space)
        self.normalization = ObservationNormalization(vec_normalize)
        self.chunk_size = getattr(policy, "chunk_size", 1)
        #: What deterministic actions are made of
        self.register_buffer("noise", policy.same_noise() if hasattr(policy, "same_noise") else th.zeros(policy.noise_shape))
        self._register_bounds()

    def check(self, format: str) -> None:
        """
        :param format: See :func:`export_policy`
        :raises ValueError: if its sampler, or the name of an observation, cannot be exported
        """
        taken = {ACTION} if self.deterministic else {ACTION, NOISE}
        if names := taken & set(self.keys):
            raise ValueError(f"The key {names.pop()!r} of the observations is the name of another input, or of the output")
        # (a one-step actor does not need it)
        sampler = None if hasattr(self.policy, "actor") else getattr(self.policy, "sampler", None)
        reason = None
        if sampler in ADAPTIVE:
            reason = "chooses its steps by what it finds"
        elif sampler == "sde" and not self.deterministic:
            reason = "draws noise at each step, but with `deterministic=True`"
        elif sampler in ("midpoint", "heun", "rk4") and format != "torchscript":
            reason = f'is torchdiffeq\'s, which "{format}" cannot follow, but "torchscript" can'
        if reason is not None:
            raise ValueError(f'The sampler "{sampler}" {reason}. Take another, see `policy.set_sampler()`')

    def _register_bounds(self) -> None:
        space = self.action_space
        assert isinstance(space, spaces.Box)
        self.action_shape = space.shape
        bounded, middle = is_bounded(space), middle_and_half_range(space)[0]
        low, high = np.where(bounded, space.low, middle), np.where(bounded, space.high, middle)
        bounds = dict(low=low, high=high, least=space.low, most=space.high, middle=middle)
        for name, value in bounds.items():
            self.register_buffer(f"_{name}", th.as_tensor(value.flatten(), dtype=th.float32).repeat(self.chunk_size))
        self.register_buffer("_bounded", th.as_tensor(bounded.flatten()).repeat(self.chunk_size))

    @property
    def keys(self) -> list[str]:
        """Names of the parts of an observation."""
        return list(self.observation_space) if isinstance(self.observation_space, spaces.Dict) else [OBSERVATION]

    @property
    def input_names(self) -> list[str]:
        return [*self.keys, *([] if self.deterministic else [NOISE])]

    def forward(self, *inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: Observation, or its parts, and the noise unless it is deterministic
        :return: action in env units, (batch, \\*action_space.shape), or a chunk, (batch, chunk_size, \\*action_space.shape)
        """
        parts = self.normalization(dict(zip(self.keys, inputs, strict=False)))
        obs = parts if isinstance(self.observation_space, spaces.Dict) else parts[OBSERVATION]
        batch_size = inputs[0].shape[0]
        noise = self.noise.expand(batch_size, *self.noise.shape) if self.deterministic else inputs[-1]
        actions = self._to_env_units(self.policy.act(obs, noise))
        chunk = [] if self.chunk_size == 1 else [self.chunk_size]
        return actions.reshape(batch_size, *chunk, *self.action_shape)

    def _to_env_units(self, actions: th.Tensor) -> th.Tensor:
        """As the policy's ``unscale_action``, of tensors."""
        squash_type = getattr(self.policy, "squash_type", None)
        if squash_type is not None:
            actions = self.policy.action_scale * actions
            squashed = actions.tanh() if squash_type == "tanh" else actions.clamp(-1, 1)
            actions = th.where(self._bounded, squashed, actions)
        weights = 0.5 * (actions + 1)
        actions = th.where(self._bounded, (1 - weights) * self._low + weights * self._high, self._middle + actions)
        return actions if squash_type is None else actions.clamp(self._least, self._most)

    def examples(self, batch_size: int) -> tuple[th.Tensor, ...]:
        """Inputs of a batch, deterministic ones."""
        space = self.observation_space
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
        samples = (th.as_tensor(draw(part, batch_size)) for part in parts)
        return (*samples, *([] if self.deterministic else [self.noise.repeat(batch_size, *[1] * self.noise.dim())]))

    def compare(self, run: Run, model: BaseAlgorithm, batch_size: int, vec_normalize: VecNormalize | None) -> None:
        """
        :param run: What was exported
        :param model: What it should do
        :param batch_size: For how many observations
        :param vec_normalize: What normalizes them for the model
        :raises ValueError: if it does something else
        """
        inputs = self.examples(batch_size)
        parts: Any = {key: part.numpy() for key, part in zip(self.keys, inputs, strict=False)}
        obs = parts if isinstance(self.observation_space, spaces.Dict) else parts[OBSERVATION]
        seen = obs if vec_normalize is None else vec_normalize.normalize_obs(obs)
        expected, state = model.predict(seen, deterministic=True)
        expected = expected if state is None else state[0]
        half_range = th.where(self._bounded, (self._high / 2 - self._low / 2).clamp(min=1e-6), th.ones_like(self._high))
        difference = (run(inputs) - th.as_tensor(expected)).flatten(1) / half_range
        if not (largest := float(difference.abs().max())) < TOLERANCE:
            raise ValueError(
                f"What was exported differs from `predict` by {largest:.2g} for {batch_size} observation(s): something in the "
                "policy (of your own?) cannot be exported"
            )

    def metadata(self) -> dict[str, Any]:
        """What a program that runs it has to know."""
        space = self.observation_space
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
        inputs = [describe(name, part) for name, part in zip(self.keys, parts, strict=True)]
        if not self.deterministic:
            inputs.append(dict(name=NOISE, shape=["batch", *self.policy.noise_shape], dtype="float32"))
        output = describe(ACTION, self.action_space) | dict(dtype="float32")
        if self.chunk_size > 1:
            output["shape"] = ["batch", self.chunk_size, *output["shape"][1:]]
        packages = ("torch", "stable-baselines3")
        return dict(
            algorithm=self.algorithm,
            deterministic=self.deterministic,
            inputs=inputs,
            outputs=[output],
            versions=dict(sb3_flow=_version(), **{name: version(name) for name in packages}),
        )


class ObservationNormalization(nn.Module):
    """
    What ``VecNormalize`` does to observations.

    :param env: The environment, None if there is none
    """

    def __init__(self, env: VecNormalize | None):
        super().__init__()
        self.clip_obs = 0.0 if env is None else env.clip_obs
        self.normalized: dict[str, int] = {}
        if env is None or not env.norm_obs:
            return
        statistics: Any = env.obs_rms if isinstance(env.obs_rms, dict) else {OBSERVATION: env.obs_rms}
        for number, (key, running) in enumerate(statistics.items()):
            self.normalized[key] = number
            self.register_buffer(f"mean_{number}", th.as_tensor(running.mean, dtype=th.float32))
            self.register_buffer(f"std_{number}", th.as_tensor(np.sqrt(running.var + env.epsilon), dtype=th.float32))

    def forward(self, parts: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
        return {key: self._normalize(key, part) for key, part in parts.items()}

    def _normalize(self, key: str, part: th.Tensor) -> th.Tensor:
        if key not in self.normalized:
            return part
        number = self.normalized[key]
        normalized = (part - getattr(self, f"mean_{number}")) / getattr(self, f"std_{number}")
        return normalized.clamp(-self.clip_obs, self.clip_obs)


def check_statistics(vec_normalize: VecNormalize, space: spaces.Space) -> None:
    """
    :param vec_normalize: What normalizes observations
    :param space: Their space
    :raises ValueError: if it normalizes others
    """
    found = vec_normalize.obs_rms
    statistics: dict[str, Any] = found if isinstance(found, dict) else {OBSERVATION: found}
    parts = space.spaces if isinstance(space, spaces.Dict) else {OBSERVATION: space}
    if isinstance(found, dict) != isinstance(space, spaces.Dict) or not set(statistics) <= set(parts):
        raise ValueError(f"`vec_normalize` is for other observations than those of the model, {space}")
    for key, running in statistics.items():
        part = parts[key]
        if running.mean.shape != part.shape:
            raise ValueError(
                f"`vec_normalize` is for observations of shape {running.mean.shape}, but those of the model have "
                f"{part.shape}: only one around all other wrappers (VecFrameStack, say) can be exported"
            )


def space_before(vec_normalize: VecNormalize, space: spaces.Space) -> spaces.Space:
    """
    :param vec_normalize: What normalizes observations
    :param space: Their space
    :return: that of observations that are not normalized yet, which may be bytes, for example
    """
    before = vec_normalize.venv.observation_space
    if not isinstance(space, spaces.Dict):
        return before
    assert isinstance(before, spaces.Dict)
    normalized = vec_normalize.norm_obs_keys or []
    return spaces.Dict({key: before[key] if key in normalized else part for key, part in space.spaces.items()})


def draw(space: spaces.Space, batch_size: int) -> np.ndarray:
    """
    :param space: Space of a part of the observations
    :param batch_size: Number of observations
    :return: observations, standard normal where they are real numbers (bounds may be far away)
    """
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        normal = np.random.default_rng(batch_size).standard_normal((batch_size, *space.shape))
        return np.clip(normal, space.low, space.high).astype(np.float32)
    space.seed(batch_size)
    return np.asarray(np.stack([space.sample() for _ in range(batch_size)]), dtype_of(space))


def dtype_of(space: spaces.Space) -> type:
    """
    :param space: Space of a part of the observations
    :return: of the input: bytes are bytes, other integers have 64 bits, and real numbers single precision
    """
    assert space.dtype is not None
    if space.dtype == np.uint8 or space.dtype == np.int8:
        return space.dtype.type
    return np.float32 if np.issubdtype(space.dtype, np.floating) else np.int64


def describe(name: str, space: spaces.Space) -> dict[str, Any]:
    """
    :param name: Of an input or the output
    :param space: Its space
    :return: name, shape, dtype and bounds, which are None where there are none
    """
    shape = () if isinstance(space, spaces.Discrete) else space.shape
    assert shape is not None
    description: dict[str, Any] = dict(name=name, shape=["batch", *shape], dtype=np.dtype(dtype_of(space)).name)
    if isinstance(space, spaces.Box):
        for bound in ("low", "high"):
            array = getattr(space, bound).astype(np.float64)
            description[bound] = np.array(np.where(np.isfinite(array), array, None)).tolist()
    elif isinstance(space, spaces.Discrete):
        description |= dict(low=int(space.start), high=int(space.start + space.n - 1))
    return description


def _version() -> str:
    import sb3_flow

    return sb3_flow.__version__


def write_torchscript(policy: ExportablePolicy, examples: tuple[th.Tensor, ...], path: Path) -> Run:
    with warnings.catch_warnings():
        # What depends on the example is found by the comparison
        warnings.simplefilter("ignore", th.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = th.jit.trace(policy, examples, check_trace=False)
    th.jit.save(traced, path, _extra_files={"metadata.json": json.dumps(policy.metadata())})
    loaded = th.jit.load(path)
    return lambda inputs: loaded(*inputs)


def to_program(policy: ExportablePolicy, examples: tuple[th.Tensor, ...]) -> th.export.ExportedProgram:
    batch = th.export.Dim("batch")
    return th.export.export(policy, examples, dynamic_shapes=(tuple({0: batch} for _ in examples),))


def write_torch_export(policy: ExportablePolicy, examples: tuple[th.Tensor, ...], path: Path) -> Run:
    th.export.save(to_program(policy, examples), path, extra_files={"metadata.json": json.dumps(policy.metadata())})
    loaded = th.export.load(path).module()
    return lambda inputs: loaded(*inputs)


def write_onnx(policy: ExportablePolicy, examples: tuple[th.Tensor, ...], path: Path) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 what PyTorch needs
    except ImportError as error:
        raise ImportError('This format needs onnxruntime, it comes with: pip install "sb3-flow[export]"') from error
    program = th.onnx.export(
        to_program(policy, examples), input_names=policy.input_names, output_names=[ACTION], dynamo=True, verbose=False
    )
    assert program is not None
    program.model.metadata_props.update({key: json.dumps(value) for key, value in policy.metadata().items()})
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: tuple[th.Tensor, ...]) -> th.Tensor:
        named = {name: tensor.numpy() for name, tensor in zip(policy.input_names, inputs, strict=True)}
        return th.as_tensor(session.run([ACTION], named)[0])

    return run


WRITERS: dict[str, Callable[[ExportablePolicy, tuple[th.Tensor, ...], Path], Run]] = {
    "onnx": write_onnx,
    "torchscript": write_torchscript,
    "torch-export": write_torch_export,
}
