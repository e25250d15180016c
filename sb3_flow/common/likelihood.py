"""
The likelihood of an action under a flow, as a diagnostic: exactly, by integrating the divergence of the velocity, and its
evidence lower bound, a weighted CFM loss, which FPO takes in its place.

Chen et al. (neural ODEs), https://arxiv.org/abs/1806.07366; Grathwohl et al. (FFJORD), https://arxiv.org/abs/1810.01367;
Kingma et al. (variational diffusion models), https://arxiv.org/abs/2107.00630.
"""

import math

import torch as th

from sb3_flow.common.flow import cfm_loss, check_choice, interpolate
from sb3_flow.common.samplers import VelocityField, odeint

#: How the divergence of the velocity is computed.
DIVERGENCES = ("exact", "hutchinson")


def _divergence(velocity: th.Tensor, x: th.Tensor, probes: th.Tensor) -> th.Tensor:
    """Mean over the probes p, (n_probes, batch, action_dim), of p^T J p, with J the Jacobian of the velocity."""
    gradients = [th.autograd.grad(velocity, x, probe, retain_graph=True)[0] for probe in probes]
    return (th.stack(gradients) * probes).sum(dim=-1).mean(dim=0)


def log_likelihood(
    field: VelocityField, actions: th.Tensor, divergence: str = "exact", n_probes: int = 1, method: str = "dopri5"
) -> th.Tensor:
    """
    Log-likelihood of actions under a flow, by the change of variables along its paths
    (https://arxiv.org/abs/1806.07366, eq. 8): with :math:`x_0 = a` and :math:`dx_t/dt = v(x_t, t)`,

    .. math::
        \\log p(a) = \\log \\mathcal{N}(x_1; 0, I) + \\int_0^1 \\nabla \\cdot v(x_t, t)\\, dt

    :param field: Velocity field. It must be differentiable in x.
    :param actions: (batch, action_dim)
    :param divergence: "exact", which takes ``action_dim`` derivatives, or "hutchinson", an unbiased estimate of it
        with random signs, the same along the whole path (FFJORD)
    :param n_probes: Number of random vectors of Hutchinson's estimate
    :param method: Name of the method of integration, torchdiffeq's
    :return: (batch,)
    :raises ValueError: if the divergence is unknown
    :raises ImportError: if torchdiffeq is not installed
    """
    check_choice("divergence", divergence, DIVERGENCES)
    if divergence == "exact":
        dim = actions.shape[1]
        probes = dim**0.5 * th.eye(dim, dtype=actions.dtype, device=actions.device).unsqueeze(1).expand(-1, *actions.shape)
    else:
        probes = th.randint(2, (n_probes, *actions.shape), device=actions.device).to(actions.dtype) * 2 - 1

    def velocity_and_divergence(t: th.Tensor, state: tuple[th.Tensor, th.Tensor]) -> tuple[th.Tensor, th.Tensor]:
        with th.enable_grad():
            x = state[0].detach().requires_grad_()
            velocity = field(x, float(t))
            return velocity.detach(), _divergence(velocity, x, probes)

    with th.no_grad():
        noise, integral = odeint(velocity_and_divergence, (actions, actions.new_zeros(len(actions))), [0.0, 1.0], method)
        return _standard_normal(noise) + integral


def _standard_normal(x: th.Tensor) -> th.Tensor:
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(dim=-1)


def evidence_lower_bound(
    field: VelocityField, actions: th.Tensor, n_times: int = 100, n_noises: int = 16, smallest_time: float = 1e-3
) -> th.Tensor:
    """
    Lower bound on the log-likelihood of actions, the one that justifies FPO's ratio: a constant minus the CFM loss with the
    weights of the diffusion objective (FPO; variational diffusion models, eq. 11 to 14),

    .. math::
        \\log p(a) \\ge -\\frac{d}{2} \\log\\Big(2 \\pi e \\frac{\\tau^2}{(1 - \\tau)^2}\\Big)
        - \\int_\\tau^1 \\frac{1 - t}{t} E_\\epsilon \\lVert \\hat u(x_t, t) - u \\rVert^2 dt

    p is the density of the stochastic sampler with this velocity (the time reversal of the diffusion), from noise to
    :math:`t = \\tau`, where :math:`x_\\tau` is decoded with its own standard deviation :math:`\\tau / (1 - \\tau)`.
    For the exact flow of a distribution it is the density of the flow, and the bound is tight as :math:`\\tau` goes to zero.

    FPO trains with this loss with ``cfm_loss="elbo"``. Others (``supervision``) have other weights, 1 with "velocity" and
    :math:`(1 - t)^2` with "noise". The first is, up to a constant, a bound for actions to which noise has been added,
    because its weight over that of the formula increases with t (https://arxiv.org/abs/2303.00848); the second is not a
    bound on a likelihood.

    :param field: Velocity field
    :param actions: (batch, action_dim)
    :param n_times: Number of times, in equal steps of log(t)
    :param n_noises: Number of noises for each action and time
    :param smallest_time: :math:`\\tau`
    :return: (batch,)
    """
    dim, step = actions.shape[1], -math.log(smallest_time) / n_times
    loss = actions.new_zeros(len(actions))
    for index in range(n_times):
        t = math.exp(-(index + 0.5) * step)
        noise = th.randn(n_noises, *actions.shape, dtype=actions.dtype, device=actions.device)
        times = noise.new_full(noise.shape[:-1], t)
        # All actions with one noise at a time: the field has one observation for each action
        velocity = th.stack([field(x, t) for x in interpolate(actions, noise, times)])
        # dt = t d(log t)
        loss += step * t * cfm_loss(velocity, actions, noise, times, supervision="elbo", reduction="sum").mean(dim=0)
    decoder_std = smallest_time / (1 - smallest_time)
    return -dim / 2 * math.log(2 * math.pi * math.e * decoder_std**2) - loss
