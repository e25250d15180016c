"""Evaluation of a run of rl-zoo3."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import ALGOS, create_test_env, get_model_path, get_saved_hyperparams
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_flow.zoo import EVALUATED_WITH_NOISE
from sb3_flow.zoo.runs import Run, SavedModel, latest_run_id, load_pickle, written_whole


def load_run(
    algo: str,
    env: str,
    folder: str = "logs",
    exp_id: int = 0,
    load_best: bool = False,
    seed: int = 0,
    device: str = "auto",
    n_envs: int = 1,
) -> tuple[BaseAlgorithm, VecEnv, Path]:
    """
    The model of a run, and an environment such as it was trained in.

    :param algo: Name of the algorithm
    :param env: Environment id
    :param folder: Log folder
    :param exp_id: Number of the run, 0 for the latest
    :param load_best: Whether to load the best model instead of the last one
    :param seed: Seed of the environment and of the actions
    :param device: PyTorch device
    :param n_envs: Number of environments side by side
    :return: model, environment, with the statistics of ``VecNormalize`` if there are any, and path of the model
    :raises FileNotFoundError: if there is no such run
    """
    env_name = EnvironmentName(env)
    try:
        exp_id = exp_id or latest_run_id(Path(folder) / algo, env_name)
        _, model_path, run_folder = get_model_path(exp_id, folder, algo, env_name, load_best)
    except (ValueError, AssertionError) as error:
        raise FileNotFoundError(str(error)) from error
    run, saved = Run(Path(run_folder)), SavedModel.of(Path(model_path), env_name)
    latest = run.saved_models()[0]
    if not load_best and latest != saved:
        print(f"{latest.path} is later than {saved.path}: sb3-flow train --resume {run.folder} goes on from there")
    hyperparams, stats_path = get_saved_hyperparams(str(run.folder / env_name), test_mode=True)
    # Those of the command line of the training come first, as they did there
    env_kwargs = run.args["env_kwargs"] or hyperparams.pop("env_kwargs", {})
    set_random_seed(seed)
    vec_env = create_test_env(
        env, n_envs, stats_path=stats_path, seed=seed, should_render=False, hyperparams=hyperparams, env_kwargs=env_kwargs
    )
    normalization = unwrap_vec_normalize(vec_env)
    if normalization is not None and saved.statistics.is_file():
        # rl-zoo3 takes those of the final model for the best one, too
        normalization.obs_rms = load_pickle(saved.statistics, VecNormalize).obs_rms
    # Nothing is learned here: schedules are not needed
    custom_objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    # Nor is a replay buffer
    kwargs: dict[str, Any] = dict(buffer_size=1) if issubclass(ALGOS[algo], OffPolicyAlgorithm) else {}
    if "HerReplayBuffer" in str(hyperparams.get("replay_buffer_class")):
        kwargs["env"] = vec_env
    return ALGOS[algo].load(model_path, custom_objects=custom_objects, device=device, **kwargs), vec_env, Path(model_path)


def evaluate(
    algo: str,
    env: str,
    folder: str = "logs",
    exp_id: int = 0,
    load_best: bool = False,
    n_eval_episodes: int = 10,
    stochastic: bool | None = None,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """
    Evaluate the model of a run, and leave the result in ``evaluation.json`` in the folder of the run.

    :param algo: Name of the algorithm
    :param env: Environment id
    :param folder: Log folder
    :param exp_id: Number of the run, 0 for the latest
    :param load_best: Whether to load the best model instead of the last one
    :param n_eval_episodes: Number of episodes
    :param stochastic: Whether to sample the actions. None: as the authors of the algorithm do, with FQL
    :param seed: Seed of the environment and of the actions
    :param device: PyTorch device
    :return: what is in evaluation.json: mean and standard deviation of the return, and how they were obtained
    :raises FileNotFoundError: if there is no such run
    """
    stochastic = algo in EVALUATED_WITH_NOISE if stochastic is None else stochastic
    model, vec_env, model_path = load_run(algo, env, folder, exp_id, load_best, seed, device)
    successes: list[bool] = []

    def collect_successes(locals_: dict[str, Any], _) -> None:
        if locals_["done"] and "is_success" in locals_["info"]:
            successes.append(locals_["info"]["is_success"])

    returns, lengths = evaluate_policy(
        model,
        vec_env,
        n_eval_episodes,
        deterministic=not stochastic,
        return_episode_rewards=True,
        callback=collect_successes,
    )
    vec_env.close()

    result = dict(
        mean_return=float(np.mean(returns)),
        std_return=float(np.std(returns)),
        mean_length=float(np.mean(lengths)),
        success_rate=float(np.mean(successes)) if successes else None,
        n_eval_episodes=n_eval_episodes,
        deterministic=not stochastic,
        seed=seed,
        num_timesteps=model.num_timesteps,
        model=str(model_path),
    )
    with written_whole(model_path.parent) as unfinished:
        (unfinished / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return result
