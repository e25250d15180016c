"""Figures of trained policies."""

from pathlib import Path
from typing import Any

import numpy as np

from sb3_flow.zoo.arguments import figure, finite, integer, new_file, wrong
from sb3_flow.zoo.commands.common import check_env, trained_agent_parser
from sb3_flow.zoo.errors import InputError, user_input


def _png(text: str) -> Path:
    """Type of a figure to write, with a GIF beside it."""
    if Path(text).suffix not in ("", ".png"):
        raise wrong(text, "a name that ends in .png")
    return new_file(text)


def plot_flow() -> None:
    """Draw the samples of a trained flow policy as they go from noise to action."""
    from stable_baselines3.common.vec_env import unwrap_vec_normalize

    from sb3_flow.plotting.flow import flow_policy
    from sb3_flow.plotting.flow import plot_flow as plot
    from sb3_flow.zoo.evaluate import load_run
    from sb3_flow.zoo.trained_agents import folder_with_run, output_folder

    parser = trained_agent_parser("sb3-flow plot-flow", plot_flow.__doc__)
    parser.set_defaults(algo="fpo", env="HalfCheetah-v5")
    parser.add_argument(
        "-o", "--output", help="PNG to write (default: in the folder of the run, if it is one's own), and a GIF", type=_png
    )
    observation = parser.add_mutually_exclusive_group()
    observation.add_argument("--obs", help="Observation (not normalized)", nargs="+", type=finite)
    observation.add_argument(
        "--steps", help="Or that after some steps of the policy in the environment", default=0, type=integer(0)
    )
    parser.add_argument("--dims", help="One or two dimensions of the action to show", nargs="+", type=integer(0))
    parser.add_argument("--n-samples", help="Number of samples", default=1000, type=integer(1))
    args = parser.parse_args()
    check_env(args.env, args.gym_packages)
    args.folder = folder_with_run(args.algo, args.env, args.folder, args.exp_id != 0 or args.load_best)
    model, env, model_path = load_run(args.algo, args.env, args.folder, args.exp_id, args.load_best, args.seed, args.device)
    obs: Any = env.reset()
    state, episode_start = None, np.ones(env.num_envs, dtype=bool)
    for _ in range(args.steps):
        actions, state = model.predict(obs, state, episode_start, deterministic=False)
        obs, _, episode_start, _ = env.step(actions)
    if isinstance(obs, dict):
        raise InputError(f"argument --env: found {args.env!r}, which has a Dict of observations, expected one with a Box")
    if args.obs is not None:
        if obs[0].size != len(args.obs):
            raise InputError(f"argument --obs: found {len(args.obs)} numbers, expected {obs[0].size}")
        obs = np.array(args.obs, dtype=obs.dtype).reshape(obs.shape)
        normalization = unwrap_vec_normalize(env)
        obs = obs if normalization is None else normalization.normalize_obs(obs)
    where = f"at {args.obs}" if args.obs else f"after {args.steps} steps"
    path = args.output or output_folder(model_path.parent) / "flow.png"
    with user_input("argument --algo", ValueError):
        flow_policy(model)
    with user_input("argument --dims", ValueError):
        files = plot(model, obs[0], path, args.dims, args.n_samples, f"{args.algo.upper()} on {args.env}, {where}")
    print(*files, sep="\n")


def plot_gridworld() -> None:
    """Draw trained policies in GridWorld: mean actions, samples at a saddle point, episodes; and count their modes."""
    from rl_zoo3.utils import ALGOS
    from stable_baselines3.common.vec_env import unwrap_vec_normalize

    from sb3_flow.plotting.gridworld import multimodality
    from sb3_flow.plotting.gridworld import plot_gridworld as plot
    from sb3_flow.zoo.evaluate import load_run
    from sb3_flow.zoo.trained_agents import folder_with_run, output_folder

    parser = trained_agent_parser("sb3-flow plot-gridworld", plot_gridworld.__doc__)
    parser.add_argument("--algo", help="RL Algorithms, a row of the figure for each", nargs="+", choices=list(ALGOS))
    parser.add_argument(
        "-o", "--output", help="Figure to write (default: in the folder of the run, if it is one's own)", type=figure
    )
    parser.set_defaults(algo=["fpo"], env="sb3_flow/GridWorld-v0")
    args = parser.parse_args()
    check_env(args.env, args.gym_packages)
    args.folder = folder_with_run(args.algo, args.env, args.folder, args.exp_id != 0 or args.load_best)
    models, normalize = {}, {}  # type: dict[str, Any], dict[str, Any]
    for algo in args.algo:
        model, env, model_path = load_run(algo, args.env, args.folder, args.exp_id, args.load_best, args.seed, args.device)
        if not env.has_attr("layout"):
            raise InputError(f"argument --env: found {args.env!r}, expected a GridWorld")
        layout = env.get_attr("layout")[0]
        args.output = args.output or output_folder(model_path.parent) / "gridworld.png"
        normalization = unwrap_vec_normalize(env)
        models[algo.upper()] = model
        normalize[algo.upper()] = np.asarray if normalization is None else normalization.normalize_obs
    print("At the saddle point: share of samples in each mode (and between them), entropy of the goals of episodes")
    for name, model in models.items():
        modes = multimodality(model, layout, normalize=normalize[name])
        print(f"{name}: {modes['low']:.2f}, {modes['high']:.2f} ({modes['stay']:.2f}), {modes['goal_entropy']:.2f} bits")
    print(*plot(models, args.output, layout, normalize), sep="\n")
