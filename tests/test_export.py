"""Policies in one file: they do what ``predict`` does, without this package."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

import sb3_flow.fpo
import sb3_flow.fql
from sb3_flow import DPPO, FAWAC, FBRAC, FPO, FQL, IFQL, QC, FlowBC
from sb3_flow.common.flow import PREDICTION_TYPES
from sb3_flow.export import FORMATS, export_policy

ALGORITHMS: list[Any] = [FPO, DPPO, FQL, FlowBC, IFQL, QC, FBRAC, FAWAC]
ON_POLICY = (FPO, DPPO)
N_OBS = 1000

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec.*"),
]


class SpacesEnv(FakeImageEnv):
    """An environment of these spaces."""

    def __init__(self, observation_space, action_space):
        super().__init__(discrete=False)
        self.observation_space, self.action_space = observation_space, action_space


def box(*shape, low=-1.0, high=1.0):
    return spaces.Box(np.float32(low), np.float32(high), shape)


def make_model(algorithm, env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    policy_kwargs = dict(net_arch=[16, 16], n_flow_steps=3) | kwargs.pop("policy_kwargs", {})
    if algorithm in (IFQL, QC):
        policy_kwargs["n_samples"] = 4
    if algorithm not in (*ON_POLICY, FlowBC):
        kwargs["buffer_size"] = 10
    model = algorithm(policy, env, device="cpu", seed=0, policy_kwargs=policy_kwargs, **kwargs)
    th.manual_seed(1)
    with th.no_grad():
        for parameter in model.policy.parameters():
            # (of convolutions by less: large features have large rounding errors)
            parameter.add_((0.1 if parameter.dim() < 3 and policy == "MlpPolicy" else 0.01) * th.randn_like(parameter))
        # Statistics that are not those of the start
        for name, buffer in model.policy.named_buffers():
            if name.endswith(("statistics.mean", "statistics.var")):
                buffer.copy_(0.5 + th.rand_like(buffer))
    return model


def observations(space, n=N_OBS):
    space.seed(0)
    if isinstance(space, spaces.Dict):
        parts = {key: observations(part, n) for key, part in space.spaces.items()}
        return parts
    return np.stack([space.sample() for _ in range(n)])


def inputs_of(obs, noise):
    return dict(obs if isinstance(obs, dict) else {"observation": obs}) | ({} if noise is None else {"noise": noise})


def as_input(array):
    return np.asarray(array, np.float32) if np.issubdtype(array.dtype, np.floating) else array


def run(file, obs, noise=None):
    """What the file makes of observations, by what it is for."""
    inputs = {name: as_input(array) for name, array in inputs_of(obs, noise).items()}
    if file.suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "sb3-flow[export]"')
        return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(["action"], inputs)[0]
    module = th.jit.load(file) if file.suffix == ".pt" else th.export.load(file).module()
    with th.no_grad():
        return module(*map(th.as_tensor, inputs.values())).numpy()


def check(tmp_path, model, format, **kwargs):
    """Equal to ``predict``, of any number of observations, with noise and without."""
    obs = observations(model.observation_space)
    n = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
    seen = obs
    if "vec_normalize" in kwargs or model.get_vec_normalize_env() is not None:
        seen = (kwargs.get("vec_normalize") or model.get_vec_normalize_env()).normalize_obs(obs)
    expected, state = model.predict(seen, deterministic=True)
    chunks = [] if state is None else [state[0]]
    expected = chunks[0] if chunks else expected
    file = export_policy(model, tmp_path / "deterministic", format, deterministic=True, **kwargs)
    assert file.suffix == FORMATS[format]
    half_range = np.where(np.isfinite(model.action_space.high - model.action_space.low),
                          (model.action_space.high - model.action_space.low) / 2, 1)  # fmt: skip
    assert np.abs((run(file, obs) - expected) / half_range).max() < 1e-5

    file = export_policy(model, tmp_path / "random", format, **kwargs)
    th.manual_seed(2)
    expected, state = model.predict(seen, deterministic=False)
    expected = expected if state is None else state[0]
    th.manual_seed(2)
    if isinstance(model, DPPO):
        steps, dim = model.policy.n_flow_steps, model.policy.action_net.action_dim
        step_noise = th.randn(steps, n, dim)
        noise = th.cat([th.randn(n, 1, dim), step_noise.movedim(0, 1)], dim=1)
    else:
        noise = th.randn(n, *model.policy.noise_shape)
    actions = run(file, obs, noise.numpy())
    assert actions.shape == expected.shape and np.abs((actions - expected) / half_range).max() < 1e-5
    first = {key: part[:1] for key, part in obs.items()} if isinstance(obs, dict) else obs[:1]
    assert np.abs((run(file, first, noise[:1].numpy()) - expected[:1]) / half_range).max() < 1e-5
    return file


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_torchscript(tmp_path, algorithm):
    check(tmp_path, make_model(algorithm), "torchscript")


@pytest.mark.parametrize("algorithm", [FPO, pytest.param(IFQL, marks=pytest.mark.slow)])
def test_torch_export(tmp_path, algorithm):
    check(tmp_path, make_model(algorithm), "torch-export")


@pytest.mark.parametrize(
    "algorithm", [FPO, *(pytest.param(algorithm, marks=pytest.mark.slow) for algorithm in (DPPO, FQL, FlowBC, IFQL))]
)
def test_onnx(tmp_path, algorithm):
    pytest.importorskip("onnxscript", reason='needs pip install "sb3-flow[export]"')
    check(tmp_path, make_model(algorithm), "onnx")


@pytest.mark.parametrize("squash_type", ["clip", "tanh"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("skip_connection", [True, False])
def test_prediction_types(tmp_path, prediction_type, skip_connection, squash_type):
    flow = dict(prediction_type=prediction_type, skip_connection=skip_connection, squash_type=squash_type)
    check(tmp_path, make_model(FPO, policy_kwargs=flow), "torchscript")


@pytest.mark.parametrize("sampler", ["midpoint", "heun", "rk4"])
@pytest.mark.parametrize("algorithm", [FPO, FlowBC])
def test_samplers(tmp_path, algorithm, sampler):
    pytest.importorskip("torchdiffeq", reason='needs pip install "sb3-flow[solvers]"')
    check(tmp_path, make_model(algorithm, policy_kwargs=dict(sampler=sampler)), "torchscript")


@pytest.mark.parametrize(
    ("algorithm", "space"),
    [
        # Other bounds, and more than one axis
        *((algorithm, spaces.Box(np.array([-3, 10, 0], np.float32), np.array([5, 30, 1e-3], np.float32)))
          for algorithm in (FPO, FQL)),
        *((algorithm, box(2, 3, low=-4, high=2)) for algorithm in (FPO, DPPO, FlowBC)),
        (FPO, spaces.Box(-1e30, 1e30, (2,))),
        (FPO, spaces.Box(-2.0, 2.0, (2,), np.float64)),
    ],
)  # fmt: skip
def test_action_spaces(tmp_path, algorithm, space):
    check(tmp_path, make_model(algorithm, SpacesEnv(box(4), space)), "torchscript")


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5),
        spaces.MultiDiscrete([3, 4]),
        spaces.MultiBinary(4),
        spaces.Box(-1.0, 1.0, (3,), np.float64),
        box(2, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("algorithm", [FPO, FQL])
def test_observation_spaces(tmp_path, algorithm, space):
    check(tmp_path, make_model(algorithm, SpacesEnv(space, box(2))), "torchscript")


@pytest.mark.parametrize(("algorithm", "format"), [
    (FPO, "torchscript"), (FQL, "torchscript"), (FQL, "onnx"), pytest.param(FPO, "onnx", marks=pytest.mark.slow)
])  # fmt: skip
def test_dict(tmp_path, algorithm, format):
    """With an image in it: each part is an input, by its key."""
    if format == "onnx":
        pytest.importorskip("onnxscript", reason='needs pip install "sb3-flow[export]"')
    model = make_model(algorithm, SimpleMultiObsEnv(discrete_actions=False), "MultiInputPolicy")
    file = check(tmp_path, model, format)
    if format == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(file)
        assert [part.name for part in session.get_inputs()] == [*model.observation_space, "noise"]


@pytest.mark.parametrize(("algorithm", "format"), [
    (FPO, "torchscript"), (FlowBC, "torchscript"), (FlowBC, "onnx"), pytest.param(FPO, "onnx", marks=pytest.mark.slow)
])  # fmt: skip
def test_images(monkeypatch, tmp_path, algorithm, format):
    if format == "onnx":
        pytest.importorskip("onnxscript", reason='needs pip install "sb3-flow[export]"')
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=3, discrete=False)
    monkeypatch.setattr(observations, "__defaults__", (20,))
    check(tmp_path, make_model(algorithm, env, "CnnPolicy"), format)


@pytest.mark.parametrize("kind", ["array", "dict", "no observations"])
def test_vec_normalize(tmp_path, kind):
    """Its statistics are inside, those of the environment of the model or others."""
    if kind == "dict":
        env: Any = DummyVecEnv([lambda: SimpleMultiObsEnv(discrete_actions=False)])
        env = VecNormalize(env, norm_obs_keys=["vec"])
    else:
        env = VecNormalize(make_vec_env("Pendulum-v1", 2), norm_obs=kind == "array", clip_obs=0.5)
    env.reset()
    for _ in range(20):
        env.step(np.stack([env.action_space.sample() for _ in range(env.num_envs)]))
    env.training = False
    model = make_model(FPO, env, "MultiInputPolicy" if kind == "dict" else "MlpPolicy")
    check(tmp_path, model, "torchscript")
    model.save(tmp_path / "model")
    loaded = FPO.load(tmp_path / "model", device="cpu")
    check(tmp_path, loaded, "torchscript", vec_normalize=env)


def test_moving_average(tmp_path):
    """What predicts is exported."""
    model = make_model(FPO, n_steps=64, batch_size=64, n_epochs=1, ema_decay=0.9, ema_start=0).learn(128)
    check(tmp_path, model, "torchscript")


@pytest.mark.parametrize("algorithm", [FQL, QC, FlowBC])
def test_chunks(tmp_path, algorithm):
    check(tmp_path, make_model(algorithm, SpacesEnv(box(4), box(2, low=-3, high=1)), chunk_size=3), "torchscript")


def test_in_a_python_without_this_package(tmp_path):
    """Nor SB3, gymnasium or, for ONNX, PyTorch."""
    pytest.importorskip("onnxscript", reason='needs pip install "sb3-flow[export]"')
    model = make_model(FPO)
    obs = observations(model.observation_space, 5)
    expected, _ = model.predict(obs, deterministic=True)
    for format, missing, code in (
        ("onnx", "torch", "import onnxruntime as o; a = o.InferenceSession(f).run(None, {'observation': x})[0]"),
        ("torchscript", "onnx", "import torch; a = torch.jit.load(f)(torch.as_tensor(x)).detach().numpy()"),
        ("torch-export", "onnx", "import torch; a = torch.export.load(f).module()(torch.as_tensor(x)).detach().numpy()"),
    ):
        file = export_policy(model, tmp_path / "policy", format, deterministic=True)
        without = ["sb3_flow", "stable_baselines3", "gymnasium", missing]
        program = (
            f"import sys, json; sys.modules.update(dict.fromkeys({without}))\nimport numpy as np\nf = {str(file)!r}\n"
            f"x = np.array({obs.tolist()}, np.float32)\n{code}\nprint(json.dumps(a.tolist()))"
        )
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
        assert np.allclose(json.loads(done.stdout.splitlines()[-1]), expected, atol=1e-5)


def test_metadata(tmp_path):
    observation_space = spaces.Box(np.float32([-1, -np.inf]), np.float32([1, np.inf]))
    model = make_model(FQL, SpacesEnv(observation_space, spaces.Box(np.float32([-3, 0]), np.float32([5, 1]))), chunk_size=3)
    extra = {"metadata.json": ""}
    th.jit.load(export_policy(model, tmp_path / "policy", "torchscript"), _extra_files=extra)
    metadata = json.loads(extra["metadata.json"])
    assert metadata["algorithm"] == "FQL" and not metadata["deterministic"] and "torch" in metadata["versions"]
    observation, noise = metadata["inputs"]
    assert observation == dict(name="observation", shape=["batch", 2], dtype="float32", low=[-1.0, None], high=[1.0, None])
    assert noise == dict(name="noise", shape=["batch", 6], dtype="float32")
    (action,) = metadata["outputs"]
    assert action["shape"] == ["batch", 3, 2] and action["low"] == [-3, 0] and action["high"] == [5, 1]


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (lambda: PPO("MlpPolicy", "Pendulum-v1", device="cpu"), {}, "PPO has no flow policy to export"),
        (lambda: make_model(FPO, policy_kwargs=dict(sampler="sde")), {}, 'The sampler "sde" draws noise at each step'),
        *(
            (
                lambda: make_model(FPO, policy_kwargs=dict(sampler="heun")),
                dict(format=format),
                f'The sampler "heun" is torchdiffeq\'s, which "{format}" cannot follow',
            )
            for format in ("onnx", "torch-export")
        ),
        (lambda: make_model(FPO), dict(format="tflite"), "Unknown `format`: 'tflite'"),
    ],
)
def test_refused(tmp_path, make, kwargs, message):
    pytest.importorskip("torchdiffeq", reason='needs pip install "sb3-flow[solvers]"')
    with pytest.raises(ValueError, match=message):
        export_policy(make(), tmp_path / "policy", **kwargs)
    assert not list(tmp_path.iterdir())


def test_stochastic_sampler(tmp_path):
    """Without its noise."""
    model = make_model(FPO, policy_kwargs=dict(sampler="sde"))
    obs = observations(model.observation_space)
    file = export_policy(model, tmp_path / "policy", "torchscript", deterministic=True)
    assert np.abs(run(file, obs) - model.predict(obs, deterministic=True)[0]).max() < 1e-5


@pytest.mark.parametrize("algorithm", [FPO, FlowBC])
def test_adaptive_sampler_is_refused(tmp_path, algorithm):
    pytest.importorskip("torchdiffeq", reason='needs pip install "sb3-flow[solvers]"')
    with pytest.raises(ValueError, match='The sampler "dopri5" chooses its steps'):
        export_policy(make_model(algorithm, policy_kwargs=dict(sampler="dopri5")), tmp_path / "policy", "torchscript")
    # The one-step policy of FQL does not need it
    check(tmp_path, make_model(FQL, policy_kwargs=dict(sampler="dopri5")), "torchscript")


class Reversed(sb3_flow.fql.MlpPolicy):
    def _predict(self, observation, deterministic=False):
        return -super()._predict(observation, deterministic)


class Halved(sb3_flow.fpo.MlpPolicy):
    def unscale_action(self, scaled_action):
        return 0.5 * super().unscale_action(scaled_action)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("algorithm", "policy"), [(FQL, Reversed), (FPO, Halved)])
def test_policies_that_act_otherwise(tmp_path, algorithm, policy, deterministic):
    """What a subclass does is not what is exported."""
    with pytest.raises(ValueError, match="What was exported differs from `predict` by"):
        export_policy(make_model(algorithm, policy=policy), tmp_path / "policy", "torchscript", deterministic)
    assert not list(tmp_path.iterdir())


class DataDependent(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 3)

    def forward(self, observations):
        return observations if observations.sum() > 0 else 2 * observations


def test_what_cannot_be_exported_is_one_line(tmp_path):
    model = make_model(FPO, policy_kwargs=dict(features_extractor_class=DataDependent))
    with pytest.raises(ValueError, match='The policy cannot be exported as "torch-export": ') as error:
        export_policy(model, tmp_path / "policy", "torch-export")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("key", "deterministic"), [("noise", False), ("action", False), ("action", True)])
def test_names_that_are_taken(tmp_path, key, deterministic, format):
    env = SpacesEnv(spaces.Dict({key: box(2), "other": box(3)}), box(2))
    with pytest.raises(ValueError, match=f"The key '{key}' of the observations is the name of another input"):
        export_policy(make_model(FPO, env, "MultiInputPolicy"), tmp_path / "policy", format, deterministic)


def test_name_that_is_free(tmp_path):
    env = SpacesEnv(spaces.Dict({"noise": box(2), "a b": box(3)}), box(2))
    export_policy(make_model(FPO, env, "MultiInputPolicy"), tmp_path / "policy", "torchscript", deterministic=True)


def test_statistics_of_other_observations(tmp_path):
    """Around single frames, of another size, or of another kind."""
    plain = make_vec_env("Pendulum-v1", 1)
    stacked = VecFrameStack(VecNormalize(plain), 4)
    model = make_model(FPO, stacked)
    with pytest.raises(ValueError, match=r"of shape \(3,\), but those of the model have \(12,\): only one around all other"):
        export_policy(model, tmp_path / "policy", "torchscript")
    model = make_model(FPO)
    one = VecNormalize(DummyVecEnv([lambda: SpacesEnv(box(1), box(2))]))
    dictionary = VecNormalize(DummyVecEnv([lambda: SpacesEnv(spaces.Dict(a=box(3)), box(2))]))
    with pytest.raises(ValueError, match=r"of shape \(1,\)"):
        export_policy(model, tmp_path / "policy", "torchscript", vec_normalize=one)
    with pytest.raises(ValueError, match="`vec_normalize` is for other observations than those of the model"):
        export_policy(model, tmp_path / "policy", "torchscript", vec_normalize=dictionary)


def test_bytes_that_are_normalized(tmp_path):
    """They come in as bytes."""
    env = VecNormalize(DummyVecEnv([lambda: SpacesEnv(spaces.Box(0, 255, (4,), np.uint8), box(2))]))
    env.reset()
    env.training = False
    model = make_model(FPO, env)
    extra = {"metadata.json": ""}
    file = export_policy(model, tmp_path / "policy", "torchscript", deterministic=True)
    module = th.jit.load(file, _extra_files=extra)
    assert json.loads(extra["metadata.json"])["inputs"][0]["dtype"] == "uint8"
    obs = observations(spaces.Box(0, 255, (4,), np.uint8), 10)
    expected, _ = model.predict(env.normalize_obs(obs), deterministic=True)
    assert np.allclose(module(th.as_tensor(obs)).detach().numpy(), expected, atol=1e-5)


def test_bounds_that_are_far_away(tmp_path):
    export_policy(make_model(QC, SpacesEnv(box(4, low=-1e4, high=1e4), box(2))), tmp_path / "policy", "torchscript")


def test_suffixes(tmp_path):
    model = make_model(FPO)
    assert export_policy(model, tmp_path / "run_0.95", "torchscript").name == "run_0.95.pt"
    with pytest.raises(ValueError, match=r'`path` must end in \.pt with `format="torchscript"`'):
        export_policy(model, tmp_path / "policy.onnx", "torchscript")


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
def test_from_a_gpu(tmp_path):
    model = FPO("MlpPolicy", "Pendulum-v1", device="cuda")
    export_policy(model, tmp_path / "policy", "torchscript")
    assert next(model.policy.parameters()).is_cuda


def test_what_cannot_be_traced_is_not_left(tmp_path):
    """A network whose way depends on what it sees: the file would be wrong."""
    model = FPO("MlpPolicy", "Pendulum-v1", device="cpu", policy_kwargs=dict(net_arch=[16, 16], ortho_init=False))

    class Moody(th.nn.Module):
        def forward(self, x):
            return x + 1 if len(x) == 1 else x

    model.policy.action_net.layers.insert(0, Moody())
    with pytest.raises(ValueError, match=r"What was exported differs from `predict` by .* for 1 observation\(s\)"):
        export_policy(model, tmp_path / "policy", "torchscript")
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, monkeypatch, capsys):
    """With the statistics of the run."""
    pytest.importorskip("rl_zoo3", reason='needs pip install "sb3-flow[zoo]"')
    from sb3_flow.zoo import cli
    from sb3_flow.zoo.evaluate import load_run

    def run_command(*args):
        monkeypatch.setattr(sys, "argv", ["sb3-flow", *map(str, args)])
        cli.main()

    monkeypatch.chdir(tmp_path)
    agent = ["--algo", "fpo", "--env", "Pendulum-v1"]
    params = ["-params", "n_envs:2", "n_steps:32", "batch_size:32", "normalize:True"]
    run_command("train", *agent, "-n", 256, "--eval-freq", -1, "--verbose", 0, *params)
    run_command("export", *agent, "--format", "torchscript", "--deterministic")
    run_command("export", *agent, "--format", "torchscript", "-o", "policy.pt")
    out = capsys.readouterr().out
    assert "Pendulum-v1.pt" in out and "policy.pt" in out
    model, env, model_path = load_run("fpo", "Pendulum-v1", "logs", device="cpu")
    obs = observations(model.observation_space, 10)
    expected, _ = model.predict(env.normalize_obs(obs), deterministic=True)
    assert np.abs(env.normalize_obs(obs) - obs).max() > 0.1
    assert np.allclose(run(model_path.with_suffix(".pt"), obs), expected, atol=1e-5)
    assert np.allclose(run(tmp_path / "policy.pt", obs, np.zeros((10, 1), np.float32)), expected, atol=1e-5)
