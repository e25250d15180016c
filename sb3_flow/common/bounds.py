"""The bounds of actions."""

import warnings

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy


def middle_and_half_range(action_space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """
    :param action_space: Action space with finite bounds
    :return: the middle between the bounds, and half their difference, which is finite even where the difference is not
    """
    low, high = action_space.low / 2, action_space.high / 2
    return high + low, high - low


def warn_if_too_wide(action_space: spaces.Box) -> None:
    """
    Warn if the difference of the bounds overflows: what is learned in [-1, 1] hardly ever means such actions.

    :param action_space: Action space with finite bounds
    """
    with np.errstate(over="ignore"):
        overflows = ~np.isfinite(action_space.high - action_space.low)
    if overflows.any():
        warnings.warn(
            f"The bounds of the action space are so wide that their difference overflows: {action_space}. "
            "Actions are rescaled to them, and most will be of their size: give the bounds of what the environment can use"
        )


class RescaledActionsPolicy(BasePolicy):
    """Policy whose actions are rescaled from [-1, 1] to the bounds of the action space."""

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
        # Not low + weight (high - low), which may overflow, nor from the middle, which may miss the bounds
        weight = 0.5 * (scaled_action + 1.0)
        return (1.0 - weight) * self.action_space.low + weight * self.action_space.high
