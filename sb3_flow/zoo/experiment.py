"""rl-zoo3's experiment manager, with runs that can be resumed."""

import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from huggingface_sb3 import EnvironmentName
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_flow.zoo import EVALUATED_WITH_NOISE


def vecnormalize_path(checkpoint: Path) -> Path:
    """
    Where SB3's ``CheckpointCallback`` leaves the statistics of ``VecNormalize``.

    :param checkpoint: Path of the model, rl_model_*_steps.zip
    :return: rl_model_vecnormalize_*_steps.pkl beside it
    """
    return checkpoint.with_name(re.sub(r"^rl_model_(\d+_steps).zip$", r"rl_model_vecnormalize_\1.pkl", checkpoint.name))


def replay_buffer_path(checkpoint: Path) -> Path:
    """
    Where SB3's ``CheckpointCallback`` leaves the replay buffer.

    :param checkpoint: Path of the model, rl_model_*_steps.zip
    :return: rl_model_replay_buffer_*_steps.pkl beside it
    """
    return vecnormalize_path(checkpoint).with_name(vecnormalize_path(checkpoint).name.replace("vecnormalize", "replay_buffer"))


class _KeepLatestReplayBuffer(BaseCallback):
    """Each is as large as its ``buffer_size``, whatever is in it: only that of the last checkpoint is kept."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def _on_step(self) -> bool:
        paths = list(self.folder.glob("rl_model_replay_buffer_*_steps.pkl"))
        if len(paths) > 1:
            paths.sort(key=lambda path: int(path.stem.split("_")[-2]))
            for path in paths[:-1]:
                path.unlink()
        return True


def find_run(log_path: Path, env_id: str) -> Path:
    """
    The latest run of an environment that has a checkpoint.

    :param log_path: e.g. logs/fpo
    :param env_id: Environment id
    :return: its folder
    :raises FileNotFoundError: if there is none
    """
    name = EnvironmentName(env_id)
    runs = {
        int(match[1]): path
        for path in log_path.glob(f"{name}_*")
        if (match := re.fullmatch(rf"{re.escape(name)}_(\d+)", path.name)) and any(path.glob("rl_model_*_steps.zip"))
    }
    if not runs:
        raise FileNotFoundError(f"There is no run of {env_id} with a checkpoint to resume from in {log_path}")
    return runs[max(runs)]


def last_checkpoint(run_folder: Path) -> tuple[Path, int]:
    """
    The last complete checkpoint of a run, which may have been killed while it wrote another.

    :param run_folder: e.g. logs/fpo/HalfCheetah-v5_1
    :return: path of the model, and its number of timesteps
    :raises FileNotFoundError: if there is none
    """
    checkpoints = {
        int(match[1]): path
        for path in run_folder.glob("rl_model_*_steps.zip")
        if (match := re.fullmatch(r"rl_model_(\d+)_steps.zip", path.name)) and zipfile.is_zipfile(path)
    }
    # The statistics are written last: without them a checkpoint is not complete, unless the run has none at all
    if any(run_folder.glob("rl_model_vecnormalize_*_steps.pkl")):
        checkpoints = {steps: path for steps, path in checkpoints.items() if _is_pickle(vecnormalize_path(path))}
    if not checkpoints:
        raise FileNotFoundError(f"There is no checkpoint (rl_model_*_steps.zip) to resume from in {run_folder}")
    num_timesteps = max(checkpoints)
    return checkpoints[num_timesteps], num_timesteps


def _is_pickle(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            pickle.load(file)
    except (OSError, EOFError, pickle.UnpicklingError):
        return False
    return True


def _learn_both_phases(learn: Callable, offline_steps: int, total_timesteps: int, **kwargs) -> BaseAlgorithm:
    return learn(total_timesteps - offline_steps, **kwargs)


class FlowExperimentManager(ExperimentManager):
    """
    rl-zoo3's ``ExperimentManager``, whose checkpoints hold all that is needed to go on from them.

    :param resume: Folder of the run that the trained agent is the last checkpoint of, to continue it in place;
        None for a new run
    :param args: See ``ExperimentManager``
    :param kwargs: See ``ExperimentManager``
    """

    def __init__(self, *args, resume: Path | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.deterministic_eval = self.deterministic_eval and self.algo not in EVALUATED_WITH_NOISE
        self.resumed_timesteps = 0
        if resume is not None:
            self.resumed_timesteps = last_checkpoint(resume)[1]
            self.save_path = str(resume)
            self.params_path = f"{self.save_path}/{self.env_name}"
            # New Monitor files beside the old ones: each has a clock of its own, that their readers take into account
            for path in resume.glob("[0-9]*.monitor.csv"):
                path.rename(path.with_name(f"before_{self.resumed_timesteps}.{path.name}"))

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]):
        processed = super()._preprocess_hyperparams(hyperparams)
        if self.resumed_timesteps:
            # Those of an offline phase, gradient steps, come on top of what is to be learned online
            offline_steps = hyperparams.get("offline_steps", 0)
            total = offline_steps + self.n_timesteps
            print(f"Resuming {self.save_path} after {self.resumed_timesteps} of {total} timesteps")
            self.n_timesteps = min(max(total - self.resumed_timesteps, 0), self.n_timesteps)
        return processed

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        # A checkpoint is to be continued with the statistics that were saved with it
        statistics = vecnormalize_path(Path(self.trained_agent)) if self.continue_training else None
        if statistics is None or statistics.suffix != ".pkl" or not statistics.is_file():
            if self.resumed_timesteps and self.normalize:
                raise ValueError(f"{self.trained_agent} has no statistics of VecNormalize beside it: it cannot be resumed")
            return super()._maybe_normalize(env, eval_env)
        env = VecNormalize.load(str(statistics), env)
        if eval_env:
            env.training = False
            env.norm_reward = False
        return env

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        is_new = not Path(self.save_path).exists()
        try:
            return super().setup_experiment()
        except Exception as error:
            # Nothing has started yet: no empty run is left behind
            if is_new:
                shutil.rmtree(self.save_path, ignore_errors=True)
            if isinstance(error, (ValueError, AssertionError)):
                # The message says it all
                raise SystemExit(f"sb3-flow: error: {error}") from error
            raise

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        model = super()._load_pretrained_agent(hyperparams, env)
        replay_buffer = replay_buffer_path(Path(self.trained_agent))
        if isinstance(model, OffPolicyAlgorithm) and replay_buffer.suffix == ".pkl" and replay_buffer.is_file():
            print(f"Loading replay buffer {replay_buffer}")
            model.load_replay_buffer(replay_buffer, truncate_last_traj=True)
        return model

    def create_callbacks(self) -> None:
        super().create_callbacks()
        for callback in list(self.callbacks):
            if isinstance(callback, CheckpointCallback):
                callback.save_vecnormalize = True
                if self.save_replay_buffer:
                    callback.save_replay_buffer = True
                    self.callbacks.append(_KeepLatestReplayBuffer(Path(self.save_path)))
            elif isinstance(callback, EvalCallback) and self.resumed_timesteps:
                self._restore_evaluations(callback)

    def _restore_evaluations(self, callback: EvalCallback) -> None:
        try:
            with np.load(Path(self.save_path) / "evaluations.npz") as npz:
                evaluations = list(zip(npz["timesteps"], npz["results"], npz["ep_lengths"], strict=True))
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):
            # None yet, or the run was killed while it wrote them
            return
        for step, results, lengths in evaluations:
            if step <= self.resumed_timesteps:
                callback.evaluations_timesteps.append(int(step))
                callback.evaluations_results.append(results.tolist())
                callback.evaluations_length.append(lengths.tolist())
                callback.best_mean_reward = max(callback.best_mean_reward, float(results.mean()))

    def hyperparameters_optimization(self) -> None:
        """A trial learns offline first, as a training does, and is evaluated and pruned along the way of both phases."""
        offline_steps = self._hyperparams.get("offline_steps", 0)
        if offline_steps == 0:
            super().hyperparameters_optimization()
            return
        algorithm = ALGOS[self.algo]

        def create(**kwargs) -> BaseAlgorithm:
            model = algorithm(**kwargs)
            # rl-zoo3 has one number of timesteps, that of both phases
            model.learn = partial(_learn_both_phases, model.learn, offline_steps)  # type: ignore[method-assign]
            return model

        self.n_timesteps += offline_steps
        ALGOS[self.algo] = create  # type: ignore[assignment]
        try:
            super().hyperparameters_optimization()
        finally:
            ALGOS[self.algo] = algorithm

    def learn(self, model: BaseAlgorithm) -> None:
        if self.resumed_timesteps:
            continued = SimpleNamespace(env=model.env, learn=partial(model.learn, reset_num_timesteps=False))
            super().learn(continued)  # type: ignore[arg-type]
        else:
            super().learn(model)
