"""Numbers of any kind, and what is not one."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sb3_flow import FPO, FQL
from sb3_flow.common.checks import to_bool, to_float, to_int, to_net_arch
from sb3_flow.common.optimizers import make_optimizer
from sb3_flow.fpo import MlpPolicy
from sb3_flow.fql import MlpPolicy as FQLMlpPolicy
from sb3_flow.on_policy.policies import FlowActorCriticPolicy

KINDS = [int, np.int64, np.int8, np.uint16, np.array, np.float64, float, th.tensor]
FPO_INTEGERS = dict(n_steps=32, batch_size=16, n_epochs=2, n_mc_samples=3, n_baseline_actions=1, ema_start=2, seed=3)
FQL_INTEGERS = dict(
    batch_size=16, buffer_size=100, learning_starts=20, train_freq=2, gradient_steps=1, n_steps=2, offline_steps=0,
    random_crop=0, seed=3,
)  # fmt: skip
POLICY_INTEGERS = dict(n_flow_steps=4)
FQL_POLICY_INTEGERS = dict(n_flow_steps=4, n_critics=3)


@given(st.integers(-100, 100), st.sampled_from([kind for kind in KINDS if kind is not np.uint16]))
def test_integers(value, kind):
    integer = to_int("name", kind(value))
    assert integer == value and type(integer) is int
    if value < 7:
        with pytest.raises(ValueError, match="`name` must be at least 7, it is"):
            to_int("name", kind(value), at_least=7)


NO_INTEGERS = [
    True,
    np.bool_(True),
    2.5,
    np.float32(2.5),
    np.nan,
    np.inf,
    "2",
    None,
    [2],
    np.array([2, 3]),
    (2,),
    2j,
    th.ones(2),
    nn.SiLU,
]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=str)
def test_not_an_integer(value):
    with pytest.raises(ValueError, match="`name` must be an integer, it is"):
        to_int("name", value)


@pytest.mark.parametrize("value", [True, "0.5", None, [0.5], np.ones(1), np.ones(2), 2j, th.ones(2)], ids=str)
def test_not_a_number(value):
    with pytest.raises(ValueError, match="`name` must be a number, it is"):
        to_float("name", value)
    assert to_float("name", np.float32(0.5)) == to_float("name", np.array(0.5)) == to_float("name", th.tensor(0.5)) == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_net_arch(kind):
    layers = (kind(8), kind(4))
    for sequence in (list(layers), layers, np.array([8, 4]), iter(layers)):
        assert to_net_arch(sequence, ("pi", "vf")) == [8, 4]
    assert to_net_arch(dict(pi=layers, vf=()), ("pi", "vf")) == dict(pi=[8, 4], vf=[])


@pytest.mark.parametrize("net_arch", [64, "64", [64, 0], [64, -1], [64, 2.5], [[64]], dict(pi=64), dict(vf=[None])])
@pytest.mark.parametrize("algorithm", [FPO, FQL])
def test_wrong_net_arch(algorithm, net_arch):
    if isinstance(net_arch, dict) and algorithm is FQL:
        net_arch = dict(pi=[8], qf=next(iter(net_arch.values())))
    with pytest.raises(ValueError, match="`net_arch"):
        algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=net_arch))


def test_wrong_units():
    with pytest.raises(ValueError, match=r"units of `net_arch` must be an integer, it is \[4\]"):
        to_net_arch([[4]], ("pi", "vf"))


@pytest.mark.parametrize(("algorithm", "key"), [(FPO, "qf"), (FQL, "vf")])
def test_unknown_key_of_net_arch(algorithm, key):
    with pytest.raises(ValueError, match=f"`net_arch` has unknown keys \\['{key}'\\], they must be 'pi' and"):
        algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch={"pi": [8], key: [8]}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("algorithm", "integers", "policy_integers"),
    [(FPO, FPO_INTEGERS, POLICY_INTEGERS), (FQL, FQL_INTEGERS, FQL_POLICY_INTEGERS)],
)
def test_models_take_integers_of_any_kind(algorithm, integers, policy_integers, kind, tmp_path):
    value_key = "vf" if algorithm is FPO else "qf"
    kwargs = {name: kind(value) for name, value in integers.items()}
    policy_kwargs = {name: kind(value) for name, value in policy_integers.items()}
    policy_kwargs["net_arch"] = {"pi": (kind(8),), value_key: [kind(8), kind(4)]}
    model = algorithm("MlpPolicy", "Pendulum-v1", device="cpu", policy_kwargs=policy_kwargs, **kwargs).learn(64)
    for name, value in integers.items():
        if name != "train_freq":
            assert type(getattr(model, name)) is int and getattr(model, name) == value
    for name, value in policy_integers.items():
        assert type(getattr(model.policy, name)) is int and getattr(model.policy, name) == value
    assert model.policy.net_arch == {"pi": [8], value_key: [8, 4]}
    model.policy.set_sampler(n_flow_steps=kind(3))
    assert type(model.policy.n_flow_steps) is int
    model.save(tmp_path / "model")
    obs = np.zeros(3, np.float32)
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("value", [2.5, True, "3"])
@pytest.mark.parametrize(
    ("algorithm", "integers", "policy_integers"),
    [(FPO, FPO_INTEGERS, POLICY_INTEGERS), (FQL, FQL_INTEGERS, FQL_POLICY_INTEGERS)],
)
def test_models_refuse_what_is_no_integer(algorithm, integers, policy_integers, value):
    for name in integers:
        if name != "offline_steps":
            with pytest.raises(ValueError, match=f"`{name}` must be an integer, it is {value!r}"):
                algorithm("MlpPolicy", "Pendulum-v1", **{name: value})
    for name in policy_integers:
        with pytest.raises(ValueError, match=f"`{name}` must be an integer, it is {value!r}"):
            algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs={name: value})
    with pytest.raises(ValueError, match=f"`n_flow_steps` must be an integer, it is {value!r}"):
        algorithm("MlpPolicy", "Pendulum-v1", device="cpu").policy.set_sampler(n_flow_steps=value)


FPO_FLOATS = dict(
    learning_rate=1e-3, gamma=0.9, gae_lambda=0.9, clip_range=0.1, clip_range_vf=0.2, ent_coef=0.01, vf_coef=0.5,
    max_grad_norm=0.5, bounds_loss_coef=0.1, cfm_loss_clip=5.0, log_ratio_clip=3.0, ema_decay=0.9, target_kl=0.1,
)  # fmt: skip
FPO_POLICY_FLOATS = dict(action_scale=0.5, output_scale=0.25, sampler_sigma=0.05, action_perturbation_std=0.1, ema_decay=0.9)
FQL_FLOATS = dict(learning_rate=1e-3, alpha=10.0, tau=0.1, gamma=0.9, random_crop_probability=0.5)
FLOATS = [(FPO, FPO_FLOATS, FPO_POLICY_FLOATS), (FQL, FQL_FLOATS, {})]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, th.tensor])
@pytest.mark.parametrize(("algorithm", "floats", "policy_floats"), FLOATS)
def test_models_take_floats_of_any_kind(algorithm, floats, policy_floats, kind):
    kwargs = {name: kind(value) for name, value in floats.items()}
    policy_kwargs = {name: kind(value) for name, value in policy_floats.items()}
    model = algorithm("MlpPolicy", "Pendulum-v1", device="cpu", policy_kwargs=policy_kwargs, **kwargs)
    for instance, values in ((model, floats), (model.policy, policy_floats)):
        for name, value in values.items():
            if not name.startswith("clip_range"):
                assert type(getattr(instance, name)) is float and np.isclose(getattr(instance, name), value)


@pytest.mark.parametrize("value", ["0.5", [0.5], True, np.nan, -0.9])
@pytest.mark.parametrize(("algorithm", "floats", "policy_floats"), FLOATS)
def test_models_refuse_what_is_no_float(algorithm, floats, policy_floats, value):
    for name in floats:
        if not (name == "ent_coef" and value == -0.9):
            with pytest.raises((ValueError, AssertionError), match=f"`{name}` must "):
                algorithm("MlpPolicy", "Pendulum-v1", **{name: value})
    for name in policy_floats:
        if not (name == "output_scale" and value == -0.9):
            with pytest.raises(ValueError, match=f"`{name}` must "):
                algorithm("MlpPolicy", "Pendulum-v1", policy_kwargs={name: value})


@pytest.mark.parametrize(
    ("algorithm", "kwargs"), [(FQL, dict(gamma=2)), (FQL, dict(tau=2)), (FPO, dict(gamma=1.1)), (FPO, dict(gae_lambda=2))]
)
def test_fractions(algorithm, kwargs):
    with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}` must be in \\[0, 1\\], it is"):
        algorithm("MlpPolicy", "Pendulum-v1", **kwargs)


@pytest.mark.parametrize("algorithm", [FPO, FQL])
def test_stats_window_size(algorithm):
    model = algorithm("MlpPolicy", "Pendulum-v1", stats_window_size=np.int64(7))
    assert type(model._stats_window_size) is int
    with pytest.raises(ValueError, match="`stats_window_size` must be an integer"):
        algorithm("MlpPolicy", "Pendulum-v1", stats_window_size=2.5)


def test_booleans():
    assert to_bool("name", np.bool_(True)) is True and to_bool("name", False) is False
    with pytest.raises(ValueError, match="`compile` must be True or False, it is 'False'"):
        FPO("MlpPolicy", "Pendulum-v1", compile="False")
    with pytest.raises(ValueError, match="`normalize_advantage` must be True, False or \"rollout\", it is 'False'"):
        FPO("MlpPolicy", "Pendulum-v1", normalize_advantage="False")
    for name in ("skip_connection", "ortho_init", "share_features_extractor", "normalize_values"):
        with pytest.raises(ValueError, match=f"`{name}` must be True or False, it is 'False'"):
            FPO("MlpPolicy", "Pendulum-v1", policy_kwargs={name: "False"})
    for name in ("normalize_q_loss", "balanced_sampling"):
        with pytest.raises(ValueError, match=f"`{name}` must be True or False, it is 'False'"):
            FQL("MlpPolicy", "Pendulum-v1", **{name: "False"})
    for name in ("layer_norm", "share_features_extractor"):
        with pytest.raises(ValueError, match=f"`{name}` must be True or False, it is 'False'"):
            FQL("MlpPolicy", "Pendulum-v1", policy_kwargs={name: "False"})


class Still(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert np.isfinite(action).all() and self.action_space.contains(action)
        return np.zeros(2, np.float32), 0.0, False, False, {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bounds_whose_difference_overflows(dtype):
    """A warning, and finite actions all the same."""
    largest = np.finfo(dtype).max
    action_space = spaces.Box(np.array([-largest, -1], dtype), np.array([largest, 3], dtype), dtype=dtype)
    with pytest.warns(UserWarning, match="so wide that their difference overflows"):
        model = FPO("MlpPolicy", Still(action_space), n_steps=16, batch_size=8, n_epochs=1, device="cpu")
    with np.errstate(over="raise", invalid="raise"):
        model.learn(16)
        scaled = np.array([[-1, -1], [-0.5, 0], [0, 0.5], [1, 1]], dtype)
        actions = super(FlowActorCriticPolicy, model.policy).unscale_action(scaled)
        assert np.isfinite(actions).all() and actions[0, 1] == -1 and actions[3, 1] == 3
        assert np.allclose(super(FlowActorCriticPolicy, model.policy).scale_action(actions), scaled)
    with pytest.warns(UserWarning, match="so wide that their difference overflows"):
        policy = FQLMlpPolicy(Still.observation_space, action_space, lambda _: 1e-3, net_arch=[8])
    with np.errstate(over="raise", invalid="raise"):
        assert action_space.contains(policy.predict(np.zeros(2, np.float32))[0])
        assert np.allclose(policy.scale_action(policy.unscale_action(scaled)), scaled)


@pytest.mark.parametrize("squash_type", ["tanh", "clip"])
def test_bounds_that_are_equal(squash_type):
    action_space = spaces.Box(np.array([-1, 2], np.float32), np.array([1, 2], np.float32))
    policy = MlpPolicy(Still.observation_space, action_space, lambda _: 1e-3, squash_type=squash_type)
    actions = np.array([[0.5, 2], [-0.5, 2]], np.float32)
    with np.errstate(all="raise"):
        raw = policy.scale_action(actions)
        assert np.isfinite(raw).all() and np.allclose(policy.unscale_action(raw), actions)


@pytest.mark.filterwarnings("error")
def test_wide_bounds_without_a_warning():
    bounds = spaces.Box(-1e38, 1e38, (2,))
    MlpPolicy(Still.observation_space, bounds, lambda _: 1e-3)
    FQLMlpPolicy(Still.observation_space, bounds, lambda _: 1e-3)
    # They do not matter where there are not two
    MlpPolicy(Still.observation_space, spaces.Box(-np.finfo(np.float32).max, np.inf, (2,)), lambda _: 1e-3)


def test_optimizer():
    """Fused for what is fused alone, and otherwise as it comes."""
    weights = [nn.Parameter(th.randn(3))]
    assert make_optimizer(th.optim.Adam, iter(weights), lr=0.1).defaults["fused"] is True
    assert make_optimizer(th.optim.Adam, weights, lr=0.1, foreach=True).defaults["fused"] is None
    frozen = [*weights, nn.Parameter(th.ones(3, dtype=th.int8), requires_grad=False)]
    assert make_optimizer(th.optim.Adam, frozen, lr=0.1).defaults["fused"] is None

    class Custom(th.optim.Adam):
        def __init__(self, params, lr):
            super().__init__(params, lr=lr)

    assert make_optimizer(Custom, weights, lr=0.1).defaults["fused"] is None
    assert pickle.loads(pickle.dumps(make_optimizer(th.optim.AdamW, weights, lr=0.1))).defaults["fused"] is True
