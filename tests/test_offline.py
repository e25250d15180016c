"""IFQL, FBRAC, FAWAC and FlowBC: their losses, how they act, and what they have in common with FQL."""

from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

import sb3_flow
from sb3_flow import FAWAC, FBRAC, FQL, IFQL, FlowBC
from sb3_flow.offline.values import aggregate, expectile_loss, td_target

OBS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32) / 3
ALGORITHMS: list[Any] = [IFQL, FBRAC, FAWAC, FlowBC]
WITH_VALUES: list[Any] = [FQL, IFQL, FBRAC, FAWAC]


def make_dataset(n=200):
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (n + 1, 3)).astype(np.float32)
    return dict(
        observations=observations[:-1],
        next_observations=observations[1:],
        actions=rng.uniform(-2, 2, (n, 1)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        terminals=np.arange(n) % 20 == 19,
    )


def make_model(algorithm, env="Pendulum-v1", policy="MlpPolicy", **kwargs):
    kwargs = dict(seed=0, device="cpu", batch_size=32) | kwargs
    kwargs["policy_kwargs"] = dict(net_arch=[16, 16], n_flow_steps=4) | kwargs.get("policy_kwargs", {})
    return algorithm(policy, env, **kwargs)


def make_batch(model, n=16, discounts=False):
    generator = th.Generator().manual_seed(0)

    def rand(*shape):
        return th.rand(shape, generator=generator) * 2 - 1

    observations, next_observations = rand(n, 3), rand(n, 3)
    dones = (rand(n, 1) > 0.5).float()
    return ReplayBufferSamples(
        observations, rand(n, 1), next_observations, dones, rand(n, 1), 0.5 + 0.5 * rand(n, 1).abs() if discounts else None
    )


def randomize(model):
    """Networks that are not as they were made: the critics differ from their targets."""
    th.manual_seed(1)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))


# --- Losses, written plainly


def plain_mlp(ensemble, member, x):
    """One member of an ensemble, layer by layer."""
    for layer in range(len(ensemble.weights)):
        x = x @ ensemble.weights[layer][member] + ensemble.biases[layer][member]
        if layer < len(ensemble.weights) - 1:
            x = nn.functional.gelu(x, approximate="tanh")
            mean, var = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, correction=0)
            x = (x - mean) / (var + 1e-6).sqrt()
            x = x * ensemble.norm_weights[layer][member] + ensemble.norm_biases[layer][member]
    return x[:, 0]


def plain_q(critic, obs, actions):
    inputs = th.cat([obs, actions], dim=1)
    return th.stack([plain_mlp(critic.q_networks, k, inputs) for k in range(len(critic.q_networks.weights[0]))])


def plain_flow(bc_flow, obs, x, t):
    network = bc_flow.network
    return network.layers(network.input_layer(th.cat([obs, x, t.expand(len(x), 1)], dim=1)))


def plain_sample(bc_flow, obs, noise):
    """Euler's method, from t = 1 to t = 0, clipped at the end."""
    x = noise
    for k in range(bc_flow.n_flow_steps):
        x = x - plain_flow(bc_flow, obs, x, th.tensor(1 - k / bc_flow.n_flow_steps)) / bc_flow.n_flow_steps
    return x.clamp(-1, 1)


def plain_cfm(bc_flow, batch, noise, timesteps):
    t = timesteps.unsqueeze(1)
    velocity = plain_flow(bc_flow, batch.observations, t * noise + (1 - t) * batch.actions, t)
    return (velocity - (noise - batch.actions)).square().mean(dim=1)


def plain_targets(model, batch, next_values):
    discounts = model.gamma if batch.discounts is None else batch.discounts.flatten()
    return batch.rewards.flatten() + discounts * (1 - batch.dones.flatten()) * next_values


def plain_aggregate(model, q_values):
    if model.q_agg == "min":
        return q_values.min(dim=0).values
    mean = sum(q_values) / len(q_values)
    return mean - model.rho * (sum((q - mean) ** 2 for q in q_values) / len(q_values)).sqrt()


