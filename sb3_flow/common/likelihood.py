"""
The likelihood of an action under a flow: by integrating the divergence of the velocity, for FPO's entropy bonus and, to any
accuracy, as a diagnostic; and its evidence lower bound, a weighted CFM loss, which FPO's ratio takes in its place.

Chen et al. (neural ODEs), https://arxiv.org/abs/1806.07366; Grathwohl et al. (FFJORD), https://arxiv.org/abs/1810.01367;
Kingma et al. (variational diffusion models), https://arxiv.org/abs/2107.00630.
"""

import math

import torch as th

from sb3_flow.common.flow import cfm_loss, check_choice, interpolate
from sb3_flow.common.samplers import VelocityField, odeint

#: How the divergence of the velocity is computed.
DIVERGENCES = ("exact", "hutchinson")
#: Of the likelihood of noisy actions: number of dimensions up to which its divergence is exact
MAX_EXACT = 4


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
    probes = _exact_probes(actions) if divergence == "exact" else _random_probes(actions, n_probes)

    def velocity_and_divergence(t: th.Tensor, state: tuple[th.Tensor, th.Tensor]) -> tuple[th.Tensor, th.Tensor]:
        return _velocity_and_divergence(field, state[0], float(t), probes)

    with th.no_grad():
        noise, integral = odeint(velocity_and_divergence, (actions, actions.new_zeros(len(actions))), [0.0, 1.0], method)
        return _standard_normal(noise) + integral


def noisy_log_likelihood(field: VelocityField, actions: th.Tensor, noise_std: float, n_steps: int) -> th.Tensor:
    """
    Log-likelihood of noisy actions: those of a flow with Gaussian noise, which are :math:`x_\\tau / (1 - \\tau)` for the
    :math:`\\tau` where :math:`\\tau / (1 - \\tau)` is the standard deviation of the noise,

    .. math::
        \\log p(a) = \\log \\mathcal{N}(x_1; 0, I) + \\int_\\tau^1 \\nabla \\cdot v(x_t, t)\\, dt + d \\log(1 - \\tau)

    by the midpoint method. The divergence is exact in up to ``MAX_EXACT`` dimensions, and Hutchinson's estimate in more.

    :param field: Velocity field. It must be differentiable in x.
    :param actions: (batch, action_dim)
    :param noise_std: Standard deviation of the noise
    :param n_steps: Number of steps
    :return: (batch,)
    """
    dim = actions.shape[1]
    probes = _exact_probes(actions) if dim <= MAX_EXACT else _random_probes(actions, 1)
    start = noise_std / (1 + noise_std)
    step = (1 - start) / n_steps
    x, integral = (1 - start) * actions, actions.new_full((len(actions),), dim * math.log(1 - start))
    with th.no_grad():
        for t in (start + step * index for index in range(n_steps)):
            middle = x + step / 2 * field(x, t)
            velocity, divergence = _velocity_and_divergence(field, middle, t + step / 2, probes)
            x, integral = x + step * velocity, integral + step * divergence
        return _standard_normal(x) + integral


def _exact_probes(actions: th.Tensor) -> th.Tensor:
    dim = actions.shape[1]
    return dim**0.5 * th.eye(dim, dtype=actions.dtype, device=actions.device).unsqueeze(1).expand(-1, *actions.shape)


def _random_probes(actions: th.Tensor, n_probes: int) -> th.Tensor:
    return th.randint(2, (n_probes, *actions.shape), device=actions.device).to(actions.dtype) * 2 - 1


def _velocity_and_divergence(field: VelocityField, x: th.Tensor, t: float, probes: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    with th.enable_grad():
        x = x.detach().requires_grad_()
        velocity = field(x, t)
        return velocity.detach(), _divergence(velocity, x, probes)


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
