"""The mathematics of FQL, and what its two phases share."""

import warnings
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_flow import FQL
from sb3_flow.common.networks import EnsembleMLP
from sb3_flow.offline.algorithm import random_crop
from sb3_flow.offline.buffers import OfflineBuffer
from sb3_flow.offline.datasets import dataset_name, load_dataset

N_FLOW_STEPS = 10


def make_dataset(n=400, seed=0, obs_dim=3, action_dim=1):
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=(n, obs_dim)).astype(np.float32)
    dones = rng.random(n) < 0.1
    return dict(
        observations=observations,
        actions=rng.uniform(-2, 2, size=(n, action_dim)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        next_observations=np.roll(observations, -1, axis=0),
        dones=dones,
        episode_ends=dones,
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
    distill_loss, q_loss = model._actor_losses(batch)
    for loss, own in [
        (model._critic_loss(batch)[0], policy.critic),
        (model._bc_flow_losses(batch).mean(), policy.bc_flow),
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
    with pytest.warns(UserWarning, match="The dataset was given as arrays, which are not saved"):
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


# --- What is done to the rewards of both phases

REWARD = 2.0


class ConstantReward(gym.Env):
    """Whatever happens, and whatever the goal is. The observation is a vector, or has goals."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, with_goals=False, n_steps=7):
        box = spaces.Box(-1, 1, (2,))
        self.names = ("observation", "achieved_goal", "desired_goal") if with_goals else None
        self.observation_space = spaces.Dict(dict.fromkeys(self.names, box)) if with_goals else box
        self.observation_space.seed(0)
        self.n_steps, self.n_resets = n_steps, 0

    def _observe(self):
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.step_number = 0
        self.n_resets += 1
        return self._observe(), {}

    def step(self, action):
        self.step_number += 1
        return self._observe(), REWARD, False, self.step_number == self.n_steps, {}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return np.full(len(achieved_goal), REWARD)

    def dataset(self, n=60):
        observations = [self._observe() for _ in range(n + 1)]
        if self.names:
            before, after = (
                {name: np.stack([obs[name] for obs in part]) for name in self.names}
                for part in (observations[:-1], observations[1:])
            )
        else:
            before, after = np.stack(observations[:-1]), np.stack(observations[1:])
        return dict(
            observations=before, next_observations=after, actions=np.zeros((n, 1)), rewards=np.full(n, REWARD),
            dones=np.arange(n) % 11 == 10, episode_ends=np.arange(n) % 11 == 10,
        )  # fmt: skip


BOTH_PHASES = {
    "dataset": dict(steps=0),
    "dataset, 3 steps": dict(steps=0, n_steps=3),
    "ReplayBuffer": dict(),
    "ReplayBuffer, balanced": dict(balanced_sampling=True),
    "NStepReplayBuffer": dict(n_steps=3),
    "NStepReplayBuffer, balanced": dict(n_steps=3, balanced_sampling=True),
    "NStepReplayBuffer and single steps": dict(
        replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=dict(n_steps=4, gamma=0.9), balanced_sampling=True
    ),
    "DictReplayBuffer": dict(with_goals=True),
    "HerReplayBuffer": dict(with_goals=True, replay_buffer_class=HerReplayBuffer, balanced_sampling=True),
    "VecNormalize": dict(normalize=True),
}


def make_constant(steps=40, with_goals=False, normalize=False, **kwargs):
    env, data = ConstantReward(with_goals), ConstantReward(with_goals).dataset()
    if normalize:
        env = VecNormalize(DummyVecEnv([lambda: ConstantReward(with_goals)]), norm_reward=False)
    policy = "MultiInputPolicy" if with_goals else "MlpPolicy"
    kwargs = dict(gamma=0.9, policy_kwargs=dict(net_arch=[8]), buffer_size=100, batch_size=8, seed=0, device="cpu") | kwargs
    return FQL(policy, env, dataset=data, offline_steps=1, **kwargs).learn(steps), data


@pytest.mark.parametrize("kind", BOTH_PHASES)
def test_one_reward_in_both_phases(kind):
    """Whatever buffer a transition comes from, and whatever number of rewards is in a return."""
    model, data = make_constant(**BOTH_PHASES[kind])

    def sampled():
        np.random.seed(3)
        th.manual_seed(3)
        return model._sample(128)

    def returns(discounts):
        return 1 if discounts is None else (1 - discounts) / (1 - 0.9)

    plain = sampled()
    assert np.allclose(plain.rewards, REWARD * returns(plain.discounts))
    if plain.discounts is not None:
        assert len(plain.discounts.unique()) > 2

    @settings(max_examples=20, deadline=None)
    @given(st.floats(-10, 10), st.floats(-10, 10))
    def check(scale, shift):
        model.set_dataset(data, reward_scale=scale, reward_shift=shift)
        batch = sampled()
        assert np.allclose(batch.rewards, (scale * REWARD + shift) * returns(batch.discounts), atol=1e-4)
        for before, after in zip(plain, batch, strict=True):
            if after is not batch.rewards and not isinstance(after, dict):
                assert before is after is None or th.equal(before, after)

    check()
    # What is stored, and what is logged of episodes, are the rewards of the environment
    assert (model.offline_buffer.rewards == REWARD).all() and set(np.unique(model.replay_buffer.rewards)) <= {0, REWARD}
    assert all(info["r"] == 7 * REWARD for info in model.ep_info_buffer)


def test_rewards_of_a_loaded_model(tmp_path):
    np.savez(tmp_path / "data.npz", **make_dataset())
    for dataset in (make_dataset(), tmp_path / "data.npz"):
        model = make_model(dataset=dataset, dataset_kwargs=dict(reward_scale=2.0, reward_shift=-1.0)).learn(3)
        model.save(tmp_path / "model.zip")
        for kwargs, transformed in [
            (dict(), lambda rewards: 2 * rewards - 1),
            (dict(dataset_kwargs=dict(reward_shift=5)), lambda rewards: rewards + 5),
        ]:
            loaded = FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu", **kwargs)
            # The task is the same with another dataset, and without one
            for _ in range(2):
                np.random.seed(0)
                rewards = model.replay_buffer.sample(64).rewards
                loaded.offline_buffer, loaded.replay_buffer = None, model.replay_buffer
                np.random.seed(0)
                assert np.allclose(loaded._sample(64).rewards, transformed(rewards))
                loaded.set_dataset(make_dataset())
        loaded.set_dataset(make_dataset(), reward_shift=0)
        loaded.replay_buffer.reset()
        assert set(loaded._sample(500).rewards.flatten().tolist()) <= set(make_dataset()["rewards"].tolist())
        with pytest.raises(ValueError, match="`reward_scale` must be a finite number, it is 'twice'"):
            FQL.load(tmp_path / "model.zip", dataset_kwargs=dict(reward_scale="twice"))


def test_rewards_that_cannot_be_transformed():
    for value in (np.nan, np.inf, "1", None):
        with pytest.raises(ValueError, match=f"`reward_shift` must be a finite number, it is {value!r}"):
            make_model(dataset_kwargs=dict(reward_shift=value))
    with pytest.raises(ValueError, match="`dataset_kwargs` needs a `dataset`"):
        make_model(dataset=None, dataset_kwargs=dict(reward_shift=-1))
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model = FQL(
        "MlpPolicy", env, dataset=make_dataset(), dataset_kwargs=dict(reward_scale=0.1), policy_kwargs=dict(net_arch=[8])
    )
    for learn in (model.learn, model.learn_offline):
        with pytest.raises(ValueError, match="norm_reward=False"):
            learn(5)
    undiscounted = make_model(gamma=1.0, n_steps=2, dataset_kwargs=dict(reward_shift=-1))
    with pytest.raises(ValueError, match="`reward_shift` with returns of several steps needs a `gamma` of less than 1"):
        undiscounted.learn_offline(2)
    undiscounted.set_dataset(make_dataset(), reward_scale=0.1, reward_shift=0)
    undiscounted.learn_offline(2)


def test_normalized_returns_are_sums_of_normalized_rewards():
    """In the dataset as in SB3's buffers: each reward is normalized, and clipped, by itself."""
    env = VecNormalize(DummyVecEnv([ConstantReward]), norm_obs=False, clip_reward=0.5)
    env.ret_rms.var = np.array(1.0)
    buffer = OfflineBuffer(load_dataset(ConstantReward().dataset()), n_steps=3, gamma=0.9)
    batch = buffer.sample(64, env)
    assert np.allclose(batch.rewards, 0.5 * (1 - batch.discounts) / (1 - 0.9))


def test_gamma_of_returns_of_several_steps(tmp_path):
    model = make_model(n_steps=3).learn(5)
    model.save(tmp_path / "model.zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), gamma=0.5)
    assert isinstance(loaded.replay_buffer, NStepReplayBuffer) and loaded.replay_buffer.gamma == 0.5
    loaded.set_dataset(make_dataset())
    loaded.learn(5)
    assert loaded._sample(500).discounts.max() == 0.5
    loaded.gamma = 0.9
    with pytest.raises(ValueError, match=r"`gamma` is 0\.9, but 0\.5 in the returns of OfflineBuffer"):
        loaded.learn(5)
    single = FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), n_steps=1)
    assert type(single.replay_buffer) is ReplayBuffer
    other = dict(replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=dict(n_steps=2, gamma=0.9))
    with pytest.raises(ValueError, match=r"`gamma` is 0\.99, but 0\.9 in the returns of NStepReplayBuffer"):
        make_model(**other).learn(5)


def test_time_limits_of_both_phases():
    kwargs = dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False), buffer_size=100)
    with pytest.warns(UserWarning, match="is over for what is collected online, but not for the dataset"):
        make_model(**kwargs).learn(3)


