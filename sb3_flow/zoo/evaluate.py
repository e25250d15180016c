"""Evaluation of a run of rl-zoo3."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import ALGOS, create_test_env, get_model_path, get_saved_hyperparams
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import check_for_correct_spaces, set_random_seed
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_flow.zoo import EVALUATED_WITH_NOISE
from sb3_flow.zoo.errors import InputError, did_you_mean, user_input
from sb3_flow.zoo.hyperparams import check_trained_agent
from sb3_flow.zoo.runs import Run, SavedModel, latest_run_id, load_pickle, written_whole
from sb3_flow.zoo.trained_agents import is_trained_agent


def find_model(
    algo: str,
    env: str,
    folder: str = "logs",
    exp_id: int = 0,
    load_best: bool = False,
    load_checkpoint: int | None = None,
    load_last_checkpoint: bool = False,
) -> Path:
    """
    The model of a run, all files of which are there and whole.

    :param algo: Name of the algorithm
    :param env: Environment id
    :param folder: Log folder
    :param exp_id: Number of the run, 0 for the latest, -1 for a model that is not in the folder of a run
    :param load_best: Whether to load the best model instead of the last one
    :param load_checkpoint: Number of timesteps of the checkpoint to load instead
    :param load_last_checkpoint: Whether to load the last checkpoint instead
    :return: path of the model
    :raises InputError: if a file is not there or damaged
    """
    env_name = EnvironmentName(env)
    exp_id = exp_id or latest_run_id(Path(folder) / algo, env_name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            # (which formats the number of a checkpoint, an int in spite of its annotation)
            checkpoint: Any = load_checkpoint
            model_path = get_model_path(exp_id, folder, algo, env_name, load_best, checkpoint, load_last_checkpoint)[1]
    except (ValueError, AssertionError) as error:
        options = {
            "--load-best": load_best,
            "--load-checkpoint": load_checkpoint is not None,
            "--load-last-checkpoint": load_last_checkpoint,
            "--exp-id": exp_id != 0,
        }
        option = next((option for option, given in options.items() if given), "--env")
        raise InputError(f"argument {option}: {error}, expected {_what_there_is(Path(folder) / algo, env_name)}") from error
    path = Path(model_path)
    check_trained_agent(path, algo)
    parameters_folder = path.parent / env_name
    for file in ("config.yml", "args.yml"):
        with user_input(
            f"{parameters_folder / file} is damaged", yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError
        ):
            content = yaml.unsafe_load((parameters_folder / file).read_text())
        if not isinstance(content, dict) or (file == "args.yml" and "env_kwargs" not in content):
            raise InputError(f"{parameters_folder / file} is damaged: found {content!r:.50}, expected what train wrote")
    if get_saved_hyperparams(str(parameters_folder), test_mode=True)[0]["normalize"]:
        with user_input(f"statistics of VecNormalize in {parameters_folder}", ValueError):
            load_pickle(parameters_folder / "vecnormalize.pkl", VecNormalize)
    return path


def _what_there_is(log_path: Path, env_name: str) -> str:
    if not log_path.is_dir():
        algos = sorted(path.name for path in log_path.parent.iterdir() if path.is_dir()) if log_path.parent.is_dir() else []
        return f"an algorithm with runs{did_you_mean(log_path.name, algos)}"
    runs = sorted(path.name for path in log_path.iterdir() if path.is_dir() and "_" in path.name)
    numbers = [name.rpartition("_")[2] for name in runs if name.rpartition("_")[0] == env_name]
    if numbers:
        return f"a run that has it (there is {', '.join(numbers)})"
    return f"an environment with runs{did_you_mean(env_name, (name.rpartition('_')[0] for name in runs))}"


def load_run(
    algo: str,
    env: str,
    folder: str = "logs",
    exp_id: int = 0,
    load_best: bool = False,
    seed: int = 0,
    device: str = "auto",
    n_envs: int = 1,
    load_checkpoint: int | None = None,
    load_last_checkpoint: bool = False,
    env_kwargs: dict[str, Any] | None = None,
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
    :param load_checkpoint: Number of timesteps of the checkpoint to load instead
    :param load_last_checkpoint: Whether to load the last checkpoint instead
    :param env_kwargs: Arguments of the environment that are not those of the training
    :return: model, environment, with the statistics of ``VecNormalize`` if there are any, and path of the model
    :raises InputError: if there is no such run, or a file of it is damaged
    """
    model_path = find_model(algo, env, folder, exp_id, load_best, load_checkpoint, load_last_checkpoint)
    print(f"Loading {model_path}")
    run, saved = Run(model_path.parent), SavedModel.of(model_path, EnvironmentName(env))
    latest = run.saved_models()[0]
    if saved.path == run.final_model != latest.path:
        print(f"{latest.path} is later than {saved.path}: sb3-flow train --resume {run.folder} goes on from there")
    hyperparams, stats_path = get_saved_hyperparams(str(run.folder / run.env_name), test_mode=True)
    # Those of the command line of the training come first, as they did there
    env_kwargs = {**(run.args["env_kwargs"] or hyperparams.pop("env_kwargs", {})), **(env_kwargs or {})}
    set_random_seed(seed)
    with user_input(f"environment of {model_path.parent}"):
        vec_env = create_test_env(
            env, n_envs, stats_path=stats_path, seed=seed, should_render=False, hyperparams=hyperparams, env_kwargs=env_kwargs
        )
    normalization = unwrap_vec_normalize(vec_env)
    if normalization is not None and saved.statistics.is_file():
        # rl-zoo3 takes those of the final model for all of them
        with user_input(f"statistics of {model_path}", ValueError):
            normalization.obs_rms = load_pickle(saved.statistics, VecNormalize).obs_rms
    # Nothing is learned here: schedules are not needed
    custom_objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    # Nor is a replay buffer
    kwargs: dict[str, Any] = dict(buffer_size=1) if issubclass(ALGOS[algo], OffPolicyAlgorithm) else {}
    if "HerReplayBuffer" in str(hyperparams.get("replay_buffer_class")):
        kwargs["env"] = vec_env
    with user_input(f"{model_path} as a model of {algo}"):
        model = ALGOS[algo].load(model_path, custom_objects=custom_objects, device=device, **kwargs)
        check_for_correct_spaces(vec_env, model.observation_space, model.action_space)
    return model, vec_env, model_path


