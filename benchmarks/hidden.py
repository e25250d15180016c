"""A task whose observation lacks a part."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

#: Of Walker2d: angles, and angular velocities, of the hip, the knee and the ankle
LEFT_LEG = (5, 6, 7, 14, 15, 16)


class LeftLegHidden(gym.ObservationWrapper):
    """
    ``Walker2d-v5`` without the angles and velocities of the left leg.

    :param env: The environment
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, spaces.Box) and space.shape == (17,)
        self.seen = np.setdiff1d(np.arange(17), LEFT_LEG)
        self.observation_space = spaces.Box(space.low[self.seen], space.high[self.seen], dtype=space.dtype.type)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[self.seen]
