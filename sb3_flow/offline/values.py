"""How the values of several critics are put together, and what they should be."""

import torch as th
from torch.nn import functional as F

from sb3_flow.offline.buffers import Batch
from sb3_flow.offline.chunks import ChunkSamples

#: How the critics are put together.
Q_AGGREGATIONS = ("mean", "min")


def aggregate(q_values: th.Tensor, q_agg: str = "mean", rho: float = 0.0) -> th.Tensor:
    """
    :param q_values: Those of the critics, (n_critics, batch)
    :param q_agg: "mean" or "min"
    :param rho: How many of their standard deviations are subtracted from the mean: a lower bound of the value
        (as https://github.com/ColinQiyangLi/qam has it, with ten critics and 0.5)
    :return: (batch,)
    """
    if q_agg == "min":
        return q_values.min(dim=0).values
    mean = q_values.mean(dim=0)
    return mean if rho == 0 else mean - rho * q_values.std(dim=0, correction=0)


def td_target(batch: Batch, next_values: th.Tensor, gamma: float) -> th.Tensor:
    """
    :param batch: Transitions
    :param next_values: Values of their next observations, (batch,)
    :param gamma: Discount factor
    :return: what the values of their actions should be, (batch,)
    """
    # For n-step replay, discount factor is gamma**n_steps (when no early termination)
    discounts = gamma if batch.discounts is None else batch.discounts.flatten()
    return batch.rewards.flatten() + (1 - batch.dones.flatten()) * discounts * next_values


def td_loss(q_values: th.Tensor, targets: th.Tensor, batch: Batch) -> th.Tensor:
    """
    :param q_values: Those of the critics, (n_critics, batch)
    :param targets: What they should be, (batch,)
    :param batch: Transitions, or chunks, of which only those count whose last step is valid
    :return: squared error, mean over the critics and the batch
    """
    if isinstance(batch, ChunkSamples):
        return ((q_values - targets).square() * batch.valid[:, -1]).mean()
    return F.mse_loss(q_values, targets.expand_as(q_values))


def expectile_loss(difference: th.Tensor, expectile: float) -> th.Tensor:
    """
    Asymmetric squared error of IQL (https://arxiv.org/abs/2110.06169, eq. 4).

    :param difference: What should be, minus what is, (batch,)
    :param expectile: Weight of the positive ones, that of the others is 1 minus it
    :return: (batch,)
    """
    return th.where(difference >= 0, expectile, 1 - expectile) * difference.square()
