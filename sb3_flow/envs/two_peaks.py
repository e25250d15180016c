"""A bandit with two equally good actions, ``sb3_flow/TwoPeaks-v0``: the smallest task that a Gaussian cannot solve."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

#: Distance of the peaks of the reward from the middle, and their standard deviation
PEAK, WIDTH = 0.6, 0.1


class TwoPeaksEnv(gym.Env):
    """
    One state, one action, two narrow peaks of reward.

    - **Observation**: 0
    - **Action**: a number in [-1, 1]
    - **Reward**: :math:`\\exp(-\\tfrac{1}{2} ((|a| - 0.6) / 0.1)^2)`, which is 1 at -0.6 and 0.6. An episode is one step.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, dtype=np.float32), float(peaks(np.asarray(action))[0]), True, False, {}


def peaks(actions: np.ndarray) -> np.ndarray:
    """
    :param actions: Any number of them
    :return: reward of each
    """
    return np.exp(-0.5 * ((np.abs(actions) - PEAK) / WIDTH) ** 2)


def register_two_peaks() -> None:
    """Register the bandit with gymnasium."""
    gym.register("sb3_flow/TwoPeaks-v0", entry_point="sb3_flow.envs.two_peaks:TwoPeaksEnv")
