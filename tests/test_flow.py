"""The mathematics of flow matching: path, CFM loss, networks, samplers."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_flow.common.flow import (
    CFM_LOSSES,
    LOSS_REDUCTIONS,
    PREDICTION_TYPES,
    SAMPLINGS,
    SINGULARITY_MARGIN,
    CFMLoss,
    cfm_loss,
    check_flow_steps,
    draw_pairs,
    flow_target,
    interpolate,
    sampler_grid,
    squared_error,
    standard_normal_flow,
    timestep_range,
    to_action,
    to_cfm_loss,
    to_velocity,
)
from sb3_flow.common.networks import FlowNetwork, TanhGELU, TimestepEmbedding
from sb3_flow.common.samplers import SAMPLERS, integrate
from sb3_flow.common.surrogates import relative_loss


def test_path_ends_at_noise_and_action():
    actions, noise = th.randn(5, 3), th.randn(5, 3)
    assert th.equal(interpolate(actions, noise, th.ones(5)), noise)
    assert th.equal(interpolate(actions, noise, th.zeros(5)), actions)
    # Its derivative is the target of a velocity network
    t = th.full((5,), 0.3)
    slope = (interpolate(actions, noise, t + 0.5) - interpolate(actions, noise, t)) / 0.5
    assert th.allclose(slope, flow_target("velocity", actions, noise), atol=1e-6)


# One point in 2-D: a = (1, -1), eps = (3, 0), t = 0.25, hence x_t = (1.5, -0.75) and u = (2, 1)
# An output of (2, 2) is an error of (0, 1), (-1, 2), (1, 3) for velocity, noise and action networks
@pytest.mark.parametrize(
    ("prediction_type", "supervision", "sum_of_squares"),
    [
        ("velocity", "velocity", 1.0),
        ("velocity", "noise", 0.75**2 * 1.0),
        ("velocity", "action", 0.25**2 * 1.0),
        ("noise", "noise", 5.0),
        ("noise", "velocity", 5.0 / 0.75**2),
        ("noise", "action", 5.0 * (0.25 / 0.75) ** 2),
        ("action", "action", 10.0),
        ("action", "velocity", 10.0 / 0.25**2),
        ("action", "noise", 10.0 * (0.75 / 0.25) ** 2),
        ("velocity", "elbo", 0.75 / 0.25 * 1.0),
        ("noise", "elbo", 0.75 / 0.25 * 5.0 / 0.75**2),
        ("action", "elbo", 0.75 / 0.25 * 10.0 / 0.25**2),
    ],
)
@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
def test_cfm_loss_by_hand(prediction_type, supervision, sum_of_squares, reduction):
    actions, noise, t = th.tensor([[1.0, -1.0]]), th.tensor([[3.0, 0.0]]), th.tensor([0.25])
    loss = cfm_loss(th.tensor([[2.0, 2.0]]), actions, noise, t, prediction_type, supervision, reduction)
    expected = sum_of_squares / {"mean": 2, "sum": 1, "sqrt": math.sqrt(2)}[reduction]
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_authors_loss():
    """The authors' code: x0_hat = x_t - t v, x1_hat = x0_hat + v, mean (eps - x1_hat)^2."""
    actions, noise, t, velocity = th.randn(7, 1, 4), th.randn(7, 5, 4), th.rand(7, 5), th.randn(7, 5, 4)
    x_t = interpolate(actions, noise, t)
    x1_hat = x_t - t.unsqueeze(-1) * velocity + velocity
    expected = (noise - x1_hat).square().mean(dim=-1)
    assert th.allclose(cfm_loss(velocity, actions, noise, t, "velocity", "noise"), expected, atol=1e-5)


@pytest.mark.parametrize("supervision", PREDICTION_TYPES)
def test_cfm_loss_is_equal_across_types(supervision):
    """Networks of different types that represent the same field have the same loss."""
    actions, noise, velocity = th.randn(50, 1, 3), th.randn(50, 8, 3), th.randn(50, 8, 3)
    t = th.rand(50, 8) * 0.9 + 0.05
    x_t, time = interpolate(actions, noise, t), t.unsqueeze(-1)
    outputs = {"velocity": velocity, "noise": x_t + (1 - time) * velocity, "action": x_t - time * velocity}
    losses = {kind: cfm_loss(output, actions, noise, t, kind, supervision) for kind, output in outputs.items()}
    for kind in PREDICTION_TYPES:
        assert th.allclose(losses[kind], losses["velocity"], rtol=1e-3, atol=1e-5)
        assert th.allclose(to_velocity(outputs[kind], x_t, time, kind), velocity, atol=1e-4)
        assert th.allclose(to_action(outputs[kind], x_t, t, kind), outputs["action"], atol=1e-4)


