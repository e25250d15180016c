"""
The settings of the papers, for ``DPPO("MlpPolicy", env, **presets.PAPER)``, or ``preset: paper`` in a YAML file.
"""

from typing import Any

import torch as th
from torch import nn

#: DPPO (https://arxiv.org/abs/2409.00588) as its authors fine-tune policies for manipulation; for locomotion their clipping is
#: 0.01 at all steps, and there are 5 epochs. There the policy is a diffusion policy, the critic has a learning rate of 1e-3,
#: only the gradient of the actor is clipped (nowhere here), a minibatch has steps of different transitions, and the first
#: steps are those of the policy that is fine-tuned.
PAPER: dict[str, Any] = dict(
    learning_rate=1e-4,
    n_epochs=10,
    gamma=0.999,
    gae_lambda=0.95,
    clip_range=0.01,
    normalize_advantage=True,
    vf_coef=0.5,
    max_grad_norm=None,
    bounds_loss_coef=0.0,
    n_trained_steps=10,
    gamma_denoising=0.99,
    first_clip_range=0.001,
    log_prob_reduction="mean",
    # They stop at 1, SB3 at 1.5 times this
    target_kl=1 / 1.5,
    policy_kwargs=dict(
        net_arch=dict(pi=[512] * 3, vf=[256] * 3),
        activation_fn=nn.ReLU,
        ortho_init=False,
        squash_type="clip",
        action_scale=1.0,
        optimizer_class=th.optim.AdamW,
        optimizer_kwargs=dict(weight_decay=0.0),
        n_flow_steps=20,
        noise_std=0.1,
        output_scale=1.0,
        normalize_values=False,
    ),
)

#: As the authors of FPO compare with it (https://arxiv.org/abs/2507.21053), for flow policies: their networks, rollouts and
#: epochs are those of FPO.
FPO_PAPER: dict[str, Any] = dict(
    learning_rate=3e-4,
    n_epochs=16,
    gamma=0.995,
    gae_lambda=0.95,
    clip_range=0.2,
    normalize_advantage=True,
    vf_coef=0.25,
    max_grad_norm=None,
    bounds_loss_coef=0.0,
    n_trained_steps=None,
    gamma_denoising=1.0,
    first_clip_range=None,
    log_prob_reduction="sum",
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
        noise_std=0.05,
        output_scale=0.25,
        normalize_values=False,
    ),
)

#: For an actor that is a clone, see :meth:`DPPO.pretrain` and :meth:`DPPO.from_flow_bc`: the critic learns first, at a rate of
#: its own, the trust region is small, and so is the noise that the clone does not have by itself.
FINE_TUNE: dict[str, Any] = dict(
    learning_rate=2e-4,
    critic_learning_rate=5e-4,
    critic_warmup=5,
    clip_range=0.1,
    policy_kwargs=dict(share_features_extractor=False, noise_std=0.1),
)

#: By the names that YAML files and the command line have for them
PRESETS = {"paper": PAPER, "fpo-paper": FPO_PAPER, "fine-tune": FINE_TUNE}
