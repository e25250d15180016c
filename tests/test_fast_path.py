"""What is computed in fewer calls is what the modules compute, called one after the other, or it is not taken."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cloudpickle
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm

from sb3_flow.common.activations import ELEMENTWISE, FEW_ELEMENTS, TanhGELU
from sb3_flow.common.flow import (
    PREDICTION_TYPES,
    sampler_grid,
    standard_normal_flow,
    standard_normal_std,
    timestep_range,
    to_velocity,
)
from sb3_flow.common.in_place import EulerIntegrator
from sb3_flow.common.networks import LARGEST_KEPT_BATCH, EnsembleMLP, FlowNetwork
from sb3_flow.common.samplers import integrate, unit_variance_field
from sb3_flow.fpo import MlpPolicy
from sb3_flow.fql import MlpPolicy as FQLMlpPolicy

OBS_DIM, ACTION_DIM = 4, 2
TOLERANCE = {th.float32: dict(rtol=1e-4, atol=2e-5), th.float64: dict(rtol=1e-9, atol=1e-10)}


class UnitsTogether(nn.Module):
    """Normalises over the units, which are the last dimension."""

    def forward(self, x):
        return x / (1 + x.norm(dim=-1, keepdim=True))


class Sine(nn.Module):
    """Elementwise, but nobody knows."""

    def forward(self, x):
        return x.sin()


class Counting(nn.Module):
    """With a state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", th.tensor(0.3))

    def forward(self, x):
        return (x + self.shift).tanh()


class LoudSiLU(nn.SiLU):
    def forward(self, x):
        return 2 * super().forward(x)


KNOWN = [
    *(kind for kind in ELEMENTWISE if kind is not nn.Threshold),
    partial(nn.Threshold, 0.1, -0.2),
    partial(nn.LeakyReLU, 0.3),
    partial(nn.ELU, 0.7),
    partial(nn.GELU, "tanh"),
    partial(nn.SiLU, True),
    partial(nn.Hardtanh, -0.5, 0.5),
]
UNKNOWN = [
    UnitsTogether,
    Sine,
    Counting,
    LoudSiLU,
    nn.PReLU,
    nn.RReLU,
    nn.Dropout,
    partial(nn.Softmax, dim=1),
    partial(nn.Softmax, dim=-1),
    partial(nn.LayerNorm, 6),
    partial(nn.BatchNorm1d, 6),
    lambda: nn.Sequential(nn.LayerNorm(6), nn.SiLU()),
]


def randomize(module: nn.Module, generator: np.random.Generator) -> None:
    with th.no_grad():
        for parameter in module.parameters():
            parameter.copy_(th.as_tensor(generator.normal(0, 0.5, parameter.shape)))


def find_all(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [child for child in module.modules() if type(child) is kind]


# --- Ways to change the values of weights


def in_place(module, rng):
    randomize(module, rng)


def behind_autograd(module, rng):
    for parameter in module.parameters():
        parameter.data.mul_(-0.7)


def other_storage(module, rng):
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.6


def through_numpy(module, rng):
    for parameter in module.parameters():
        parameter.detach().numpy()[...] *= 0.8


def same_vector_twice(module, rng):
    """As ``load_from_vector`` does it, which lets parameters share the memory of its argument."""
    parameters = list(module.parameters())
    vector = th.cat([parameter.detach().flatten() for parameter in parameters]).clone()
    nn.utils.vector_to_parameters(vector, parameters)
    module(*module.example)
    vector.mul_(-0.9)
    nn.utils.vector_to_parameters(vector, parameters)


def assign(module, rng):
    module.load_state_dict({name: 0.5 * value for name, value in module.state_dict().items()}, assign=True)


def there_and_back(module, rng):
    dtype = next(module.parameters(), th.zeros(())).dtype
    module.half().to(dtype)


def in_inference_mode(module, rng):
    with th.inference_mode():
        randomize(module, rng)


CHANGES = [
    in_place,
    behind_autograd,
    other_storage,
    through_numpy,
    assign,
    there_and_back,
    in_inference_mode,
    same_vector_twice,
]

# --- Ways to change what a layer computes, each undone by what it returns


def hook(layer):
    return layer.register_forward_hook(lambda module, inputs, output: 1.5 * output).remove


def pre_hook(layer):
    return layer.register_forward_pre_hook(lambda module, inputs: (0.5 * inputs[0],)).remove


def backward_hook(layer):
    return layer.register_full_backward_hook(lambda module, grad_input, grad_output: None).remove


def global_hook(layer):
    return nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 2 * output if module is layer else output
    ).remove


def own_forward(layer):
    plain = layer.forward
    layer.forward = lambda x: plain(x) - 0.1

    def undo():
        del layer.forward

    return undo


def other_class(layer):
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.2

    layer.__class__ = Shifted
    return lambda: setattr(layer, "__class__", nn.Linear)


def patched_class(layer):
    plain = nn.Linear.forward
    nn.Linear.forward = lambda self, x: plain(self, x) + 0.3 * (self is layer)
    return lambda: setattr(nn.Linear, "forward", plain)


def parametrized(layer):
    parametrizations.weight_norm(layer)
    with th.no_grad():
        layer.parametrizations.weight.original0.mul_(1.7)
    return lambda: nn.utils.parametrize.remove_parametrizations(layer, "weight")


