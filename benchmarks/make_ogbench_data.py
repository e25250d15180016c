"""
Make datasets of OGBench with its own scripted experts, in its own format, where the official files (a million transitions
each) are too large: `python benchmarks/make_ogbench_data.py --datasets cube-single-play-v0 --folder data`

They have the recipes of the official ones: experts that follow plans from one random target to the next (play), and from goal
to goal in a maze (navigate). An episode has its own seed and file, so that more processes (--jobs), or a second call after an
interrupted one, make the same dataset; the files are put together at the end. Scores on such datasets cannot be compared with
those on the official ones.
"""

import argparse
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

#: Those whose experts come with OGBench
DATASETS = (
    "cube-single-play-v0",
    "cube-double-play-v0",
    "scene-play-v0",
    "puzzle-3x3-play-v0",
    "pointmaze-medium-navigate-v0",
    "pointmaze-large-navigate-v0",
)
#: Bounds of the probability of stacking, in an episode
STACKING = {"cube-single": (0.0, 0.0), "cube-double": (0.0, 0.25), "scene": (0.5, 0.5), "puzzle-3x3": (0.5, 0.5)}
NOISE = 0.1
NOISE_IN_MAZES = 0.5
DTYPES = {"terminals": bool, "button_states": np.int64}


def make_env(dataset: str, n_steps: int, **kwargs) -> gym.Env:
    import ogbench  # noqa: F401 registers the environments

    task, version = dataset.rsplit("-", 2)[0], dataset.rsplit("-", 1)[1]
    return gym.make(f"{task}-{version}", terminate_at_goal=False, max_episode_steps=n_steps, **kwargs)


