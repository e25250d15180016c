"""The mathematics of FQL."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_flow import FQL
from sb3_flow.common.networks import EnsembleMLP
from sb3_flow.fql.fql import random_crop

N_FLOW_STEPS = 10


def make_dataset(n=400, seed=0, obs_dim=3, action_dim=1):
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=(n, obs_dim)).astype(np.float32)
    return dict(
        observations=observations,
        actions=rng.uniform(-2, 2, size=(n, action_dim)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        next_observations=observations + 0.1,
        dones=(rng.random(n) < 0.1).astype(np.float32),
    )


def make_model(**kwargs):
    kwargs = dict(dataset=make_dataset(), seed=0, device="cpu", policy_kwargs=dict(net_arch=[16, 16]), alpha=3.0) | kwargs
    return FQL("MlpPolicy", "Pendulum-v1", **kwargs)


def parameters(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return any(not th.equal(value, before[name]) for name, value in module.state_dict().items())


# --- A second implementation, as plain as it can be: loops over members and steps, the authors' time


def mlp(x, layers, norms=None):
    """GELU (tanh) between linear layers, LayerNorm after it."""
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        if i < len(layers) - 1:
            x = 0.5 * x * (1 + th.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
            if norms is not None:
                mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
                x = (x - mean) / th.sqrt(variance + 1e-6) * norms[i][0] + norms[i][1]
    return x


def linear_layers(*modules):
    return [(m.weight.t(), m.bias) for module in modules for m in module.modules() if isinstance(m, th.nn.Linear)]


def reference_q(critic, member, obs, actions):
    q = critic.q_networks
    layers = [(weight[member], bias[member]) for weight, bias in zip(q.weights, q.biases, strict=True)]
    norms = [(weight[member], bias[member]) for weight, bias in zip(q.norm_weights, q.norm_biases, strict=True)]
    return mlp(th.cat([obs, actions], dim=1), layers, norms).squeeze(1)


def reference_losses(model, batch, noises, q_agg, normalize_q_loss):
    """The losses of the paper, with time from 0 (noise) to 1 (action) as its authors have it."""
    obs, actions, next_obs, dones, rewards, _ = batch
    policy = model.policy
    mu = linear_layers(policy.actor.mu)
    network = linear_layers(policy.bc_flow.network.input_layer, policy.bc_flow.network.layers)

    def velocity(o, x, t):
        # Our network gets 1 - t and predicts the velocity towards the noise
        return -mlp(th.cat([o, x, 1 - t], dim=1), network)

    next_actions = mlp(th.cat([next_obs, noises["target"]], dim=1), mu).clamp(-1, 1).detach()
    next_q = th.stack([reference_q(policy.critic_target, k, next_obs, next_actions) for k in range(2)])
    next_q = next_q.mean(0) if q_agg == "mean" else next_q.min(0).values
    target = (rewards.flatten() + model.gamma * (1 - dones.flatten()) * next_q).detach()
    critic_loss = sum(((reference_q(policy.critic, k, obs, actions) - target) ** 2).mean() for k in range(2)) / 2

    t = 1 - noises["time"].unsqueeze(1)
    x_t = (1 - t) * noises["flow"] + t * actions
    bc_flow_loss = ((velocity(obs, x_t, t) - (actions - noises["flow"])) ** 2).mean()

    x = noises["actor"]
    for k in range(N_FLOW_STEPS):
        x = x + velocity(obs, x, th.full((len(x), 1), k / N_FLOW_STEPS)) / N_FLOW_STEPS
    policy_actions = mlp(th.cat([obs, noises["actor"]], dim=1), mu)
    distill_loss = ((policy_actions - x.clamp(-1, 1).detach()) ** 2).mean()
    q = sum(reference_q(policy.critic, k, obs, policy_actions.clamp(-1, 1)) for k in range(2)) / 2
    q_loss = -q.mean()
    if normalize_q_loss:
        q_loss = q_loss / q.detach().abs().mean()
    return critic_loss, bc_flow_loss, distill_loss, q_loss


@pytest.mark.parametrize("q_agg", ["mean", "min"])
@pytest.mark.parametrize("normalize_q_loss", [False, True])
def test_one_update_equals_the_reference(monkeypatch, q_agg, normalize_q_loss):
    model = make_model(q_agg=q_agg, normalize_q_loss=normalize_q_loss, alpha=3.0, learning_rate=1e-2)
    policy = model.policy
    # So that clips matter, and LayerNorm is not the identity
    with th.no_grad():
        policy.actor.mu[-1].weight.mul_(5)
        for values in (policy.critic.q_networks.norm_weights, policy.critic.q_networks.norm_biases):
            for value in values:
                value.add_(0.3 * th.randn_like(value))
        for value in policy.critic_target.parameters():
            value.add_(0.1 * th.randn_like(value))
    batch = model._sample(64)
    noises = {name: th.randn(64, 1) for name in ("target", "flow", "actor")} | {"time": th.rand(64)}
    order = iter([noises["target"], noises["flow"], noises["actor"]])
    monkeypatch.setattr(th, "randn_like", lambda x: next(order))
    monkeypatch.setattr(th, "rand", lambda *args, **kwargs: noises["time"])
    monkeypatch.setattr(model, "_sample", lambda batch_size: batch)

    with th.no_grad():
        raw = policy.actor.unclipped_actions(batch.observations, noises["actor"])
    assert (raw.abs() > 1).any() and (raw.abs() < 1).any()
    losses = reference_losses(model, batch, noises, q_agg, normalize_q_loss)
    modules = dict(critic=policy.critic, bc_flow=policy.bc_flow, actor=policy.actor)
    objectives = dict(critic=losses[0], bc_flow=losses[1], actor=model.alpha * losses[2] + losses[3])
    before = {name: parameters(module) for name, module in modules.items()}
    target_before, online_before = parameters(policy.critic_target), parameters(policy.critic)
    gradients = {
        name: th.autograd.grad(objectives[name], list(module.parameters()), allow_unused=True)
        for name, module in modules.items()
    }

    model.set_logger(configure_logger(0))
    model.train(1, 64)
    logged = model.logger.name_to_value
    for name, expected in zip(("critic_loss", "bc_flow_loss", "distill_loss", "q_loss"), losses, strict=True):
        assert logged[f"train/{name}"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), name
    # First step of Adam, for each network from its own objective only
    for name, module in modules.items():
        for (key, value), gradient in zip(module.named_parameters(), gradients[name], strict=True):
            step = 1e-2 * gradient / (gradient.abs() + 1e-8)
            significant = gradient.abs() > 1e-5
            assert th.allclose(value[significant], (before[name][key] - step)[significant], atol=1e-4), (name, key)
    # The target network averages the weights from before the update
    for key, value in policy.critic_target.state_dict().items():
        assert th.allclose(value, 0.995 * target_before[key] + 0.005 * online_before[key], atol=1e-6)


def test_gradients_reach_only_what_they_should():
    model = make_model()
    batch = model._sample(32)
    policy = model.policy
    networks = [policy.critic, policy.bc_flow, policy.actor, policy.critic_target]
    distill_loss, actions = model._distill_loss(batch)
    q_loss = model._q_loss(batch, actions)
    for loss, own in [
        (model._critic_loss(batch)[0], policy.critic),
        (model._bc_flow_loss(batch), policy.bc_flow),
        (distill_loss, policy.actor),
        (q_loss, policy.actor),
    ]:
        policy.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        touched = [network for network in networks if any(p.grad is not None for p in network.parameters())]
        assert touched == [own]
    # The critics can be trained again after the actor's loss
    assert all(parameter.requires_grad for parameter in policy.critic.parameters())


def test_terminations_stop_bootstrapping_truncations_do_not():
    """What the losses do with ``dones`` is in the reference above; this is what the buffers take for one."""
    # An online truncation is not a termination, and neither is the end of a trajectory in the dataset
    model = make_model()
    buffer = ReplayBuffer(2, model.observation_space, model.action_space)
    for truncated in (True, False):
        infos = [{"TimeLimit.truncated": truncated}]
        buffer.add(np.zeros(3), np.zeros(3), np.zeros((1, 1)), np.zeros(1), np.ones(1), infos)
    assert buffer._get_samples(np.array([0, 1])).dones.flatten().tolist() == [0.0, 1.0]
    data = make_dataset() | dict(dones=np.arange(400) % 3 == 0, episode_ends=np.arange(400) % 2 == 0)
    for n_steps in (1, 2):
        batch = make_model(dataset=data, n_steps=n_steps)._sample(256)
        # The observations tell the row
        rows = (batch.observations.numpy()[:, None] == data["observations"][None]).all(-1).argmax(1)
        last = rows if n_steps == 1 else np.where((rows % 2 == 0) | (rows % 3 == 0), rows, rows + 1)
        assert np.array_equal(batch.dones.flatten(), last % 3 == 0)


@pytest.mark.parametrize("forward", [EnsembleMLP.forward, EnsembleMLP.forward_batched, EnsembleMLP.forward_in_turn])
def test_ensemble_equals_its_members(forward):
    """One batched product for each layer, or one member after the other."""
    ensemble = EnsembleMLP(3, 5, [8, 8])
    with th.no_grad():
        for values in (*ensemble.norm_weights, *ensemble.norm_biases, *ensemble.biases):
            values.add_(th.randn_like(values))
    inputs = th.randn(10, 5)
    outputs = forward(ensemble, inputs)
    assert outputs.shape == (3, 10)
    for k in range(3):
        layers = [(weight[k], bias[k]) for weight, bias in zip(ensemble.weights, ensemble.biases, strict=True)]
        norms = [(weight[k], bias[k]) for weight, bias in zip(ensemble.norm_weights, ensemble.norm_biases, strict=True)]
        assert th.allclose(outputs[k], mlp(inputs, layers, norms).squeeze(1), atol=1e-5)
    # A loss of one member does not train the others
    (gradient,) = th.autograd.grad(outputs[1].sum(), ensemble.weights[0])
    assert gradient[1].abs().sum() > 0 and gradient[0].abs().sum() == 0 == gradient[2].abs().sum()


class TwoModes(gym.Env):
    """One step, one action."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(1, dtype=np.float32), float(action[0] > 0), True, False, {}


