"""The denoising chains of DPPO, its losses, and what becomes of them in rollouts and updates."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn
from torch.distributions import Normal

import sb3_flow.dppo.dppo as dppo_module
from sb3_flow import DPPO
from sb3_flow.common.networks import FlowNetwork
from sb3_flow.dppo import presets
from sb3_flow.dppo.buffers import ChainDictRolloutBuffer, ChainRolloutBuffer
from sb3_flow.dppo.dppo import step_log_probs

OBS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


def make_model(kind="box", **kwargs):
    def make_env():
        if kind == "dict":
            return gym.wrappers.TimeLimit(SimpleMultiObsEnv(random_start=False, discrete_actions=False), 20)
        return gym.make("Pendulum-v1")

    env = DummyVecEnv([make_env] * 2)
    env.seed(0)
    if kind == "normalize":
        env = VecNormalize(env)
    kwargs = dict(n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu") | kwargs
    kwargs["policy_kwargs"] = dict(net_arch=[16], n_flow_steps=4) | kwargs.get("policy_kwargs", {})
    return DPPO("MultiInputPolicy" if kind == "dict" else "MlpPolicy", env, **kwargs)


def collect(model):
    """Collect a rollout, but do not train."""
    _, callback = model._setup_learn(model.n_steps * model.n_envs)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


def record_ratios(monkeypatch):
    """Those that the objective gets, with its advantages and clip ranges."""
    calls, function = [], dppo_module.surrogate_objective

    def recorder(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(dppo_module, "surrogate_objective", recorder)
    return calls


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_log_probs_of_steps(reduction):
    means, states = th.randn(2, 7, 4, 3)
    expected = getattr(Normal(means, 0.3).log_prob(states), reduction)(dim=-1)
    th.testing.assert_close(step_log_probs(means, states, 0.3, reduction), expected)
    # By hand: a step of 0.1 and 0.2 from its mean, of a standard deviation of 0.1
    log_prob = step_log_probs(th.zeros(1, 1, 2), th.tensor([[[0.1, 0.2]]]), 0.1)
    assert log_prob.item() == pytest.approx(-0.5 - 2 + 2 * math.log(10) - math.log(2 * math.pi), abs=1e-5)


@pytest.mark.parametrize("activation_fn", [nn.SiLU, nn.Tanh, nn.PReLU])
def test_chain(activation_fn):
    """Each state is Euler's step from the one before, and its noise; that of the fast path is the same."""
    network = FlowNetwork(5, 3, [16, 16], activation_fn, output_scale=2.0)
    features, noise, step_noise = th.randn(7, 5), th.randn(7, 3), 0.1 * th.randn(4, 7, 3)
    x, states = noise, [noise]
    for k in range(4):
        velocity = network.forward_plain(features, x.unsqueeze(1), th.full((7, 1), 1 - k / 4)).squeeze(1)
        x = x - velocity / 4 + step_noise[k]
        states.append(x)
    expected = th.stack(states, dim=1)
    th.testing.assert_close(network.sample_chain(features, noise, step_noise), expected)
    with th.no_grad():
        for _ in range(2):
            th.testing.assert_close(network.sample_chain(features, noise, step_noise), expected, rtol=1e-4, atol=1e-5)
        # Without noise in the steps, it is what Euler's sampler makes
        th.testing.assert_close(
            network.sample_chain(features, noise, th.zeros_like(step_noise))[:, -1], network.sample(features, noise, 4)
        )
    loss = network.sample_chain(features, noise, step_noise)[:, -1].sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["box", "dict", "normalize"])