def mean_interval(values: Any, n: int | None = None, confidence: float = 0.95) -> list[float]:
    """
    :param values: Values of episodes
    :param n: Number of episodes of a mean, as many as there are values if None
    :param confidence: Confidence level
    :return: bounds of the mean, by the bootstrap
    """
    means = np.random.default_rng(0).choice(values, (10_000, n or len(values))).mean(axis=1)
    return [float(bound) for bound in np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])]


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
    env_kwargs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Evaluate the model of a run, and leave the result in ``evaluation.json`` in the folder of the run (but for an agent that
    comes with the package, whose own evaluation is there).

    :param algo: Name of the algorithm
    :param env: Environment id
    :param folder: Log folder
    :param exp_id: Number of the run, 0 for the latest
    :param load_best: Whether to load the best model instead of the last one
    :param n_eval_episodes: Number of episodes
    :param stochastic: Whether to sample the actions. None: as the authors of the algorithm do, with the offline ones
    :param seed: Seed of the environment and of the actions
    :param device: PyTorch device
    :param env_kwargs: Arguments of the environment that are not those of the training
    :return: the result: mean and standard deviation of the return, and how they were obtained
    :raises InputError: if there is no such run, or a file of it is damaged
    """
    if n_eval_episodes < 1:
        raise InputError(f"`n_eval_episodes` must be 1 or more, it is {n_eval_episodes}")
    stochastic = algo in EVALUATED_WITH_NOISE if stochastic is None else stochastic
    model, vec_env, model_path = load_run(algo, env, folder, exp_id, load_best, seed, device, env_kwargs=env_kwargs)
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
        mean_return_interval=mean_interval(returns),
        returns=np.asarray(returns).tolist(),
        mean_length=float(np.mean(lengths)),
        success_rate=float(np.mean(successes)) if successes else None,
        n_eval_episodes=n_eval_episodes,
        deterministic=not stochastic,
        seed=seed,
        env_kwargs=env_kwargs,
        num_timesteps=model.num_timesteps,
        model=str(model_path),
    )
    if not is_trained_agent(model_path.parent):
        with written_whole(model_path.parent) as unfinished:
            (unfinished / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return result
