"""What FPO does with a rollout."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn
from torch.distributions import TanhTransform

import sb3_flow.fpo.fpo as fpo_module
from sb3_flow import FPO, presets
from sb3_flow.common.flow import PREDICTION_TYPES, cfm_loss, interpolate
from sb3_flow.common.surrogates import RATIO_TYPES, flow_ratio
from sb3_flow.fpo import MlpPolicy


def collect(model):
    """Collect a rollout, but do not train."""
    _, callback = model._setup_learn(model.n_steps * model.n_envs)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


def make_model(kind="box", **kwargs):
    def make_env():
        if kind == "dict":
            return gym.wrappers.TimeLimit(SimpleMultiObsEnv(random_start=False, discrete_actions=False), 20)
        return gym.make("Pendulum-v1")

    env = DummyVecEnv([make_env] * 2)
    if kind == "normalize":
        env = VecNormalize(env)
    kwargs = dict(n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu") | kwargs
    kwargs["policy_kwargs"] = dict(net_arch=[64, 64]) | kwargs.get("policy_kwargs", {})
    return FPO("MultiInputPolicy" if kind == "dict" else "MlpPolicy", env, **kwargs)


def record_calls(monkeypatch, name):
    """Record (arguments, result) of the calls of a function that FPO uses."""
    calls, function = [], getattr(fpo_module, name)

    def recorder(*args):
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(fpo_module, name, recorder)
    return calls


@pytest.mark.parametrize("kind", ["box", "dict", "normalize"])
@pytest.mark.parametrize("ratio_type", RATIO_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_first_ratio_is_exactly_one(monkeypatch, kind, ratio_type, prediction_type):
    model = make_model(kind, ratio_type=ratio_type, policy_kwargs=dict(prediction_type=prediction_type))
    calls = record_calls(monkeypatch, "flow_ratio")
    for _ in range(2):
        calls.clear()
        collect(model)
        model.train()
        ratios = [ratio for _, ratio in calls]
        assert ratios[0].shape == (32, 1 if ratio_type == "averaged" else 4)
        assert th.equal(ratios[0], th.ones_like(ratios[0]))
        assert not th.equal(ratios[-1], th.ones_like(ratios[-1]))


@pytest.mark.parametrize("kind", ["box", "dict", "normalize"])
def test_pairs_stay_with_their_transition(monkeypatch, kind):
    """With a learning rate of zero the ratio stays one in every minibatch of every epoch, however it is shuffled."""
    model = make_model(kind, learning_rate=0.0, n_epochs=4)
    if kind == "normalize":
        # Statistics that change during the rollout must not matter: the stored observations are normalized already
        model.env.obs_rms.count = 1e-2
    collect(model)
    calls = record_calls(monkeypatch, "flow_ratio")
    model.train()
    assert len(calls) == 4 * 4
    for _, ratio in calls:
        assert th.allclose(ratio, th.ones_like(ratio), atol=1e-5)
    # Pairs of another transition would have shown
    (old_loss, loss, *_), _ = calls[-1]
    assert not th.allclose(old_loss.roll(1, dims=0), loss, atol=1e-2)


def test_every_transition_once_per_epoch():
    model = make_model()
    collect(model)
    actions = model.rollout_buffer.actions.copy().reshape(-1, 1)
    rollout = model._get_rollout()
    taken = rollout.actions[:, 0].flatten(1).numpy()
    assert np.allclose(np.sort(taken, axis=0), np.sort(actions, axis=0))
    assert not np.allclose(taken, actions)
    for _ in range(2):
        indices = th.cat(list(model._shuffled_minibatches(128)))
        assert th.equal(indices.sort().values, th.arange(128))


@pytest.mark.parametrize(
    ("points", "times"), [((), ()), ((4,), (1,)), ((2, 3, 4), (1, 3, 4)), ((2, 3, 4), (2, 1, 4)), ((2, 3, 4), (1, 3, 1))]
)
def test_any_number_of_points(points, times):
    """Whatever their shape, and however their times broadcast to it, the output is that of each by itself."""
    policy, obs = make_model().policy, th.randn(5, 3)
    x_t, timesteps = th.randn(5, *points, 1), th.rand(5, *times)
    expected = policy.flow_output(obs.repeat_interleave(x_t[0].numel(), 0), x_t.reshape(-1, 1, 1),
                                  timesteps.expand(5, *points).reshape(-1, 1))  # fmt: skip
    for outputs in (policy.flow_output(obs, x_t, timesteps), policy.evaluate_flow(obs, x_t, timesteps)[1]):
        th.testing.assert_close(outputs, expected.view(x_t.shape))


def test_times_of_another_shape():
    policy = make_model().policy
    with pytest.raises(RuntimeError):
        # (not those of the first two points, and of the next two)
        policy.flow_output(th.randn(5, 3), th.randn(5, 4, 1), th.rand(5, 2))


@pytest.mark.parametrize("n_baseline_actions", [0, 2])
@pytest.mark.parametrize(
    ("prediction_type", "supervision", "reduction"),
    [("velocity", "noise", "mean"), ("velocity", "elbo", "sum"), ("noise", "velocity", "sqrt"), ("action", "action", "sum")],
)
def test_loss_is_that_of_the_rollout(monkeypatch, n_baseline_actions, prediction_type, supervision, reduction):
    """The losses of a transition, from the plain network and the stored (raw) action and observation."""
    calls = record_calls(monkeypatch, "draw_pairs")
    loss = dict(supervision=supervision, reduction=reduction, timestep_distribution="grid")
    policy_kwargs = dict(prediction_type=prediction_type, output_scale=1.0)
    model = make_model(n_mc_samples=3, n_baseline_actions=n_baseline_actions, cfm_loss=loss, policy_kwargs=policy_kwargs)
    collect(model)
    rollout = model._get_rollout()
    ((_, (noise, timesteps, _)),) = calls
    assert rollout.actions.shape == (128, 1 + n_baseline_actions, 1, 1)
    assert rollout.x_t.shape == rollout.targets.shape == (128, 1 + n_baseline_actions, 3, 1)
    assert rollout.timesteps.shape == rollout.weights.shape == (128, 1, 3)
    values, outputs = model.policy.evaluate_flow(rollout.observations, rollout.x_t, rollout.timesteps)
    losses = model._cfm_loss(outputs, rollout)
    assert losses.shape == (128, 1 + n_baseline_actions, 3)
    network = model.policy.action_net
    for actions, loss in zip(rollout.actions.unbind(dim=1), losses.unbind(dim=1), strict=True):
        x_t = interpolate(actions, noise, timesteps)
        plain = network.forward_plain(rollout.observations, x_t, timesteps)
        expected = cfm_loss(plain, actions, noise, timesteps, prediction_type, supervision, reduction)
        assert th.allclose(loss, expected, rtol=1e-4, atol=1e-5)
    assert th.allclose(values.flatten(), rollout.old_values, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 1, 4), (5, 3, 1), (5, 1, 1), (1, 1, 4)])
@pytest.mark.parametrize("hook", [False, True])
def test_timesteps_broadcast(shape, hook):
    """... to the points, also where the network is called with one for each."""
    policy = make_model(policy_kwargs=dict(output_scale=1.0)).policy
    obs, x_t, timesteps = th.randn(5, 3), th.randn(5, 3, 4, 1), th.rand(shape)
    expected = policy.flow_output(obs, x_t, timesteps.expand(5, 3, 4).contiguous())
    if hook:
        policy.action_net.register_forward_pre_hook(lambda module, inputs: inputs)
    assert th.allclose(policy.flow_output(obs, x_t, timesteps), expected, atol=1e-6)


def test_raw_actions_in_the_buffer_legal_ones_in_the_env():
    class RecordActions(gym.ActionWrapper):
        actions = []

        def action(self, action):
            self.actions.append(action)
            return action

    env = DummyVecEnv([lambda: RecordActions(gym.make("Pendulum-v1"))])
    for squash_type, action_scale in (("tanh", 1.0), ("tanh", 0.3), ("clip", 0.5)):
        RecordActions.actions.clear()
        policy_kwargs = dict(squash_type=squash_type, action_scale=action_scale)
        model = FPO("MlpPolicy", env, n_steps=256, seed=0, device="cpu", policy_kwargs=policy_kwargs)
        collect(model)
        raw, sent = model.rollout_buffer.actions.reshape(-1, 1), np.array(RecordActions.actions)
        assert np.abs(raw).max() > 2
        squashed = np.tanh(action_scale * raw) if squash_type == "tanh" else np.clip(action_scale * raw, -1, 1)
        assert np.allclose(sent, 2 * squashed, atol=1e-6)
        assert sent.dtype == np.float32 and all(env.action_space.contains(action) for action in sent)
        inside = np.abs(sent) < 1.99
        assert np.allclose(model.policy.scale_action(sent)[inside], raw[inside], atol=1e-2)


def test_action_perturbation():
    model = make_model(policy_kwargs=dict(action_perturbation_std=0.5))
    obs = th.zeros(20000, 3)
    th.manual_seed(0)
    unperturbed = model.policy._predict(obs)
    th.manual_seed(0)
    difference = model.policy(obs)[0] - unperturbed
    assert difference.std().item() == pytest.approx(0.5, rel=0.05)
    assert th.equal(model.policy(obs, deterministic=True)[0], model.policy._predict(obs, deterministic=True))


def test_zero_noise_prediction():
    """Deterministic predictions integrate from zero noise, others are the flow of a random one."""
    model = make_model(policy_kwargs=dict(skip_connection=False, squash_type="tanh", action_scale=1.0))
    obs = np.zeros((5, 3), dtype=np.float32)
    network = model.policy.action_net
    with th.no_grad():
        x = th.zeros(5, 1)
        for k in range(10):
            x = x - 0.1 * network.forward_plain(th.zeros(5, 3), x.unsqueeze(1), th.full((5, 1), 1 - k / 10)).squeeze(1)
    assert np.allclose(model.predict(obs, deterministic=True)[0], 2 * np.tanh(x.numpy()), atol=1e-5)
    assert model.predict(obs, deterministic=False)[0].std() > 0.1


def test_gradients_reach_only_what_they_should():
    model = make_model(vf_coef=0.5)
    policy = model.policy
    collect(model)
    rollout = model._get_rollout()
    actor = set(policy.action_net.parameters())
    critic = {*policy.mlp_extractor.parameters(), *policy.value_net.parameters()}
    assert actor | critic == set(policy.parameters())
    values, outputs = model.policy.evaluate_flow(rollout.observations, rollout.x_t, rollout.timesteps)
    for loss, touched in [(model._cfm_loss(outputs, rollout).mean(), actor), (values.square().mean(), critic)]:
        policy.zero_grad()
        loss.backward()
        assert {parameter for parameter in policy.parameters() if parameter.grad is not None} == touched


def test_baseline_actions_are_those_of_the_policy():
    model = make_model(n_baseline_actions=200, policy_kwargs=dict(action_perturbation_std=0.5))
    collect(model)
    rollout = model._get_rollout()
    obs = rollout.observations[:1].expand(4000, -1)
    expected, drawn = model.policy(obs)[0], rollout.actions[0, 1:]
    assert drawn.mean().item() == pytest.approx(expected.mean().item(), abs=0.25)
    assert drawn.std().item() == pytest.approx(expected.std().item(), rel=0.2)
    assert len(drawn.unique()) == 200


def test_opposite_baseline_actions():
    """Stratified sampling draws baseline actions from opposite noise: those of a Gaussian around zero are opposite."""
    policy_kwargs = dict(output_scale=0.0, action_perturbation_std=0.0)
    for sampling, opposite in [("stratified", True), ("independent", False)]:
        model = make_model(n_baseline_actions=3, cfm_loss=dict(sampling=sampling), policy_kwargs=policy_kwargs)
        collect(model)
        first, second, third = model._get_rollout().actions[:, 1:].unbind(dim=1)
        assert th.equal(first, -second) == opposite
        assert not th.equal(third.abs(), first.abs())


def test_common_advantages_do_not_change_the_policy():
    """If all actions are as good as each other there is no policy gradient on average: with baseline actions, that is so."""
    squared_norms = []
    for n_baseline_actions, sampling in [(0, "independent"), (1, "independent"), (2, "stratified")]:
        model = make_model(n_steps=4096, n_baseline_actions=n_baseline_actions, cfm_loss=dict(sampling=sampling))
        collect(model)
        rollout, gradients = model._get_rollout(), []
        for indices in th.arange(len(rollout.returns)).split(256):
            part = rollout.select(indices)
            losses = model._cfm_loss(model._flow_output(part), part)
            objective = flow_ratio(losses.detach(), losses).mean()
            gradient = th.autograd.grad(objective, list(model.policy.action_net.parameters()))
            gradients.append(th.cat([x.flatten() for x in gradient]))
        # That of the mean gradient, without bias: of pairs of different parts
        products = th.stack(gradients) @ th.stack(gradients).T
        squared_norms.append(((products.sum() - products.trace()) / (len(products) * (len(products) - 1))).item())
    assert abs(squared_norms[1]) < 0.5 * squared_norms[0] and abs(squared_norms[2]) < 0.5 * squared_norms[0]


def test_initial_weights():
    """LeCun-uniform weights have the variance 1 / fan-in; orthogonal ones are, times the square root of two."""
    for ortho_init in (True, False):
        policy = make_model(policy_kwargs=dict(net_arch=[256, 256], ortho_init=ortho_init)).policy
        for layer in (policy.action_net.layers[1], policy.mlp_extractor.value_net[2]):
            if ortho_init:
                assert th.allclose(layer.weight @ layer.weight.T, 2 * th.eye(256), atol=1e-4)
            else:
                assert layer.weight.var().item() * layer.in_features == pytest.approx(1, rel=0.05)
                assert layer.weight.abs().max().item() == pytest.approx((3 / 256) ** 0.5, rel=0.01)


def spread_without_rewards(monkeypatch, action_scale, n_rollouts, **kwargs):
    """Standard deviation of the actions, before they are clipped, after some training with nothing to gain."""

    def no_rewards(buffer):
        def compute_returns_and_advantage(**_):
            buffer.returns, buffer.advantages = np.zeros_like(buffer.values), np.zeros_like(buffer.values)

        return compute_returns_and_advantage

    model = make_model(
        n_steps=512, batch_size=128, n_epochs=10, gamma=0.0, policy_kwargs=dict(action_scale=action_scale), **kwargs
    )
    monkeypatch.setattr(model.rollout_buffer, "compute_returns_and_advantage", no_rewards(model.rollout_buffer))
    model.learn(n_rollouts * 1024)
    return action_scale * model.policy._predict(th.zeros(5000, 3)).std().item()


class GaussianFlow(nn.Module):
    """The flow from noise to a Gaussian around zero, exactly."""

    def __init__(self, action_dim, std):
        super().__init__()
        self.action_dim = action_dim
        self.log_std = nn.Parameter(th.tensor(std).log())

    def forward(self, features, x, timesteps):
        t, variance = timesteps.unsqueeze(-1), (2 * self.log_std).exp()
        return (t - (1 - t) * variance) / (t**2 + (1 - t) ** 2 * variance) * x

    def velocity_field(self, features, n_flow_steps):
        return lambda x, t: self(features, x, th.full_like(x[:, 0], t))

    def sample(self, features, noise, *_):
        return self.log_std.exp() * noise


@pytest.mark.parametrize("std", [1.0, 0.4])
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(ratio_type="averaged", cfm_loss=dict(timestep_distribution="grid", sampling="independent")),
        dict(ratio_type="averaged", cfm_loss=dict(timestep_distribution="grid", sampling="independent"), n_baseline_actions=0),
    ],
)
def test_entropy_gradient(std, kwargs):
    """That of a Gaussian, whose entropy is the logarithm of its standard deviation (and a constant)."""
    model = make_model(n_steps=16384, batch_size=4096, n_mc_samples=8, ent_coef=1.0, **kwargs)
    # That of the actions before they are clipped
    model.policy._bounded[:] = 0
    model.policy.action_net = GaussianFlow(1, std)
    buffer, rng, gradients = model.rollout_buffer, np.random.default_rng(0), []
    for _ in range(3):
        # A rollout, as if it had been collected
        buffer.reset()
        buffer.actions[:], buffer.full = rng.normal(scale=std, size=buffer.actions.shape), True
        rollout = model._get_rollout()
        losses = model._cfm_loss(model._flow_output(rollout), rollout)
        ratio = flow_ratio(losses.detach(), losses, model.ratio_type)
        objective = (ratio * model._surprise(rollout).unsqueeze(1)).mean()
        gradients.append(th.autograd.grad(objective, model.policy.action_net.log_std)[0].item())
    assert 0.9 < np.mean(gradients) < 1.1


@pytest.mark.parametrize("action_scale", [0.4, 2.0])
def test_entropy_bonus(monkeypatch, action_scale):
    """With nothing to gain the entropy decides: from narrower or wider, the actions come to fill the bounds."""
    spread = spread_without_rewards(monkeypatch, action_scale, 10, ent_coef=0.2)
    # The standard deviation before a tanh that makes actions uniform is 0.9
    assert 0.6 < spread < 1.3


@pytest.mark.parametrize("squash_type", ["tanh", "clip"])
def test_log_squashing(squash_type):
    """The change of the log-density under a tanh, as torch.distributions has it, also if the actions are clipped."""
    policy = make_model(policy_kwargs=dict(action_scale=0.5, squash_type=squash_type)).policy
    actions = th.linspace(-8, 8, 10).view(5, 2)
    expected = -TanhTransform().log_abs_det_jacobian(0.5 * actions, th.tanh(0.5 * actions)).sum(dim=-1)
    policy._bounded = policy._bounded.repeat(2)
    assert th.allclose(policy.log_squashing(actions), expected, atol=1e-5)


def test_bounds_loss_keeps_actions_in_reach(monkeypatch):
    """... when they are driven out of the bounds, here by a reward for little entropy."""
    free, kept = (spread_without_rewards(monkeypatch, 1.5, 5, ent_coef=-0.2, bounds_loss_coef=coef) for coef in (0.0, 1.0))
    assert free > 1.2 * 1.5 and kept < 0.8 * free


@pytest.mark.parametrize(
    ("policy_kwargs", "soft_bound"),
    [(dict(squash_type="clip", action_scale=0.5), 3.0), (dict(squash_type="tanh", action_scale=2.0), 1.5)],
)
def test_bounds_loss_by_hand(policy_kwargs, soft_bound):
    """Pendulum's actions are in [-2, 2]; in raw actions, the loss starts at 1.5 times the bounds if they are clipped."""
    policy = make_model(policy_kwargs=policy_kwargs).policy
    unit = 1 / policy_kwargs["action_scale"]
    actions = th.tensor([[0.0], [-soft_bound], [soft_bound + unit], [-soft_bound - 2 * unit]])
    assert policy.bounds_loss(actions).tolist() == pytest.approx([0.0, 0.0, 1.0, 4.0])


