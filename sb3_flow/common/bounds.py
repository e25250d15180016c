"""The bounds of actions."""

import warnings

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy


def is_bounded(action_space: spaces.Box) -> np.ndarray:
    """
    :param action_space: Action space
    :return: which of its dimensions have two finite bounds
    """
    return action_space.bounded_below & action_space.bounded_above


def middle_and_half_range(action_space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """
    :param action_space: Action space
    :return: the middle between the bounds, and half their difference, which is finite even where the difference is not.
        Dimensions without two finite bounds are in env units: there they are the legal action that is closest to zero, and 1
    """
    bounded = is_bounded(action_space)
    low, high = (np.where(bounded, bound, 0.0).astype(bound.dtype) / 2 for bound in (action_space.low, action_space.high))
    closest = np.clip(np.zeros_like(low), action_space.low, action_space.high)
    return np.where(bounded, high + low, closest), np.where(bounded, high - low, 1.0).astype(low.dtype)


def warn_if_too_wide(action_space: spaces.Box) -> None:
    """
    Warn if the difference of finite bounds overflows: what is learned in [-1, 1] hardly ever means such actions.

    :param action_space: Action space
    """
    bounded = is_bounded(action_space)
    with np.errstate(over="ignore"):
        overflows = ~np.isfinite(action_space.high[bounded] - action_space.low[bounded])
    if overflows.any():
        warnings.warn(
            f"The bounds of the action space are so wide that their difference overflows: {action_space}. "
            "Actions are rescaled to them, and most will be of their size: give the bounds of what the environment can use"
        )


class RescaledActionsPolicy(BasePolicy):
    """
    Policy whose actions are rescaled from [-1, 1] to the bounds of the action space, or are in env units, where a dimension
    does not have two finite ones (see :func:`middle_and_half_range`).
    """

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """
        Rescale the action from [low, high] to [-1, 1]

        :param action: Action to scale
        :return: Scaled action, zero where the bounds are equal
        """
        assert isinstance(self.action_space, spaces.Box)
        middle, half_range = middle_and_half_range(self.action_space)
        return (action - middle) / np.where(half_range > 0, half_range, np.inf)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Rescale the action from [-1, 1] to [low, high]

        :param scaled_action: Action to un-scale
        :return: Action, in env units
        """
        assert isinstance(self.action_space, spaces.Box)
        low, high = self.action_space.low, self.action_space.high
        # Not low + weight (high - low), which may overflow, nor from the middle, which may miss the bounds
        weight = 0.5 * (scaled_action + 1.0)
        if self.action_space.is_bounded():
            return (1.0 - weight) * low + weight * high
        bounded, (middle, _) = is_bounded(self.action_space), middle_and_half_range(self.action_space)
        low, high = np.where(bounded, low, middle), np.where(bounded, high, middle)
        return np.where(bounded, (1.0 - weight) * low + weight * high, middle + scaled_action)