def plain_losses(model, batch):
    """In the order in which the algorithm draws its noise."""
    obs, next_obs, actions, dim = batch.observations, batch.next_observations, batch.actions, batch.actions.shape
    losses = {}
    if isinstance(model, IFQL):
        next_values = plain_mlp(model.value.network, 0, next_obs).detach()
        q_values = plain_q(model.critic, obs, actions)
        losses["critic_loss"] = (q_values - plain_targets(model, batch, next_values)).square().sum(dim=0).mean()
        difference = plain_aggregate(model, plain_q(model.critic_target, obs, actions)) - plain_mlp(
            model.value.network, 0, obs
        )
        losses["value_loss"] = th.mean(th.where(difference > 0, 0.9, 0.1) * difference**2)
    elif not isinstance(model, FlowBC):
        next_actions = plain_sample(model.bc_flow, next_obs, th.randn(dim))
        next_q = plain_q(model.critic_target, next_obs, next_actions)
        next_q = plain_aggregate(model, next_q)
        q_values = plain_q(model.critic, obs, actions)
        losses["critic_loss"] = (q_values - plain_targets(model, batch, next_q.detach())).square().mean()
    if isinstance(model, FAWAC):
        values = plain_mlp(model.value.network, 0, obs)
        losses["value_loss"] = (values - plain_q(model.critic_target, obs, actions).mean(dim=0)).square().mean()
        advantages = plain_q(model.critic, obs, actions).mean(dim=0) - values
        weights = (model.alpha * advantages).exp().clamp(max=100).detach()
    else:
        weights = th.ones(len(obs))
    noise, timesteps = th.randn(dim), th.rand(len(obs))
    losses["bc_flow_loss"] = (weights * plain_cfm(model.bc_flow, batch, noise, timesteps)).mean()
    if isinstance(model, FBRAC):
        q_values = plain_q(model.critic, obs, plain_sample(model.bc_flow, obs, th.randn(dim))).mean(dim=0)
        losses["q_loss"] = -q_values.mean() / (q_values.abs().mean().detach() if model.normalize_q_loss else 1)
    return losses


@pytest.mark.parametrize("discounts", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [
        (IFQL, {}),
        (IFQL, dict(q_agg="mean", rho=0.5, policy_kwargs=dict(n_critics=4))),
        (FBRAC, dict(q_agg="min")),
        (FAWAC, dict(q_agg="min")),
        (FBRAC, {}),
        (FBRAC, dict(normalize_q_loss=True, alpha=3.0, rho=0.5, policy_kwargs=dict(n_critics=4))),
        (FAWAC, {}),
        (FAWAC, dict(alpha=5.0, rho=0.5, policy_kwargs=dict(n_critics=4))),
        (FlowBC, {}),
    ],
)
def test_losses(algorithm, kwargs, discounts):
    """Values and gradients of all losses."""
    model = make_model(algorithm, **kwargs)
    randomize(model)
    batch = make_batch(model, discounts=discounts)
    th.manual_seed(2)
    loss, logged = model._losses(batch)
    th.manual_seed(2)
    expected = plain_losses(model, batch)
    for name, value in expected.items():
        assert logged[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    weight = {"bc_flow_loss": model.alpha} if algorithm is FBRAC else {}
    total = sum(weight.get(name, 1.0) * value for name, value in expected.items())
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    parameters = [parameter for parameter in model.policy.parameters() if parameter.requires_grad]
    actual = th.autograd.grad(loss, parameters, allow_unused=True)
    assert all(gradient is not None for gradient in actual)
    # The critics have none of the Q term, nor the values of the weights
    parts = {"critic": ["critic_loss"], "value": ["value_loss"], "bc_flow": ["bc_flow_loss", "q_loss"]}
    for network, names in parts.items():
        if network in model.policy.network_names:
            own = sum(weight.get(name, 1.0) * expected[name] for name in names if name in expected)
            own_parameters = list(getattr(model, network).parameters())
            reference = th.autograd.grad(own, own_parameters, retain_graph=True)
            th.manual_seed(2)
            gradients = th.autograd.grad(model._losses(batch)[0], own_parameters)
            for gradient, plain in zip(gradients, reference, strict=True):
                th.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)


