"""Figures of trained policies."""

import sys
from typing import Any

import numpy as np

from sb3_flow.zoo.commands.common import check_env, trained_agent_parser


def plot_flow() -> None:
    """Draw the samples of a trained flow policy as they go from noise to action."""
    from stable_baselines3.common.vec_env import unwrap_vec_normalize

    from sb3_flow.plotting.flow import plot_flow as plot
    from sb3_flow.zoo.evaluate import load_run

    parser = trained_agent_parser("sb3-flow plot-flow", plot_flow.__doc__)
    parser.set_defaults(algo="fpo", env="HalfCheetah-v5")
    observation = parser.add_mutually_exclusive_group()
    observation.add_argument("--obs", help="Observation (not normalized)", nargs="+", type=float)
    observation.add_argument("--steps", help="Or that after some steps of the policy in the environment", default=0, type=int)
    parser.add_argument("--dims", help="One or two dimensions of the action to show", nargs="+", type=int)
    parser.add_argument("--n-samples", help="Number of samples", default=1000, type=int)
    args = parser.parse_args()
    check_env(args.env, args.gym_packages)
    model, env, model_path = load_run(args.algo, args.env, args.folder, args.exp_id, args.load_best, args.seed, args.device)
    obs: Any = env.reset()
    for _ in range(args.steps):
        obs, *_ = env.step(model.predict(obs, deterministic=False)[0])
    if isinstance(obs, dict):
        sys.exit("sb3-flow: error: plot-flow draws policies with one observation, not with a Dict of them")
    if args.obs is not None:
        if obs[0].size != len(args.obs):
            sys.exit(f"sb3-flow: error: argument --obs: expected {obs[0].size} numbers, got {len(args.obs)}")
        obs = np.array(args.obs, dtype=obs.dtype).reshape(obs.shape)
        normalization = unwrap_vec_normalize(env)
        obs = obs if normalization is None else normalization.normalize_obs(obs)
    where = f"at {args.obs}" if args.obs else f"after {args.steps} steps"
    path = args.output or model_path.parent / "flow.png"
    try:
        files = plot(model, obs[0], path, args.dims, args.n_samples, f"{args.algo.upper()} on {args.env}, {where}")
    except ValueError as error:
        sys.exit(f"sb3-flow: error: {error}")
    print(*files, sep="\n")


def plot_gridworld() -> None:
    """Draw trained policies in GridWorld: mean actions, samples at a saddle point, episodes; and count their modes."""
    from stable_baselines3.common.vec_env import unwrap_vec_normalize

    from sb3_flow.plotting.gridworld import multimodality
    from sb3_flow.plotting.gridworld import plot_gridworld as plot
    from sb3_flow.zoo.evaluate import load_run

    parser = trained_agent_parser("sb3-flow plot-gridworld", plot_gridworld.__doc__)
    parser.add_argument("--algo", help="RL Algorithms, a row of the figure for each", nargs="+")
    parser.set_defaults(algo=["fpo"], env="sb3_flow/GridWorld-v0")
    args = parser.parse_args()
    check_env(args.env, args.gym_packages)
    models, normalize = {}, {}  # type: dict[str, Any], dict[str, Any]
    for algo in args.algo:
        model, env, model_path = load_run(algo, args.env, args.folder, args.exp_id, args.load_best, args.seed, args.device)
        if not env.has_attr("layout"):
            sys.exit(f"sb3-flow: error: argument --env: {args.env} is not a GridWorld")
        layout = env.get_attr("layout")[0]
        args.output = args.output or model_path.parent / "gridworld.png"
        normalization = unwrap_vec_normalize(env)
        models[algo.upper()] = model
        normalize[algo.upper()] = np.asarray if normalization is None else normalization.normalize_obs
    print("At the saddle point: share of samples in each mode (and between them), entropy of the goals of episodes")
    for name, model in models.items():
        modes = multimodality(model, layout, normalize=normalize[name])
        print(f"{name}: {modes['low']:.2f}, {modes['high']:.2f} ({modes['stay']:.2f}), {modes['goal_entropy']:.2f} bits")
    print(*plot(models, args.output, layout, normalize), sep="\n")
