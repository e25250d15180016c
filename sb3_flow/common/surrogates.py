"""
Surrogate objectives: the ratio that stands in for the likelihood ratio, and the trust regions around it.

FPO (https://arxiv.org/abs/2507.21053), Alg. 1 and eq. 13-20: a ratio of exponentials of CFM losses, in PPO's clipped
objective.
FPO++ (https://arxiv.org/abs/2602.02481): one ratio for each Monte-Carlo pair, and the ASPO trust region.
"""

import torch as th

#: One ratio for each transition (FPO), or for each Monte-Carlo pair (FPO++).
RATIO_TYPES = ("averaged", "per_sample")
#: PPO's clip, or that where the advantage is positive and SPO's quadratic penalty where it is negative.
TRUST_REGIONS = ("ppo", "aspo")


def _clip_values(x: th.Tensor, low: float | None, high: float) -> th.Tensor:
    """Clip, but let the gradient through, as if nothing had been clipped."""
    return x.detach().clamp(low, high) + (x - x.detach())


def relative_loss(loss: th.Tensor) -> th.Tensor:
    """
    CFM loss (or its change) of the action taken, minus the mean of the baseline actions, if there are any.

    :param loss: (batch, 1 + n_baseline_actions, n_mc_samples)
    :return: (batch, n_mc_samples)
    """
    return loss[:, 0] - loss[:, 1:].mean(dim=1) if loss.shape[1] > 1 else loss[:, 0]


def flow_ratio(
    old_loss: th.Tensor,
    loss: th.Tensor,
    ratio_type: str = "averaged",
    cfm_loss_clip: float | None = None,
    log_ratio_clip: float | None = None,
) -> th.Tensor:
    """
    Ratio of the policies, ``exp(old CFM loss - CFM loss)``.

    The losses are those of the action taken and, behind it, of any number of baseline actions, drawn from the policy that
    collected the rollout. The exponential of a loss is not normalised: its log-ratio minus the mean of theirs is, to first
    order. The gradient of that is zero on average over the actions of the old policy, as that of a log-likelihood is, so
    that an advantage all actions have in common (an error of the value function) does not change the policy on average.

    :param old_loss: CFM loss of each action and Monte-Carlo pair under the policy that collected the rollout,
        (batch, 1 + n_baseline_actions, n_mc_samples)
    :param loss: CFM loss of the same under the current policy, (batch, 1 + n_baseline_actions, n_mc_samples)
    :param ratio_type: "averaged" takes the mean over the pairs before the exponential (FPO),
        "per_sample" gives one ratio for each pair (FPO++)
    :param cfm_loss_clip: Upper bound on the losses, before their difference
    :param log_ratio_clip: Bound on the absolute log-ratio. The gradient passes through, so that a ratio
        that has gone too far can come back.
    :return: (batch, 1) for an averaged ratio, (batch, n_mc_samples) for one per sample
    """
    if cfm_loss_clip is not None:
        old_loss, loss = old_loss.clamp(max=cfm_loss_clip), loss.clamp(max=cfm_loss_clip)
    log_ratio = relative_loss(old_loss - loss)
    if ratio_type == "averaged":
        log_ratio = log_ratio.mean(dim=1, keepdim=True)
    if log_ratio_clip is not None:
        log_ratio = _clip_values(log_ratio, -log_ratio_clip, log_ratio_clip)
    return log_ratio.exp()


def surrogate_objective(
    ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, trust_region: str = "ppo"
) -> th.Tensor:
    """
    Objective of each sample, to be maximised.

    :param ratio: (batch, n)
    :param advantages: (batch, 1)
    :param clip_range: Size of the trust region, a number or a tensor
    :param trust_region: "ppo": :math:`\\min(r A, \\mathrm{clip}(r, 1-\\varepsilon, 1+\\varepsilon) A)`,
        "aspo" (FPO++): the same where A >= 0, and where A < 0 that of SPO (https://arxiv.org/abs/2401.16025),
        :math:`r A - |A| (r - 1)^2 / (2 \\varepsilon)`
    :return: (batch, n)
    """
    unclipped = advantages * ratio
    # (both bounds are numbers, or both tensors, which mypy does not see)
    clipped = advantages * ratio.clamp(1 - clip_range, 1 + clip_range)  # type: ignore[arg-type]
    ppo = th.min(unclipped, clipped)
    if trust_region == "ppo":
        return ppo
    spo = unclipped - advantages.abs() / (2 * clip_range) * (ratio - 1).square()
    return th.where(advantages >= 0, ppo, spo)