def with_old_weight_norm(layer):
    old_weight_norm(layer)
    with th.no_grad():
        layer.weight_g.mul_(1.7)
    return lambda: nn.utils.remove_weight_norm(layer)


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    return lambda: prune.remove(layer, "weight")


def without_bias(layer):
    bias, layer.bias = layer.bias, None
    return lambda: setattr(layer, "bias", bias)


def another_parameter(layer):
    weight, layer.weight = layer.weight, nn.Parameter(0.3 * layer.weight.detach())
    return lambda: setattr(layer, "weight", weight)


def tensor_in_place_of_parameter(layer):
    weight = layer.weight
    del layer.weight
    layer.weight = 0.4 * weight.detach()

    def undo():
        del layer.weight
        layer.weight = weight

    return undo


def hidden_parameter(layer):
    layer.__dict__["weight"] = 0.4 * layer.weight.detach()

    def undo():
        del layer.__dict__["weight"]

    return undo


INTERVENTIONS = [
    hook, pre_hook, backward_hook, global_hook, own_forward, other_class, patched_class, parametrized, with_old_weight_norm,
    pruned, without_bias, another_parameter, tensor_in_place_of_parameter, hidden_parameter,
]  # fmt: skip

# --- The flow network


def plain_sample(
    network: FlowNetwork, features: th.Tensor, noise: th.Tensor, n_flow_steps: int, factor: float = 1.0
) -> th.Tensor:
    """Euler's method, with the network called as any module is, one point at a time."""
    x, kind = noise, network.prediction_type
    for time in sampler_grid(n_flow_steps):
        t = float(np.clip(time, *timestep_range(kind)))
        output = factor * network.forward_plain(features, x.unsqueeze(1), th.full((len(x), 1), t, dtype=x.dtype)).squeeze(1)
        velocity = to_velocity(output, x, t, kind)
        if network.skip_connection:
            # What it adds to the velocity is integrated exactly
            x = x - (velocity - standard_normal_flow(t, "velocity") * x) / n_flow_steps
            x = x * standard_normal_std(time - 1 / n_flow_steps) / standard_normal_std(time)
        else:
            x = x - velocity / n_flow_steps
    return x


def has_memory(network: FlowNetwork) -> bool:
    return any(isinstance(value, EulerIntegrator) for value in network._memory.values())


flow_networks = st.fixed_dictionaries(
    dict(
        # Of the units that the normalising ones are made for
        net_arch=st.sampled_from([[], [6], [6, 6], [6, 6, 6]]),
        activation_fn=st.sampled_from(KNOWN) | st.sampled_from(UNKNOWN),
        timestep_embedding_dim=st.sampled_from([0, 2, 8]),
        output_scale=st.sampled_from([1.0, 0.25]),
        skip_connection=st.booleans(),
        prediction_type=st.sampled_from(PREDICTION_TYPES),
    )
)


@settings(max_examples=100, deadline=None)
@given(
    kwargs=flow_networks,
    batch_size=st.sampled_from([1, 2, 16, 33]),
    n_flow_steps=st.integers(1, 4),
    dtype=st.sampled_from([th.float32, th.float64]),
    mode=st.sampled_from([th.no_grad, th.inference_mode, th.enable_grad]),
    training=st.booleans(),
    change=st.sampled_from(CHANGES),
    intervention=st.sampled_from(INTERVENTIONS),
    which=st.integers(0, 10),
    seed=st.integers(0, 2**16),
)
def test_sample_is_the_plain_loop(kwargs, batch_size, n_flow_steps, dtype, mode, training, change, intervention, which, seed):
    """Whatever the layers are, and whatever happens to them between two calls."""
    rng = np.random.default_rng(seed)
    th.manual_seed(seed)
    network = FlowNetwork(OBS_DIM, ACTION_DIM, **kwargs).to(dtype)
    randomize(network, rng)
    features, noise = (th.as_tensor(rng.normal(size=(batch_size, dim))).to(dtype) for dim in (OBS_DIM, ACTION_DIM))
    points, times = th.as_tensor(rng.normal(size=(batch_size, 3, ACTION_DIM))).to(dtype), th.full(
        (batch_size, 3), 0.4, dtype=dtype
    )
    network.example = features, points, times
    is_random = any(isinstance(module, (nn.Dropout, nn.RReLU, nn.BatchNorm1d)) for module in network.modules())
    network.train(training and not is_random)

    def check():
        with mode():
            actual = network.sample(features, noise, n_flow_steps)
            expected = plain_sample(network, features, noise, n_flow_steps)
            th.testing.assert_close(actual, expected, **TOLERANCE[dtype])
            th.testing.assert_close(network(*network.example), network.forward_plain(*network.example), **TOLERANCE[dtype])
            # Other samplers go through the velocity field
            field = network.velocity_field(features, n_flow_steps)
            field = unit_variance_field(field, network.prediction_type) if network.skip_connection else field
            th.testing.assert_close(integrate("euler", field, noise, n_flow_steps), expected, **TOLERANCE[dtype])
        return actual

    before = check()
    change(network, rng)
    if kwargs["net_arch"] and change is not there_and_back:
        assert not th.equal(before, check())
    check()
    if in_inference_mode is change:
        return
    linears = find_all(network, nn.Linear)
    undo = intervention(linears[which % len(linears)])
    check()
    undo()
    together = check()
    # What is sampled alone is what is sampled in a batch
    with mode():
        alone = network.sample(features[:1], noise[:1], n_flow_steps)
    th.testing.assert_close(alone, together[:1], **TOLERANCE[dtype])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_intervention_between_two_calls(intervention, layer):
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [6, 6])
    features, noise = th.randn(5, OBS_DIM), th.randn(5, ACTION_DIM)
    with th.no_grad():
        before = network.sample(features, noise, 3)
        assert has_memory(network)
        undo = intervention(find_all(network, nn.Linear)[layer])
        actual = network.sample(features, noise, 3)
        assert intervention is backward_hook or not th.allclose(actual, before, atol=1e-4)
        th.testing.assert_close(actual, plain_sample(network, features, noise, 3), **TOLERANCE[th.float32])
        undo()
        th.testing.assert_close(
            network.sample(features, noise, 3), plain_sample(network, features, noise, 3), **TOLERANCE[th.float32]
        )