def test_two_modes_offline():
    """Of two kinds of behaviour only one pays: the policy takes it and stays in support, the flow clones both."""
    rng = np.random.default_rng(0)
    actions = np.clip(np.where(rng.random(2000) < 0.5, -0.5, 0.5) + 0.15 * rng.normal(size=2000), -1, 1)
    observations = np.zeros((2000, 1))
    data = dict(
        observations=observations, next_observations=observations, actions=actions[:, None], rewards=actions > 0,
        dones=np.ones(2000),
    )  # fmt: skip
    model = FQL(
        "MlpPolicy", TwoModes(), dataset=data, alpha=0.1, learning_rate=1e-3, seed=0, device="cpu",
        policy_kwargs=dict(net_arch=[64, 64]),
    )  # fmt: skip
    model.learn_offline(2000)
    obs = np.zeros((2000, 1), dtype=np.float32)
    one_step, flow = model.predict(obs)[0].flatten(), model.policy.bc_flow.predict(obs)[0].flatten()
    # Three standard deviations around the mode that pays
    assert np.mean(np.abs(one_step - 0.5) < 0.45) > 0.9
    for mode in (-0.5, 0.5):
        assert np.mean(np.abs(flow - mode) < 0.45) > 0.4
    assert np.mean(np.abs(flow) < 0.05) < 0.05


