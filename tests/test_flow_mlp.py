"""The derivative that is written by hand is the one of autograd, and updates with it are those without."""

from functools import partial

import gymnasium as gym
import pytest
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_flow import FPO
from sb3_flow.common import networks
from sb3_flow.common.flow_mlp import WITH_DERIVATIVE, flow_mlp
from sb3_flow.common.networks import FlowNetwork
from sb3_flow.common.optimizers import clip_grad_norm

FEATURES_DIM, ACTION_DIM = 4, 2


def make_network(activation_fn=nn.SiLU, net_arch=(6, 5), **kwargs) -> FlowNetwork:
    th.manual_seed(0)
    kwargs = dict(skip_connection=True, output_scale=3.0, timestep_embedding_dim=4) | kwargs
    return FlowNetwork(FEATURES_DIM, ACTION_DIM, list(net_arch), activation_fn, **kwargs).double()


def make_inputs(n=6, n_times=6, batch_size=5) -> tuple[th.Tensor, ...]:
    shapes = (batch_size, FEATURES_DIM), (batch_size, n, ACTION_DIM), (batch_size, n_times)
    return tuple(th.rand(shape, dtype=th.float64, requires_grad=True) for shape in shapes)


@pytest.fixture
def calls(monkeypatch):
    """The calls of what is written by hand."""
    found = []

    def recorder(*args):
        found.append(args)
        return flow_mlp(*args)

    monkeypatch.setattr(networks, "flow_mlp", recorder)
    return found


@pytest.mark.parametrize("n_times", [1, 2, 6])
@pytest.mark.parametrize("net_arch", [(6,), (6, 5), (5, 6, 7)])
@pytest.mark.parametrize("activation_fn", WITH_DERIVATIVE)
def test_like_autograd(activation_fn, net_arch, n_times, calls):
    network, inputs = make_network(activation_fn, net_arch), make_inputs(n_times=n_times)
    wanted = [*inputs, *network.parameters()]
    expected, output = network.forward_plain(*inputs), network(*inputs)
    assert len(calls) == 1
    th.testing.assert_close(output, expected)
    weights = th.randn_like(output)
    gradients = th.autograd.grad(expected, wanted, weights)
    # As often as it is asked for
    for _ in range(2):
        th.testing.assert_close(th.autograd.grad(output, wanted, weights, retain_graph=True), gradients)
    # The same numbers without a graph: the first ratio of FPO is exactly one
    with th.no_grad():
        assert th.equal(network(*inputs), output)


@pytest.mark.parametrize("activation_fn", [nn.SiLU, nn.Tanh])
def test_derivatives_by_differences(activation_fn):
    network, inputs = make_network(activation_fn), make_inputs(n=2, n_times=1, batch_size=2)
    names = [name for name, _ in network.named_parameters()]

    def function(features, x, timesteps, *parameters):
        return th.func.functional_call(network, dict(zip(names, parameters, strict=True)), (features, x, timesteps))

    arguments = (*inputs, *network.parameters())
    assert th.autograd.gradcheck(function, arguments)
    # With a graph of the derivative
    assert th.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("activation_fn", WITH_DERIVATIVE)
def test_extreme_values(activation_fn):
    x = th.tensor([0.0, 1e-30, 20.0, 100.0, 1e8, 1e30])
    x = th.cat([x, -x])
    value, derivative = x.clone(), WITH_DERIVATIVE[activation_fn](result := x.clone(), True)
    value.requires_grad_()
    activation_fn()(value).sum().backward()
    th.testing.assert_close(result, activation_fn()(x))
    th.testing.assert_close(derivative, value.grad, rtol=1e-5, atol=1e-7)


def test_frozen_layers():
    network, inputs = make_network(), [x.detach() for x in make_inputs()]
    network.input_layer.weight.requires_grad_(False)
    network.layers[1].bias.requires_grad_(False)
    network(*inputs).sum().backward()
    frozen = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert frozen == {"input_layer.weight", "layers.1.bias"}


def test_weights_that_change_before_the_derivative():
    """... are an error, as they are for any module."""
    network = make_network()
    output = network(*make_inputs())
    with th.no_grad():
        network.layers[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class Doubled(nn.SiLU):
    def forward(self, x):
        return 2 * super().forward(x)


def with_hook(network):
    network.layers[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def with_backward_hook(network):
    network.layers[1].register_full_backward_hook(lambda module, grad_input, grad_output: (2 * grad_input[0],))


def with_subclass(network):
    network.layers[0] = Doubled()


def with_weight_norm(network):
    nn.utils.parametrizations.weight_norm(network.layers[1])


def without_bias(network):
    network.layers[1].bias = None


@pytest.mark.parametrize("change", [with_hook, with_backward_hook, with_subclass, with_weight_norm, without_bias])
def test_not_taken(change, calls):
    """What is not plain is called as it is."""
    network, inputs = make_network(), make_inputs()
    change(network)
    output, expected = network(*inputs), network.forward_plain(*inputs)
    assert not calls
    th.testing.assert_close(output, expected)
    for result in (output, expected):
        result.sum().backward(inputs=inputs[1])
    with th.autocast("cpu", dtype=th.bfloat16):
        network(*inputs)
    assert not calls


def trained(**kwargs) -> list[th.Tensor]:
    env = DummyVecEnv([partial(gym.make, "Pendulum-v1")] * 2)
    kwargs = dict(
        n_steps=64, batch_size=32, n_epochs=2, supervision="elbo", loss_reduction="sum", ratio_type="per_sample",
        mc_sampling="stratified", timestep_distribution="importance", n_mc_samples=4, n_baseline_actions=2, log_ratio_clip=0.5,
        ent_coef=0.02, bounds_loss_coef=0.3, seed=0, device="cpu",
    ) | kwargs  # fmt: skip
    model = FPO("MlpPolicy", env, policy_kwargs=dict(skip_connection=True, output_scale=4.0), **kwargs)
    model.learn(128)
    return [parameter.detach().clone() for parameter in model.policy.parameters()]


@pytest.mark.parametrize("kwargs", [{}, dict(n_baseline_actions=0, ratio_type="averaged", trust_region="aspo")])
def test_training_is_the_same(kwargs, monkeypatch, calls):
    by_hand = trained(**kwargs)
    assert calls
    monkeypatch.setattr(networks, "WITH_DERIVATIVE", {})
    calls.clear()
    plain = trained(**kwargs)
    assert not calls
    for weights, expected in zip(by_hand, plain, strict=True):
        th.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.1, 1e3, float("inf")])
@pytest.mark.parametrize("other", [lambda x: None, lambda x: x.double()])
def test_clip_grad_norm(max_norm, other):
    """PyTorch's, also of parameters without gradient or in several precisions."""
    results = []
    for clip in (clip_grad_norm, nn.utils.clip_grad_norm_):
        th.manual_seed(0)
        parameters = [nn.Parameter(th.zeros(3, 2)), nn.Parameter(th.zeros(4))]
        for parameter in parameters:
            parameter.grad = th.randn_like(parameter)
        extra = other(th.ones(2))
        if extra is not None:
            parameters.append(nn.Parameter(th.zeros_like(extra)))
            parameters[-1].grad = extra
        norm = clip(iter([*parameters, nn.Parameter(th.zeros(1))]), max_norm)
        results.append([norm, *(parameter.grad for parameter in parameters)])
    th.testing.assert_close(*results)
    assert clip_grad_norm([nn.Parameter(th.zeros(1))], max_norm) == 0