# --- What a dataset may be like


def test_actions_are_clipped():
    data = make_dataset()
    data["actions"][5], data["actions"][7] = 3, -2.5
    with pytest.raises(ValueError, match=r"actions, row 5: outside of .* which `clip_actions=True` clips them to \(\[3\.\]\)"):
        make_model(dataset=data)
    actions = make_model(dataset=data, dataset_kwargs=dict(clip_actions=True)).offline_buffer.actions.flatten()
    assert actions[5] == pytest.approx(1 - 1e-5) and actions[7] == pytest.approx(-1 + 1e-5)
    assert data["actions"][5] == 3 and np.allclose(actions[8:] * 2, data["actions"][8:].flatten(), atol=1e-4)
    # What is not a number is not clipped
    for value in (np.nan, np.inf):
        data["actions"][9] = value
        with pytest.raises(ValueError, match="actions, row 9: NaN or inf"):
            make_model(dataset=data, dataset_kwargs=dict(clip_actions=True))
    # Alone, a dataset has no bounds
    with pytest.raises(ValueError, match=r"`clip_actions`, .* are for `set_dataset\(\)`"):
        load_dataset(data, clip_actions=True)


@pytest.mark.filterwarnings("ignore:The bounds of the action space are so wide")
def test_actions_of_wide_bounds(tmp_path):
    """Neither the difference of the bounds, nor that of an action and a bound, overflows."""
    largest = np.finfo(np.float32).max

    class Wide(gym.Env):
        observation_space = spaces.Box(-10, 10, (3,))
        action_space = spaces.Box(np.float32([-largest, 0, 0.9 * largest, -1]), np.float32([largest, largest, largest, 3]))

    scaled = np.random.default_rng(0).uniform(-0.99, 0.99, (400, 4)).astype(np.float32)
    low, high = Wide.action_space.low, Wide.action_space.high
    actions = (0.5 * (1 - scaled) * low + 0.5 * (1 + scaled) * high).astype(np.float32)
    data = make_dataset() | dict(actions=actions)
    np.savez(tmp_path / "data.npz", **data)
    for dataset in (data, tmp_path / "data.npz"):
        before = actions.copy()
        with np.errstate(over="raise", invalid="raise"):
            model = FQL("MlpPolicy", Wide(), dataset=dataset, buffer_size=1, device="cpu", policy_kwargs=dict(net_arch=[8]))
            model.learn_offline(1)
        assert np.array_equal(actions, before)
        assert model.offline_buffer.actions.dtype == th.float32
        assert np.allclose(model.offline_buffer.actions.numpy(), scaled, atol=1e-4)
    with pytest.raises(ValueError, match="actions, row 0: outside of the action space"):
        model.set_dataset(data | dict(actions=actions * np.float32([1, 1, 0.5, 1])))