def test_actions_are_scaled():
    """Env units outside, [-1, 1] inside, and just inside of the bounds."""
    data = make_dataset()
    data["actions"][:2] = [[2.0], [-2.0]]
    actions = make_model(dataset=data).offline_buffer.actions
    assert actions[0] == pytest.approx(1 - 1e-5) and actions[1] == pytest.approx(-1 + 1e-5)
    assert np.allclose(actions[2:] * 2, data["actions"][2:], atol=1e-6)
    assert np.abs(make_model().predict(np.zeros((500, 3), dtype=np.float32))[0]).max() <= 2


@pytest.mark.parametrize("balanced_sampling", [False, True])
def test_mixed_sampling(balanced_sampling):
    model = make_model(balanced_sampling=balanced_sampling, batch_size=100)
    assert not (model._sample(100).rewards == 7).any()
    for _ in range(100):
        model.replay_buffer.add(np.zeros(3), np.zeros(3), np.zeros((1, 1)), np.full(1, 7.0), np.zeros(1), [{}])
    counts = np.array([(model._sample(100).rewards == 7).sum().item() for _ in range(200)])
    if balanced_sampling:
        assert (counts == 50).all()
    else:
        # 100 of 500 transitions
        assert counts.mean() == pytest.approx(20, abs=1.5) and counts.std() == pytest.approx(4, abs=1.5)


def test_offline_then_online():
    model = make_model(offline_steps=50, learning_starts=1000)
    model.learn(60)
    # No random actions, and an update for every step from the first one on
    assert model._n_updates == 50 + 60 and model.num_timesteps == 110
    assert model.replay_buffer.pos == 60
    model.learn(10, reset_num_timesteps=False)
    assert model._n_updates == 120 and model.num_timesteps == 120
    online = FQL("MlpPolicy", "Pendulum-v1", learning_starts=20, policy_kwargs=dict(net_arch=[16])).learn(50)
    assert online._n_updates == 30