def test_noise_loss_vanishes_at_t_1():
    output, actions, noise = th.randn(4, 2), th.randn(4, 2), th.randn(4, 2)
    assert th.equal(cfm_loss(output, actions, noise, th.ones(4), "velocity", "noise"), th.zeros(4))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_pairs(sampling, prediction_type):
    low, high = timestep_range(prediction_type)
    loss = CFMLoss("velocity", "sum", "grid", sampling)
    noise, grid, _ = draw_pairs((2000, 3, 2), loss, prediction_type, 5)
    assert noise.shape == (2000, 3, 2) and grid.shape == (2000, 3)
    # All the times the sampler visits, about as often
    values, counts = grid.unique(return_counts=True)
    assert np.allclose(values.numpy(), np.clip([0.2, 0.4, 0.6, 0.8, 1.0], low, high))
    assert counts.min() > 0.85 * grid.numel() / 5
    loss = loss._replace(timestep_distribution="uniform")
    uniform = draw_pairs((2000, 3, 2), loss, prediction_type, 5).timesteps
    assert len(uniform.unique()) > 3000
    assert uniform.min() >= low and uniform.max() <= high
    assert uniform.min() < 0.01 + SINGULARITY_MARGIN and uniform.max() > 0.99 - SINGULARITY_MARGIN
    # FPO++: .005 + .99 U
    assert uniform.min() >= 0.005 and uniform.max() <= 0.995
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    # Not where the evidence lower bound has infinite weight
    loss = loss._replace(supervision="elbo")
    assert draw_pairs((2000, 3, 2), loss, prediction_type, 5).timesteps.min() >= SINGULARITY_MARGIN
    assert noise.mean().item() == pytest.approx(0.0, abs=0.05) and noise.std().item() == pytest.approx(1.0, abs=0.03)
    assert sampler_grid(4) == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("supervision", "odds"), [("velocity", [1, 1, 1, 1]), ("noise", [3, 2, 1, 0]), ("elbo", np.sqrt([3, 1, 1 / 3, 0]))]
)
def test_importance_of_the_times(supervision, odds):
    """Times of the grid as often as the square roots of their weights, and weights of the losses that undo it."""
    loss = CFMLoss(supervision, "mean", "importance", "stratified")
    _, timesteps, weights = draw_pairs((20000, 5, 2), loss, n_flow_steps=4)
    for time, probability in zip([0.25, 0.5, 0.75, 1.0], np.array(odds) / sum(odds), strict=True):
        drawn = timesteps == time
        assert drawn.float().mean().item() == pytest.approx(probability, abs=0.01)
        if probability > 0:
            weight = {"velocity": 1, "noise": (1 - time) ** 2, "elbo": (1 - time) / time}[supervision] / 2
            assert weights[drawn].tolist() == pytest.approx([weight / (4 * probability)] * drawn.sum().item(), rel=1e-5)


@pytest.mark.parametrize("sampling", ["independent", "stratified"])
def test_logit_normal_times(sampling):
    """Their log-odds are normal, with the mean and standard deviation of EDM."""
    th.manual_seed(0)
    _, timesteps, _ = draw_pairs((2000, 8, 1), CFMLoss("velocity", "sum", "logit-normal", sampling))
    log_odds = timesteps.logit().flatten()
    normal = th.distributions.Normal(-1.2, 1.2)
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert (log_odds < normal.icdf(th.tensor(quantile))).float().mean().item() == pytest.approx(quantile, abs=0.02)


def test_scale():
    losses = []
    for scale in (1.0, 200.0):
        th.manual_seed(0)
        losses.append(draw_pairs((10, 4, 2), to_cfm_loss(dict(scale=scale))).weights)
    th.testing.assert_close(losses[1], 200 * losses[0])
    for scale in (0.0, -1.0, np.inf, "1"):
        with pytest.raises(ValueError, match=r"cfm_loss\['scale'\]"):
            to_cfm_loss(dict(scale=scale))
    # Of a model that was saved before there was one
    assert to_cfm_loss(["noise", "mean", "grid", "independent"]) == CFM_LOSSES["fpo"]