def test_bounds_loss_in_env_units():
    """Half a unit beyond the bound that there is; the legal action closest to zero is zero."""
    action_space = spaces.Box(np.array([-np.inf, 2.0, -np.inf]), np.array([3.0, np.inf, np.inf]), dtype=np.float64)
    policy = MlpPolicy(spaces.Box(-1, 1, (3,)), action_space, lambda _: 1e-3, action_scale=0.5)
    loss = policy.bounds_loss(th.tensor([[7.0, -1.0, 99.0], [9.0, 0.0, 0.0], [-99.0, -5.0, 0.0]]))
    assert loss.tolist() == [0.0, 1.0, 4.0] and loss.dtype == th.float32
    assert policy.unscale_action(np.array([[7.0, -1.0, 99.0], [5.0, 1.0, 0.0]])).tolist() == [[3, 2, 49.5], [2.5, 2.5, 0]]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_bounds_loss_is_on_the_predicted_actions(prediction_type):
    """... of the points where the CFM losses are taken: with perfect predictions, the actions of the rollout."""
    policy_kwargs = dict(squash_type="clip", action_scale=10.0, prediction_type=prediction_type)
    model = make_model(n_mc_samples=4, n_baseline_actions=2, bounds_loss_coef=0.1, policy_kwargs=policy_kwargs)
    collect(model)
    batch = model._get_rollout()
    expected = (10 * batch.actions.abs() - 1.5).clamp(min=0).square().mean().item()
    assert model._bounds_loss(batch.targets, batch).item() == pytest.approx(expected, rel=1e-3) and expected > 0


