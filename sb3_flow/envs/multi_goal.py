"""
The multi-goal task of soft Q-learning (Haarnoja et al., https://arxiv.org/abs/1702.08165): several goals are equally good.

``sb3_flow/MultiGoal-v0`` (four goals, or ``n_goals=...``) and ``sb3_flow/MultiGoal-8-v0``.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_flow.common.checks import to_int
from sb3_flow.common.flow import check_choice

#: Half the side of the plane, distance of the goals from its middle, and how close is close enough
HALF_SIZE, DISTANCE, RADIUS = 7.0, 5.0, 1.0
GOAL_REWARD, ACTION_COST = 10.0, 0.1
#: Standard deviation of the start, along each axis
START_STD = 0.1
GOAL_COLOR, AGENT_COLOR = (0, 158, 115), (0, 67, 117)
PIXELS_PER_UNIT = 20


def make_goals(n_goals: int) -> np.ndarray:
    """
    Goals around the start, counterclockwise, the first one to the right. Multiples of eight are between the axes and the
    diagonals, where actions, which are within a square, leave all of them equal.

    :param n_goals: Number of goals
    :return: their positions, (n_goals, 2)
    """
    first = 0.5 if n_goals % 8 == 0 else 0.0
    angles = 2 * np.pi * (first + np.arange(n_goals)) / n_goals
    return DISTANCE * np.stack([np.cos(angles), np.sin(angles)], axis=1)


class MultiGoalEnv(gym.Env):
    """
    A point in the plane, surrounded by goals, all as good and as far.

    - **Observation**: position (x, y), in [-7, 7]²
    - **Action**: move along x and y, in [-1, 1]². A move longer than 1 is shortened to 1, so that no direction is faster
      than another.
    - **Reward**: :math:`-(d / 5)^2 - 0.1\\,\\lVert m \\rVert^2` after a move :math:`m`, with the distance :math:`d` to the
      nearest goal, and 10 more at a distance of less than 1, which ends the episode. ``info["goal"]`` is the number of
      the goal that is reached, or -1, and ``info["is_success"]`` whether there is one.
    - **Start**: in the middle, with a standard deviation of 0.1, or ``reset(options={"position": (x, y)})``
    - The episode is truncated after 30 steps.

    :param n_goals: Number of goals, on a circle of radius 5
    :param render_mode: "rgb_array"
    :raises ValueError: if there are no goals, or there is no such render mode
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012 (as gymnasium declares it)

    def __init__(self, n_goals: int = 4, render_mode: str | None = None):
        check_choice("render_mode", str(render_mode), ["None", *self.metadata["render_modes"]])
        self.goals = make_goals(to_int("n_goals", n_goals, at_least=1))
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-HALF_SIZE, HALF_SIZE, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        #: Where the point is, (x, y)
        self.position = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if options and "position" in options:
            position = np.asarray(options["position"], dtype=float)
            if position.shape != (2,) or not (np.abs(position) <= HALF_SIZE).all():
                raise ValueError(f"`position` must be (x, y), both in [-7, 7], it is {options['position']}")
        else:
            position = self.np_random.normal(0.0, START_STD, 2)
        self.position = position
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        move = np.clip(np.asarray(action, dtype=float), -1, 1)
        move = move / max(np.linalg.norm(move), 1.0)
        self.position = np.clip(self.position + move, -HALF_SIZE, HALF_SIZE)
        distances = np.linalg.norm(self.goals - self.position, axis=1)
        nearest = int(distances.argmin())
        reached = bool(distances[nearest] < RADIUS)
        reward = -((distances[nearest] / DISTANCE) ** 2) - ACTION_COST * (move**2).sum() + GOAL_REWARD * reached
        info = dict(goal=nearest if reached else -1, is_success=reached)
        return self.position.astype(np.float32), float(reward), reached, False, info

    def render(self) -> np.ndarray | None:  # type: ignore[override]  # gymnasium's is generic
        if self.render_mode is None:
            return None
        coordinates = (np.arange(2 * HALF_SIZE * PIXELS_PER_UNIT) + 0.5) / PIXELS_PER_UNIT - HALF_SIZE
        # y points upwards
        pixels = np.stack(np.meshgrid(coordinates, coordinates[::-1]), axis=-1)
        image = np.full((*pixels.shape[:2], 3), 245, dtype=np.uint8)
        for goal in self.goals:
            image[np.linalg.norm(pixels - goal, axis=-1) < RADIUS] = GOAL_COLOR
        image[np.linalg.norm(pixels - self.position, axis=-1) < 0.3] = AGENT_COLOR
        return image


def register_multi_goal() -> None:
    """Register the task, with four and with eight goals, with gymnasium."""
    for name, n_goals in {"MultiGoal": 4, "MultiGoal-8": 8}.items():
        gym.register(
            f"sb3_flow/{name}-v0",
            entry_point="sb3_flow.envs.multi_goal:MultiGoalEnv",
            kwargs=dict(n_goals=n_goals),
            max_episode_steps=30,
        )