def play(dataset: str, seed: np.random.SeedSequence, n_steps: int) -> dict[str, list[Any]]:
    """An episode of an arm: each plan, of moving a cube, pressing a button, ..., is followed by another."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    env = make_env(dataset, n_steps, mode="data_collection")
    unwrapped: Any = env.unwrapped
    kwargs: dict[str, Any] = dict(env=env, noise=NOISE, noise_smoothing=0.5)
    if dataset.startswith("puzzle"):
        kwargs["gripper_always_closed"] = True
    classes = dict(
        cube=cube_plan.CubePlanOracle,
        button=button_plan.ButtonPlanOracle,
        drawer=drawer_plan.DrawerPlanOracle,
        window=window_plan.WindowPlanOracle,
    )
    experts: dict[str, Any] = {}

    def expert(obs: np.ndarray, info: dict[str, Any]) -> Any:
        name = info["privileged/target_task"]
        if name not in experts:
            experts[name] = classes[name](**kwargs)
        experts[name].reset(obs, info)
        return experts[name]

    # (the experts draw from NumPy's global generator)
    np.random.seed(seed.generate_state(1))
    obs, info = env.reset(seed=int(seed.generate_state(1)[0]))
    p_stack = np.random.uniform(*next(bounds for name, bounds in STACKING.items() if dataset.startswith(name)))
    current, episode, ended = expert(obs, info), Episode(), False
    while not ended:
        action = np.clip(current.select_action(obs, info), -1, 1)
        next_obs, _, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        if current.done:
            current = expert(*unwrapped.set_new_target(p_stack=p_stack))
        episode.add(obs, action, ended, info)
        obs = next_obs
    return episode.arrays


def navigate(dataset: str, seed: np.random.SeedSequence, n_steps: int) -> dict[str, list[Any]]:
    """An episode of a point in a maze: towards the next cell of the shortest way to a goal, and then to another one."""
    env = make_env(dataset, n_steps)
    unwrapped: Any = env.unwrapped
    free = unwrapped.maze_map == 0
    cells = [tuple(cell) for cell in np.argwhere(free)]

    def is_hallway(cell: tuple[int, int]) -> bool:
        i, j = cell
        up, down, left, right = free[i - 1, j], free[i + 1, j], free[i, j - 1], free[i, j + 1]
        return bool((up and down and not left and not right) or (left and right and not up and not down))

    goals = [cell for cell in cells if not is_hallway(cell)]
    generator = np.random.default_rng(seed)

    def choose(places: list[tuple[int, int]]) -> tuple[int, int]:
        return places[generator.integers(len(places))]

    np.random.seed(seed.generate_state(1))
    task = dict(task_info=dict(init_ij=choose(cells), goal_ij=choose(goals)))
    obs, _ = env.reset(seed=int(seed.generate_state(1)[0]), options=task)
    episode, ended = Episode(), False
    while not ended:
        position = unwrapped.get_xy()
        direction = unwrapped.get_oracle_subgoal(position, unwrapped.cur_goal_xy)[0] - position
        direction = direction / (np.linalg.norm(direction) + 1e-6)
        action = np.clip(direction + generator.normal(0, NOISE_IN_MAZES, 2), -1, 1)
        next_obs, _, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        if info["success"]:
            unwrapped.set_goal(choose(goals))
        episode.add(obs, action, ended, info)
        obs = next_obs
    return episode.arrays


class Episode:
    """The arrays of an episode, in the format of OGBench."""

    def __init__(self) -> None:
        self.arrays: dict[str, list[Any]] = {}

    def add(self, obs: np.ndarray, action: np.ndarray, ended: bool, info: dict[str, Any]) -> None:
        row = dict(observations=obs, actions=action, terminals=ended, qpos=info["prev_qpos"], qvel=info["prev_qvel"])
        if "prev_button_states" in info:
            row["button_states"] = info["prev_button_states"]
        for name, value in row.items():
            self.arrays.setdefault(name, []).append(np.copy(value))


def is_healthy(dataset: str, qpos: np.ndarray) -> bool:
    """Whether the cube of the scene has stayed where it is seen: on the table, or in the drawer."""
    if not dataset.startswith("scene"):
        return True
    y, z = qpos[:, 15], qpos[:, 16]
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return bool((y < 0.29).all() and ((y > -0.3) | in_drawer).all())


def make_episode(number: int, dataset: str, seed: int, n_steps: int, folder: Path) -> None:
    """Make an episode, if it is not there."""
    file = folder / f"{number}.npz"
    if file.exists():
        return
    make = navigate if "maze" in dataset else play
    attempt = 0
    while True:
        arrays = make(dataset, np.random.SeedSequence([seed, number, attempt]), n_steps)
        if is_healthy(dataset, np.array(arrays["qpos"])):
            break
        attempt += 1
    unfinished = folder / f"{number}.tmp.npz"
    typed: dict[str, Any] = {name: np.array(array, DTYPES.get(name, np.float32)) for name, array in arrays.items()}
    np.savez(unfinished, **typed)
    unfinished.replace(file)


def put_together(files: list[Path], target: Path) -> None:
    parts = [dict(np.load(file)) for file in files]
    arrays: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    unfinished = target.with_suffix(".tmp.npz")
    np.savez_compressed(unfinished, **arrays)
    unfinished.replace(target)


def make_dataset(dataset: str, folder: Path, n_episodes: int, n_val_episodes: int, n_steps: int, seed: int, jobs: int) -> None:
    """
    :param dataset: One of :data:`DATASETS`
    :param folder: Where its two files go, for training and validation
    :param n_episodes: Number of episodes to learn from
    :param n_val_episodes: Number of further episodes, for validation
    :param n_steps: Length of an episode
    :param seed: Seed
    :param jobs: Number of processes
    """
    target = folder / f"{dataset}.npz"
    if target.exists():
        print(f"{target} is there")
        return
    parts = folder / f"{dataset}-seed{seed}-{n_steps}"
    parts.mkdir(parents=True, exist_ok=True)
    numbers = range(n_episodes + n_val_episodes)
    with ProcessPoolExecutor(jobs) as pool:
        job = partial(make_episode, dataset=dataset, seed=seed, n_steps=n_steps, folder=parts)
        list(tqdm(pool.map(job, numbers), desc=dataset, total=len(numbers), unit="episode"))
    files = [parts / f"{number}.npz" for number in numbers]
    if n_val_episodes:
        put_together(files[n_episodes:], folder / f"{dataset}-val.npz")
    put_together(files[:n_episodes], target)
    shutil.rmtree(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS), metavar="NAME")
    parser.add_argument("--folder", type=Path, required=True, help="where the files go")
    parser.add_argument("--episodes", type=int, default=200, help="(1000 in the official ones)")
    parser.add_argument("--val-episodes", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1001, help="rows of an episode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    for dataset in args.datasets:
        make_dataset(dataset, args.folder, args.episodes, args.val_episodes, args.steps, args.seed, args.jobs)


if __name__ == "__main__":
    main()
