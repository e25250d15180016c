"""
GridWorld, the task of the first figure of FPO (https://arxiv.org/abs/2507.21053): a state may have several good actions.

``sb3_flow/GridWorld-v0`` (two walls, or ``layout=...``), and ``sb3_flow/GridWorld-three_goals-v0``, ... for each layout.
"""

from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_flow.common.flow import check_choice

SIZE = 25
CENTER = SIZE // 2
#: Kinds of cells
FREE, GOAL, DEATH, WALL = range(4)
GOAL_REWARD, DEATH_REWARD = 20.0, -10.0
#: Color of each kind of cell, of the agent, and of the lines between cells (legible without telling red from green)
CELL_COLORS = np.array([[245, 245, 245], [0, 158, 115], [213, 94, 0], [110, 110, 110]], dtype=np.uint8)
AGENT_COLOR = np.array([0, 67, 117], dtype=np.uint8)
LINE_COLOR = np.array([215, 215, 215], dtype=np.uint8)
PIXELS_PER_CELL = 20


def _block(cells: np.ndarray, xs: Iterable[int], ys: Iterable[int], kind: int) -> None:
    cells[np.ix_(list(ys), list(xs))] = kind


def _around(center: int, radius: int) -> range:
    return range(center - radius, center + radius + 1)


def _two_walls(cells: np.ndarray) -> None:
    _block(cells, range(SIZE), (0, 1, SIZE - 2, SIZE - 1), GOAL)


def _three_goals(cells: np.ndarray) -> None:
    for x, y in ((12, 18), (7, 7), (17, 7)):
        _block(cells, _around(x, 1), _around(y, 1), GOAL)
    _block(cells, _around(CENTER, 1), _around(CENTER, 1), DEATH)


def _tree_in_the_middle(cells: np.ndarray) -> None:
    _block(cells, (SIZE - 2, SIZE - 1), _around(CENTER, 2), GOAL)
    _block(cells, range(CENTER + 1, CENTER + 6), _around(CENTER, 2), DEATH)


def _two_slits(cells: np.ndarray) -> None:
    _block(cells, (SIZE - 1,), range(SIZE), GOAL)
    _block(cells, (CENTER + 3,), range(SIZE), WALL)
    for slit in (range(CENTER - 8, CENTER - 4), range(CENTER + 5, CENTER + 9)):
        _block(cells, (CENTER + 3,), slit, FREE)


def _c_shape(cells: np.ndarray) -> None:
    _block(cells, _around(CENTER, 2), _around(CENTER, 2), GOAL)
    _block(cells, _around(CENTER, 5), (CENTER - 5, CENTER + 5), WALL)
    _block(cells, (CENTER + 5,), _around(CENTER, 5), WALL)


LAYOUTS = {
    "two_walls": _two_walls,
    "three_goals": _three_goals,
    "tree_in_the_middle": _tree_in_the_middle,
    "two_slits": _two_slits,
    "c_shape": _c_shape,
}


def make_layout(layout: str) -> np.ndarray:
    """
    The cells of a layout.

    :param layout: One of ``LAYOUTS``
    :return: kind of each cell (``FREE``, ``GOAL``, ``DEATH`` or ``WALL``), [y, x], (25, 25)
    """
    cells = np.full((SIZE, SIZE), FREE)
    LAYOUTS[layout](cells)
    return cells