class BatchNormExtractor(FlattenExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.norm = th.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations):
        return self.norm(super().forward(observations))


@pytest.mark.parametrize("share_features_extractor", [False, True])
@pytest.mark.parametrize(
    "kwargs", [dict(), dict(n_steps=3), dict(wrapper=VecNormalize), dict(wrapper=partial(VecFrameStack, n_stack=2))]
)
def test_terminal_observations_may_be_nan(kwargs, share_features_extractor):
    """No weight depends on what is there, in the dataset and online."""
    terminal = np.arange(60) % 11 == 10

    class Broken(ConstantReward):
        value: float

        def step(self, action):
            obs, reward, _, over, info = super().step(action)
            return np.full_like(obs, self.value) if over else obs, reward, over, False, info

    def weights(value, features_extractor_class=FlattenExtractor):
        wrapper = kwargs.get("wrapper", lambda env: env)
        Broken.value = value
        env = Broken()
        data = env.dataset()
        data["next_observations"][terminal, 1] = value
        model = FQL(
            "MlpPolicy", wrapper(DummyVecEnv([lambda: env])), dataset=data, seed=0, n_steps=kwargs.get("n_steps", 1),
            policy_kwargs=dict(
                net_arch=[8], share_features_extractor=share_features_extractor,
                features_extractor_class=features_extractor_class,
            ), batch_size=64, device="cpu",
        )  # fmt: skip
        model.learn_offline(5)
        model.learn(20)
        return model.policy.parameters_to_vector()

    finite = weights(0.3)
    assert np.array_equal(weights(np.nan), finite) and np.array_equal(weights(np.inf), finite)
    assert np.isfinite(weights(np.nan, BatchNormExtractor)).all()


