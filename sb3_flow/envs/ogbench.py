"""
The single tasks of OGBench (https://arxiv.org/abs/2410.20092) as gymnasium environments:
``ogbench/cube-single-play-singletask-v0``, ``ogbench/cube-single-play-singletask-task3-v0``, ...
"""

from itertools import product

import gymnasium as gym

NAVIGATE = ("navigate", "stitch")
PLAY = ("play", "noisy")
#: Environments, and the kinds of their datasets
FAMILIES = {
    "pointmaze-medium": NAVIGATE,
    "pointmaze-large": NAVIGATE,
    "pointmaze-giant": NAVIGATE,
    "pointmaze-teleport": NAVIGATE,
    "antmaze-medium": (*NAVIGATE, "explore"),
    "antmaze-large": (*NAVIGATE, "explore"),
    "antmaze-giant": NAVIGATE,
    "antmaze-teleport": (*NAVIGATE, "explore"),
    "humanoidmaze-medium": NAVIGATE,
    "humanoidmaze-large": NAVIGATE,
    "humanoidmaze-giant": NAVIGATE,
    "antsoccer-arena": NAVIGATE,
    "antsoccer-medium": NAVIGATE,
    **{f"cube-{number}": PLAY for number in ("single", "double", "triple", "quadruple")},
    "scene": PLAY,
    **{f"puzzle-{size}": PLAY for size in ("3x3", "4x4", "4x5", "4x6")},
}
VISUAL = tuple(name for name in FAMILIES if name.startswith(("antmaze", "humanoidmaze", "cube", "scene", "puzzle")))
TASKS = ("", *(f"-task{number}" for number in range(1, 6)))


class ReportSuccess(gym.Wrapper):
    """Report the success of OGBench under the name that SB3 looks for, ``is_success``, and free its renderers."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        info["is_success"] = bool(info.get("success", False))
        return observation, reward, terminated, truncated, info

    def close(self):
        # OGBench does not close its renderers, which then fail noisily at the end of the process
        for name in ("custom_renderer", "_renderer"):
            renderer = getattr(self.unwrapped, name, None)
            if renderer is not None:
                renderer.close()
        super().close()


def make(name: str, **kwargs) -> gym.Env:
    """
    Make the environment of a single task.

    :param name: Name of the dataset, e.g. cube-single-play-singletask-v0
    :param kwargs: For the environment, e.g. ``success_timing="post"``, which restores what the FQL paper used
    :return: environment
    """
    try:
        import ogbench
    except ImportError as error:
        raise ImportError('ogbench is needed for this environment: pip install "sb3-flow[offline]"') from error
    return ReportSuccess(ogbench.make_env_and_datasets(name, env_only=True, **kwargs))


def register_ogbench() -> None:
    """Register all single tasks with gymnasium."""
    names = [*FAMILIES, *(f"visual-{name}" for name in VISUAL)]
    for name in names:
        for kind, task in product(FAMILIES[name.removeprefix("visual-")], TASKS):
            full_name = f"{name}-{kind}-singletask{task}-v0"
            gym.register(f"ogbench/{full_name}", entry_point="sb3_flow.envs.ogbench:make", kwargs=dict(name=full_name))