def test_target_kl_stops_early():
    model = make_model(n_epochs=10, target_kl=1e-7)
    collect(model)
    model.train()
    assert model._n_updates == 1
    model = make_model(n_epochs=10, target_kl=1e3)
    collect(model)
    model.train()
    assert model._n_updates == 10


def test_pseudo_kl_by_hand():
    """Mean squared change of the predicted noise: (1 - t)^2 times that of the velocity."""
    model = make_model()
    change, t = th.tensor([[[[1.0, -2.0]]]]), th.tensor([[[0.25]]])
    assert model._pseudo_kl(change, t).item() == pytest.approx(0.75**2 * 2.5)


@pytest.mark.parametrize("normalize_advantage", [True, "rollout", False])
def test_normalized_advantages(monkeypatch, normalize_advantage):
    """... in each minibatch, or over the rollout."""
    model = make_model(normalize_advantage=normalize_advantage, n_epochs=1, ent_coef=0.0)
    collect(model)
    expected = model.rollout_buffer.advantages.flatten()
    calls = record_calls(monkeypatch, "surrogate_objective")
    model.train()
    batches = [args[1].flatten() for args, _ in calls]
    if normalize_advantage == "rollout":
        expected = (expected - expected.mean()) / expected.std(ddof=1)
    if normalize_advantage is True:
        for batch in batches:
            assert batch.mean().item() == pytest.approx(0, abs=1e-5) and batch.std().item() == pytest.approx(1, rel=1e-4)
    else:
        assert all(abs(batch.mean().item()) > 1e-3 for batch in batches)
        assert np.allclose(np.sort(th.cat(batches)), np.sort(expected), rtol=1e-4, atol=1e-4)