def test_observations_may_not_be_nan():
    """But where nothing is bootstrapped from."""
    for key in (None, "achieved_goal"):
        env = ConstantReward(with_goals=key is not None)
        model = FQL("MultiInputPolicy" if key else "MlpPolicy", env, policy_kwargs=dict(net_arch=[8]), buffer_size=10)
        for field, row, is_refused in [
            ("next_observations", 10, False),
            ("next_observations", 9, True),
            ("observations", 10, True),
        ]:
            data = env.dataset()
            (data[field][key] if key else data[field])[row, 0] = np.nan
            if is_refused:
                with pytest.raises(ValueError, match=rf"{field}.*, row {row}: NaN or inf"):
                    model.set_dataset(data)
            else:
                model.set_dataset(data)
                model.learn_offline(3)


def test_bytes_are_not_fractions():
    shape = (3, 8, 8)

    class Images(gym.Env):
        observation_space, action_space = spaces.Box(0, 1, shape, dtype=np.float32), spaces.Box(-1, 1, (1,))

    data = make_dataset(20) | {name: np.full((20, *shape), 255, np.uint8) for name in ("observations", "next_observations")}
    data["actions"] /= 2
    with pytest.raises(ValueError, match="observations are bytes, but those of the env are not more than 1"):
        FQL("MlpPolicy", Images(), dataset=data, buffer_size=10)