def test_lower_bound_of_fql():
    model = make_model(FQL, rho=0.5, policy_kwargs=dict(n_critics=4))
    randomize(model)
    batch = make_batch(model)
    th.manual_seed(2)
    loss, _ = model._critic_loss(batch)
    th.manual_seed(2)
    next_actions = model.actor.unclipped_actions(batch.next_observations, th.randn_like(batch.actions)).clamp(-1, 1)
    next_q = plain_aggregate(model, plain_q(model.critic_target, batch.next_observations, next_actions)).detach()
    q_values = plain_q(model.critic, batch.observations, batch.actions)
    expected = (q_values - plain_targets(model, batch, next_q)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_anchor():
    """The loss of flow anchoring, for hand-written paths, and what it trains."""
    model = make_model(FQL, distillation="anchor", normalize_q_loss=True, alpha=3.0)
    randomize(model)
    batch = make_batch(model)
    th.manual_seed(2)
    distill_loss, _ = model._actor_losses(batch)
    th.manual_seed(2)
    noise, t = th.randn(16, 1), th.rand(16).unsqueeze(1)
    actions = model.actor.mu(th.cat([batch.observations, noise], dim=1))
    velocity = plain_flow(model.bc_flow, batch.observations, t * noise + (1 - t) * actions, t)
    expected = (noise - actions - velocity).square().mean()
    assert distill_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(model.actor.parameters())
    reference = th.autograd.grad(expected, parameters)
    for gradient, plain in zip(th.autograd.grad(distill_loss, parameters, retain_graph=True), reference, strict=True):
        th.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)
    distill_loss.backward()
    assert all(parameter.grad is None for parameter in model.bc_flow.parameters())
    assert all(parameter.requires_grad for parameter in model.bc_flow.parameters())
    model = make_model(FQL, dataset=make_dataset(), distillation="anchor").learn_offline(20)
    with pytest.raises(ValueError, match="Unknown `distillation`: 'flow', it must be one of 'samples', 'anchor'"):
        make_model(FQL, distillation="flow")


def test_aggregation():
    q_values = th.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, -1.0]])
    assert aggregate(q_values).tolist() == [3, 1] and aggregate(q_values, "min").tolist() == [1, -1]
    # Standard deviations of the critics: sqrt(8 / 3) and sqrt(2)
    assert aggregate(q_values, "mean", 0.5).tolist() == pytest.approx([3 - 0.5 * (8 / 3) ** 0.5, 1 - 0.5 * 2**0.5])


def test_expectile():
    """What has the least loss of several numbers: with 0.5 it is their mean."""
    numbers = th.tensor([0.0, 1.0, 2.0, 10.0])
    # (0.9 (10 - v) = 0.1 (3 v - 3) for v = 7.75)
    for expectile, expected in [(0.5, 3.25), (0.9, 7.75)]:
        candidates = th.linspace(0, 10, 10_001)
        losses = expectile_loss(numbers.unsqueeze(1) - candidates, expectile).mean(dim=0)
        assert candidates[losses.argmin()].item() == pytest.approx(expected, abs=2e-3)


def test_td_target():
    batch = ReplayBufferSamples(th.zeros(2, 3), th.zeros(2, 1), th.zeros(2, 3), th.tensor([[0.0], [1.0]]),
                                th.tensor([[1.0], [2.0]]), None)  # fmt: skip
    assert td_target(batch, th.tensor([10.0, 10.0]), 0.9).tolist() == [10, 2]
    assert td_target(batch._replace(discounts=th.tensor([[0.5], [0.5]])), th.tensor([10.0, 10.0]), 0.9).tolist() == [6, 2]