@settings(max_examples=30, deadline=None)
@given(
    kwargs=flow_networks,
    target=st.sampled_from(["network", "layers", "timestep_embedding", "activation"]),
    mode=st.sampled_from([th.no_grad, th.inference_mode, th.enable_grad]),
)
def test_hooks_on_whatever_there_is(kwargs, target, mode):
    network = FlowNetwork(OBS_DIM, ACTION_DIM, **kwargs).eval()
    if target == "activation" and not kwargs["net_arch"]:
        return
    module = network if target == "network" else network.layers[0] if target == "activation" else getattr(network, target)
    features, noise = th.randn(5, OBS_DIM), th.randn(5, ACTION_DIM)
    with mode():
        network.sample(features, noise, 3)
        calls = []
        handle = module.register_forward_hook(lambda module, inputs, output: calls.append(1) or 1.5 * output)
        actual = network.sample(features, noise, 3)
        assert len(calls) == 3
        expected = plain_sample(network, features, noise, 3, factor=1.5 if target == "network" else 1.0)
        th.testing.assert_close(actual, expected, **TOLERANCE[th.float32])
        handle.remove()
        th.testing.assert_close(
            network.sample(features, noise, 3), plain_sample(network, features, noise, 3), rtol=1e-4, atol=2e-5
        )


@pytest.mark.parametrize("activation_fn", KNOWN)
def test_the_fast_path_is_taken(activation_fn):
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [6, 5], activation_fn)
    features, noise = th.randn(5, OBS_DIM), th.randn(5, ACTION_DIM)
    network.sample(features, noise, 3)
    assert not has_memory(network)
    with th.no_grad():
        network.sample(features, noise, 3)
    assert has_memory(network)


@pytest.mark.parametrize("activation_fn", UNKNOWN)
def test_the_fast_path_is_not_taken(activation_fn):
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [6, 6], activation_fn).eval()
    with th.no_grad():
        network.sample(th.randn(5, OBS_DIM), th.randn(5, ACTION_DIM), 3)
    assert not has_memory(network)


def test_elementwise():
    """Each output depends on one input, and on nothing else."""
    x = th.randn(3, 7)
    for activation_fn in KNOWN:
        activation = activation_fn()
        assert not list(activation.parameters()) and not list(activation.buffers())
        expected = th.stack([activation(value.clone().view(1)) for value in x.flatten()]).view(x.shape)
        for shape in ((3, 7), (7, 3), (21,), (3, 1, 7)):
            inputs = x.clone().view(shape)
            th.testing.assert_close(activation(inputs).view(x.shape), expected)
        write = ELEMENTWISE[type(activation)]
        if write is not None:
            inputs = x.clone()
            assert write(inputs) is inputs
            th.testing.assert_close(inputs, expected)


class DoubledNetwork(FlowNetwork):
    def forward(self, features, x, timesteps):
        return 2 * super().forward(features, x, timesteps)


def test_subclass_of_the_network():
    network = DoubledNetwork(OBS_DIM, ACTION_DIM, [8])
    features, noise = th.randn(5, OBS_DIM), th.randn(5, ACTION_DIM)
    for mode in (th.no_grad, th.enable_grad):
        with mode():
            th.testing.assert_close(network.sample(features, noise, 3), plain_sample(network, features, noise, 3, factor=2.0))


def test_no_observations():
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [8])
    for mode in (th.no_grad, th.enable_grad):
        with mode():
            assert network.sample(th.zeros(0, OBS_DIM), th.zeros(0, ACTION_DIM), 3).shape == (0, ACTION_DIM)


def test_inputs_of_another_precision_are_refused():
    """As modules refuse them."""
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [8, 8])
    with th.no_grad():
        network.sample(th.zeros(2, OBS_DIM), th.zeros(2, ACTION_DIM), 3)
        network.layers[1].double()
        with pytest.raises(RuntimeError, match="dtype"):
            network.sample(th.zeros(2, OBS_DIM), th.zeros(2, ACTION_DIM), 3)


def test_autocast():
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [32, 32])
    features, noise = th.randn(5, OBS_DIM), th.randn(5, ACTION_DIM)
    with th.no_grad():
        full = network.sample(features, noise, 3)
        with th.autocast("cpu", th.bfloat16):
            field = network.velocity_field(features, 3)
            actual, expected = network.sample(features, noise, 3), integrate("euler", field, noise, 3)
    assert th.equal(actual, expected) and not th.equal(actual, full)