def test_stacked_observations_are_normalized():
    """By the statistics of stacks, as SB3 does it where VecNormalize is around VecFrameStack."""
    data = make_dataset(2000) | dict(episode_ends=np.arange(2000) % 10 == 9)
    env = VecNormalize(VecFrameStack(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), 2))
    model = FQL("MlpPolicy", env, dataset=data, policy_kwargs=dict(net_arch=[16]), seed=0).learn_offline(2)
    # One in ten has zeros in place of the observation before
    assert np.allclose(env.obs_rms.var[:3], 0.9 * env.obs_rms.var[3:], rtol=0.03)
    batch = model._sample(2000)
    assert (batch.observations.std(dim=0) - 1).abs().max() < 0.1
    inside = VecFrameStack(VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")])), 2)
    with pytest.raises(ValueError, match="`VecNormalize` must be around `VecFrameStack`"):
        FQL("MlpPolicy", inside, dataset=data, policy_kwargs=dict(net_arch=[16])).learn_offline(2)


def test_normalization_knows_the_dataset_without_an_offline_phase():
    data = make_dataset(2000)
    data["observations"] = 100 * data["observations"] + 50
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    FQL("MlpPolicy", env, dataset=data, policy_kwargs=dict(net_arch=[16])).learn(10)
    assert np.allclose(env.obs_rms.mean, data["observations"].mean(axis=0), atol=1)


def test_the_environment_is_not_touched_offline():
    class Robot(ConstantReward):
        def reset(self, **kwargs):
            raise AssertionError("The robot moves")

    model = FQL("MlpPolicy", Robot(), dataset=Robot().dataset(), policy_kwargs=dict(net_arch=[8]), offline_steps=3)
    model.learn_offline(3)
    model.learn_offline(2, reset_num_timesteps=False)
    assert model.num_timesteps == 5 and model._n_updates == 5
    model.learn(0)
    # And it goes on where it was
    env = ConstantReward()
    model = FQL("MlpPolicy", env, dataset=env.dataset(), policy_kwargs=dict(net_arch=[8]), offline_steps=3).learn(4)
    assert env.n_resets == 1
    model.learn_offline(3)
    model.learn(2, reset_num_timesteps=False)
    assert env.n_resets == 1 and env.step_number == 6


# --- Without rewards


def test_cloning_needs_no_rewards(tmp_path):
    data = make_dataset()
    del data["rewards"]
    with pytest.raises(ValueError, match="rewards"):
        make_model(dataset=data)
    clone = dict(need_rewards=False)
    model = make_model(dataset=data, dataset_kwargs=clone, alpha=0.0, learning_rate=1e-2)
    networks = (model.critic, model.actor, model.bc_flow)
    before = [parameters(network) for network in networks]
    model.learn_offline(10)
    assert [changed(*pair) for pair in zip(networks, before, strict=True)] == [False, True, True]
    losses = {name for name in model.logger.name_to_value if name.startswith("train/") and name.endswith("_loss")}
    assert losses == {"train/bc_flow_loss", "train/distill_loss"}
    # Rewards make no difference where there are any
    other = make_model(dataset=data | dict(rewards=np.full(400, 100)), dataset_kwargs=clone, alpha=0.0, learning_rate=1e-2)
    other.learn_offline(10)
    assert np.array_equal(other.policy.parameters_to_vector(), model.policy.parameters_to_vector())
    # The one-step policy is that of the flow
    model.learn_offline(200)
    obs, noise = th.zeros(500, 3), th.randn(500, 1)
    with th.no_grad():
        difference = model.actor.unclipped_actions(obs, noise).clamp(-1, 1) - model.bc_flow.sample(obs, noise)
    assert difference.abs().mean() < 0.2
    # What was collected online is not cloned
    for _ in range(100):
        model.replay_buffer.add(np.zeros(3), np.zeros(3), np.zeros((1, 1)), np.full(1, 7.0), np.zeros(1), [{}])
    assert not (model._sample(100).rewards == 7).any()
    # It is of no use online, unless it is left behind
    with pytest.raises(ValueError, match="a dataset is only cloned"):
        model.learn(5)
    np.savez(tmp_path / "data.npz", **data)
    model = make_model(dataset=tmp_path / "data.npz", dataset_kwargs=clone, offline_steps=5).learn(0)
    model.save(tmp_path / "model.zip")
    FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1")).learn_offline(2)
    loaded = FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), dataset=None)
    with pytest.warns(UserWarning, match="The dataset was given as arrays, which are not saved"):
        loaded.learn(5)
    assert changed(loaded.critic, parameters(model.critic))


# --- Validation