@pytest.mark.parametrize("n_trained_steps", [None, 1, 3])
def test_rollouts_keep_the_chains(kind, n_trained_steps):
    """They end in the actions taken, and their noise is as large as it should be, under the policy that made them."""
    model = make_model(kind, n_trained_steps=n_trained_steps, policy_kwargs=dict(noise_std=0.2))
    collect(model)
    actions = model.rollout_buffer.actions.copy().reshape(128, -1)
    rollout = model._get_rollout()
    n_steps = 4 if n_trained_steps is None else n_trained_steps
    assert rollout.chains.shape == (128, n_steps + 1, actions.shape[1])
    assert np.allclose(np.sort(rollout.chains[:, -1].numpy(), axis=0), np.sort(actions, axis=0))
    with th.no_grad():
        _, means, _ = model.policy.evaluate_chains(rollout.observations, rollout.chains[:, :-1])
    noise = (rollout.chains[:, 1:] - means) / 0.2
    n = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(n) and abs(noise.square().mean() - 1) < 4 * math.sqrt(2 / n)
    if n_steps == 4:
        assert abs(rollout.chains[:, 0].square().mean() - 1) < 4 * math.sqrt(2 / rollout.chains[:, 0].numel())


@pytest.mark.parametrize("kind", ["box", "dict", "normalize"])
def test_first_ratio_is_exactly_one(monkeypatch, kind):
    model = make_model(kind)
    calls = record_ratios(monkeypatch)
    for _ in range(2):
        calls.clear()
        collect(model)
        model.train()
        first, *_, last = (ratio for ratio, *_ in calls)
        assert first.shape == (32, 4) and th.equal(first, th.ones_like(first))
        assert not th.allclose(last, th.ones_like(last))


def test_chains_stay_with_their_transition(monkeypatch):
    """With a learning rate of zero the ratio stays one in every minibatch of every epoch, however it is shuffled."""
    model = make_model(learning_rate=0.0, n_epochs=3, policy_kwargs=dict(ortho_init=False))
    collect(model)
    calls = record_ratios(monkeypatch)
    model.train()
    assert len(calls) == 3 * 4
    for ratio, *_ in calls:
        th.testing.assert_close(ratio, th.ones_like(ratio), rtol=0, atol=1e-4)


def reference_loss(ratios, advantages, clip_ranges, gamma_denoising):
    """The policy loss, one number after the other: the discount of DPPO, PPO's clipping."""
    terms, n_steps = [], len(clip_ranges)
    for row, advantage in zip(ratios.tolist(), advantages.tolist(), strict=True):
        for k, ratio in enumerate(row):
            discounted = gamma_denoising ** (n_steps - 1 - k) * advantage
            clipped = min(max(ratio, 1 - clip_ranges[k]), 1 + clip_ranges[k])
            terms.append(-min(ratio * discounted, clipped * discounted))
    return float(np.mean(terms))


@pytest.mark.parametrize(
    ("kwargs", "clip_ranges"),
    [
        (dict(), [0.2] * 4),
        (dict(gamma_denoising=0.9, clip_range=0.1), [0.1] * 4),
        # (clip_ploss_coef_base + (clip_ploss_coef - clip_ploss_coef_base) (exp(3 t) - 1) / (exp(3) - 1), authors' code)
        (dict(first_clip_range=0.05), [0.05, 0.05 + 0.15 * 0.0900305, 0.05 + 0.15 * 0.3347613, 0.2]),
        (dict(n_trained_steps=1, first_clip_range=0.05), [0.2]),
    ],
)
def test_policy_loss(kwargs, clip_ranges):
    model = make_model(**kwargs)
    ratio, advantages = th.exp(0.3 * th.randn(6, len(clip_ranges))), th.randn(6)
    normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    actual = model._clip_range_of_steps(model.clip_range(1.0), ratio)
    assert np.broadcast_to(np.asarray(actual), len(clip_ranges)).tolist() == pytest.approx(clip_ranges, rel=1e-5)
    loss = model._policy_loss(ratio, advantages, actual)
    assert loss.item() == pytest.approx(reference_loss(ratio, normalized, clip_ranges, model.gamma_denoising), abs=1e-5)