def test_function_transforms():
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [8, 8], TanhGELU)
    features, noise = th.randn(6, OBS_DIM), th.randn(6, ACTION_DIM)
    with th.no_grad():
        expected = network.sample(features, noise, 3)
        batched = th.vmap(lambda f, x: network.sample(f, x, 3))(features.view(2, 3, -1), noise.view(2, 3, -1))
        th.testing.assert_close(batched.view(6, -1), expected)
        # Forward-mode derivative: that of the noise
        tangent = th.randn_like(noise)
        _, derivative = th.func.jvp(lambda x: network.sample(features, x, 3), (noise,), (tangent,))
    step = 1e-3
    difference = (
        network.sample(features, noise + step * tangent, 3) - network.sample(features, noise - step * tangent, 3)
    ) / (2 * step)
    th.testing.assert_close(derivative, difference, rtol=1e-2, atol=1e-2)


def test_threads_do_not_disturb_each_other():
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [32, 32])
    inputs = [(th.randn(16, OBS_DIM), th.randn(16, ACTION_DIM)) for _ in range(8)]

    def sample(pair):
        with th.no_grad():
            return [network.sample(*pair, 5) for _ in range(50)]

    expected = [sample(pair)[0] for pair in inputs]
    with ThreadPoolExecutor(8) as pool:
        for results, value in zip(pool.map(sample, inputs), expected, strict=True):
            assert all(th.equal(result, value) for result in results)


def test_copies_have_memory_of_their_own():
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [8])
    features, noise = th.randn(5, OBS_DIM), th.randn(5, ACTION_DIM)
    with th.no_grad():
        expected = network.sample(features, noise, 3)
        for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert not copied._memory
            assert th.equal(copied.sample(features, noise, 3), expected)
            copied.input_layer.weight.mul_(2)
            assert not th.allclose(copied.sample(features, noise, 3), expected)


# --- The value network, and what there is between features and networks


def make_policy(policy_class=MlpPolicy, obs_dim=OBS_DIM, **kwargs):
    kwargs = dict(net_arch=dict(pi=[6], vf=[6, 6]), n_flow_steps=3) | kwargs
    if issubclass(policy_class, MlpPolicy):
        # (what is compared draws no noise)
        kwargs = dict(action_perturbation_std=0.0) | kwargs
    policy = policy_class(spaces.Box(-1, 1, (obs_dim,)), spaces.Box(-1, 1, (ACTION_DIM,)), lambda _: 1e-3, **kwargs)
    policy.set_training_mode(False)
    return policy


def check_values(policy, obs_dim=OBS_DIM) -> th.Tensor:
    """Rollouts, ``predict_values`` and updates have the same value, of one observation or many."""
    obs = th.randn(9, obs_dim, generator=th.Generator().manual_seed(0))
    actions, timesteps = th.zeros(9, 1, ACTION_DIM), th.full((9, 1), 0.5)
    in_training, _ = policy.evaluate_flow(obs, actions, timesteps)
    for mode in (th.no_grad, th.inference_mode):
        with mode():
            _, in_rollout, _ = policy(obs)
            _, alone, _ = policy(obs[:1])
            th.testing.assert_close(in_rollout, in_training, rtol=1e-5, atol=1e-5)
            th.testing.assert_close(policy.predict_values(obs), in_training, rtol=1e-5, atol=1e-5)
            th.testing.assert_close(alone, in_training[:1], rtol=1e-5, atol=1e-5)
    th.testing.assert_close(policy.predict_values(obs), in_training, rtol=1e-5, atol=1e-5)
    return in_training.detach()


def check_actions(policy, obs_dim=OBS_DIM) -> np.ndarray:
    """Rollouts and predictions come from the same flow, from one observation or many."""
    obs = th.randn(9, obs_dim, generator=th.Generator().manual_seed(0))
    predicted, _ = policy.predict(obs.numpy(), deterministic=True)
    alone, _ = policy.predict(obs[0].numpy(), deterministic=True)
    raw = policy(obs, deterministic=True)[0].detach()
    with th.no_grad():
        th.testing.assert_close(policy(obs, deterministic=True)[0], raw, rtol=1e-5, atol=1e-5)
        explored = policy.explore(obs, th.zeros(9, 2, ACTION_DIM))
    assert np.allclose(policy.unscale_action(raw.numpy()), predicted, atol=1e-5) and np.allclose(
        alone, predicted[0], atol=1e-5
    )
    th.testing.assert_close(explored, raw.unsqueeze(1).expand(-1, 2, -1), rtol=1e-5, atol=1e-5)
    return predicted


@settings(max_examples=40, deadline=None)
@given(
    activation_fn=st.sampled_from(KNOWN) | st.sampled_from(UNKNOWN),
    vf=st.sampled_from([[], [6], [6, 6]]),
    share=st.booleans(),
    change=st.sampled_from([change for change in CHANGES if change is not same_vector_twice]),
    intervention=st.sampled_from(INTERVENTIONS),
    which=st.integers(0, 10),
    seed=st.integers(0, 2**16),
)
def test_values_are_the_same_everywhere(activation_fn, vf, share, change, intervention, which, seed):
    rng = np.random.default_rng(seed)
    kwargs = dict(features_extractor_class=LearnedExtractor, share_features_extractor=share)
    policy = make_policy(net_arch=dict(pi=[6], vf=vf), activation_fn=activation_fn, **kwargs)
    # (also the last bias: units may be dead)
    for module in (policy.mlp_extractor, policy.value_net):
        randomize(module, rng)
    before = check_values(policy)
    for module in (policy.mlp_extractor, policy.value_net):
        change(module, rng)
    if change is not there_and_back:
        assert not th.equal(check_values(policy), before)
    check_values(policy)
    if change is in_inference_mode:
        return
    linears = [*find_all(policy.mlp_extractor, nn.Linear), policy.value_net]
    undo = intervention(linears[which % len(linears)])
    check_values(policy)
    undo()
    check_values(policy)
    check_actions(policy)


