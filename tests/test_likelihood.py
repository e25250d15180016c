"""Log-likelihood of actions under a flow, and its lower bound."""

import math

import numpy as np
import pytest
import torch as th
from torch.distributions import MultivariateNormal, Normal

from sb3_flow import FPO
from sb3_flow.common.flow import PREDICTION_TYPES, SINGULARITY_MARGIN, interpolate
from sb3_flow.common.likelihood import MAX_EXACT, evidence_lower_bound, log_likelihood, noisy_log_likelihood, odeint

pytest.importorskip("torchdiffeq", reason='needs pip install "sb3-flow[solvers]"')

MEAN, STD = 0.7, 0.4
ACTIONS = th.linspace(-1, 2, 7, dtype=th.float64).unsqueeze(1)


def gaussian_velocity(x, t):
    """Velocity of the flow from N(0, 1) to N(MEAN, STD^2)."""
    return -MEAN + (t - (1 - t) * STD**2) / (t**2 + ((1 - t) * STD) ** 2) * (x - (1 - t) * MEAN)


def affine_velocity(matrix, offset):
    """dx/dt = matrix x + offset: an affine map, and so a Gaussian."""
    return lambda x, t: x @ matrix.t() + offset


def affine_log_likelihood(matrix, offset, actions):
    # From a to noise: z = e^M a + M^-1 (e^M - 1) offset
    flow = th.matrix_exp(matrix)
    shift = th.linalg.solve(matrix, (flow - th.eye(len(matrix), dtype=th.float64)) @ offset)
    inverse = th.linalg.inv(flow)
    return MultivariateNormal(-inverse @ shift, inverse @ inverse.t()).log_prob(actions)


def test_closed_form_in_one_dimension():
    result = log_likelihood(gaussian_velocity, ACTIONS)
    assert result.shape == (7,)
    assert th.allclose(result, Normal(MEAN, STD).log_prob(ACTIONS).squeeze(1), atol=1e-3)


def test_closed_form_in_three_dimensions():
    """A Jacobian that is not symmetric, and coupled dimensions."""
    th.manual_seed(0)
    matrix, offset = th.randn(3, 3, dtype=th.float64), th.randn(3, dtype=th.float64)
    actions = th.randn(20, 3, dtype=th.float64)
    field = affine_velocity(matrix, offset)
    expected = affine_log_likelihood(matrix, offset, actions)
    assert th.allclose(log_likelihood(field, actions), expected, atol=1e-3)
    # Hutchinson's estimate is unbiased: right on average, and better with more probes
    estimates = th.stack([log_likelihood(field, actions, "hutchinson", method="rk4") for _ in range(200)])
    exact = log_likelihood(field, actions, method="rk4")
    standard_error = estimates.std(dim=0) / 200**0.5
    assert (estimates.std(dim=0) > 0.1).all()
    assert ((estimates.mean(dim=0) - exact).abs() < 4 * standard_error).all()
    assert (log_likelihood(field, actions, "hutchinson", n_probes=500) - expected).abs().max() < 0.5


@pytest.mark.parametrize("noise_std", [0.05, 0.5])
def test_noisy_actions_in_one_dimension(noise_std):
    """Those of a Gaussian are another one."""
    result = noisy_log_likelihood(gaussian_velocity, ACTIONS, noise_std, 20)
    expected = Normal(MEAN, math.hypot(STD, noise_std)).log_prob(ACTIONS).squeeze(1)
    assert th.allclose(result, expected, atol=0.02)


@pytest.mark.parametrize("dim", [3, MAX_EXACT, MAX_EXACT + 2])
def test_noisy_actions_in_several_dimensions(dim):
    """Next to no noise: the likelihood of the actions, if only on average in more than four dimensions."""
    th.manual_seed(0)
    matrix, offset = 0.5 * th.randn(dim, dim, dtype=th.float64), th.randn(dim, dtype=th.float64)
    actions = th.randn(20, dim, dtype=th.float64)
    field = affine_velocity(matrix, offset)
    estimates = th.stack([noisy_log_likelihood(field, actions, 1e-9, 20) for _ in range(300)])
    error, spread = (estimates.mean(dim=0) - affine_log_likelihood(matrix, offset, actions)).abs(), estimates.std(dim=0)
    if dim <= MAX_EXACT:
        assert spread.max() < 1e-9 and error.max() < 0.02
    else:
        assert spread.min() > 0.1 and (error < 0.02 + 4 * spread / 300**0.5).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("perturbation", [0.0, 0.3])
def test_actions_of_rollouts(prediction_type, perturbation):
    """Their density, with their perturbation or noise of half a step, is that of the flow with as much noise."""
    th.manual_seed(0)
    kwargs = dict(n_steps=64, batch_size=16, learning_rate=1e-3, ema_decay=0.5, device="cpu", seed=0)
    policy_kwargs = dict(prediction_type=prediction_type, action_perturbation_std=perturbation)
    policy = FPO("MlpPolicy", "Pendulum-v1", policy_kwargs=policy_kwargs, **kwargs).learn(64).policy
    actions = th.linspace(-6, 6, 1201).unsqueeze(1)
    density = policy.exploration_log_likelihood(th.ones(1201, 3), actions).exp()
    assert not density.requires_grad
    assert th.trapezoid(density, actions[:, 0]).item() == pytest.approx(1, abs=0.03)
    # Of the actor, not of its moving average
    policy.ema = None
    flow = policy.log_likelihood(th.ones(1201, 3), actions).exp()
    noise = Normal(0.0, max(perturbation, 0.05)).log_prob(actions - actions.t()).exp()
    assert th.allclose(density, 0.01 * noise @ flow, atol=0.03)


