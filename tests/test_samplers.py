"""Samplers: their order of convergence, their accuracy with each type of network, and how a policy changes its own."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_flow import FPO, FQL
from sb3_flow.common.flow import PREDICTION_TYPES, timestep_range, to_velocity
from sb3_flow.common.networks import FlowNetwork
from sb3_flow.common.samplers import SAMPLERS, TOLERANCE, integrate

pytest.importorskip("torchdiffeq", reason='needs pip install "sb3-flow[solvers]"')

OBS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
MEAN, STD = 0.7, 0.4


def gaussian_velocity(x, t):
    """Velocity of the flow from N(0, 1) to N(MEAN, STD^2): it maps a noise z to MEAN + STD z."""
    std_squared = t**2 + ((1 - t) * STD) ** 2
    return -MEAN + (t - (1 - t) * STD**2) / std_squared * (x - (1 - t) * MEAN)


def error(sampler, n_flow_steps, field=gaussian_velocity, **kwargs):
    noise = th.tensor([[-1.5], [0.3], [2.0]], dtype=th.float64)
    actions = integrate(sampler, field, noise, n_flow_steps, 0.0, **kwargs)
    return (actions - (MEAN + STD * noise)).abs().max().item()


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("sde", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(sampler, order):
    """Twice the number of steps, an error 2^order times smaller: dx/dt = -x^2 cos(t), 1/x = sin(t) + constant."""
    noise = th.tensor([[0.3], [0.5]], dtype=th.float64)
    exact = 1 / (1 / noise - math.sin(1))
    errors = [
        (integrate(sampler, lambda x, t: -x.square() * math.cos(t), noise, n_flow_steps, 0.0) - exact).abs().max().item()
        for n_flow_steps in (16, 32, 64)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


def test_adaptive():
    assert error("dopri5", 1) < 30 * TOLERANCE
    # The number of steps has no meaning for it
    assert error("dopri5", 1) == error("dopri5", 50)


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 5), ("midpoint", 10), ("heun", 10), ("rk4", 20)])
def test_number_of_evaluations(sampler, evaluations):
    times = []
    integrate(sampler, lambda x, t: times.append(t) or x, th.zeros(1, 1), 5, 0.0)
    assert len(times) == evaluations and max(times) == 1.0 and min(times) >= 0.0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", ["midpoint", "heun", "rk4", "dopri5"])
def test_every_prediction_type(prediction_type, sampler):
    """
    Networks that predict noise or actions are not evaluated where they are singular: in the limit, all samplers give
    the same actions, which are close to those of the exact flow.
    """
    earliest, latest = timestep_range(prediction_type)

    def field(x, t):
        t = min(max(t, earliest), latest)
        velocity = gaussian_velocity(x, t)
        output = {"velocity": velocity, "noise": x + (1 - t) * velocity, "action": x - t * velocity}[prediction_type]
        return to_velocity(output, x, t, prediction_type)

    kinks = timestep_range(prediction_type)
    noise = th.tensor([[-1.5], [0.3], [2.0]], dtype=th.float64)
    reference = integrate("euler", field, noise, 20_000, 0.0)
    # The times of the kinks are steps: twice as many steps do not do better than what remains at the end of the interval
    assert th.allclose(integrate(sampler, field, noise, 40, 0.0, kinks), reference, atol=2e-3)
    assert error(sampler, 40, field, kinks=kinks) < 0.01


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_network_with_every_sampler(prediction_type, sampler):
    th.manual_seed(0)
    network = FlowNetwork(6, 3, [16, 16], prediction_type=prediction_type)
    features, noise = th.randn(10, 6), th.randn(10, 3)
    with th.no_grad():
        actions = network.sample(features, noise, 40, sampler)
        reference = network.sample(features, noise, 1, "dopri5")
    assert actions.shape == (10, 3) and actions.dtype == th.float32
    # (a noise network without training amplifies its input)
    tolerance = {"euler": 0.25, "sde": 1.0, "midpoint": 0.05, "heun": 0.05}.get(sampler, 0.005)
    assert (actions - reference).abs().max() < tolerance * reference.abs().max()
    # Differentiable, as Euler's method
    network.sample(features, noise, 2, sampler).sum().backward()
    assert network.input_layer.weight.grad.abs().sum() > 0


def make_fpo(**policy_kwargs):
    kwargs = dict(n_steps=32, batch_size=32, n_epochs=2, seed=0, device="cpu")
    return FPO(
        "MlpPolicy", make_vec_env("Pendulum-v1", 2, seed=0), policy_kwargs=dict(net_arch=[16]) | policy_kwargs, **kwargs
    )


def predict(model):
    th.manual_seed(3)
    return model.predict(OBS, deterministic=False)[0]


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_set_sampler(tmp_path, ema_decay):
    model = make_fpo(ema_decay=ema_decay).learn(64)
    before = predict(model)
    model.policy.set_sampler("heun", n_flow_steps=4)
    heun = predict(model)
    assert not np.allclose(heun, before, atol=1e-5)
    # With many steps, all of them are the same flow
    model.policy.set_sampler(n_flow_steps=100)
    many = predict(model)
    model.policy.set_sampler("dopri5")
    assert np.allclose(predict(model), many, atol=1e-3)
    # Back again, through the fast path: the number of steps is that of now
    model.policy.set_sampler("euler", n_flow_steps=100)
    assert np.allclose(predict(model), many, atol=0.05)
    model.policy.set_sampler(n_flow_steps=10)
    assert np.array_equal(predict(model), before)

    # Saved with the model, which can go on learning
    model.policy.set_sampler("heun", n_flow_steps=4)
    model.save(tmp_path / "model.zip")
    loaded = FPO.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    assert (loaded.policy.sampler, loaded.policy.n_flow_steps) == ("heun", 4)
    assert np.array_equal(predict(loaded), heun)
    loaded.learn(64)
    # And with the policy alone
    model.policy.save(tmp_path / "policy.zip")
    policy = type(model.policy).load(tmp_path / "policy.zip", device="cpu")
    assert np.array_equal(predict(policy), heun)


def test_set_sampler_of_fql(tmp_path):
    model = FQL("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[16]), device="cpu", buffer_size=100, seed=0)
    actor, before = predict(model), predict(model.policy.bc_flow)
    model.policy.set_sampler("rk4", n_flow_steps=3)
    rk4 = predict(model.policy.bc_flow)
    # Only the flow is sampled in steps
    assert np.array_equal(predict(model), actor)
    assert not np.array_equal(rk4, before) and np.allclose(rk4, before, atol=0.5)
    model.save(tmp_path / "model.zip")
    loaded = FQL.load(tmp_path / "model.zip", device="cpu")
    assert (loaded.policy.sampler, loaded.policy.n_flow_steps) == ("rk4", 3)
    assert np.array_equal(predict(loaded.policy.bc_flow), rk4)
    model.policy.save(tmp_path / "policy.zip")
    policy = type(model.policy).load(tmp_path / "policy.zip", device="cpu")
    assert np.array_equal(predict(policy.bc_flow), rk4)
    # What the actor is distilled from must be a function of the noise
    with pytest.raises(ValueError, match=r"`sampler`.*'sde'"):
        model.policy.set_sampler("sde")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sampler", dict(sampler="leapfrog")),
        ("n_flow_steps", dict(n_flow_steps=0)),
        ("n_flow_steps", dict(n_flow_steps=2.5)),
        ("sampler_sigma", dict(sampler_sigma=-0.1)),
    ],
)
def test_errors(name, arguments):
    policy = make_fpo().policy
    with pytest.raises(ValueError, match=f"`{name}`"):
        policy.set_sampler(**arguments)
    # Nothing has changed
    assert (policy.sampler, policy.n_flow_steps, policy.sampler_sigma) == ("euler", 10, 0.05)
    with pytest.raises(ValueError, match=f"`{name}`"):
        make_fpo(**arguments)
    if name != "sampler_sigma":
        with pytest.raises(ValueError, match=f"`{name}`"):
            FQL("MlpPolicy", "Pendulum-v1", policy_kwargs=arguments, buffer_size=100)


def test_torchdiffeq_is_not_installed(monkeypatch):
    model = make_fpo()
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"sb3-flow\[solvers\]"):
        model.policy.set_sampler("rk4")
    with pytest.raises(ImportError, match=r"sb3-flow\[solvers\]"):
        make_fpo(sampler="dopri5")
    assert model.policy.sampler == "euler"
    predict(model)