class LearnedExtractor(FlattenExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.linear = nn.Linear(OBS_DIM, OBS_DIM)

    def forward(self, observations):
        return self.linear(super().forward(observations)).tanh()


class CustomNetwork(nn.Module):
    """As in SB3's documentation of custom policies."""

    def __init__(self, features_dim, latent_dim_pi=5, latent_dim_vf=7):
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = latent_dim_pi, latent_dim_vf
        self.policy_net = nn.Sequential(nn.Linear(features_dim, latent_dim_pi), nn.ReLU())
        self.value_net = nn.Sequential(nn.Linear(features_dim, latent_dim_vf), nn.ReLU())

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features):
        return self.policy_net(features)

    def forward_critic(self, features):
        return self.value_net(features)


class CustomPolicy(MlpPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = CustomNetwork(self.features_dim)


class Sb3Extractor(MlpPolicy):
    """With SB3's own, whose layers for the actor come before the flow."""

    _build_mlp_extractor = ActorCriticPolicy._build_mlp_extractor


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("policy_class", "latent_dims"), [(CustomPolicy, (5, 7)), (Sb3Extractor, (6, 6))])
def test_custom_mlp_extractor(policy_class, latent_dims, share, ema_decay, tmp_path):
    """SB3's recipe: the networks take what the extractor makes of the features."""
    kwargs = dict(features_extractor_class=LearnedExtractor, share_features_extractor=share, ema_decay=ema_decay)
    policy = make_policy(policy_class, **kwargs)
    assert (policy.action_net.features_dim, policy.value_net.in_features) == latent_dims
    check_values(policy)
    before = check_actions(policy)
    obs = th.randn(9, OBS_DIM)
    # Both parts are trained, and matter to what they are for
    values, outputs = policy.evaluate_flow(obs, th.zeros(9, 1, ACTION_DIM), th.full((9, 1), 0.5))
    (values.sum() + outputs.sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in policy.mlp_extractor.parameters())
    with th.no_grad():
        policy.mlp_extractor.policy_net[0].bias.add_(0.5)
    if ema_decay is not None:
        policy.update_ema(restart=True)
    assert not np.allclose(check_actions(policy), before)
    policy.save(tmp_path / "policy.pth")
    loaded = policy_class.load(tmp_path / "policy.pth", device="cpu")
    assert np.array_equal(check_actions(loaded), check_actions(policy)) and th.equal(
        check_values(loaded), check_values(policy)
    )


def shift(module, inputs, output):
    return tuple(x + 0.7 for x in output) if isinstance(output, tuple) else output + 0.7


def replace_by_another_kind(policy):
    policy.value_net = nn.Bilinear(6, 6, 1)
    policy.value_net.register_forward_pre_hook(lambda module, inputs: inputs * 2)


def replace(*path):
    """:param path: name of what is replaced, and a function of the policy that gives what is there instead"""
    *parents, name, make = path

    def function(policy):
        module = policy
        for parent in parents:
            module = getattr(module, parent)
        setattr(module, name, make(policy))

    return function


def scaled(method):
    return lambda self, features: 2 * method(self, features) + 1


REPLACEMENTS = {
    "value_net": replace("value_net", lambda _: nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 1))),
    "value_net, normalised": replace("value_net", lambda _: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 1))),
    "value_net, of another kind": replace_by_another_kind,
    "value layers": replace("mlp_extractor", "value_net", lambda _: nn.Sequential(nn.Linear(4, 6), nn.Softmax(dim=-1))),
    "one value layer": lambda policy: policy.mlp_extractor.value_net.__setitem__(0, nn.Linear(4, 6)),
    "another value layer": lambda policy: policy.mlp_extractor.value_net.append(nn.Softplus()),
    "extractor": replace("mlp_extractor", lambda _: MlpExtractor(4, dict(pi=[], vf=[5, 6]), nn.ReLU, device="cpu")),
    "custom extractor": replace("mlp_extractor", lambda _: CustomNetwork(4, 4, 6)),
    "hook on the extractor": lambda policy: policy.mlp_extractor.register_forward_hook(shift),
    "hook on the value layers": lambda policy: policy.mlp_extractor.value_net.register_forward_hook(shift),
    "hook on the value net": lambda policy: policy.value_net.register_forward_hook(shift),
    "hook on the features": lambda policy: policy.features_extractor.register_forward_hook(shift),
    "features": replace("features_extractor", lambda policy: LearnedExtractor(policy.observation_space)),
    "compiled": replace("value_net", "_compiled_call_impl", lambda p: lambda x: p.value_net.forward(x) + 0.4),
    "own method for values": replace(
        "mlp_extractor", "forward_critic", lambda p: partial(scaled(MlpExtractor.forward_critic), p.mlp_extractor)
    ),
    "own method": replace(
        "mlp_extractor", "forward", lambda p: lambda features: (features, 2 * p.mlp_extractor.forward_critic(features))
    ),
}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["forward_actor", "forward_critic"])
def test_replaced_method_of_the_class(name, share, monkeypatch):
    """Before and after the first call."""
    policy = make_policy(share_features_extractor=share)
    values, actions = check_values(policy), check_actions(policy)
    with monkeypatch.context() as patch:
        patch.setattr(MlpExtractor, name, scaled(getattr(MlpExtractor, name)))
        assert th.equal(check_values(policy), values) == (name == "forward_actor")
        assert np.array_equal(check_actions(policy), actions) == (name == "forward_critic")
        other = make_policy(share_features_extractor=share)
        other.load_state_dict(policy.state_dict())
        assert th.equal(check_values(other), check_values(policy))
    assert th.equal(check_values(policy), values) and np.array_equal(check_actions(policy), actions)