def test_validation_losses(tmp_path):
    """They are logged, and the training does not know of them."""

    def train(validation):
        model = FQL(
            "MlpPolicy", ConstantReward(), dataset=ConstantReward().dataset(), dataset_kwargs=dict(validation=validation),
            policy_kwargs=dict(net_arch=[8], features_extractor_class=BatchNormExtractor), seed=0, batch_size=32, device="cpu",
        )  # fmt: skip
        model.set_logger(configure_logger(0))
        written = []
        model.logger.dump = lambda step: written.append(dict(model.logger.name_to_value))
        model.learn_offline(40, log_interval=10)
        model.learn(30, log_interval=1)
        return model, written

    model, written = train(ConstantReward().dataset(20))
    without, _ = train(None)
    assert np.array_equal(model.policy.parameters_to_vector(), without.policy.parameters_to_vector())
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, without.policy.state_dict()[name]), name
    assert len(written) >= 5
    for name in ("critic_loss", "bc_flow_loss", "distill_loss", "q_loss", "q_mean"):
        values = [values[f"validation/{name}"] for values in written]
        assert np.isfinite(values).all() and len(set(values)) > 1
    assert not any(name.startswith("validation/") for name in without.logger.name_to_value)
    # It is loaded again with the dataset, if both have names
    np.savez(tmp_path / "val.npz", **make_dataset(50, seed=1))
    np.savez(data := tmp_path / "data.npz", **make_dataset())
    for validation in (tmp_path / "val.npz", 0.5):
        make_model(dataset=data, dataset_kwargs=dict(validation=validation)).save(tmp_path / "model.zip")
        loaded = FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1")).learn_offline(2)
        assert loaded.validation_buffer is not None


@pytest.mark.parametrize("n_steps", [1, 3])
def test_whole_episodes_are_held_out(n_steps):
    data = make_dataset(400) | dict(dones=np.zeros(400), episode_ends=np.arange(400) % 13 == 12)
    data["observations"][:, 0] = data["next_observations"][:, 0] = np.arange(400) // 13
    model = make_model(dataset=data, dataset_kwargs=dict(validation=0.2), n_steps=n_steps)

    def episodes(buffer):
        batch = buffer.sample(5000)
        assert th.equal(batch.observations[:, 0], batch.next_observations[:, 0])
        return set(batch.observations[:, 0].tolist())

    trained_on, held_out = episodes(model.offline_buffer), episodes(model.validation_buffer)
    assert len(held_out) == 6 and trained_on | held_out == set(range(31)) and not trained_on & held_out
    assert len(model.offline_buffer) + len(model.validation_buffer) == 400
    # Always the same ones, whatever the seed: a run that goes on has not seen them
    again = make_model(dataset=data, dataset_kwargs=dict(validation=0.2), seed=7)
    assert th.equal(again.validation_buffer.rows, model.validation_buffer.rows)
    # The arrays are held once
    assert model.validation_buffer.observations is model.offline_buffer.observations
    # Nor do the statistics know of them
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    FQL("MlpPolicy", env, dataset=data, dataset_kwargs=dict(validation=0.2), policy_kwargs=dict(net_arch=[8])).learn_offline(1)
    assert env.obs_rms.mean[0] == pytest.approx(data["observations"][model.offline_buffer.rows, 0].mean(), rel=1e-3)


