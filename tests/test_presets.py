"""The settings of the papers: their numbers, and FPO's loss as the paper writes it."""

import pytest
import torch as th
from torch import nn

from sb3_flow import FPO, presets
from sb3_flow.common.normalization import NormalizedFlattenExtractor


def make_model(preset, **kwargs):
    return FPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **{**preset, "n_steps": 64, "batch_size": 32, **kwargs})


def layers(module):
    return [layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear)]


NUMBERS = {
    # Those of the authors' JAX code, playground/src/flow_policy/fpo.py
    "paper": dict(
        learning_rate=3e-4, n_epochs=16, gamma=0.995, gae_lambda=0.95, clip_range=0.05, normalize_advantage=True, ent_coef=0,
        vf_coef=0.25, max_grad_norm=None, bounds_loss_coef=0, n_mc_samples=8, n_baseline_actions=0, ratio_type="averaged",
        trust_region="ppo", cfm_loss_clip=None, log_ratio_clip=None, ema_decay=None, target_kl=None, clip_range_vf=None,
        cfm_loss=("noise", "mean", "grid", "independent", 1),
    ),
    # Those of FPO++ for locomotion
    "fpo++": dict(
        learning_rate=1e-4, n_epochs=16, gamma=0.99, gae_lambda=0.95, clip_range=0.05, normalize_advantage="rollout",
        ent_coef=0, vf_coef=1, max_grad_norm=1, bounds_loss_coef=0, n_mc_samples=16, n_baseline_actions=0,
        ratio_type="per_sample", trust_region="aspo", cfm_loss_clip=20, log_ratio_clip=10, ema_decay=0.95, ema_start=500,
        target_kl=None, clip_range_vf=None, cfm_loss=("velocity", "sqrt", "uniform", "independent", 1),
    ),
    # Table A.3 of FPO, and the authors' code, phc/configs/fpo.ini
    "humanoid": dict(
        learning_rate=1e-4, n_epochs=4, gamma=0.98, gae_lambda=0.2, clip_range=0.01, normalize_advantage=True, ent_coef=0,
        vf_coef=1.2, max_grad_norm=10, bounds_loss_coef=0, n_mc_samples=1, n_baseline_actions=0, ratio_type="averaged",
        trust_region="ppo", cfm_loss_clip=None, log_ratio_clip=None, ema_decay=None, target_kl=None,
        cfm_loss=("action", "mean", "logit-normal", "independent", 200),
    ),
}  # fmt: skip
POLICIES = {
    "paper": dict(squash_type="tanh", action_scale=1, n_flow_steps=10, prediction_type="velocity", output_scale=0.25,
                  skip_connection=False, sampler="euler", action_perturbation_std=0, ortho_init=False),
    "fpo++": dict(squash_type="clip", action_scale=1, n_flow_steps=64, prediction_type="velocity", output_scale=1,
                  skip_connection=False, sampler="euler", action_perturbation_std=0.02, ortho_init=False),
    "humanoid": dict(squash_type="clip", action_scale=1, n_flow_steps=10, prediction_type="action", output_scale=1,
                     skip_connection=False, sampler="euler", action_perturbation_std=0.05, ortho_init=True),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_the_papers(name):
    model = make_model(presets.PRESETS[name])
    values = {key: getattr(model, key) for key in NUMBERS[name]}
    assert values | dict(clip_range=model.clip_range(1.0)) == NUMBERS[name]
    policy = model.policy
    assert {key: getattr(policy, key) for key in POLICIES[name]} == POLICIES[name]
    pi, vf, activation = {
        "paper": ([32] * 4, [256] * 5, nn.SiLU), "fpo++": ([256] * 3, [768] * 3, nn.ELU),
        "humanoid": ([512] * 2, [512] * 2, nn.SiLU),
    }[name]  # fmt: skip
    assert layers(policy.action_net) == [*pi, 1] and layers(policy.mlp_extractor) == vf
    assert {type(module) for module in policy.modules() if type(module).__module__.endswith("activation")} == {activation}
    (group,) = policy.optimizer.param_groups
    assert type(policy.optimizer) is (th.optim.AdamW if name == "fpo++" else th.optim.Adam)
    assert group["eps"] == 1e-8 and group["betas"] == (0.9, 0.999)
    assert group["weight_decay"] == (1e-4 if name == "fpo++" else 0)
    # Observations are normalized, values are not
    assert type(policy.features_extractor) is NormalizedFlattenExtractor and policy.value_normalization is None
    # (cos and sin of t, 2 t, 4 t, 8 t)
    assert policy.action_net.timestep_embedding.features_dim == 8


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_learn_and_are_not_changed(name, tmp_path):
    before = repr(presets.PRESETS[name])
    model = make_model(presets.PRESETS[name], n_epochs=1, gamma=0.9).learn(128)
    assert model.gamma == 0.9
    model.save(tmp_path / "model")
    assert FPO.load(tmp_path / "model", device="cpu").cfm_loss == model.cfm_loss
    assert repr(presets.PRESETS[name]) == before


def test_every_argument_of_a_preset_is_one():
    for preset in presets.PRESETS.values():
        with pytest.raises(TypeError, match="n_stepps"):
            make_model(preset, n_stepps=3)


def test_loss_of_motion_tracking():
    """As the authors' code has it: the log-likelihood of a Gaussian of standard deviation 0.05, without its constant."""
    model = make_model(presets.HUMANOID)
    assert model.clip_range_vf(1.0) == 0.2
    _, callback = model._setup_learn(64)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    rollout = model._get_rollout()
    action, x_t, t = rollout.actions[:, 0, 0], rollout.x_t[:, 0], rollout.timesteps[:, 0]
    with th.no_grad():
        features = model.policy.extract_features(rollout.observations)
        x1 = model.policy.action_net.forward_plain(features, x_t, t)
        log_probs = -((x1 - action.unsqueeze(1)) ** 2) / (2 * 0.05**2)
        losses = model._cfm_loss(model._flow_output(rollout), rollout)
    th.testing.assert_close(losses[:, 0], -log_probs.mean(-1), rtol=1e-4, atol=1e-4)


def test_loss_of_the_paper():
    """Alg. 1 and eq. 13 to 20, as the authors' code has them, written plainly."""
    model = make_model(presets.PAPER)
    _, callback = model._setup_learn(64)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    rollout = model._get_rollout()
    network = model.policy.action_net
    action, t = rollout.actions[:, 0, 0], rollout.timesteps[:, 0]
    eps = (rollout.x_t[:, 0] - (1 - t.unsqueeze(-1)) * action.unsqueeze(1)) / t.unsqueeze(-1)
    assert set((10 * t).round().flatten().tolist()) <= set(range(1, 11))

    def cfm_loss():
        features = model.policy.extract_features(rollout.observations)
        x_t = t.unsqueeze(-1) * eps + (1 - t.unsqueeze(-1)) * action.unsqueeze(1)
        velocity = network.forward_plain(features, x_t, t)
        x0 = x_t - t.unsqueeze(-1) * velocity
        x1 = x0 + velocity
        return (eps - x1).square().mean(dim=-1)

    with th.no_grad():
        old_loss = cfm_loss()
        old = model._evaluate_old_policy(rollout)
        for parameter in network.parameters():
            parameter += 0.05 * th.randn_like(parameter)
    ratio = (old_loss - cfm_loss()).mean(dim=1).exp()
    assert ratio.std() > 0.01
    advantages = (rollout.advantages - rollout.advantages.mean()) / (rollout.advantages.std() + 1e-8)
    surrogate = th.min(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages)
    value_loss = 0.25 * (rollout.returns - model.policy.predict_values(rollout.observations).flatten()).square().mean()
    expected = -surrogate.mean() + value_loss
    loss, _ = model._losses(rollout, old, model._clip_ranges(), needs_kl=False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    expected_gradient = th.autograd.grad(expected, list(network.parameters()))
    gradient = th.autograd.grad(loss, list(network.parameters()))
    for theirs, ours in zip(expected_gradient, gradient, strict=True):
        assert th.allclose(ours, theirs, rtol=1e-3, atol=1e-6)