@pytest.mark.parametrize("n_mc_samples", [1, 2, 7, 8])
def test_stratified_pairs(n_mc_samples):
    noise, timesteps, weights = draw_pairs((50, n_mc_samples, 2), CFMLoss("velocity", "sum", "uniform", "stratified"))
    assert noise.shape == (50, n_mc_samples, 2) and timesteps.shape == weights.shape == (50, n_mc_samples)
    strata = (timesteps - 0.005) / 0.99 * n_mc_samples
    assert th.equal(strata.clamp(0, n_mc_samples - 1e-4).floor(), th.arange(n_mc_samples).expand(50, -1).float())
    assert th.equal(noise[:, 1::2], -noise[:, : n_mc_samples - 1 : 2])
    assert len(noise.abs().unique()) == noise[:, ::2].numel()
    assert (weights == 1).all()


def test_stratified_pairs_have_less_variance():
    """The log-ratio of a flow that moves its actions is the same on average, its variance a fraction."""
    th.manual_seed(0)
    actions = th.ones(20000, 1, 1)

    def log_ratio(sampling):
        noise, t, _ = draw_pairs((20000, 8, 1), CFMLoss("velocity", "sum", "uniform", sampling))
        x_t = interpolate(actions, noise, t)
        old, new = (cfm_loss(0.3 * x_t - shift, actions, noise, t).mean(dim=1) for shift in (0.7, 0.75))
        return old - new

    independent, stratified = log_ratio("independent"), log_ratio("stratified")
    error = (independent.var() / len(independent)).sqrt().item()
    assert stratified.mean().item() == pytest.approx(independent.mean().item(), abs=4 * error)
    assert stratified.var() < 0.05 * independent.var()


def gaussian_flow(x_t, t, mean, std):
    """Velocity of the flow from N(0, 1) to N(mean, std^2)."""
    slope = (t - (1 - t) * std**2) / (t**2 + ((1 - t) * std) ** 2)
    return slope.unsqueeze(-1) * (x_t - (1 - t.unsqueeze(-1)) * mean) - mean


def relative_log_ratio(supervision, std, new_mean, new_std):
    """
    Log-ratio of the flows of N(new_mean std, (new_std std)^2) and N(0, std^2), over that of their likelihoods, for
    several actions (and up to a constant: times below the margin are left out).
    """
    z = th.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).view(5, 1)
    actions = (z * std).repeat_interleave(40000, dim=0).unsqueeze(1)
    noise, t, _ = draw_pairs((len(actions), 2, 1), CFMLoss(supervision, "sum", "uniform", "stratified"))
    x_t = interpolate(actions, noise, t)
    velocities = gaussian_flow(x_t, t, 0.0, std), gaussian_flow(x_t, t, new_mean * std, new_std * std)
    old_loss, loss = (cfm_loss(velocity, actions, noise, t, supervision=supervision) for velocity in velocities)
    log_ratio = (old_loss - loss).view(5, -1).mean(dim=1)
    expected = 0.5 * (z**2 - ((z - new_mean) / new_std) ** 2).squeeze(1)
    return ((log_ratio - log_ratio[2]) / (expected - expected[2]))[[0, 1, 3, 4]]


