"""rl-zoo3's experiment manager, with runs that can be resumed."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import optuna
from huggingface_sb3 import EnvironmentName
from optuna.trial import TrialState
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_flow.zoo import EVALUATED_WITH_NOISE
from sb3_flow.zoo.errors import InputError
from sb3_flow.zoo.hyperparams import CheckedExperimentManager
from sb3_flow.zoo.shared_study import open_storage, optimize_together


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
    # Replay buffer and statistics are written after the model: without them a checkpoint is not complete, unless the run has
    # none at all
    for kind, path_of in (("replay_buffer", replay_buffer_path), ("vecnormalize", vecnormalize_path)):
        if any(run_folder.glob(f"rl_model_{kind}_*_steps.pkl")):
            checkpoints = {steps: path for steps, path in checkpoints.items() if _is_pickle(path_of(path))}
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


class _TrueZero(int):
    def __bool__(self) -> bool:
        return True


class FlowExperimentManager(CheckedExperimentManager):
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
        if self.trial_id == 0:
            # rl-zoo3 takes the first trial for none
            self.trial_id = _TrueZero()
        self.study: optuna.Study | None = None
        self.resumed_timesteps = 0
        if resume is not None:
            self.resumed_timesteps = last_checkpoint(resume)[1]
            self.save_path = str(resume)
            self.params_path = f"{self.save_path}/{self.env_name}"
            # New Monitor files beside the old ones: each has a clock of its own, that their readers take into account
            n_resumed = len({path.name.split(".")[0] for path in resume.glob("before_*.monitor.csv")})
            for path in resume.glob("[0-9]*.monitor.csv"):
                path.rename(path.with_name(f"before_{n_resumed + 1}.{path.name}"))

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]):
        offline_steps = hyperparams.get("offline_steps", 0)
        if offline_steps and self.optimize_hyperparameters and self.n_evaluations is None:
            # As rl-zoo3, one every 100,000 timesteps, but of both phases
            n_timesteps = self.n_timesteps if self.n_timesteps > 0 else int(hyperparams["n_timesteps"])
            self.n_evaluations = max(1, (offline_steps + n_timesteps) // 100_000)
        processed = super()._preprocess_hyperparams(hyperparams)
        if self.resumed_timesteps:
            # Those of an offline phase, gradient steps, come on top of what is to be learned online
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

    def create_log_folder(self) -> None:
        # A search has no run of its own, which would be taken for the latest one
        if not self.optimize_hyperparameters:
            super().create_log_folder()

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        return super().create_envs(n_envs, eval_env, no_log or self.optimize_hyperparameters)

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        model = super()._load_pretrained_agent(hyperparams, env)
        agent = Path(self.trained_agent)
        replay_buffer, final_replay_buffer = replay_buffer_path(agent), agent.with_name("replay_buffer.pkl")
        if isinstance(model, OffPolicyAlgorithm) and replay_buffer != agent:
            if replay_buffer.is_file():
                print(f"Loading replay buffer {replay_buffer}")
                model.load_replay_buffer(replay_buffer, truncate_last_traj=True)
            elif model.num_timesteps > hyperparams.get("offline_steps", 0) and not final_replay_buffer.is_file():
                print(f"There is no {replay_buffer} (see --save-replay-buffer): what {agent} had collected is lost")
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
                successes = list(npz["successes"]) if "successes" in npz else []
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):
            # None yet, or the run was killed while it wrote them
            return
        for step, results, lengths in evaluations:
            if step <= self.resumed_timesteps:
                callback.evaluations_timesteps.append(int(step))
                callback.evaluations_results.append(results.tolist())
                callback.evaluations_length.append(lengths.tolist())
                callback.best_mean_reward = max(callback.best_mean_reward, float(results.mean()))
        callback.evaluations_successes = [success.tolist() for success in successes[: len(callback.evaluations_timesteps)]]

    def objective(self, trial: optuna.Trial) -> float:
        # Which of the workers ran it
        trial.set_user_attr("pid", os.getpid())
        return super().objective(trial)

    def _create_study(self, create_study: Callable[..., optuna.Study], **kwargs) -> optuna.Study:
        """In a storage with a heartbeat, and with all of its ``max_total_trials`` done."""
        if self.storage is None:
            self.study = create_study(**kwargs)
            return self.study
        self.study = create_study(**{**kwargs, "storage": open_storage(self.storage)})
        if self.study.trials:
            # Not the same suggestions again
            self.study.sampler.reseed_rng()
        if self.max_total_trials is not None:
            try:
                optimize_together(self.study, self.objective, self.max_total_trials, self.n_jobs)
            except KeyboardInterrupt:
                pass
            # rl-zoo3, which would not wait for the trials of other workers, has only the report to write
            self.n_trials, self.max_total_trials = self.max_total_trials, 0
        return self.study

    def hyperparameters_optimization(self) -> None:
        """
        A trial learns offline first, as a training does, and is evaluated and pruned along the way of both phases.
        Workers that share a storage take over the trials of those that were killed.
        """
        algorithm = ALGOS[self.algo]
        offline_steps = self._hyperparams.get("offline_steps", 0)

        def create_model(**kwargs) -> BaseAlgorithm:
            model = algorithm(**kwargs)
            # rl-zoo3 has one number of timesteps, that of both phases
            model.learn = partial(_learn_both_phases, model.learn, offline_steps)  # type: ignore[method-assign]
            return model

        self.n_timesteps += offline_steps
        with (
            mock.patch.object(optuna, "create_study", partial(self._create_study, optuna.create_study)),
            mock.patch.dict(ALGOS, {self.algo: create_model} if offline_steps else {}),
        ):
            try:
                super().hyperparameters_optimization()
            except ValueError as error:
                if self.study is None or self.study.get_trials(states=[TrialState.COMPLETE]):
                    raise
                raise InputError("no trial was completed: all were pruned or failed") from error
        if self.storage is not None:
            assert self.study is not None
            number = self.study.best_trial.number
            print(
                f"The best trial is number {number}, to train with: --study-name {self.study.study_name} --trial-id {number}"
            )

    def learn(self, model: BaseAlgorithm) -> None:
        if self.resumed_timesteps:
            continued = SimpleNamespace(env=model.env, learn=partial(model.learn, reset_num_timesteps=False))
            super().learn(continued)  # type: ignore[arg-type]
        else:
            super().learn(model)