def test_callbacks_offline(tmp_path):
    evaluation = EvalCallback(gym.make("Pendulum-v1"), log_path=str(tmp_path), eval_freq=40, n_eval_episodes=1, verbose=0)
    checkpoint = CheckpointCallback(save_freq=50, save_path=str(tmp_path))
    model = make_model(tensorboard_log=str(tmp_path))
    model.learn_offline(100, callback=[evaluation, checkpoint], log_interval=20, progress_bar=True)
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [40, 80]
    assert (tmp_path / "rl_model_100_steps.zip").is_file()
    assert len(list((tmp_path / "FQL_1").iterdir())) == 1
    model.learn_offline(100, callback=lambda local_variables, global_variables: model.num_timesteps < 30)
    assert model.num_timesteps == 30


def test_callbacks_over_both_phases(tmp_path):
    """One run for TensorBoard, one learning rate schedule; what stops the offline phase stops it all."""

    class Record(BaseCallback):
        def __init__(self, stop_at=None):
            super().__init__()
            self.rates, self.inits, self.stop_at = [], 0, stop_at

        def _init_callback(self):
            self.inits += 1

        def _on_step(self):
            self.rates.append(self.model.policy.optimizer.param_groups[0]["lr"])
            return self.num_timesteps != self.stop_at

    model = make_model(offline_steps=30, learning_rate=lambda progress: progress, tensorboard_log=str(tmp_path))
    record = Record()
    model.learn(30, callback=[record, StopTrainingOnMaxEpisodes(10)], progress_bar=True)
    # (online, the callback is called before the update of the step)
    assert np.allclose(record.rates[:30], 1 - np.arange(30) / 60)
    assert np.allclose(record.rates[31:], 1 - np.arange(31, 60) / 60)
    assert record.inits == 2
    assert [path.name for path in tmp_path.iterdir()] == ["FQL_1"]
    model.learn_offline(2, callback=(record := Record()))
    assert record.rates == [1.0, 0.5]

    stopped = make_model(offline_steps=30)
    stopped.learn(30, callback=Record(stop_at=10))
    assert stopped.num_timesteps == 10 and stopped.replay_buffer.pos == 0


def test_resume_is_bit_equal(tmp_path):
    """100 steps, or 50, save, load and 50 more."""

    def sampled_after(model, steps):
        th.manual_seed(5)
        model.learn_offline(steps, reset_num_timesteps=False)
        return parameters(model.policy)

    model = make_model()
    model.learn_offline(50)
    model.save(tmp_path / "model.zip")
    loaded = FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu")
    obs = np.ones((5, 3), dtype=np.float32)
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    with pytest.raises(ValueError, match="There is no dataset"):
        loaded.learn_offline(10)
    loaded.set_dataset(make_dataset())
    first, second = sampled_after(model, 50), sampled_after(loaded, 50)
    assert model.num_timesteps == loaded.num_timesteps == 100
    for name in first:
        assert th.equal(first[name], second[name])


def test_loaded_without_its_dataset(tmp_path):
    model = make_model(offline_steps=3)
    model.learn(2)
    model.save(tmp_path / "model.zip")
    loaded = FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu")
    with pytest.warns(UserWarning, match="a dataset that is not saved with it"):
        loaded.learn(2, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="There is no environment"):
        without_env = FQL.load(tmp_path / "model.zip", device="cpu")
        without_env.set_dataset(make_dataset())
        without_env.learn_offline(2)
    with pytest.raises(ValueError, match="`q_agg`: 'max'"):
        FQL.load(tmp_path / "model.zip", q_agg="max")
    with pytest.raises(ValueError, match="`buffer_size` must be larger to learn online, it is 1"):
        FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), buffer_size=1).learn(10)
    flow = model.policy.bc_flow
    flow.save(tmp_path / "flow.pth")
    obs = np.ones((4, 3), dtype=np.float32)
    assert np.array_equal(type(flow).load(tmp_path / "flow.pth").predict(obs, deterministic=True)[0],
                          flow.predict(obs, deterministic=True)[0])  # fmt: skip


def test_dataset_is_loaded_again(tmp_path):
    """A dataset that has a name is remembered, not saved."""
    np.savez(tmp_path / "data.npz", **make_dataset())
    model = make_model(dataset=str(tmp_path / "data.npz"))
    model.learn_offline(5)
    model.save(tmp_path / "model.zip")
    loaded = FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"))
    assert loaded.offline_buffer is None
    loaded.learn_offline(5)
    assert len(loaded.offline_buffer) == 400