@pytest.mark.parametrize(("new_mean", "new_std"), [(0.05, 1.0), (0.0, 1.05)])
def test_elbo_is_the_log_likelihood_ratio(new_mean, new_std):
    """With the weights of the evidence lower bound it is, whatever the spread. With others it gets smaller with the spread."""
    th.manual_seed(0)
    wide, narrow = (relative_log_ratio("elbo", std, new_mean, new_std) for std in (1.0, 0.25))
    assert th.allclose(wide, th.ones(4), atol=0.1) and th.allclose(narrow, th.ones(4), atol=0.15)
    wide, narrow = (relative_log_ratio("velocity", std, new_mean, new_std) for std in (1.0, 0.25))
    assert (wide > 3 * narrow).all()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_importance_sampling_has_less_variance(sampling):
    """The log-ratio of a narrow Gaussian that moves is the same on average, its variance less than half."""
    th.manual_seed(0)
    std = 0.1
    # An action and the baseline action opposite to it
    actions = th.tensor([std, -std]).view(1, 2, 1, 1)

    def log_ratio(distribution):
        pairs = draw_pairs((40000, 4, 1), CFMLoss("elbo", "sum", distribution, sampling))
        noise, t, weights = (x.unsqueeze(1) for x in pairs)
        x_t, target = interpolate(actions, noise, t), flow_target("velocity", actions, noise)
        old, new = (squared_error(gaussian_flow(x_t, t, mean, std), target) for mean in (0.0, 0.01 * std))
        return relative_loss(weights * (old - new)).mean(dim=1)

    grid, importance = log_ratio("grid"), log_ratio("importance")
    error = (grid.var() / len(grid)).sqrt().item()
    assert importance.mean().item() == pytest.approx(grid.mean().item(), abs=4 * error)
    assert importance.var() < 0.5 * grid.var()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "loss", [CFM_LOSSES["fpo"], CFM_LOSSES["fpo++"], CFMLoss("elbo", "sum", "grid"), CFMLoss("action", "sqrt", "uniform")]
)
def test_weighted_errors_are_cfm_losses(loss, prediction_type):
    pairs = draw_pairs((500, 3, 2), loss, prediction_type, 4)
    actions, outputs = th.randn(500, 1, 2), th.randn(500, 3, 2)
    weighted = pairs.weights * squared_error(outputs, flow_target(prediction_type, actions, pairs.noise))
    losses = cfm_loss(outputs, actions, pairs.noise, pairs.timesteps, prediction_type, loss.supervision, loss.reduction)
    assert th.allclose(weighted, losses, rtol=1e-4)


def test_cfm_loss_of_the_argument():
    for name, loss in CFM_LOSSES.items():
        assert to_cfm_loss(name) is loss
        # (as JSON gives it back)
        assert to_cfm_loss(list(loss)) == to_cfm_loss(loss) == to_cfm_loss(loss._asdict()) == loss
    assert to_cfm_loss({}) == CFM_LOSSES["elbo"]
    assert to_cfm_loss(dict(supervision="velocity")) == ("velocity", "sum", "importance", "stratified", 1.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Elbo", "Unknown `cfm_loss`: 'Elbo', it must be one of 'elbo', 'fpo', 'fpo\\+\\+'"),
        (None, "`cfm_loss` must be one of 'elbo', .*, or a dict of 'supervision', .*, it is None"),
        (["noise"], "`cfm_loss` must be one of .* it is \\['noise'\\]"),
        (dict(supervison="noise", base="fpo"), "`cfm_loss` has unknown keys \\['base', 'supervison'\\], they must be among"),
        (dict(reduction="max"), "Unknown `cfm_loss\\['reduction'\\]`: 'max', it must be one of 'mean', 'sum', 'sqrt'"),
        (dict(sampling=["stratified"]), "Unknown `cfm_loss\\['sampling'\\]`: \\['stratified'\\]"),
    ],
)
def test_wrong_cfm_loss(value, message):
    with pytest.raises(ValueError, match=message):
        to_cfm_loss(value)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("supervision", ["velocity", "noise", "action", "elbo"])
@pytest.mark.parametrize("distribution", ["grid", "uniform", "importance"])
@pytest.mark.parametrize("n_flow_steps", [1, 2])
def test_steps_with_a_loss(prediction_type, supervision, distribution, n_flow_steps):
    """Those that are refused are those with weights of zero only."""
    loss = CFMLoss(supervision, "sum", distribution)
    weights = draw_pairs((100, 2, 1), loss, prediction_type, n_flow_steps).weights
    if (weights > 0).any():
        check_flow_steps(loss, prediction_type, n_flow_steps)
    else:
        with pytest.raises(ValueError, match="`n_flow_steps` must be at least 2 for this `cfm_loss`"):
            check_flow_steps(loss, prediction_type, n_flow_steps)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_standard_normal_flow(prediction_type):
    """It minimises the CFM loss of standard normal actions: its errors are orthogonal to x_t at every time."""
    th.manual_seed(0)
    actions, noise = th.randn(2, 100_000)
    for t in (0.1, 0.35, 0.5, 0.9):
        x_t = interpolate(actions.unsqueeze(1), noise.unsqueeze(1), th.tensor(t)).squeeze(1)
        error = standard_normal_flow(t, prediction_type) * x_t - flow_target(prediction_type, actions, noise)
        assert (error * x_t).mean().item() == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("n_flow_steps", [1, 2, 5, 10, 33])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_skip_connection_leaves_noise_as_it_is(prediction_type, n_flow_steps, sampler):
    """... whatever the sampler and its steps: the standard deviation of a new policy is one."""
    if sampler not in ("euler", "sde"):
        pytest.importorskip("torchdiffeq", reason='needs pip install "sb3-flow[solvers]"')
    network = FlowNetwork(1, 2, [8], output_scale=0.0, skip_connection=True, prediction_type=prediction_type)
    features, noise = th.zeros(100, 1), th.randn(100, 2)
    for grad in (False, True):
        with th.set_grad_enabled(grad):
            assert th.allclose(network.sample(features, noise, n_flow_steps, sampler), noise, atol=1e-3)