def test_density_integrates_to_one():
    """Of a network that nobody has trained, in one dimension."""
    th.manual_seed(0)
    model = FPO("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(output_scale=2.0), device="cpu")
    actions = th.linspace(-15, 15, 3001).unsqueeze(1)
    obs = th.randn(1, 3).expand(3001, -1)
    density = model.policy.log_likelihood(obs, actions).exp()
    assert th.trapezoid(density, actions[:, 0]).item() == pytest.approx(1, abs=1e-3)
    # And is that of the samples
    model.policy.set_sampler("dopri5")
    with th.no_grad():
        samples = model.policy._predict(th.zeros(20_000, 3) + obs[0])[:, 0]
    histogram, edges = th.histogram(samples, bins=20, density=True)
    centers = (edges[1:] + edges[:-1]) / 2
    assert np.allclose(np.interp(centers, actions[:, 0], density), histogram, atol=0.04)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_policy(prediction_type, ema_decay):
    """What the policy predicts with, for each type of network: its density integrates to one."""
    th.manual_seed(0)
    kwargs = dict(n_steps=64, batch_size=16, learning_rate=1e-2, ema_decay=ema_decay, ema_start=0, device="cpu", seed=0)
    model = FPO("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(prediction_type=prediction_type), **kwargs).learn(128)
    width = 300 if prediction_type == "noise" else 20
    actions = th.linspace(-width, width, 4001).unsqueeze(1)
    density = model.policy.log_likelihood(th.ones(4001, 3), actions).exp()
    assert th.trapezoid(density, actions[:, 0]).item() == pytest.approx(1, abs=5e-3)
    assert not density.requires_grad
    if ema_decay is not None:
        model.policy.ema = None
        assert not th.allclose(model.policy.log_likelihood(th.ones(4001, 3), actions).exp(), density, atol=1e-6)


def bound_of(field, smallest_time=1e-3, n_copies=5000):
    copies = ACTIONS.repeat(n_copies, 1)
    bound = evidence_lower_bound(field, copies, 200, 1, smallest_time)
    return bound.view(n_copies, len(ACTIONS)).mean(dim=0)


def test_bound_is_tight_for_the_exact_flow():
    """Constant minus weighted CFM loss = log-likelihood, as the smallest time goes to zero."""
    th.manual_seed(0)
    expected = Normal(MEAN, STD).log_prob(ACTIONS).squeeze(1)
    assert th.allclose(bound_of(gaussian_velocity), expected, atol=0.03)


def stochastic_sampler(slope, offset, smallest_time):
    """
    Density of the reverse diffusion with the velocity slope(t) x + offset(t), by the equations of its mean and variance:
    dx = (x / (1 - t) + 2 v(x, t)) dt + sqrt(2 t / (1 - t)) dW, backwards from N(0, 1).
    """

    def derivative(t, state):
        mean, variance = state
        rate = 1 / (1 - t) + 2 * slope(t)
        return rate * mean + 2 * offset(t), 2 * rate * variance - 2 * t / (1 - t)

    start = (th.zeros(1, dtype=th.float64), th.ones(1, dtype=th.float64))
    mean, variance = odeint(derivative, start, [1 - 1e-5, smallest_time], "dopri5")
    decoder_std = smallest_time / (1 - smallest_time)
    return Normal(mean / (1 - smallest_time), (variance / (1 - smallest_time) ** 2 + decoder_std**2).sqrt())


@pytest.mark.parametrize("smallest_time", [1e-3, 0.05])
@pytest.mark.parametrize("error", [(2.0, 0.0), (-1.0, 0.5), (0.0, -2.0)])
def test_bound_of_a_wrong_flow(error, smallest_time):
    """For a flow that is not exact it is a lower bound on the likelihood under the stochastic sampler."""
    th.manual_seed(0)

    def slope(t):
        return (t - (1 - t) * STD**2) / (t**2 + ((1 - t) * STD) ** 2) + error[0] * t

    def offset(t):
        return -MEAN - (slope(t) - error[0] * t) * (1 - t) * MEAN + error[1] * t

    density = stochastic_sampler(slope, offset, smallest_time)
    bound = bound_of(lambda x, t: slope(t) * x + offset(t), smallest_time)
    gap = density.log_prob(ACTIONS).squeeze(1) - bound
    assert (gap > -0.03).all() and gap.max() > 0.08


def test_bound_of_a_network_that_has_learned():
    """CFM training raises the bound towards the exact log-likelihood of its own flow."""
    th.manual_seed(0)
    model = FPO("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(output_scale=1.0), device="cpu")
    policy, obs = model.policy, th.zeros(256, 3)
    optimizer = th.optim.Adam(policy.parameters(), lr=3e-3)
    test_actions = MEAN + STD * th.randn(256, 1)

    def bound():
        return evidence_lower_bound(policy.velocity_field(obs), test_actions, smallest_time=SINGULARITY_MARGIN).mean().item()

    with th.no_grad():
        before = bound()
    for _ in range(400):
        actions, noise, t = MEAN + STD * th.randn(256, 1), th.randn(256, 1, 1), th.rand(256, 1)
        _, velocity = policy.evaluate_flow(obs, interpolate(actions.unsqueeze(1), noise, t), t)
        loss = (velocity - (noise - actions.unsqueeze(1))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    exact = policy.log_likelihood(obs, test_actions).mean().item()
    with th.no_grad():
        after = bound()
    assert after > before + 0.3
    assert exact - 0.15 < after < exact + 0.05
    assert exact == pytest.approx(-0.5 * math.log(2 * math.pi * math.e * STD**2), abs=0.1)


def test_errors():
    with pytest.raises(ValueError, match="`divergence`"):
        log_likelihood(gaussian_velocity, ACTIONS, divergence="trace")