def test_validation_that_is_not_saved(tmp_path):
    """As with a dataset that was given as arrays."""
    data, path = tmp_path / "data.npz", tmp_path / "model.zip"
    np.savez(data, **make_dataset())
    for validation in (make_dataset(seed=1), data, 0.5, None):
        make_model(dataset=data, dataset_kwargs=dict(validation=validation)).save(path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = FQL.load(path, env=gym.make("Pendulum-v1")).learn_offline(1)
        said = [text for text in (str(warning.message) for warning in caught) if "held out for validation" in text]
        assert len(said) == isinstance(validation, dict)
        assert (model.validation_buffer is None) == (validation is None or isinstance(validation, dict))


@pytest.mark.parametrize("steps", [2.5, "5", None, -1, True])
def test_bad_numbers_of_steps(steps):
    model = make_model()
    with pytest.raises(ValueError, match="`gradient_steps` must"):
        model.learn_offline(steps)
    with pytest.raises(ValueError, match="`total_timesteps` must"):
        model.learn(steps)
    assert model.learn_offline(np.int64(2)).num_timesteps == model.learn_offline(2.0).num_timesteps == 2


@pytest.mark.parametrize("clip_actions", ["yes", 1, None])
def test_bad_dataset_arguments(clip_actions):
    with pytest.raises(ValueError, match="`clip_actions` must be True or False, it is"):
        make_model(dataset_kwargs=dict(clip_actions=clip_actions))
    with pytest.raises(ValueError, match="`dataset_kwargs` must be a dictionary, it is 'a'"):
        make_model(dataset_kwargs="a")


def test_loaded_without_arguments_of_the_dataset(tmp_path):
    make_model().save(tmp_path / "model.zip")
    assert FQL.load(tmp_path / "model.zip", dataset=None, dataset_kwargs=None).dataset_kwargs == {}


def test_bad_validation():
    for value in (0, 1, -0.1, 1.5, True):
        with pytest.raises(ValueError, match=r"`validation` must be a dataset, or a fraction between 0 and 1, it is"):
            make_model(dataset_kwargs=dict(validation=value))
    episode = make_dataset() | dict(dones=np.zeros(400), episode_ends=np.arange(400) == 399)
    with pytest.raises(ValueError, match=r"Whole episodes are held out for validation: 0\.1 of 1 leaves none"):
        make_model(dataset=episode, dataset_kwargs=dict(validation=0.1))
    with pytest.raises(ValueError, match="`validation`: observations of shape"):
        make_model(dataset_kwargs=dict(validation=make_dataset(obs_dim=4)))


# --- Where a dataset is


@pytest.mark.parametrize("with_goals", [False, True])
def test_dataset_elsewhere_than_the_networks(with_goals):
    """The device of the samples is "meta", where there is no data."""
    transitions = load_dataset(ConstantReward(with_goals).dataset())
    buffer = OfflineBuffer(transitions, "meta", n_steps=2, n_stack=1, storage_device="cpu")

    def devices(values):
        parts = [part for value in values for part in (value.values() if isinstance(value, dict) else [value])]
        return {part.device.type for part in parts}

    assert devices([buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards, buffer.dones]) == {"cpu"}
    for part in (buffer, *buffer.split(0.5)):
        assert devices(part.sample(8)) == {"meta"}
    model = make_model(dataset_kwargs=dict(device="cpu", validation=0.5))
    assert model.offline_buffer.storage_device == th.device("cpu") == model.validation_buffer.storage_device


def test_dataset_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez("data.npz", **make_dataset())
    for dataset in ("data.npz", Path("data.npz"), "~/data.npz", ["data.npz", Path("data.npz")]):
        make_model(dataset=dataset, dataset_kwargs=dict(validation="data.npz")).save("model.zip")
        (tmp_path / "other").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "other")
        loaded = FQL.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1")).learn_offline(2)
        absolute = str(tmp_path / "data.npz")
        assert loaded.dataset == (absolute if not isinstance(dataset, list) else [absolute] * 2)
        monkeypatch.chdir(tmp_path)
    # One that is given to a loaded model is remembered in the same way, whether it was trained on or not
    for dataset, expected in [("other.npz", str(tmp_path / "other.npz")), (make_dataset(), None)]:
        FQL.load("model.zip", dataset=dataset).save("again.zip")
        assert FQL.load("again.zip").dataset == expected
    for name, expected in [
        ("ogbench:cube-single-play-singletask-v0", None),
        ("ogbench:cube-single-play-singletask-v0@data", f"ogbench:cube-single-play-singletask-v0@{tmp_path}/data"),
        ("ogbench:cube-single-play-singletask-v0@~/data", f"ogbench:cube-single-play-singletask-v0@{tmp_path}/data"),
        ("minari:pendulum/random-v0", None),
        (make_dataset(), make_dataset),
        (["data.npz", make_dataset()], make_dataset),
    ]:
        assert dataset_name(name) == (None if expected is make_dataset else expected or name)