def test_noise_of_the_sampler_with_skip_connection():
    """Each step adds its noise to x: the flow of a standard normal then changes its scale until the next."""
    network = FlowNetwork(1, 1, [8], output_scale=0.0, skip_connection=True)
    actions = network.sample(th.zeros(50_000, 1), th.zeros(50_000, 1), 4, "sde", 0.2)
    variance = sum(0.2**2 / (t**2 + (1 - t) ** 2) for t in (0.75, 0.5, 0.25, 0.0))
    assert actions.std().item() == pytest.approx(variance**0.5, rel=0.02)


@pytest.mark.parametrize("sampler", ["euler", "midpoint"])
def test_skip_connection_does_not_change_the_flow(sampler):
    """With many steps, sampling leads where the velocity field does."""
    if sampler != "euler":
        pytest.importorskip("torchdiffeq", reason='needs pip install "sb3-flow[solvers]"')
    network = make_network(skip_connection=True)
    features, noise = th.randn(10, 6), th.randn(10, 3)
    with th.no_grad():
        expected = integrate("euler", network.velocity_field(features, 4000), noise, 4000)
        assert th.allclose(network.sample(features, noise, 400, sampler), expected, atol=5e-3)


def test_timestep_embedding():
    t = th.tensor([[0.0, 0.3]])
    embedding = TimestepEmbedding(8)(t)
    expected = [np.cos(0.3 * 2**k) for k in range(4)] + [np.sin(0.3 * 2**k) for k in range(4)]
    assert embedding.shape == (1, 2, 8)
    assert np.allclose(embedding[0, 1], expected, atol=1e-6)
    assert th.equal(TimestepEmbedding(0)(t), t.unsqueeze(-1))
    for dim in (-2, 3):
        with pytest.raises(ValueError, match="timestep_embedding_dim"):
            TimestepEmbedding(dim)


def make_network(features_dim=6, action_dim=3, net_arch=(16, 16), **kwargs):
    return FlowNetwork(features_dim, action_dim, list(net_arch), output_scale=0.7, **kwargs)