def test_losses_are_those_of_the_rollout():
    """The loss of a minibatch and what is logged of it, from the plain network and the distributions of torch."""
    model = make_model(policy_kwargs=dict(ortho_init=False, noise_std=0.3, squash_type="tanh", action_scale=2.0))
    collect(model)
    rollout = model._get_rollout()
    old = model._evaluate_old_policy(rollout)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.policy.parameters()) * 1.1, model.policy.parameters())
    loss, statistics = model._losses(rollout, old, model._clip_ranges(), needs_kl=True)
    policy = model.policy
    values = policy.predict_values(rollout.observations).flatten()
    log_probs, bounds = [], []
    for k in range(4):
        t, x, x_next = 1 - k / 4, rollout.chains[:, k], rollout.chains[:, k + 1]
        features = policy.extract_features(rollout.observations)
        velocity = policy.action_net.forward_plain(features, x.unsqueeze(1), th.full((128, 1), t)).squeeze(1)
        log_probs.append(Normal(x - velocity / 4, 0.3).log_prob(x_next).sum(dim=-1))
        bounds.append(policy.bounds_loss(x - t * velocity))
    log_ratio = th.stack(log_probs, dim=1) - old.log_probs
    ratio, advantages = log_ratio.exp(), rollout.advantages
    normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = reference_loss(ratio, normalized, [0.2] * 4, 1.0)
    value_loss = (values - rollout.returns).square().mean() / policy.value_normalization.std.square()
    bounds_loss = th.stack(bounds).mean()
    assert statistics["policy_gradient_loss"].item() == pytest.approx(policy_loss, abs=1e-5)
    assert statistics["value_loss"].item() == pytest.approx(value_loss.item(), rel=1e-4)
    assert statistics["bounds_loss"].item() == pytest.approx(bounds_loss.item(), rel=1e-4) and bounds_loss > 0
    assert loss.item() == pytest.approx(policy_loss + 0.5 * value_loss.item() + 0.3 * bounds_loss.item(), rel=1e-4)
    assert statistics["approx_kl"].item() == pytest.approx((ratio - 1 - log_ratio).mean().item(), abs=1e-5)
    assert statistics["clip_fraction"].item() == pytest.approx(((ratio - 1).abs() > 0.2).float().mean().item())


@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_which_loss_trains_what(share_features_extractor):
    model = make_model(policy_kwargs=dict(share_features_extractor=share_features_extractor))
    collect(model)
    rollout = model._get_rollout()
    policy = model.policy
    values, log_probs, _ = model._evaluate_chains(rollout)
    actor, critic = [policy.action_net], [policy.value_net, policy.mlp_extractor]
    for loss, trained, others in [(log_probs.sum(), actor, critic), (values.sum(), critic, actor)]:
        policy.zero_grad()
        loss.backward(retain_graph=True)
        assert all(parameter.grad is not None for module in trained for parameter in module.parameters())
        assert all(parameter.grad is None for module in others for parameter in module.parameters())
    assert not rollout.chains.requires_grad and not rollout.advantages.requires_grad


def test_predictions_are_distributed_as_rollouts():
    model = make_model(policy_kwargs=dict(noise_std=0.5, ortho_init=False))
    obs = th.as_tensor(OBS[:1]).repeat(20_000, 1)
    with th.no_grad():
        collected = model.policy(obs)[0]
        predicted = model.policy._predict(obs, deterministic=False)
        (single,), (other,) = model.policy(obs[:1], deterministic=True)[0], model.policy._predict(obs[:1], True)
    assert abs(collected.mean() - predicted.mean()) < 0.05 and abs(collected.std() / predicted.std() - 1) < 0.05
    assert th.allclose(single, other)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(n_trained_steps=2, gamma_denoising=0.9, first_clip_range=0.1, log_prob_reduction="mean", target_kl=0.1),
        dict(clip_range=lambda progress: 0.1 * progress, clip_range_vf=0.2, normalize_advantage="rollout"),
        presets.PAPER,
        presets.FPO_PAPER,
    ],
)
def test_save_load(tmp_path, kwargs):
    model = make_model(**{**kwargs, "n_steps": 64, "batch_size": 32, "n_epochs": 1}).learn(128)
    model.save(tmp_path / "model.zip")
    loaded = DPPO.load(tmp_path / "model.zip", device="cpu")
    state, other_state = model.policy.state_dict(), loaded.policy.state_dict()
    assert state.keys() == other_state.keys() and all(th.equal(state[name], other_state[name]) for name in state)
    assert np.array_equal(model.predict(OBS, deterministic=True)[0], loaded.predict(OBS, deterministic=True)[0])
    for name in ("n_trained_steps", "gamma_denoising", "first_clip_range", "log_prob_reduction"):
        assert getattr(loaded, name) == getattr(model, name)
    loaded = DPPO.load(tmp_path / "model.zip", env=model.env, device="cpu")
    loaded.learn(128, reset_num_timesteps=False)