class GridWorldEnv(gym.Env):
    """
    An agent on a grid of 25×25 cells, which starts anywhere and looks for a goal.

    - **Observation**: position (x, y), scaled to [-1, 1]
    - **Action**: in [-1, 1]², rounded to a move of -1, 0 or 1 along each axis. The agent stays within the grid, and
      does not enter a wall.
    - **Reward**: 20 for a goal, -10 for a cell of death, which both end the episode, and 0 otherwise.
      ``info["is_success"]`` tells whether the agent has reached a goal.
    - **Start**: a free cell, with equal probabilities, or ``reset(options={"position": (x, y)})``
    - The episode is truncated after 100 steps.

    The rules are those of the authors' code (https://github.com/akanazawa/fpo), but for the start, which is never on a
    wall, and the end, where a truncation is not a termination.

    :param layout: "two_walls" (goals along the top and the bottom), "three_goals", "tree_in_the_middle", "two_slits" or
        "c_shape"
    :param render_mode: "rgb_array" or "human" (with pygame)
    :raises ValueError: if there is no such layout
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "human"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, layout: str = "two_walls", render_mode: str | None = None):
        check_choice("layout", layout, LAYOUTS)
        check_choice("render_mode", str(render_mode), ["None", *self.metadata["render_modes"]])
        self.layout = layout
        self.render_mode = render_mode
        self.cells = make_layout(layout)
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._free_cells = np.argwhere(self.cells == FREE)[:, ::-1]
        #: Where the agent is, (x, y)
        self.position = np.array([CENTER, CENTER])
        self._window: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if options and "position" in options:
            position = np.asarray(options["position"], dtype=int)
            if position.shape != (2,) or not ((0 <= position) & (position < SIZE)).all() or self._kind(position) != FREE:
                raise ValueError(f"`position` must be the (x, y) of a free cell of {self.layout}, it is {options['position']}")
        else:
            position = self._free_cells[self.np_random.integers(len(self._free_cells))]
        self.position = position
        if self.render_mode == "human":
            self.render()
        return to_observation(self.position), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        move = np.rint(np.clip(action, -1, 1)).astype(int)
        position = np.clip(self.position + move, 0, SIZE - 1)
        kind = self._kind(position)
        if kind != WALL:
            self.position = position
        if self.render_mode == "human":
            self.render()
        reward = {GOAL: GOAL_REWARD, DEATH: DEATH_REWARD}.get(kind, 0.0)
        return to_observation(self.position), reward, kind in (GOAL, DEATH), False, {"is_success": kind == GOAL}

    def _kind(self, position: np.ndarray) -> int:
        x, y = position
        return int(self.cells[y, x])

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        if self.render_mode is None:
            return None
        colors = CELL_COLORS[self.cells]
        colors[self.position[1], self.position[0]] = AGENT_COLOR
        # y points upwards
        image = colors[::-1].repeat(PIXELS_PER_CELL, axis=0).repeat(PIXELS_PER_CELL, axis=1)
        image[::PIXELS_PER_CELL] = LINE_COLOR
        image[:, ::PIXELS_PER_CELL] = LINE_COLOR
        if self.render_mode == "rgb_array":
            return image
        self._show(image)
        return None

    def _show(self, image: np.ndarray) -> None:
        try:
            import pygame
        except ImportError as error:
            raise ImportError('render_mode="human" needs pygame, it comes with: pip install "sb3-flow[zoo]"') from error
        if self._window is None:
            pygame.display.init()
            pygame.display.set_caption(f"GridWorld, {self.layout}")
            self._window, self._clock = pygame.display.set_mode(image.shape[:2]), pygame.time.Clock()
        self._window.blit(pygame.surfarray.make_surface(image.swapaxes(0, 1)), (0, 0))
        pygame.event.pump()
        pygame.display.flip()
        self._clock.tick(self.metadata["render_fps"])

    def close(self) -> None:
        if self._window is not None:
            import pygame

            pygame.display.quit()
            self._window = None


def to_observation(positions: np.ndarray) -> np.ndarray:
    """
    Observation of a position.

    :param positions: x and y of cells, (..., 2)
    :return: in [-1, 1], (..., 2)
    """
    return ((np.asarray(positions) - CENTER) / CENTER).astype(np.float32)


def register_gridworld() -> None:
    """Register GridWorld, and each of its layouts, with gymnasium."""
    names = {"GridWorld": "two_walls", **{f"GridWorld-{layout}": layout for layout in LAYOUTS}}
    for name, layout in names.items():
        gym.register(
            f"sb3_flow/{name}-v0",
            entry_point="sb3_flow.envs.gridworld:GridWorldEnv",
            kwargs=dict(layout=layout),
            max_episode_steps=100,
        )