@pytest.mark.parametrize("net_arch", [[], [16], [16, 8]])
@pytest.mark.parametrize("embedding_dim", [0, 8])
@pytest.mark.parametrize("skip_connection", [False, True])
def test_folded_network_equals_plain_one(net_arch, embedding_dim, skip_connection):
    network = make_network(net_arch=net_arch, timestep_embedding_dim=embedding_dim, skip_connection=skip_connection)
    features, x, t = th.randn(10, 6, requires_grad=True), th.randn(10, 4, 3), th.rand(10, 4)
    inputs = [features, *network.parameters()]
    folded, plain = network(features, x, t), network.forward_plain(features, x, t)
    assert folded.shape == (10, 4, 3)
    assert th.allclose(folded, plain, atol=1e-5)
    weights = th.randn_like(plain)
    for gradient, expected in zip(
        th.autograd.grad((folded * weights).sum(), inputs), th.autograd.grad((plain * weights).sum(), inputs), strict=True
    ):
        assert th.allclose(gradient, expected, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("n_flow_steps", [1, 3, 10])
@pytest.mark.parametrize("skip_connection", [False, True])
def test_folded_sampler_equals_plain_loop(prediction_type, n_flow_steps, skip_connection):
    network = make_network(prediction_type=prediction_type, skip_connection=skip_connection)
    features, noise = th.randn(10, 6), th.randn(10, 3)
    x = noise
    for k in range(n_flow_steps):
        t = float(np.clip(1 - k / n_flow_steps, *timestep_range(prediction_type)))
        output = network.forward_plain(features, x.unsqueeze(1), th.full((10, 1), t)).squeeze(1)
        x = x - to_velocity(output, x, t, prediction_type) / n_flow_steps
    with th.no_grad():
        field = network.velocity_field(features, n_flow_steps)
        fast = integrate("euler", field, noise, n_flow_steps, 0.0)
    # Noise networks divide by a small number
    assert th.allclose(fast, x, atol=1e-5, rtol=1e-5)
    # Any other time is possible too
    off_grid = network.forward_plain(features, noise.unsqueeze(1), th.full((10, 1), 0.123)).squeeze(1)
    assert th.allclose(field(noise, 0.123), to_velocity(off_grid, noise, 0.123, prediction_type), atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("net_arch", "activation_fn"),
    [
        ([], nn.SiLU),
        ([8], nn.ELU),
        ([16, 8, 8], nn.SiLU),
        ([8, 8], nn.ReLU),
        ([8, 8], nn.Tanh),
        ([8, 4], nn.GELU),
        ([8], TanhGELU),
    ],
)
@pytest.mark.parametrize(("embedding_dim", "skip_connection"), [(0, True), (8, False)])
def test_in_place_sampler_equals_plain_one(prediction_type, net_arch, activation_fn, embedding_dim, skip_connection):
    network = make_network(
        net_arch=net_arch,
        activation_fn=activation_fn,
        timestep_embedding_dim=embedding_dim,
        skip_connection=skip_connection,
        prediction_type=prediction_type,
    )
    for batch_size in (7, 7, 1, 12):
        features, noise = th.randn(batch_size, 6), th.randn(batch_size, 3)
        plain = network.sample(features, noise, 4)
        assert plain.requires_grad
        before = noise.clone()
        with th.no_grad():
            fast = network.sample(features, noise, 4)
        assert th.allclose(fast, plain, atol=1e-4, rtol=1e-4) and th.equal(noise, before)
        # An ordinary tensor, which can take part in a loss, and which the next call leaves alone
        kept = fast.clone()
        (network.input_layer.weight.sum() * fast).sum().backward()
        with th.no_grad():
            network.sample(features, noise + 1, 4)
        assert th.equal(fast, kept)


def test_in_place_sampler_follows_the_weights():
    """What was prepared is forgotten when a weight changes, whatever changes it."""
    network = make_network()
    features, noise = th.randn(7, 6), th.randn(7, 3)
    optimizer = th.optim.Adam(network.parameters(), lr=0.1)

    def step():
        network.sample(features, noise, 4).sum().backward()
        optimizer.step()

    def replace():
        network.layers[-1] = nn.Linear(*reversed(network.layers[-1].weight.shape))
        network.train(False)

    def behind_the_back():
        for parameter in network.parameters():
            parameter.data.mul_(1.5)
        network.train(False)

    changes = [
        step,
        lambda: network.load_state_dict(make_network().state_dict()),
        lambda: nn.utils.vector_to_parameters(th.randn(sum(p.numel() for p in network.parameters())), network.parameters()),
        lambda: network.double().float(),
        replace,
        behind_the_back,
    ]
    for change in changes:
        with th.no_grad():
            old = network.sample(features, noise, 4)
        change()
        with th.no_grad():
            new = network.sample(features, noise, 4)
        assert th.allclose(new, network.sample(features, noise, 4), atol=1e-4, rtol=1e-4)
        assert change is changes[3] or not th.allclose(new, old, atol=1e-3)
    # A copy has nothing prepared
    other = copy.deepcopy(network)
    with th.no_grad():
        other.input_layer.weight.mul_(2)
        assert not th.allclose(other.sample(features, noise, 4), network.sample(features, noise, 4))
    pickle.loads(pickle.dumps(network))


def test_gradient_flows_through_the_sampler():
    network = make_network()
    features, noise = th.randn(10, 6), th.randn(10, 3)
    network.sample(features, noise, 5).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_euler_on_a_known_field():
    """dx/dt = x from t = 1 to 0 multiplies by (1 - 1/K)^K; a straight path is integrated exactly."""
    x = th.tensor([[2.0]])
    assert integrate("euler", lambda x, t: x, x, 4, 0.0).item() == pytest.approx(2 * 0.75**4)
    assert integrate("euler", lambda x, t: th.full_like(x, 3.0), x, 7, 0.0).item() == pytest.approx(-1.0)
    # The velocity of the last step is that at t = 1/K
    times = []
    integrate("euler", lambda x, t: times.append(t) or x, x, 4, 0.0)
    assert times == [1.0, 0.75, 0.5, 0.25]


def test_stochastic_euler():
    """Without a drift, K steps of noise sigma add a variance of K sigma^2; without noise it is Euler's method."""
    th.manual_seed(0)
    samples = integrate("sde", lambda x, t: th.zeros_like(x), th.zeros(20000, 1), 9, 0.2)
    assert samples.mean().item() == pytest.approx(0, abs=0.02)
    assert samples.std().item() == pytest.approx(0.6, rel=0.03)
    x = th.randn(5, 2)
    assert th.equal(integrate("sde", lambda x, t: x, x, 9, 0.0), integrate("euler", lambda x, t: x, x, 9, 0.0))


@pytest.mark.parametrize(
    ("prediction_type", "skip_connection"), [("velocity", False), ("noise", False), ("action", False), ("velocity", True)]
)
def test_flow_learns_a_mixture(prediction_type, skip_connection):
    """Plain CFM regression on a mixture of two Gaussians in 2-D reproduces its modes and their weights."""
    th.manual_seed(0)
    means, std, weight = th.tensor([[-1.0, 0.5], [1.0, -0.5]]), 0.15, 0.3
    network = FlowNetwork(1, 2, [64, 64], nn.SiLU, skip_connection=skip_connection, prediction_type=prediction_type)
    optimizer = th.optim.Adam(network.parameters(), lr=3e-3)
    scheduler = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    features = th.zeros(1, 1)
    for _ in range(1500):
        mode = (th.rand(1024) > weight).long()
        actions = means[mode] + std * th.randn(1024, 2)
        loss = CFMLoss("velocity", "mean", "uniform", "independent")
        noise, t, _ = (x.squeeze(1) for x in draw_pairs((1024, 1, 2), loss, prediction_type))
        output = network(features, interpolate(actions, noise, t).unsqueeze(0), t.unsqueeze(0)).squeeze(0)
        loss = cfm_loss(output, actions, noise, t, prediction_type, prediction_type).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    with th.no_grad():
        field = network.velocity_field(th.zeros(20000, 1), 50)
        samples = integrate("euler", field, th.randn(20000, 2), 50, 0.0)
    distances = th.cdist(samples, means)
    closest = distances.argmin(dim=1)
    assert (closest == 0).float().mean().item() == pytest.approx(weight, abs=0.05)
    for mode in (0, 1):
        in_mode = samples[closest == mode]
        assert th.allclose(in_mode.mean(dim=0), means[mode], atol=0.1)
        assert th.allclose(in_mode.std(dim=0), th.full((2,), std), atol=0.1)
    # Hardly anything in between
    assert (distances.min(dim=1).values > 5 * std).float().mean() < 0.05


@pytest.mark.parametrize("n_times", [1, 2, 6])
@pytest.mark.parametrize("skip_connection", [True, False])
def test_points_that_share_their_timesteps(n_times, skip_connection):
    """Timesteps of the first points hold for the next ones too: output and gradients of the network, written plainly."""
    th.manual_seed(0)
    network = FlowNetwork(4, 2, [6, 5], output_scale=3.0, skip_connection=skip_connection).double()
    inputs = [th.rand(shape, dtype=th.float64, requires_grad=True) for shape in ((5, 4), (5, 6, 2), (5, n_times))]
    features, x, timesteps = inputs
    repeated = th.cat([timesteps] * (6 // n_times), dim=1)
    expected = network.forward_plain(features, x, repeated)
    weights, wanted = th.randn_like(expected), [*inputs, *network.parameters()]
    gradients = th.autograd.grad(expected, wanted, weights)
    for output in (network(*inputs), network.forward_plain(*inputs), network(features, x, repeated)):
        th.testing.assert_close(output, expected)
        th.testing.assert_close(th.autograd.grad(output, wanted, weights), gradients)