def test_target_follows_the_weights_from_before_the_update():
    model = make_model(FBRAC, dataset=make_dataset(), tau=0.5)
    before = [parameter.clone() for parameter in model.critic.parameters()]
    target = [parameter.clone() for parameter in model.critic_target.parameters()]
    model.learn_offline(1)
    for old, was, now in zip(before, target, model.critic_target.parameters(), strict=True):
        th.testing.assert_close(now, 0.5 * old + 0.5 * was)


# --- Acting


@pytest.mark.parametrize("deterministic", [True, False])
def test_best_of_samples(deterministic):
    """For each observation of a batch, the sample that the critics value most, and no other observation's."""
    model = make_model(IFQL, policy_kwargs=dict(n_samples=6))
    randomize(model)
    obs = th.as_tensor(OBS)
    th.manual_seed(3)
    actions = model.policy._predict(obs, deterministic)
    th.manual_seed(3)
    if deterministic:
        noise = th.randn((6, 1), generator=th.Generator().manual_seed(0)).repeat(len(obs), 1)
    else:
        noise = th.randn(len(obs) * 6, 1)
    for index in range(len(obs)):
        row = obs[index : index + 1].expand(6, -1)
        samples = plain_sample(model.bc_flow, row, noise[6 * index : 6 * index + 6])
        best = samples[plain_q(model.critic, row, samples).min(dim=0).values.argmax()]
        th.testing.assert_close(actions[index], best, rtol=1e-4, atol=1e-5)


def test_more_samples_are_better():
    values = []
    for n_samples in (1, 64):
        model = make_model(IFQL, policy_kwargs=dict(n_samples=n_samples))
        randomize(model)
        obs = th.as_tensor(OBS).repeat(20, 1)
        with th.no_grad():
            values.append(model.critic(obs, model.policy._predict(obs)).min(dim=0).values.mean())
    assert values[1] > values[0] + 0.01


@pytest.mark.parametrize("algorithm", [FBRAC, FAWAC, FlowBC])
def test_the_flow_acts(algorithm):
    model = make_model(algorithm)
    randomize(model)
    obs = th.as_tensor(OBS)
    th.manual_seed(3)
    actions = model.policy._predict(obs)
    th.manual_seed(3)
    th.testing.assert_close(actions, plain_sample(model.bc_flow, obs, th.randn(10, 1)), rtol=1e-4, atol=1e-5)
    zero = model.policy._predict(obs, deterministic=True)
    th.testing.assert_close(zero, plain_sample(model.bc_flow, obs, th.zeros(10, 1)), rtol=1e-4, atol=1e-5)


# --- What an SB3 algorithm does


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_save_load(tmp_path, algorithm):
    np.savez(tmp_path / "data.npz", **make_dataset())
    data = str(tmp_path / "data.npz")
    model = make_model(algorithm, make_vec_env("Pendulum-v1", 2, seed=0), dataset=data, offline_steps=20)
    model.learn(0 if algorithm is FlowBC else 40)
    assert model.num_timesteps == (20 if algorithm is FlowBC else 60)
    model.save(tmp_path / "model.zip")
    loaded = algorithm.load(tmp_path / "model.zip", device="cpu")
    state, other_state = model.policy.state_dict(), loaded.policy.state_dict()
    assert state.keys() == other_state.keys() and all(th.equal(state[name], other_state[name]) for name in state)
    for deterministic in (True, False):
        actions = []
        for each in (model, loaded):
            th.manual_seed(0)
            actions.append(each.predict(OBS, deterministic=deterministic)[0])
        assert np.array_equal(*actions)
    loaded = algorithm.load(tmp_path / "model.zip", env=model.env, device="cpu")
    loaded.learn_offline(5, reset_num_timesteps=False)
    assert loaded.offline_buffer is not None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_seed_same_run(algorithm):
    results = []
    for seed in (7, 7, 8):
        model = make_model(algorithm, make_vec_env("Pendulum-v1", 2, seed=seed), dataset=make_dataset(), seed=seed)
        model.learn_offline(10)
        if algorithm is not FlowBC:
            model.learn(30)
        results.append((model.policy.parameters_to_vector(), model.predict(OBS, deterministic=False)[0]))
    for first, second, other in zip(*results, strict=True):
        assert np.array_equal(first, second) and not np.array_equal(first, other)


