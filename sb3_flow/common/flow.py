"""
Conditional flow matching with the linear (rectified flow) probability path.

Convention, everywhere in this package: ``t = 1`` is noise and ``t = 0`` is the action.

.. math::
    x_t = t\\,\\epsilon + (1 - t)\\,a, \\qquad u = \\frac{dx_t}{dt} = \\epsilon - a

A network that predicts any one of the velocity :math:`u`, the noise :math:`\\epsilon` or the action :math:`a`
at a known :math:`(x_t, t)` predicts them all, and their errors differ by a factor of :math:`t` only:

.. math::
    \\hat\\epsilon - \\epsilon = (1 - t)(\\hat u - u), \\qquad \\hat a - a = -t\\,(\\hat u - u)

so that there is one CFM loss here, whatever the network predicts and whatever the loss supervises. The squared errors have
different weights at different times. With those of the evidence lower bound,

.. math::
    \\log p(a) \\ge c - E_{t, \\epsilon} \\frac{1 - t}{t} \\lVert \\hat u(x_t, t) - u \\rVert^2

(see :mod:`sb3_flow.common.likelihood`), it changes as much as the log-likelihood where the flow is exact.

Papers: Lipman et al., https://arxiv.org/abs/2210.02747; McAllister et al. (FPO), https://arxiv.org/abs/2507.21053;
Kingma et al., https://arxiv.org/abs/2107.00630
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch as th

from sb3_flow.common.checks import FINITE_POSITIVE, to_float

Time = TypeVar("Time", float, th.Tensor)

#: What a network can predict, and what the CFM loss can supervise.
PREDICTION_TYPES = ("velocity", "noise", "action")
#: And the CFM loss with the weights of the evidence lower bound.
SUPERVISIONS = (*PREDICTION_TYPES, "elbo")
#: How the squared error is reduced over the action dimensions.
LOSS_REDUCTIONS = ("mean", "sum", "sqrt")
#: Where the timesteps of the Monte-Carlo pairs come from.
TIMESTEP_DISTRIBUTIONS = ("grid", "uniform", "importance", "logit-normal")
#: How the Monte-Carlo pairs of one action depend on each other.
SAMPLINGS = ("independent", "stratified")
#: "uniform" timesteps are at least this far from both ends (FPO++)
UNIFORM_MARGIN = 0.005
#: Mean and standard deviation of the log-odds of "logit-normal" timesteps (EDM, https://arxiv.org/abs/2206.00364, where they
#: are those of the logarithm of the noise's size)
LOG_ODDS = (-1.2, 1.2)

# A noise prediction says nothing about the action at t = 1, nor an action prediction about the noise at t = 0
# (the conversion divides by 1 - t, or t): such networks are trained and sampled at this distance from there. And the
# weight of the evidence lower bound is infinite at t = 0.
SINGULARITY_MARGIN = 0.05


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """
    Check that an argument is one of the possible values.

    :param name: Name of the argument, for the error message
    :param value: Its value
    :param choices: The possible values
    :raises ValueError: if it is not, listing the possible values
    """
    if value not in choices:
        raise ValueError(f"Unknown `{name}`: {value!r}, it must be one of {', '.join(map(repr, choices))}")


class CFMLoss(NamedTuple):
    """
    A CFM loss, and how it is estimated. Without arguments it is "elbo".

    :param supervision: What is supervised, whatever the network predicts: "velocity", "noise" or "action", or "elbo" for the
        weights of the evidence lower bound
    :param reduction: Reduction of the squared error over the action dimensions: "mean", "sum", or "sqrt" for the sum over the
        square root of their number
    :param timestep_distribution: "grid" draws timesteps from those that the sampler visits, "uniform" from [0, 1] (but for
        ``UNIFORM_MARGIN``), "logit-normal" more of those close to the action than to the noise (``LOG_ODDS``), and
        "importance" those of the grid with a probability proportional to the square root of the weight that their squared
        error has, which makes the losses of all of them about as large
    :param sampling: "independent", or "stratified" for less variance: the timesteps of an action are in as many equally likely
        parts of [0, 1], one in each, and those in the first and second, third and fourth, ... have opposite noise. A pair
        picked at random among those of an action is distributed as an independent one, the first, second, ... are not.
    :param scale: Factor of the loss
    """

    supervision: str = "elbo"
    reduction: str = "sum"
    timestep_distribution: str = "importance"
    sampling: str = "stratified"
    scale: float = 1.0


#: Choices of its fields, in their order, but for the scale
CFM_LOSS_CHOICES = (SUPERVISIONS, LOSS_REDUCTIONS, TIMESTEP_DISTRIBUTIONS, SAMPLINGS)
#: Those that have a name: "elbo", with which the log-ratio is one of likelihoods, and those of the authors' codes.
CFM_LOSSES = {
    "elbo": CFMLoss(),
    "fpo": CFMLoss("noise", "mean", "grid", "independent"),
    "fpo++": CFMLoss("velocity", "sqrt", "uniform", "independent"),
    # FPO's motion tracking: the log-likelihood of a Gaussian of standard deviation 0.05 about the action that is predicted
    "fpo-humanoid": CFMLoss("action", "mean", "logit-normal", "independent", 200.0),
}


def to_cfm_loss(value: Any) -> CFMLoss:
    """
    :param value: The argument ``cfm_loss``: a name, a dictionary of fields (the others are those of "elbo"), or all of them
    :return: CFM loss
    :raises ValueError: if it is something else, or one of the fields is unknown
    """
    if isinstance(value, str):
        check_choice("cfm_loss", value, CFM_LOSSES)
        return CFM_LOSSES[value]
    names = ", ".join(map(repr, CFMLoss._fields))
    if isinstance(value, Mapping):
        if unknown := sorted(map(str, set(value) - set(CFMLoss._fields))):
            raise ValueError(f"`cfm_loss` has unknown keys {unknown}, they must be among {names}")
        loss = CFMLoss(**value)
    # (of a saved model it is a list, and may have no scale)
    elif isinstance(value, (tuple, list)) and len(CFM_LOSS_CHOICES) <= len(value) <= len(CFMLoss._fields):
        loss = CFMLoss(*value)
    else:
        raise ValueError(
            f"`cfm_loss` must be one of {', '.join(map(repr, CFM_LOSSES))}, or a dict of {names}, it is {value!r}"
        )
    for name, choices in zip(CFMLoss._fields, CFM_LOSS_CHOICES, strict=False):
        check_choice(f"cfm_loss[{name!r}]", getattr(loss, name), choices)
    return loss._replace(scale=to_float("cfm_loss['scale']", loss.scale, FINITE_POSITIVE))


class MonteCarloPairs(NamedTuple):
    """Where the CFM loss of actions is taken, several pairs of noise and timestep for each."""

    #: (n_actions, n_mc_samples, action_dim)
    noise: th.Tensor
    #: (n_actions, n_mc_samples)
    timesteps: th.Tensor
    #: What makes CFM losses of the squared errors of the network's output, (n_actions, n_mc_samples). That its timestep is
    #: drawn more or less often than the others is taken into account.
    weights: th.Tensor


def interpolate(actions: th.Tensor, noise: th.Tensor, timesteps: th.Tensor) -> th.Tensor:
    """
    Point of the probability path, :math:`x_t = t \\epsilon + (1 - t) a`.

    :param actions: (..., action_dim)
    :param noise: (..., action_dim)
    :param timesteps: (...,), in [0, 1]
    :return: (..., action_dim)
    """
    return th.lerp(actions, noise, timesteps.unsqueeze(-1))


def flow_target(prediction_type: str, actions: th.Tensor, noise: th.Tensor) -> th.Tensor:
    """
    What a network of this type is trained to predict.

    :param prediction_type: "velocity", "noise" or "action"
    :param actions: (..., action_dim)
    :param noise: (..., action_dim)
    :return: (..., action_dim), or what broadcasts to it
    """
    if prediction_type == "velocity":
        return noise - actions
    return noise if prediction_type == "noise" else actions


def to_velocity(output: th.Tensor, x_t: th.Tensor, timesteps: th.Tensor | float, prediction_type: str) -> th.Tensor:
    """
    The velocity that the output of a network stands for.

    :param output: (..., action_dim)
    :param x_t: where the network was evaluated, (..., action_dim)
    :param timesteps: and when: a float, or a tensor that broadcasts with ``output``
    :param prediction_type: what the network predicts
    :return: (..., action_dim)
    """
    if prediction_type == "velocity":
        return output
    if prediction_type == "noise":
        return (output - x_t) / (1 - timesteps)
    return (x_t - output) / timesteps


def to_action(output: th.Tensor, x_t: th.Tensor, timesteps: th.Tensor, prediction_type: str) -> th.Tensor:
    """
    The action that the output of a network stands for: the mean of the actions whose paths go through this point.

    :param output: (..., action_dim)
    :param x_t: where the network was evaluated, (..., action_dim)
    :param timesteps: and when, (...,)
    :param prediction_type: what the network predicts
    :return: (..., action_dim)
    """
    if prediction_type == "action":
        return output
    timesteps = timesteps.unsqueeze(-1)
    return th.addcmul(x_t, timesteps, to_velocity(output, x_t, timesteps, prediction_type), value=-1)


def timestep_range(prediction_type: str, supervision: str = "velocity") -> tuple[float, float]:
    """
    Times at which a network of this type can be turned into a velocity, see ``SINGULARITY_MARGIN``.

    :param prediction_type: "velocity", "noise" or "action"
    :param supervision: in what the error is wanted
    :return: smallest and largest timestep
    """
    earliest = SINGULARITY_MARGIN if prediction_type == "action" or supervision == "elbo" else 0.0
    return earliest, 1.0 - SINGULARITY_MARGIN if prediction_type == "noise" else 1.0


def standard_normal_flow(timesteps: Time, prediction_type: str) -> Time:
    """
    What a network has to predict, as a multiple of :math:`x_t`, for the actions to be standard normal: the velocity
    :math:`E[\\epsilon - a \\mid x_t]`, the noise or the action of :math:`a, \\epsilon \\sim \\mathcal{N}(0, I)`.

    :param timesteps: in [0, 1]
    :param prediction_type: "velocity", "noise" or "action"
    :return: of the shape of the timesteps
    """
    variance = timesteps**2 + (1 - timesteps) ** 2
    if prediction_type == "velocity":
        return (2 * timesteps - 1) / variance
    return (timesteps if prediction_type == "noise" else 1 - timesteps) / variance


def standard_normal_std(timesteps: Time) -> Time:
    """
    Standard deviation of :math:`x_t` for :math:`a, \\epsilon \\sim \\mathcal{N}(0, I)`: one at both ends, less between them.

    :param timesteps: in [0, 1]
    :return: of the shape of the timesteps
    """
    return (timesteps**2 + (1 - timesteps) ** 2) ** 0.5


def sampler_grid(n_flow_steps: int) -> list[float]:
    """
    The times at which Euler's method with ``n_flow_steps`` steps evaluates the velocity: 1, 1 - 1/K, ..., 1/K.

    :param n_flow_steps: Number of steps K
    :return: K timesteps, from noise to action
    """
    return [1.0 - k / n_flow_steps for k in range(n_flow_steps)]


def _grid(n_flow_steps: int, prediction_type: str, supervision: str, device: th.device | str = "cpu") -> th.Tensor:
    """Times of the sampler at which the loss can be taken, (n_flow_steps,)."""
    return th.tensor(sampler_grid(n_flow_steps), device=device).clamp_(*timestep_range(prediction_type, supervision))


def check_flow_steps(loss: CFMLoss, prediction_type: str, n_flow_steps: int) -> None:
    """
    Check that there is a time with a loss: that of a noise is zero at t = 1, the only one that a single step visits.

    :param loss: CFM loss
    :param prediction_type: what the network predicts
    :param n_flow_steps: Number of steps of the sampler
    :raises ValueError: if there is none
    """
    on_grid = loss.timestep_distribution in ("grid", "importance")
    if on_grid and not _error_scale(loss.supervision, _grid(n_flow_steps, prediction_type, loss.supervision)).any():
        raise ValueError(
            f"`n_flow_steps` must be at least 2 for this `cfm_loss`, which is zero at t = 1, it is {n_flow_steps}"
        )


def draw_pairs(
    shape: tuple[int, int, int],
    loss: CFMLoss,
    prediction_type: str = "velocity",
    n_flow_steps: int = 10,
    device: th.device | str = "cpu",
) -> MonteCarloPairs:
    """
    Draw the Monte-Carlo pairs of a batch of actions. The mean over the pairs of an action has the same expectation however
    they are sampled.

    :param shape: (n_actions, n_mc_samples, action_dim)
    :param loss: The CFM loss to estimate
    :param prediction_type: what the network predicts
    :param n_flow_steps: Number of steps of the sampler
    :param device: Device of the result
    :return: pairs
    """
    n_mc_samples = shape[1]
    noise, timesteps = th.randn(shape, device=device), th.rand(shape[:2], device=device)
    if loss.sampling == "stratified":
        timesteps = (timesteps + th.arange(n_mc_samples, device=device)) / n_mc_samples
        noise[:, 1::2] = -noise[:, : n_mc_samples - 1 : 2]
    if loss.timestep_distribution in ("uniform", "logit-normal"):
        timesteps = UNIFORM_MARGIN + (1 - 2 * UNIFORM_MARGIN) * timesteps
        if loss.timestep_distribution == "logit-normal":
            mean, std = LOG_ODDS
            timesteps = th.sigmoid(mean + std * th.special.ndtri(timesteps))
        timesteps = timesteps.clamp_(*timestep_range(prediction_type, loss.supervision))
        importance = th.ones_like(timesteps)
    else:
        grid = _grid(n_flow_steps, prediction_type, loss.supervision, device)
        odds = _error_scale(loss.supervision, grid) if loss.timestep_distribution == "importance" else th.ones_like(grid)
        indices = th.searchsorted(odds.cumsum(0), timesteps * odds.sum(), right=True).clamp_(max=n_flow_steps - 1)
        timesteps, importance = grid[indices], (odds.mean() / odds)[indices]
    weights = loss_weights(timesteps, shape[2], prediction_type, loss.supervision, loss.reduction)
    return MonteCarloPairs(noise, timesteps, loss.scale * importance * weights)


def loss_weights(timesteps: th.Tensor, action_dim: int, prediction_type: str, supervision: str, reduction: str) -> th.Tensor:
    """
    What the CFM loss multiplies the squared error of a network's output with.

    :param timesteps: (...,)
    :param action_dim: Number of action dimensions
    :param prediction_type: what the network predicts
    :param supervision: whose squared error is the loss, or "elbo", see :func:`cfm_loss`
    :param reduction: over the action dimensions
    :return: (...,)
    """
    scale = rescale_error(th.ones_like(timesteps).unsqueeze(-1), timesteps, prediction_type, supervision).squeeze(-1)
    return scale.square() / {"mean": action_dim, "sum": 1.0, "sqrt": action_dim**0.5}[reduction]


def _error_scale(kind: str, timesteps: th.Tensor) -> th.Tensor:
    """Size of the error in ``kind`` for a unit error in the velocity."""
    if kind == "velocity":
        return th.ones_like(timesteps)
    if kind == "elbo":
        return ((1 - timesteps) / timesteps).sqrt()
    return 1 - timesteps if kind == "noise" else timesteps


def rescale_error(error: th.Tensor, timesteps: th.Tensor, prediction_type: str, supervision: str) -> th.Tensor:
    """
    Turn the error of a network's output into the error of what is supervised (up to its sign).

    :param error: (..., action_dim)
    :param timesteps: (...,)
    :param prediction_type: what the network predicts
    :param supervision: in what the error is wanted
    :return: (..., action_dim)
    """
    if supervision == prediction_type:
        return error
    scale = _error_scale(supervision, timesteps) / _error_scale(prediction_type, timesteps)
    return error * scale.unsqueeze(-1)  # type: ignore[union-attr]


def cfm_loss(
    output: th.Tensor,
    actions: th.Tensor,
    noise: th.Tensor,
    timesteps: th.Tensor,
    prediction_type: str = "velocity",
    supervision: str = "velocity",
    reduction: str = "mean",
) -> th.Tensor:
    """
    Conditional flow matching loss of every (action, noise, timestep).

    :param output: output of the network at ``interpolate(actions, noise, timesteps)``, (..., action_dim)
    :param actions: (..., action_dim), must broadcast with ``noise``
    :param noise: (..., action_dim)
    :param timesteps: (...,)
    :param prediction_type: what the network predicts
    :param supervision: whose squared error is the loss, or "elbo" for the weights of the evidence lower bound
    :param reduction: over the action dimensions: "mean", "sum", or "sqrt" for the sum over the square root of their number
    :return: (...,)
    """
    weights = loss_weights(timesteps, output.shape[-1], prediction_type, supervision, reduction)
    return weights * squared_error(output, flow_target(prediction_type, actions, noise))


def squared_error(output: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    :param output: Output of a network, (..., action_dim)
    :param target: What it is trained to predict, see :func:`flow_target`
    :return: sum over the action dimensions, (...,)
    """
    return (output - target).square().sum(dim=-1)