@pytest.mark.parametrize("name", ["velocity_field", "forward"])
def test_own_method_of_the_flow_network(name):
    policy = make_policy()
    before = check_actions(policy)
    method = getattr(policy.action_net, name)
    fields = dict(
        velocity_field=lambda features, n: lambda x, t: method(features, n)(x, t) + 1,
        forward=lambda *inputs: method(*inputs) + 1,
    )
    setattr(policy.action_net, name, fields[name])
    assert not np.allclose(check_actions(policy), before)


def test_weights_of_another_shape():
    """Transposed, or with fewer units, behind the parameters."""
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [14, 14])
    features, noise = th.randn(5, OBS_DIM), th.randn(5, ACTION_DIM)
    first, second = network.input_layer, network.layers[1]

    def transpose():
        first.weight.data = first.weight.data.t()

    def shrink():
        first.weight.data, first.bias.data = first.weight.data[:9], first.bias.data[:9]
        second.weight.data = second.weight.data[:, :9]

    for change in (transpose, shrink):
        with th.no_grad():
            before = network.sample(features, noise, 3)
            change()
            actual = network.sample(features, noise, 3)
            assert not th.allclose(actual, before)
            th.testing.assert_close(actual, plain_sample(network, features, noise, 3), **TOLERANCE[th.float32])


@pytest.mark.parametrize("convert", [lambda module: th.jit.trace(module, th.ones(1, 6)), th.jit.script])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_or_scripted_value_network(convert):
    policy = make_policy()
    before = check_values(policy)
    policy.value_net = convert(policy.value_net)
    assert th.equal(check_values(policy), before)
    check_actions(policy)


@pytest.mark.parametrize("deterministic", [True, False])
def test_policy_in_double_precision(deterministic):
    class Double(FlattenExtractor):
        def forward(self, observations):
            return super().forward(observations).double()

    policy = make_policy(features_extractor_class=Double).double()
    for mode in (th.no_grad, th.enable_grad):
        with mode():
            actions, values, _ = policy(th.randn(3, OBS_DIM), deterministic)
            assert actions.dtype is values.dtype is th.float64


def test_memory_of_large_batches_is_not_kept():
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [6])
    with th.no_grad():
        for batch_size, is_kept in ((LARGEST_KEPT_BATCH + 1, False), (LARGEST_KEPT_BATCH, True)):
            features, noise = th.randn(batch_size, OBS_DIM), th.randn(batch_size, ACTION_DIM)
            th.testing.assert_close(network.sample(features, noise, 2), plain_sample(network, features, noise, 2))
            assert has_memory(network) == is_kept