def test_same_seed_same_run():
    weights = [make_model(seed=seed).learn_offline(30).policy.parameters_to_vector() for seed in (1, 1, 2)]
    assert np.array_equal(weights[0], weights[1]) and not np.array_equal(weights[0], weights[2])


def test_random_crop():
    images = th.arange(2 * 1 * 6 * 6, dtype=th.uint8).reshape(2, 1, 6, 6)
    # In the middle nothing changes, elsewhere the image moves and its border is repeated
    assert th.equal(random_crop(images, 2, th.full((2, 2), 2)), images)
    moved = random_crop(images, 2, th.tensor([[2, 2], [3, 0]]))
    assert th.equal(moved[0, 0, :, :5], images[0, 0, :, 1:]) and th.equal(moved[0, 0, :, 5], images[0, 0, :, 5])
    assert th.equal(moved[1, 0, :, 2:], images[1, 0, :, :4]) and moved.dtype == th.uint8
    vectors = th.randn(2, 3)
    assert random_crop(vectors, 2, th.zeros(2, 2, dtype=th.long)) is vectors


def test_discounts_of_both_buffers():
    """Returns of several steps, in the dataset, in the replay buffer, or in both."""
    for kwargs, among in [
        (dict(n_steps=3), [0.9, 0.9**2, 0.9**3]),
        (dict(replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=dict(n_steps=2, gamma=0.9)), [0.9, 0.9**2]),
    ]:
        model = make_model(gamma=0.9, balanced_sampling=True, **kwargs).learn(20)
        discounts = model._sample(64).discounts
        assert discounts.shape == (64, 1)
        assert np.allclose(np.unique(discounts), sorted(among))


def test_vec_normalize_knows_the_dataset():
    """Without a step in the environment, the statistics are those of the dataset."""
    data = make_dataset(2000)
    data["observations"] = 100 * data["observations"] + 50
    data["next_observations"] = data["observations"]
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), clip_obs=10.0)
    model = FQL("MlpPolicy", env, dataset=data, policy_kwargs=dict(net_arch=[16]), seed=0).learn_offline(2)
    assert np.allclose(env.obs_rms.mean, data["observations"].mean(axis=0), rtol=1e-3)
    batch = model._sample(1000)
    assert batch.observations.mean(dim=0).abs().max() < 0.2 and (batch.observations.std(dim=0) - 1).abs().max() < 0.2
    assert 0.1 < batch.rewards.std() < 2
    # Once
    count = env.obs_rms.count
    model.learn_offline(2)
    assert env.obs_rms.count == count


def test_bad_arguments():
    with pytest.raises(ValueError, match="Unknown `q_agg`: 'max', it must be one of 'mean', 'min'"):
        make_model(q_agg="max")
    for name in ("alpha", "offline_steps", "random_crop"):
        with pytest.raises(ValueError, match=f"`{name}` must not be negative"):
            make_model(**{name: -1})
    with pytest.raises(ValueError, match="`offline_steps` needs a `dataset`"):
        make_model(dataset=None, offline_steps=10)
    with pytest.raises(ValueError, match="`batch_size`"):
        make_model(batch_size=0)
    with pytest.raises(ValueError, match="`n_flow_steps`"):
        make_model(policy_kwargs=dict(n_flow_steps=0))
    with pytest.raises(ValueError, match="`use_sde` must be False"):
        make_model(use_sde=True)
    with pytest.raises(ValueError, match="`random_crop_probability`"):
        make_model(random_crop_probability=7)

    class Fixed(gym.Env):
        observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Box(np.zeros(2), np.array([1.0, 0.0]))

    with pytest.raises(ValueError, match="with low < high"):
        FQL("MlpPolicy", Fixed())
    with pytest.raises(AssertionError, match="Discrete"):
        FQL("MlpPolicy", "CartPole-v1")
    data = make_dataset()
    data["actions"][5] = 3
    with pytest.raises(ValueError, match="actions, row 5: outside of the action space"):
        make_model(dataset=data)
    with pytest.raises(ValueError, match="There is no dataset"):
        make_model(dataset=None).learn_offline(10)
    model = make_model()
    before = parameters(model.policy.actor)
    with th.no_grad():
        model.policy.critic.q_networks.biases[0][:] = np.nan
    with pytest.raises(ValueError, match=r"The loss is not finite \(critic_loss: nan"):
        model.learn_offline(1)
    assert not changed(model.policy.actor, before)
