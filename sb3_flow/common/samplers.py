"""
Samplers: integrate the velocity field from noise (t = 1) to the action (t = 0).

A sampler is a function of a field, where ``field(x, t)`` is the velocity of ``x`` at the time ``t``, a float, of the noise and
of the number of steps; :func:`integrate` finds it by its name. Policies with a skip connection are sampled in other
coordinates, see :func:`unit_variance_field`.

================= =========================== ================ =========
Sampler           Method                      Evaluations      Order
================= =========================== ================ =========
``"euler"``       Euler                       K                1
``"sde"``         Euler with noise            K
``"midpoint"``    midpoint                    2 K              2
``"heun"``        Heun (trapezoidal)          2 K              2
``"rk4"``         Runge-Kutta (3/8 rule)      4 K              4
``"dopri5"``      Dormand-Prince, adaptive    as many as       5
                                              its tolerance
                                              takes
================= =========================== ================ =========

Those after the first two are torchdiffeq's (https://github.com/rtqichen/torchdiffeq, extra ``solvers``).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch as th

from sb3_flow.common.checks import NOT_NEGATIVE, to_float, to_int
from sb3_flow.common.flow import (
    check_choice,
    sampler_grid,
    standard_normal_flow,
    standard_normal_std,
    timestep_range,
)

#: Velocity of x, (batch, action_dim), at a time.
VelocityField = Callable[[th.Tensor, float], th.Tensor]
#: Standard deviation of the noise of a step, or of each of them
Sigma = float | Sequence[float]

#: Relative and absolute tolerance of "dopri5", for the root mean square of the errors of a batch.
TOLERANCE = 1e-5


def euler(field: VelocityField, x: th.Tensor, n_flow_steps: int) -> th.Tensor:
    """
    Euler's method, with steps of equal length.

    :param field: Velocity field
    :param x: Noise, (batch, action_dim)
    :param n_flow_steps: Number of steps
    :return: Raw actions, (batch, action_dim)
    """
    for t in sampler_grid(n_flow_steps):
        x = th.sub(x, field(x, t), alpha=1.0 / n_flow_steps)
    return x


def stochastic_euler(field: VelocityField, x: th.Tensor, n_flow_steps: int, sigma: Sigma) -> th.Tensor:
    """
    Euler's method with Gaussian noise of a fixed standard deviation added at every step,
    the denoising chain of DPPO (https://arxiv.org/abs/2409.00588) as the authors of FPO run it.

    :param field: Velocity field
    :param x: Noise, (batch, action_dim)
    :param n_flow_steps: Number of steps
    :param sigma: Standard deviation of the noise of one step, or of each of them
    :return: Raw actions, (batch, action_dim)
    """
    for t, std in zip(sampler_grid(n_flow_steps), np.broadcast_to(sigma, n_flow_steps), strict=True):
        x = th.sub(x, field(x, t), alpha=1.0 / n_flow_steps)
        if std > 0:
            x = th.add(x, th.randn_like(x), alpha=float(std))
    return x


def unit_variance_field(field: VelocityField, prediction_type: str) -> VelocityField:
    """
    The field of a network with a skip connection in the coordinates :math:`y_t = x_t / s_t`, with :math:`s_t` the standard
    deviation that :math:`x_t` has for standard normal actions (:func:`~sb3_flow.common.flow.standard_normal_std`):

    .. math::
        \\frac{dy_t}{dt} = \\frac{v(s_t y_t, t)}{s_t} - \\frac{\\dot s_t}{s_t}\\, y_t

    They are those of x at both ends, noise and action. What the skip connection adds to the velocity stands still in them, so
    that it is integrated exactly by every sampler with any number of steps (an exponential integrator, Hochbruck and
    Ostermann, 2010): without the layers of the network, and the noise of the "sde" sampler, actions are standard normal.

    :param field: Velocity field of x
    :param prediction_type: What the network predicts
    :return: velocity field of y
    """
    earliest, latest = timestep_range(prediction_type)

    def field_of_y(y: th.Tensor, t: float) -> th.Tensor:
        std, rate = standard_normal_std(t), standard_normal_flow(min(max(t, earliest), latest), "velocity")
        return th.sub(field(std * y, t) / std, y, alpha=rate)

    return field_of_y


def odeint(func: Callable[[th.Tensor, Any], Any], y0: Any, times: list[float], method: str) -> Any:
    """
    torchdiffeq's ``odeint``, from the first to the last of some times.

    :param func: Derivative of y at a time, ``func(t, y)``
    :param y0: Value at the first time, a tensor or a tuple of tensors
    :param times: The steps of a method with fixed ones
    :param method: Name of the method, torchdiffeq's
    :return: value at the last time
    :raises ImportError: if torchdiffeq is not installed
    :raises ValueError: if an adaptive method is traced or exported
    """
    # (older versions of PyTorch do not tell, and refuse by themselves what depends on data)
    if method in ADAPTIVE and (th.jit.is_tracing() or getattr(th.compiler, "is_exporting", bool)()):
        raise ValueError(
            f'The sampler "{method}" chooses its steps by what it finds: it cannot be traced or exported. '
            "Take one with fixed steps, see `set_sampler()`"
        )
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError('This sampler needs torchdiffeq, it comes with: pip install "sb3-flow[solvers]"') from error
    device = (y0[0] if isinstance(y0, tuple) else y0).device
    # In double precision: these are the times that a velocity field has prepared itself for
    t = th.tensor(times, dtype=th.float64, device=device)
    solution = torchdiffeq.odeint(func, y0, t, method=method, rtol=TOLERANCE, atol=TOLERANCE)
    return tuple(y[-1] for y in solution) if isinstance(y0, tuple) else solution[-1]


def solve(method: str, field: VelocityField, x: th.Tensor, n_flow_steps: int, kinks: Iterable[float] = ()) -> th.Tensor:
    """
    A method of torchdiffeq, with steps of equal length or, if it is adaptive, of any length.

    :param method: Name of the method, torchdiffeq's
    :param field: Velocity field
    :param x: Noise, (batch, action_dim)
    :param n_flow_steps: Number of steps, if the method is not adaptive
    :param kinks: Times at which the field is not smooth, where a step ends too
    :return: Raw actions, (batch, action_dim)
    :raises ImportError: if torchdiffeq is not installed
    """
    times = [1.0, 0.0] if method in ADAPTIVE else sorted({*sampler_grid(n_flow_steps), 0.0, *kinks}, reverse=True)
    return odeint(lambda t, y: field(y, float(t.detach())), x, times, method)


#: Those of torchdiffeq, with the names that it has for them, and those that choose their steps themselves
METHODS = {"midpoint": "midpoint", "heun": "heun2", "rk4": "rk4", "dopri5": "dopri5"}
ADAPTIVE = ("dopri5",)
SAMPLERS = ("euler", "sde", *METHODS)


def integrate(
    sampler: str,
    field: VelocityField,
    x: th.Tensor,
    n_flow_steps: int,
    sigma: Sigma = 0.0,
    kinks: Iterable[float] = (),
) -> th.Tensor:
    """
    Integrate from noise to actions with one of the samplers, which takes what it needs.

    :param sampler: One of ``SAMPLERS``
    :param field: Velocity field
    :param x: Noise, (batch, action_dim)
    :param n_flow_steps: Number of steps
    :param sigma: Standard deviation of the noise of one step, or of each of them ("sde")
    :param kinks: Times at which the field is not smooth, where methods of higher order are to end a step too
    :return: Raw actions, (batch, action_dim)
    """
    if sampler == "euler":
        return euler(field, x, n_flow_steps)
    if sampler == "sde":
        return stochastic_euler(field, x, n_flow_steps, sigma)
    return solve(METHODS[sampler], field, x, n_flow_steps, kinks)


def check_sampler(sampler: str, n_flow_steps: int, sigma: float = 0.0) -> None:
    """
    Check what a policy is to sample with.

    :param sampler: One of ``SAMPLERS``
    :param n_flow_steps: Number of steps
    :param sigma: Standard deviation of the noise of one step
    :raises ValueError: if one of them is unknown or out of its range
    :raises ImportError: if the sampler needs torchdiffeq, and it is not installed
    """
    check_choice("sampler", sampler, SAMPLERS)
    to_int("n_flow_steps", n_flow_steps, at_least=1)
    to_float("sampler_sigma", sigma, NOT_NEGATIVE)
    if sampler in METHODS:
        # Before any work is lost
        odeint(lambda t, y: y, th.zeros(1), [1.0, 0.0], "euler")
