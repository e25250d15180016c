"""
Samplers: integrate the velocity field from noise (t = 1) to the action (t = 0).

A sampler is a function ``(field, x, n_flow_steps, sigma) -> actions``, with ``field(x, t)`` the velocity of ``x`` at
the time ``t``, a float. Adding one to ``SAMPLERS`` makes it available to every policy.
"""

from collections.abc import Callable

import torch as th

from sb3_flow.common.flow import sampler_grid

#: Velocity of x, (batch, action_dim), at a time.
VelocityField = Callable[[th.Tensor, float], th.Tensor]
Sampler = Callable[[VelocityField, th.Tensor, int, float], th.Tensor]


def euler(field: VelocityField, x: th.Tensor, n_flow_steps: int, sigma: float = 0.0) -> th.Tensor:
    """
    Euler's method, with steps of equal length.

    :param field: Velocity field
    :param x: Noise, (batch, action_dim)
    :param n_flow_steps: Number of steps
    :param sigma: Not used: Euler's method is deterministic given the noise
    :return: Raw actions, (batch, action_dim)
    """
    for t in sampler_grid(n_flow_steps):
        x = th.sub(x, field(x, t), alpha=1.0 / n_flow_steps)
    return x


def stochastic_euler(field: VelocityField, x: th.Tensor, n_flow_steps: int, sigma: float = 0.0) -> th.Tensor:
    """
    Euler's method with Gaussian noise of a fixed standard deviation added at every step,
    the denoising chain of DPPO (https://arxiv.org/abs/2409.00588) as the authors of FPO run it.

    :param field: Velocity field
    :param x: Noise, (batch, action_dim)
    :param n_flow_steps: Number of steps
    :param sigma: Standard deviation of the noise of one step
    :return: Raw actions, (batch, action_dim)
    """
    for t in sampler_grid(n_flow_steps):
        x = th.sub(x, field(x, t), alpha=1.0 / n_flow_steps)
        if sigma > 0:
            x = th.add(x, th.randn_like(x), alpha=sigma)
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "sde": stochastic_euler}