def test_dataset_is_not_there_any_more(tmp_path):
    np.savez(tmp_path / "data.npz", **make_dataset())
    model = make_model(dataset=tmp_path / "data.npz", offline_steps=5).learn(5)
    model.save(tmp_path / "model.zip")
    (tmp_path / "data.npz").rename(tmp_path / "moved.npz")
    # To predict it is not needed
    obs = np.ones((5, 3), dtype=np.float32)
    for env in (None, gym.make("Pendulum-v1")):
        loaded = FQL.load(tmp_path / "model.zip", env=env, device="cpu")
        assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    for learn in (loaded.learn, loaded.learn_offline):
        with pytest.raises(FileNotFoundError, match=r"data\.npz.*`dataset=` where the dataset is now, or with `dataset=None`"):
            learn(3)
    env = gym.make("Pendulum-v1")
    FQL.load(tmp_path / "model.zip", env=env, dataset=str(tmp_path / "moved.npz")).learn(3, reset_num_timesteps=False)
    for without in (dict(dataset=None), dict(custom_objects=dict(dataset=None))):
        loaded = FQL.load(tmp_path / "model.zip", env=env, **without)
        with pytest.warns(UserWarning, match="The dataset was given as arrays, which are not saved"):
            loaded.learn(3, reset_num_timesteps=False)
        assert loaded.offline_buffer is None


def test_zero_steps_are_zero():
    model = make_model(offline_steps=7)
    model.learn(0)
    assert model._n_updates == 7 == model.num_timesteps and model.replay_buffer.pos == 0
    model.learn(0)
    model.learn_offline(0, reset_num_timesteps=False)
    assert model._n_updates == 7 == model.num_timesteps
    assert make_model().learn(0)._n_updates == 0
    with pytest.raises(ValueError, match="`total_timesteps` must not be negative, it is -1"):
        model.learn(-1)
    with pytest.raises(ValueError, match="`gradient_steps` must not be negative, it is -3"):
        model.learn_offline(-3)


def test_bad_arguments():
    with pytest.raises(ValueError, match="Unknown `q_agg`: 'max', it must be one of 'mean', 'min'"):
        make_model(q_agg="max")
    for name in ("alpha", "offline_steps", "random_crop"):
        with pytest.raises(ValueError, match=f"`{name}` must not be negative"):
            make_model(**{name: -1})
        with pytest.raises(ValueError, match=f"`{name}` must (not be negative|be an integer)"):
            make_model(**{name: np.nan})
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
    with pytest.raises(ValueError, match=r"The loss is not finite \(critic: nan"):
        model.learn_offline(1)
    assert not changed(model.policy.actor, before)


class PartlyFrozen(FlattenExtractor):
    """With a layer that is not trained."""

    def __init__(self, observation_space):
        super().__init__(observation_space)
        self.layer = th.nn.Linear(3, 3).requires_grad_(False)

    def forward(self, observations):
        return self.layer(super().forward(observations))


@pytest.mark.parametrize("call", [1, 2, 3])
def test_critics_do_not_stay_frozen_after_an_error(monkeypatch, call):
    """Ctrl-C, or too little memory, in whichever call of them."""
    model, forward, calls = make_model(), EnsembleMLP.forward, []

    def interrupted(self, *args):
        calls.append(self)
        if len(calls) == call:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(EnsembleMLP, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.learn_offline(1)
    assert all(parameter.requires_grad for parameter in model.critic.parameters())


def test_what_is_frozen_of_the_critics_stays_frozen():
    kwargs = dict(net_arch=[4, 4], features_extractor_class=PartlyFrozen)
    model = FQL("MlpPolicy", "Pendulum-v1", batch_size=4, learning_starts=4, device="cpu", policy_kwargs=kwargs)
    model.critic.q_networks.weights[0].requires_grad_(False)
    before = {name: (x.clone(), x.requires_grad) for name, x in model.critic.named_parameters()}
    model.learn(10)
    for name, parameter in model.critic.named_parameters():
        value, requires_grad = before[name]
        assert parameter.requires_grad == requires_grad and th.equal(parameter, value) != requires_grad
