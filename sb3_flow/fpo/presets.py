"""
The settings of the papers, for ``FPO("MlpPolicy", env, **presets.PAPER)``, or ``preset: paper`` in a YAML file.

They are those of the authors' code, but for what depends on the environment: how many transitions a rollout and a minibatch
have, and the discount of some tasks.
"""

from typing import Any

import torch as th
from torch import nn

#: FPO (https://arxiv.org/abs/2507.21053), the authors' code for MuJoCo Playground. There a rollout has 32 minibatches of
#: 30,720 transitions, rewards are multiplied by 10, and ``gamma`` is 0.95 for ball-in-cup and finger-spin. It has no bound on
#: the log-ratio of an averaged ratio.
PAPER: dict[str, Any] = dict(
    learning_rate=3e-4,
    n_epochs=16,
    gamma=0.995,
    gae_lambda=0.95,
    clip_range=0.05,
    normalize_advantage=True,
    ent_coef=0.0,
    vf_coef=0.25,
    max_grad_norm=None,
    bounds_loss_coef=0.0,
    cfm_loss="fpo",
    n_mc_samples=8,
    n_baseline_actions=0,
    ratio_type="averaged",
    trust_region="ppo",
    cfm_loss_clip=None,
    log_ratio_clip=None,
    ema_decay=None,
    target_kl=None,
    policy_kwargs=dict(
        net_arch=dict(pi=[32] * 4, vf=[256] * 5),
        activation_fn=nn.SiLU,
        ortho_init=False,
        squash_type="tanh",
        action_scale=1.0,
        optimizer_class=th.optim.Adam,
        optimizer_kwargs=dict(eps=1e-8),
        n_flow_steps=10,
        prediction_type="velocity",
        output_scale=0.25,
        skip_connection=False,
        sampler="euler",
        action_perturbation_std=0.0,
        normalize_values=False,
    ),
)

#: FPO++ (https://arxiv.org/abs/2602.02481), for locomotion. There a rollout has 4 minibatches. Not here: a learning rate that
#: adapts to the pseudo-KL divergence, as they have for motion tracking. Their bound on the log-ratio is one from above only:
#: below ours the ratio, and with it the gradient, is next to nothing (exp(-10)).
FPO_PLUS_PLUS: dict[str, Any] = dict(
    learning_rate=1e-4,
    n_epochs=16,
    gamma=0.99,
    gae_lambda=0.95,
    clip_range=0.05,
    normalize_advantage="rollout",
    ent_coef=0.0,
    vf_coef=1.0,
    max_grad_norm=1.0,
    bounds_loss_coef=0.0,
    cfm_loss="fpo++",
    n_mc_samples=16,
    n_baseline_actions=0,
    ratio_type="per_sample",
    trust_region="aspo",
    cfm_loss_clip=20.0,
    log_ratio_clip=10.0,
    ema_decay=0.95,
    ema_start=500,
    target_kl=None,
    policy_kwargs=dict(
        net_arch=dict(pi=[256] * 3, vf=[768] * 3),
        activation_fn=nn.ELU,
        ortho_init=False,
        squash_type="clip",
        action_scale=1.0,
        optimizer_class=th.optim.AdamW,
        optimizer_kwargs=dict(weight_decay=1e-4),
        n_flow_steps=64,
        prediction_type="velocity",
        output_scale=1.0,
        skip_connection=False,
        sampler="euler",
        action_perturbation_std=0.02,
        normalize_values=False,
    ),
)

#: FPO for motion tracking, Table A.3 of the paper and the authors' code (``phc/``). There a rollout has 32 steps of 4,096
#: environments and 4 minibatches, the networks are larger and have an adaptive layer norm, and there is a loss on actions out
#: of 0.9 times the bounds.
HUMANOID: dict[str, Any] = dict(
    learning_rate=1e-4,
    n_epochs=4,
    gamma=0.98,
    gae_lambda=0.2,
    clip_range=0.01,
    clip_range_vf=0.2,
    normalize_advantage=True,
    ent_coef=0.0,
    vf_coef=1.2,
    max_grad_norm=10.0,
    bounds_loss_coef=0.0,
    cfm_loss="fpo-humanoid",
    n_mc_samples=1,
    n_baseline_actions=0,
    ratio_type="averaged",
    trust_region="ppo",
    cfm_loss_clip=None,
    log_ratio_clip=None,
    ema_decay=None,
    target_kl=None,
    policy_kwargs=dict(
        net_arch=dict(pi=[512, 512], vf=[512, 512]),
        activation_fn=nn.SiLU,
        ortho_init=True,
        squash_type="clip",
        action_scale=1.0,
        optimizer_class=th.optim.Adam,
        optimizer_kwargs=dict(eps=1e-8),
        n_flow_steps=10,
        prediction_type="action",
        output_scale=1.0,
        skip_connection=False,
        sampler="euler",
        action_perturbation_std=0.05,
        normalize_values=False,
    ),
)

#: For an actor that is a clone, see :meth:`FPO.pretrain` and :meth:`FPO.from_flow_bc`: the critic learns first, at a rate of
#: its own, the trust region is small, and so is the noise that the clone does not have by itself.
FINE_TUNE: dict[str, Any] = dict(
    learning_rate=2e-4,
    critic_learning_rate=5e-4,
    critic_warmup=5,
    clip_range=0.1,
    policy_kwargs=dict(share_features_extractor=False, action_perturbation_std=0.05),
)

#: By the names that YAML files and the command line have for them
PRESETS = {"paper": PAPER, "fpo++": FPO_PLUS_PLUS, "humanoid": HUMANOID, "fine-tune": FINE_TUNE}