def test_logger_keys():
    model = make_model()
    model.learn(128)
    keys = set(model.logger.name_to_value)
    assert {
        "train/clip_fraction", "train/policy_gradient_loss", "train/value_loss", "train/explained_variance",
        "train/approx_kl", "train/cfm_loss", "train/ratio_min", "train/ratio_max", "train/raw_action_max",
        "train/loss", "train/learning_rate", "train/clip_range", "train/n_updates",
    } <= keys  # fmt: skip
    values = model.logger.name_to_value
    assert values["train/ratio_min"] <= 1 <= values["train/ratio_max"]
    assert values["train/raw_action_max"] == pytest.approx(np.abs(model.rollout_buffer.actions).max())


class Bandit(gym.Env):
    """One state, one action in [-1, 1], and a reward of 1 on two intervals, around -0.6 and 0.6."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(1, dtype=np.float32), float(0.4 < abs(action[0]) < 0.8), True, False, {}


def test_bandit_keeps_both_modes():
    """Of two equally good actions FPO with the settings of the paper keeps both."""
    settings = dict(n_steps=64, batch_size=256, n_epochs=10, gamma=0.0, gae_lambda=0.0)
    settings["learning_rate"] = LinearSchedule(1e-3, 0.0, 1.0)
    model = FPO("MlpPolicy", make_vec_env(Bandit, 64), seed=0, device="cpu", **{**presets.PAPER, **settings})
    model.learn(12 * 64 * 64)
    actions, _ = model.predict(np.zeros((5000, 1), dtype=np.float32), deterministic=False)
    left, middle, right = (
        np.mean((low < actions) & (actions < high)) for low, high in [(-0.8, -0.4), (-0.4, 0.4), (0.4, 0.8)]
    )
    assert left >= 0.2 and right >= 0.2 and middle < 0.1


def test_ema():
    """The average predicts, the actor collects; the recursion is that of an exponential moving average."""
    model = make_model(ema_decay=0.9, ema_start=2)
    policy = model.policy
    weights, averages = [policy.action_net.input_layer.weight.detach().clone()], []
    for _ in range(5):
        collect(model)
        model.train()
        weights.append(policy.action_net.input_layer.weight.detach().clone())
        averages.append(policy.ema.module[1].input_layer.weight.clone())
    # Once for all gradient steps of an iteration; a copy until there were `ema_start` iterations
    for k in range(2):
        assert th.equal(averages[k], weights[k + 1])
    for k in range(2, 5):
        assert th.allclose(averages[k], 0.9 * averages[k - 1] + 0.1 * weights[k + 1], atol=1e-7)

    obs = np.zeros((4, 3), dtype=np.float32)
    predicted = model.predict(obs, deterministic=True)[0]
    rollout_action = policy.unscale_action(policy(th.zeros(4, 3), deterministic=True)[0].detach().numpy())
    assert not np.allclose(predicted, rollout_action)
    policy.features_extractor.load_state_dict(policy.ema.module[0].state_dict())
    policy.action_net.load_state_dict(policy.ema.module[1].state_dict())
    rollout_action = policy.unscale_action(policy(th.zeros(4, 3), deterministic=True)[0].detach().numpy())
    assert np.allclose(predicted, rollout_action, atol=1e-6)
    # No optimizer state or gradient for the average
    assert len(policy.optimizer.param_groups[0]["params"]) == len(list(make_model().policy.parameters()))