def test_numbers_of_the_papers():
    """Those of the authors' files: cfg/robomimic/finetune/square/ft_ppo_diffusion_mlp.yaml (DPPO), playground (FPO)."""
    model = DPPO("MlpPolicy", "Pendulum-v1", **presets.PAPER)
    assert (model.clip_range(1.0), model.first_clip_range, model.gamma_denoising) == (0.01, 0.001, 0.99)
    assert (model.n_trained_steps, model.policy.n_flow_steps, model.policy.noise_std) == (10, 20, 0.1)
    # SB3 stops at 1.5 times what it is given
    assert 1.5 * model.target_kl == pytest.approx(1.0) and model.n_epochs == 10 and model.log_prob_reduction == "mean"
    model = DPPO("MlpPolicy", "Pendulum-v1", **presets.FPO_PAPER)
    assert (model.clip_range(1.0), model.gamma_denoising, model.n_trained_steps) == (0.2, 1.0, None)
    assert (model.policy.n_flow_steps, model.policy.noise_std, model.policy.output_scale) == (10, 0.05, 0.25)
    assert (model.n_epochs, model.gamma, model.vf_coef, model.learning_rate) == (16, 0.995, 0.25, 3e-4)
    assert model.log_prob_reduction == "sum" and model.policy.squash_type == "tanh"


def test_same_seed_same_run():
    results = []
    for seed in (7, 7, 8):
        env = VecNormalize(make_vec_env("Pendulum-v1", 2, seed=seed))
        model = DPPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=3, seed=seed, device="cpu").learn(256)
        actions, _ = model.predict(OBS, deterministic=False)
        results.append((model.policy.parameters_to_vector(), model.rollout_buffer.rewards, actions))
    for first, second, other in zip(*results, strict=True):
        assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_number_of_trained_steps_can_change(tmp_path):
    """What a rollout keeps is what is wanted when it is collected."""
    model = make_model().learn(128)
    model.n_trained_steps = 2
    model.learn(128)
    assert model.rollout_buffer.log_probs.shape[-1] == 3
    model.n_trained_steps = 5
    with pytest.raises(ValueError, match="`n_trained_steps` must be at most `n_flow_steps` = 4, it is 5"):
        model.learn(128)


def test_first_clip_range_of_a_schedule():
    """It does not become larger than that of the last step."""
    model = make_model(first_clip_range=0.1, clip_range=lambda progress: 0.2 * progress)
    clip_ranges = model._clip_range_of_steps(0.05, th.ones(1, 4))
    assert clip_ranges.tolist() == pytest.approx([0.05] * 4)


def test_loaded_as_rl_zoo3_does(tmp_path):
    """With a clip range of zero, for acting only."""
    make_model(first_clip_range=0.1).save(tmp_path / "model")
    DPPO.load(tmp_path / "model", custom_objects=dict(clip_range=lambda _: 0.0, learning_rate=0.0)).predict(OBS)