@pytest.mark.parametrize("algorithm", [IFQL, FBRAC, FAWAC])
def test_online_from_nothing(algorithm):
    model = make_model(algorithm, make_vec_env("Pendulum-v1", 2, seed=0), learning_starts=20, n_steps=3).learn(60)
    assert model._n_updates > 0


@pytest.mark.parametrize("share_features_extractor", [True, False])
@pytest.mark.parametrize("kind", ["image", "dict"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_images_and_dicts(tmp_path, algorithm, kind, share_features_extractor):
    policy_kwargs = dict(share_features_extractor=share_features_extractor)
    kwargs = dict(policy_kwargs=policy_kwargs) | ({} if algorithm is FlowBC else dict(buffer_size=100))
    if kind == "image":
        env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
        model = make_model(algorithm, env, "CnnPolicy", random_crop=3, **kwargs)
    else:
        env = SimpleMultiObsEnv(random_start=False, discrete_actions=False)
        model = make_model(algorithm, env, "MultiInputPolicy", **kwargs)
    if algorithm is not FlowBC:
        model.learning_starts = 10
        model.learn(20)
    obs = model.env.reset()
    action, _ = model.predict(obs, deterministic=True)
    assert np.isfinite(action).all() and action.shape == (1, *model.action_space.shape)
    model.save(tmp_path / "model.zip")
    assert np.array_equal(algorithm.load(tmp_path / "model.zip").predict(obs, deterministic=True)[0], action)


@pytest.mark.parametrize("algorithm", WITH_VALUES)
def test_shared_features_are_learned_with_the_flow(algorithm):
    """Not by the critics, nor by the values."""
    model = make_model(algorithm, SimpleMultiObsEnv(discrete_actions=False), "MultiInputPolicy", buffer_size=10,
                       policy_kwargs=dict(share_features_extractor=True))  # fmt: skip
    extractor = model.bc_flow.features_extractor
    assert model.critic.features_extractor is extractor
    assert model.critic_target.features_extractor is not extractor
    obs = {key: th.as_tensor(value[None]) for key, value in model.observation_space.sample().items()}
    losses = [model.critic(obs, th.zeros(1, model.bc_flow.action_dim)).sum()]
    if "value" in model.policy.network_names:
        assert model.value.features_extractor is extractor
        losses.append(model.value(obs).sum())
    for loss in losses:
        loss.backward()
    assert all(parameter.grad is None for parameter in extractor.parameters())


@pytest.mark.parametrize(
    ("algorithm", "kwargs", "message"),
    [
        (IFQL, dict(expectile=1.5), r"`expectile` must be in \[0, 1\]"),
        (IFQL, dict(policy_kwargs=dict(n_samples=0)), "`n_samples` must be at least 1"),
        (FBRAC, dict(alpha=-1), "`alpha` must not be negative"),
        (FAWAC, dict(alpha="x"), "`alpha` must be a number"),
        (FBRAC, dict(normalize_q_loss=1), "`normalize_q_loss` must be True or False"),
        *((algorithm, dict(q_agg="max"), "Unknown `q_agg`: 'max'") for algorithm in WITH_VALUES),
        *((algorithm, dict(q_agg="mean", rho=-1), "`rho` must not be negative") for algorithm in WITH_VALUES),
        *((algorithm, dict(q_agg="min", rho=0.5), '`rho` must be 0 with `q_agg="min"`') for algorithm in WITH_VALUES),
        *((algorithm, dict(dataset=make_dataset(), dataset_kwargs=dict(need_rewards=False)), "`need_rewards` must be True")
          for algorithm in (IFQL, FBRAC, FAWAC)),
        *((algorithm, dict(policy_kwargs=dict(sampler="sde")), "Unknown `sampler`: 'sde'") for algorithm in ALGORITHMS),
        *((algorithm, dict(batch_size=0), "`batch_size` must be at least 1") for algorithm in ALGORITHMS),
    ],
)  # fmt: skip
def test_bad_arguments(algorithm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(algorithm, **kwargs)


@pytest.mark.parametrize("policy", [algorithm.policy_aliases["MlpPolicy"] for algorithm in (FQL, *ALGORITHMS)])
@pytest.mark.parametrize("algorithm", [FQL, *ALGORITHMS])
def test_policy_of_another_algorithm(algorithm, policy):
    if policy is algorithm.policy_aliases["MlpPolicy"]:
        make_model(algorithm, policy=policy)
        return
    with pytest.raises(
        ValueError, match=f"`policy` must be a {algorithm.__name__}Policy, it is <class '.*{policy.__name__}'>"
    ):
        make_model(algorithm, policy=policy)


def test_sampler_is_saved(tmp_path):
    model = make_model(IFQL)
    model.policy.set_sampler(n_samples=5, n_flow_steps=3)
    model.save(tmp_path / "model")
    policy = IFQL.load(tmp_path / "model").policy
    assert policy.n_samples == 5 and policy.bc_flow.n_flow_steps == 3
    with pytest.raises(ValueError, match="`n_samples` must be at least 1, it is 0"):
        policy.set_sampler(n_samples=0)


def test_flow_bc_only_clones():
    dataset = make_dataset()
    del dataset["rewards"]
    model = make_model(FlowBC, dataset=dataset, offline_steps=10).learn()
    assert model._n_updates == 10 and not hasattr(model, "critic")
    with pytest.raises(ValueError, match="`total_timesteps` must be 0, it is 100: FlowBC learns offline only"):
        model.learn(100)
    with pytest.raises(ValueError, match="`offline_steps` must be positive for `learn\\(\\)`, it is 0"):
        make_model(FlowBC, dataset=dataset).learn()
    with pytest.raises(TypeError, match="'n_critics': it has no critics"):
        make_model(FlowBC, policy_kwargs=dict(n_critics=3))
    # It is what FQL clones with
    bc_flow = make_model(FQL, policy_kwargs=dict(net_arch=[16, 16])).bc_flow
    bc_flow.load_state_dict(model.bc_flow.state_dict())


def test_flow_bc_clones_two_modes():
    """Actions around -1 and 1, in equal shares, and none between: as a Gaussian could not."""
    rng = np.random.default_rng(0)
    actions = np.where(rng.random((2000, 1)) < 0.5, -1, 1) + 0.1 * rng.normal(size=(2000, 1))
    dataset = dict(observations=np.zeros((2000, 3), np.float32), actions=actions.astype(np.float32))
    dataset |= dict(next_observations=dataset["observations"], terminals=np.ones(2000))
    policy_kwargs = dict(net_arch=[64, 64], n_flow_steps=20)
    model = make_model(FlowBC, dataset=dataset, batch_size=256, learning_rate=3e-3, policy_kwargs=policy_kwargs)
    samples = model.learn_offline(800).predict(np.zeros((2000, 3), np.float32), deterministic=False)[0]
    assert (np.abs(samples) < 0.5).mean() < 0.1 and 0.4 < (samples > 0).mean() < 0.6


def test_all_are_exported():
    assert {"DPPO", "FAWAC", "FBRAC", "FPO", "FQL", "IFQL", "FlowBC"} <= set(sb3_flow.__all__)
