"""Every choice of every argument trains."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_flow import FPO
from sb3_flow.common.flow import CFM_LOSSES, LOSS_REDUCTIONS, PREDICTION_TYPES, SUPERVISIONS, TIMESTEP_DISTRIBUTIONS
from sb3_flow.common.samplers import SAMPLERS
from sb3_flow.common.surrogates import RATIO_TYPES, TRUST_REGIONS


def run(policy_kwargs=None, total_timesteps=128, **kwargs):
    kwargs = dict(n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu") | kwargs
    model = FPO("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[16], **(policy_kwargs or {})), **kwargs)
    before = model.policy.parameters_to_vector()
    model.learn(total_timesteps)
    after = model.policy.parameters_to_vector()
    assert np.isfinite(after).all() and not np.array_equal(before, after)
    return model


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("timestep_distribution", TIMESTEP_DISTRIBUTIONS)
def test_flow_arguments(prediction_type, supervision, timestep_distribution):
    cfm_loss = dict(supervision=supervision, timestep_distribution=timestep_distribution, sampling="independent")
    run(dict(prediction_type=prediction_type), cfm_loss=cfm_loss)


@pytest.mark.parametrize("trust_region", TRUST_REGIONS)
@pytest.mark.parametrize("ratio_type", RATIO_TYPES)
@pytest.mark.parametrize("loss_reduction", LOSS_REDUCTIONS)
def test_surrogate_arguments(trust_region, ratio_type, loss_reduction):
    run(trust_region=trust_region, ratio_type=ratio_type, cfm_loss=dict(reduction=loss_reduction))


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(normalize_advantage=False),
        dict(normalize_advantage="rollout"),
        *[dict(cfm_loss=name) for name in CFM_LOSSES],
        dict(clip_range_vf=0.2),
        dict(clip_range=lambda progress: 0.1 * progress, learning_rate=lambda progress: 1e-3 * progress),
        dict(max_grad_norm=None),
        dict(cfm_loss_clip=20.0, log_ratio_clip=None),
        dict(n_mc_samples=1),
        dict(n_mc_samples=3, n_baseline_actions=3),
        dict(n_baseline_actions=0, ratio_type="averaged"),
        dict(policy_kwargs=dict(skip_connection=False)),
        dict(n_epochs=1),
        dict(target_kl=0.01),
        dict(ema_decay=0.95, ema_start=1),
        dict(ent_coef=0.0, bounds_loss_coef=0.0),
        dict(batch_size=1, normalize_advantage=False, n_steps=1, total_timesteps=4),
    ],
)
def test_algorithm_arguments(kwargs):
    run(**kwargs)


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        *[dict(sampler=sampler) for sampler in SAMPLERS],
        dict(sampler="sde", sampler_sigma=0.0),
        dict(squash_type="tanh"),
        dict(ortho_init=False),
        dict(n_flow_steps=2),
        dict(output_scale=1.0, action_perturbation_std=0.0),
        dict(share_features_extractor=False),
        dict(activation_fn=nn.ELU, optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(weight_decay=1e-4)),
    ],
)
def test_policy_arguments(policy_kwargs):
    run(policy_kwargs)


@pytest.mark.parametrize("net_arch", [[], [4], [4, 4], dict(vf=[16]), dict(pi=[8, 8]), dict(pi=[8], vf=[8, 4])])
def test_flexible_mlp(net_arch):
    model = FPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=1, policy_kwargs=dict(net_arch=net_arch))
    model.learn(64)
    pi, vf = (net_arch, net_arch) if isinstance(net_arch, list) else (net_arch.get("pi", []), net_arch.get("vf", []))
    linear = [module for module in model.policy.action_net.modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in linear] == [*pi, 1]
    linear = [module for module in model.policy.mlp_extractor.modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in linear] == vf


def test_rollout_sizes():
    """Truncated minibatches warn, and those of a single transition do not give NaN."""
    with pytest.raises(AssertionError, match=r"n_steps \* n_envs"):
        FPO("MlpPolicy", "Pendulum-v1", n_steps=1)
    with pytest.raises(AssertionError, match="batch_size"):
        FPO("MlpPolicy", "Pendulum-v1", batch_size=1)
    with pytest.warns(UserWarning, match="there will be a truncated mini-batch of size 1"):
        run(batch_size=63)


def test_learning_rate_stays_positive():
    """The last rollout goes beyond the end of a schedule that decreases to zero."""
    model = run(total_timesteps=100, learning_rate=lambda progress: 1e-3 * progress)
    assert model.num_timesteps == 128 and model.logger.name_to_value["train/learning_rate"] == 0


def test_recommends_cpu():
    model = FPO("MlpPolicy", "Pendulum-v1", device="cpu")
    model.device = th.device("cuda")
    with pytest.warns(UserWarning, match="You are trying to run FPO on the GPU"):
        model._maybe_recommend_cpu()


@pytest.mark.slow
def test_pendulum_is_solved():
    """Deterministic return of at least -250 after 100 k steps (an untrained policy gets about -1200)."""
    from stable_baselines3.common.evaluation import evaluate_policy

    # As in hyperparams/fpo.yml
    kwargs = dict(n_steps=512, batch_size=256, gamma=0.9, learning_rate=LinearSchedule(1e-3, 0.0, 1.0), seed=0)
    model = FPO("MlpPolicy", make_vec_env("Pendulum-v1", 4, seed=0), **kwargs)
    model.learn(100_000)
    mean_return, _ = evaluate_policy(model, make_vec_env("Pendulum-v1", 4, seed=100), 100)
    assert mean_return > -250