def test_noise_is_saved(tmp_path):
    model = make_model()
    model.policy.set_sampler(noise_std=0.7)
    model.save(tmp_path / "model")
    assert DPPO.load(tmp_path / "model").policy.noise_std == 0.7
    model.policy.save(tmp_path / "policy")
    assert type(model.policy).load(tmp_path / "policy").noise_std == 0.7
    with pytest.raises(ValueError, match="`noise_std` must be positive and finite, it is 0"):
        model.policy.set_sampler(noise_std=0)


def test_loss_that_is_not_finite():
    """Even if its gradient is, as that of a clipped ratio may be."""
    model = make_model()
    collect(model)
    model._clip_range_of_steps = lambda clip_range, ratio: th.full((4,), math.nan)
    with pytest.raises(ValueError, match=r"not finite .policy loss: nan"):
        model.train()


def test_picture_is_of_its_actions():
    from sb3_flow.plotting.flow import flow_paths

    model = make_model(policy_kwargs=dict(noise_std=0.5, action_scale=0.1))
    paths = flow_paths(model, OBS[0], n_samples=4000)
    actions, _ = model.predict(np.repeat(OBS[:1], 4000, axis=0), deterministic=False)
    assert paths.shape == (41, 4000, 1)
    assert abs(paths[-1].std() / actions.std() - 1) < 0.06


def test_target_kl():
    model = make_model(target_kl=1e-9, n_epochs=5, verbose=0).learn(128)
    assert model._n_updates == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(n_trained_steps=0), "`n_trained_steps` must be at least 1, it is 0"),
        (dict(n_trained_steps=2.5), "`n_trained_steps` must be an integer"),
        (dict(n_trained_steps=5), "`n_trained_steps` must be at most `n_flow_steps` = 4, it is 5"),
        (dict(gamma_denoising=1.1), r"`gamma_denoising` must be in \[0, 1\]"),
        (dict(first_clip_range=0), "`first_clip_range` must be positive and finite"),
        (dict(first_clip_range=math.inf), "`first_clip_range` must be positive and finite"),
        (dict(first_clip_range=0.3), "`first_clip_range` must be at most `clip_range` = 0.2"),
        (dict(rollout_buffer_class="ChainRolloutBuffer"), "`rollout_buffer_class` must be a ChainRolloutBuffer"),
        (dict(rollout_buffer_class=ChainDictRolloutBuffer), "`rollout_buffer_class` must be a ChainRolloutBuffer"),
        (dict(kind="dict", rollout_buffer_class=ChainRolloutBuffer), "must be a ChainDictRolloutBuffer"),
        (dict(log_prob_reduction="max"), "Unknown `log_prob_reduction`: 'max', it must be one of 'sum', 'mean'"),
        (dict(rollout_buffer_class=RolloutBuffer), "`rollout_buffer_class` must be a ChainRolloutBuffer"),
        (dict(clip_range=0), "`clip_range` must be positive"),
        (dict(policy_kwargs=dict(noise_std=0)), "`noise_std` must be positive and finite"),
        (dict(policy_kwargs=dict(noise_std=math.inf)), "`noise_std` must be positive and finite"),
        (dict(policy_kwargs=dict(n_flow_steps=0)), "`n_flow_steps` must be at least 1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


@pytest.mark.parametrize("name", ["sampler", "prediction_type", "skip_connection", "ema_decay", "action_perturbation_std"])
def test_arguments_of_other_policies(name):
    """What has no meaning here is no argument."""
    with pytest.raises(TypeError, match=name):
        make_model(policy_kwargs={name: None})


def test_policy_of_another_algorithm():
    from sb3_flow import FPO
    from sb3_flow.fpo import FlowPolicy

    with pytest.raises(ValueError, match=r"`policy` must be a DPPOPolicy, it is <class '.*FlowPolicy'>"):
        DPPO(FlowPolicy, "Pendulum-v1")
    with pytest.raises(ValueError, match=r"`policy` must be a FlowPolicy, it is <class '.*DPPOPolicy'>"):
        FPO(type(make_model().policy), "Pendulum-v1")