def test_not_in_place_while_a_graph_is_captured(monkeypatch):
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [6])
    monkeypatch.setattr(th.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(th.cuda, "is_current_stream_capturing", lambda: True)
    with th.no_grad():
        network.sample(th.randn(5, OBS_DIM), th.randn(5, ACTION_DIM), 3)
    assert not has_memory(network)


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replaced_networks(name):
    """The new ones count, from the next call on."""
    policy = make_policy(net_arch=dict(pi=[6], vf=[6]))
    before = check_values(policy)
    REPLACEMENTS[name](policy)
    assert not th.allclose(check_values(policy), before, atol=1e-4)
    check_actions(policy)


def test_quantized_value_network():
    """Which is another module."""
    policy, obs = make_policy(net_arch=dict(pi=[6], vf=[6])), th.randn(9, OBS_DIM)
    with th.no_grad():
        before = policy.predict_values(obs)
        policy.mlp_extractor = th.ao.quantization.quantize_dynamic(policy.mlp_extractor, {nn.Linear})
        values, expected = policy(obs)[1], policy.value_net(policy.mlp_extractor.forward_critic(obs))
    assert th.equal(values, expected) and th.equal(policy.predict_values(obs), expected)
    assert not th.equal(expected, before) and th.allclose(expected, before, atol=0.2)


class ScaledFeatures(MlpPolicy):
    def extract_features(self, obs, features_extractor=None):
        return 3 * super().extract_features(obs, features_extractor)


def test_overridden_extract_features():
    policy, plain = make_policy(ScaledFeatures), make_policy()
    plain.load_state_dict(policy.state_dict())
    assert not th.allclose(check_values(policy), check_values(plain)) and not np.allclose(
        check_actions(policy), check_actions(plain)
    )
    with pytest.raises(ValueError, match="`ema_decay` must be None: `extract_features`"):
        make_policy(ScaledFeatures, ema_decay=0.9)


def test_another_kind_of_flow_network():
    policy = make_policy()
    policy.action_net = nn.Sequential(nn.Linear(OBS_DIM, ACTION_DIM))
    obs, zeros = th.zeros(2, OBS_DIM), th.zeros(2, 1, ACTION_DIM)
    for function in (
        lambda: policy(obs), lambda: policy.predict(obs.numpy()), lambda: policy.explore(obs, zeros),
        lambda: policy.evaluate_flow(obs, zeros, th.zeros(2, 1)), lambda: policy.velocity_field(obs),
        lambda: policy.create_ema(0.9),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="`action_net` must be a FlowNetwork, it is a Sequential"):
            function()
    # One that samples, of which no likelihood is known
    policy.action_net.sample = lambda features, noise, *_: noise
    with pytest.raises(ValueError, match=r"`ent_coef` must be 0: .*, Sequential has none"):
        policy.exploration_log_likelihood(obs, zeros[:, 0])


class Factor(FlattenExtractor):
    """Without parameters."""

    factor = 1.0

    def forward(self, observations):
        return self.factor * super().forward(observations)


def with_factor(policy):
    extractor = Factor(policy.observation_space)
    extractor.factor = 3.0
    return extractor


def other_network(**kwargs):
    kwargs = dict(activation_fn=nn.SiLU, output_scale=0.25) | kwargs
    return replace("action_net", lambda policy: FlowNetwork(OBS_DIM, ACTION_DIM, **(dict(net_arch=[6]) | kwargs)))


CHANGED_ACTORS = {
    "layers": other_network(net_arch=[6, 6]),
    "activation": other_network(activation_fn=nn.Tanh),
    "output_scale": other_network(output_scale=1.0),
    "output_scale of the same": replace("action_net", "output_scale", lambda _: 1.0),
    "same": other_network(),
    "one layer": lambda policy: policy.action_net.layers.__setitem__(0, nn.Tanh()),
    "hook": lambda policy: policy.action_net.register_forward_hook(shift),
    "hook on a layer": lambda policy: policy.action_net.layers[1].register_forward_hook(shift),
    "own method": replace("action_net", "forward", lambda p: lambda *inputs: 2 * FlowNetwork.forward(p.action_net, *inputs)),
    "weight_norm": lambda policy: parametrizations.weight_norm(policy.action_net.input_layer),
    "features": replace("features_extractor", lambda policy: Factor(policy.observation_space)),
    "features of the same kind": replace("features_extractor", with_factor),
    "extractor": replace("mlp_extractor", lambda _: CustomNetwork(OBS_DIM, OBS_DIM, 6)),
}


@pytest.mark.parametrize("name", CHANGED_ACTORS)
@pytest.mark.parametrize("copied", [False, True])
def test_average_of_networks_that_were_replaced(name, copied):
    """Refused, until there is an average of the new ones."""
    policy = make_policy(ema_decay=0.9, features_extractor_class=Factor)
    if copied:
        policy.optimizer = None
        policy = pickle.loads(pickle.dumps(policy))
    policy.update_ema()
    check_actions(policy)
    CHANGED_ACTORS[name](policy)
    with pytest.raises(ValueError, match=r"call `create_ema\(\)` again"):
        policy.update_ema()
    with pytest.raises(ValueError, match=r"call `create_ema\(\)` again"):
        check_actions(policy)
    if name != "weight_norm":
        policy.create_ema(0.9)
        policy.update_ema()
        check_actions(policy)


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps, None])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_policy_can_be_pickled(dumps, ema_decay):
    policy = make_policy(ema_decay=ema_decay)
    policy.optimizer = None
    # (the schedule of this test cannot be)
    expected = check_actions(policy)
    copied = copy.deepcopy(policy) if dumps is None else pickle.loads(dumps(policy))
    assert np.array_equal(check_actions(copied), expected)
    if ema_decay is not None:
        with th.no_grad():
            copied.action_net.input_layer.weight.add_(1.0)
        copied.update_ema()
        assert not np.array_equal(check_actions_of_the_average(copied), expected)


def check_actions_of_the_average(policy):
    return policy.predict(np.ones((9, OBS_DIM), np.float32), deterministic=True)[0]


# --- Critics


@settings(max_examples=40, deadline=None)
@given(
    activation_fn=st.sampled_from(KNOWN) | st.sampled_from(UNKNOWN),
    net_arch=st.sampled_from([[], [6], [6, 6]]),
    layer_norm=st.booleans(),
    batch_size=st.sampled_from([1, 2, 16]),
    n_members=st.integers(1, 3),
)
def test_ensemble_in_turn_and_batched(activation_fn, net_arch, layer_norm, batch_size, n_members):
    """Batched where activation functions are known to be elementwise. Those with parameters have them for themselves."""
    ensemble = EnsembleMLP(n_members, OBS_DIM, net_arch, activation_fn, layer_norm).eval()
    randomize(ensemble, np.random.default_rng(0))
    inputs = th.randn(batch_size, OBS_DIM)
    in_turn = ensemble.forward_in_turn(inputs)
    assert in_turn.shape == (n_members, batch_size)
    th.testing.assert_close(ensemble(inputs), in_turn)
    if ensemble._can_be_batched():
        th.testing.assert_close(ensemble.forward_batched(inputs), in_turn, rtol=1e-4, atol=1e-5)
    assert ensemble._can_be_batched() == (net_arch == [] or type(activation_fn()) in ELEMENTWISE)
    # A member is an MLP
    for member in range(n_members):
        x = inputs
        for layer, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
            x = x @ weight[member] + bias[member]
            if layer < len(net_arch):
                x = ensemble.activations[member][layer](x)
                if layer_norm:
                    x = nn.functional.layer_norm(x, (6,), ensemble.norm_weights[layer][member, 0],
                                                 ensemble.norm_biases[layer][member, 0], 1e-6)  # fmt: skip
        th.testing.assert_close(in_turn[member], x.squeeze(1), rtol=1e-4, atol=1e-5)
    parameters = [parameter for activations in ensemble.activations for parameter in activations.parameters()]
    assert len({id(parameter) for parameter in parameters}) == n_members * len(net_arch) * len(
        list(activation_fn().parameters())
    )


def test_hook_on_an_activation_of_the_critics():
    ensemble = EnsembleMLP(2, OBS_DIM, [6], nn.SiLU)
    ensemble.activations[0][0].register_forward_hook(lambda module, inputs, output: output + 1)
    assert not ensemble._can_be_batched()


# --- Traces, graphs and exported programs


class Actor(nn.Module):
    """As SB3's documentation exports a policy."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, obs):
        return self.policy(obs, deterministic=True)


def predict_both(policy_class):
    policy = make_policy(policy_class, **(dict(net_arch=[6, 6]) if policy_class is FQLMlpPolicy else {}))
    # Known to the cache, if there is one
    with th.no_grad():
        policy(th.randn(3, OBS_DIM))
    return Actor(policy).eval()


def assert_same_outputs(function: Callable, actor: Actor, obs: th.Tensor) -> None:
    with th.no_grad():
        th.testing.assert_close(function(obs), actor(obs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy_class", [MlpPolicy, FQLMlpPolicy])
@pytest.mark.parametrize("n_obs", [3, FEW_ELEMENTS // 2])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_policy(policy_class, n_obs, tmp_path):
    """It is right for other observations, any number of them, and with other weights."""
    actor = predict_both(policy_class)
    with th.no_grad():
        traced = th.jit.trace(actor, th.randn(n_obs, OBS_DIM))
    for batch_size in (1, n_obs, 7, FEW_ELEMENTS):
        assert_same_outputs(traced, actor, th.randn(batch_size, OBS_DIM))
    traced.save(tmp_path / "policy.pt")
    assert_same_outputs(th.jit.load(tmp_path / "policy.pt"), actor, th.randn(5, OBS_DIM))
    # A trace shares the parameters of what was traced
    randomize(actor, np.random.default_rng(0))
    assert_same_outputs(traced, actor, th.randn(5, OBS_DIM))


@pytest.mark.parametrize("policy_class", [MlpPolicy, FQLMlpPolicy])
@pytest.mark.parametrize("strict", [False, True])
def test_exported_policy(policy_class, strict):
    actor = predict_both(policy_class)
    with th.no_grad():
        program = th.export.export(
            actor, (th.randn(4, OBS_DIM),), dynamic_shapes=({0: th.export.Dim("batch", min=2)},), strict=strict
        )
    for batch_size in (2, 33):
        assert_same_outputs(program.module(), actor, th.randn(batch_size, OBS_DIM))
    # Its weights are parameters, and not constants
    randomize(actor, np.random.default_rng(0))
    module = program.module()
    module.load_state_dict(actor.state_dict(), strict=False)
    assert_same_outputs(module, actor, th.randn(5, OBS_DIM))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_adaptive_sampler_is_not_traced():
    """Its steps would be those of the example."""
    pytest.importorskip("torchdiffeq")
    actor = Actor(make_policy(sampler="dopri5"))
    with th.no_grad():
        with pytest.raises(ValueError, match='The sampler "dopri5" chooses its steps'):
            th.jit.trace(actor, th.randn(3, OBS_DIM))
        with pytest.raises(Exception, match='The sampler "dopri5" chooses its steps'):
            th.export.export(actor, (th.randn(3, OBS_DIM),), strict=False)
        actor.policy.set_sampler("midpoint", n_flow_steps=3)
        th.jit.trace(actor, th.randn(3, OBS_DIM), check_trace=False)


def test_compiled_network():
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [8, 8])
    features, noise = th.randn(5, OBS_DIM), th.randn(5, ACTION_DIM)
    with th.no_grad():
        compiled = th.compile(lambda f, x: network.sample(f, x, 3), backend="eager", fullgraph=True)
        th.testing.assert_close(compiled(features, noise), network.sample(features, noise, 3))


def test_functional_call():
    network = FlowNetwork(OBS_DIM, ACTION_DIM, [8, 8])
    inputs = th.randn(5, OBS_DIM), th.randn(5, 3, ACTION_DIM), th.rand(5, 3)
    others = {name: 0.5 * value.detach() for name, value in network.named_parameters()}
    with th.no_grad():
        actual = th.func.functional_call(network, others, inputs)
        network.load_state_dict(others)
        th.testing.assert_close(actual, network(*inputs))
