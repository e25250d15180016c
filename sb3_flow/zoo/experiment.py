"""rl-zoo3's experiment manager, with runs that can go on after whatever ended them."""

import contextlib
import copy
import os
import re
import shutil
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import optuna
import yaml
from huggingface_sb3 import EnvironmentName
from optuna.trial import TrialState
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_flow import distributed
from sb3_flow.envs import make_envpool
from sb3_flow.envs.envpool import NAMESPACE, to_ordinary_id
from sb3_flow.zoo import EVALUATED_WITH_NOISE, patches
from sb3_flow.zoo.defaults import FLATTEN, normalization_for, policy_for, read_conf_file
from sb3_flow.zoo.errors import InputError
from sb3_flow.zoo.hyperparams import CheckedExperimentManager, check_hyperparams_for_envpool
from sb3_flow.zoo.runs import Run, SavedModel, lock, remove_unfinished, written_whole
from sb3_flow.zoo.shared_study import open_storage, optimize_together


class WholeCheckpoints(CheckpointCallback):
    """
    SB3's ``CheckpointCallback``. A checkpoint is there with all that belongs to it, or not at all. That of an on-policy
    algorithm waits for the end of the rollout, from the middle of which it could not go on.

    :param args: See ``CheckpointCallback``
    :param kwargs: See ``CheckpointCallback``
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_due = False

    def _on_step(self) -> bool:
        self.is_due = self.is_due or self.n_calls % self.save_freq == 0
        is_last_step = not isinstance(self.model, OnPolicyAlgorithm) or (
            self.locals["n_steps"] + 1 == self.locals["n_rollout_steps"]
        )
        if self.is_due and is_last_step:
            self._save()
            self.is_due = False
        return True

    def _save(self) -> None:
        model, replay_buffer, statistics = (
            Path(self._checkpoint_path(kind, extension)).name
            for kind, extension in (("", "zip"), ("replay_buffer_", "pkl"), ("vecnormalize_", "pkl"))
        )
        with written_whole(Path(self.save_path)) as unfinished:
            self.model.save(unfinished / model)
            if self.save_replay_buffer and isinstance(self.model, OffPolicyAlgorithm):
                self.model.save_replay_buffer(unfinished / replay_buffer)
            if (normalization := self.model.get_vec_normalize_env()) is not None:
                normalization.save(str(unfinished / statistics))
        # Each is as large as its ``buffer_size``, whatever is in it: only that of the last checkpoint is kept
        for path in Path(self.save_path).glob("rl_model_replay_buffer_*_steps.pkl") if self.save_replay_buffer else ():
            if path.name != replay_buffer:
                path.unlink()


class WholeEvaluations(EvalCallback):
    """
    SB3's ``EvalCallback``. What it saves is there, or not at all, and the best model has its own statistics of
    ``VecNormalize``.

    :param eval_env: Environment
    :param run_folder: Where the evaluations and the best model are saved
    :param env_name: Name of the environment in the names of files
    :param kwargs: See ``EvalCallback``
    """

    def __init__(self, eval_env: VecEnv, run_folder: Path, env_name: str, **kwargs):
        super().__init__(eval_env, **kwargs)
        self.run_folder = run_folder
        self.env_name = env_name

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq != 0:
            return True
        with written_whole(self.run_folder) as unfinished:
            self.best_model_save_path, self.log_path = str(unfinished), str(unfinished / "evaluations")
            continue_training = super()._on_step()
            normalization = self.model.get_vec_normalize_env()
            if normalization is not None and (unfinished / "best_model.zip").is_file():
                normalization.save(str(unfinished / "best_model_vecnormalize.pkl"))
                if not (self.run_folder / f"{self.env_name}.zip").is_file():
                    # Those of the final model, once there is one
                    (unfinished / self.env_name).mkdir()
                    normalization.save(str(unfinished / self.env_name / "vecnormalize.pkl"))
        return continue_training

    def restore(self, num_timesteps: int) -> None:
        """
        Go on with the evaluations that a run has had.

        :param num_timesteps: Those up to here are taken over
        """
        path = self.run_folder / "evaluations.npz"
        if not path.is_file():
            return
        try:
            with np.load(path) as npz:
                evaluations = list(zip(npz["timesteps"], npz["results"], npz["ep_lengths"], strict=True))
                successes = list(npz["successes"]) if "successes" in npz else []
        except Exception as error:
            # What a damaged file leads to can be anything
            print(f"The evaluations of before are lost: {path} does not load: {error}")
            return
        for step, results, lengths in evaluations:
            if step <= num_timesteps:
                self.evaluations_timesteps.append(int(step))
                self.evaluations_results.append(results.tolist())
                self.evaluations_length.append(lengths.tolist())
                self.best_mean_reward = max(self.best_mean_reward, float(results.mean()))
        self.evaluations_successes = [success.tolist() for success in successes[: len(self.evaluations_timesteps)]]


class _TrueZero(int):
    def __bool__(self) -> bool:
        return True


class FlowExperimentManager(CheckedExperimentManager):
    """
    rl-zoo3's ``ExperimentManager``, whose runs can go on after whatever ended them.

    :param run: The run to go on with, in its folder, see :meth:`Run.resume`. None for a new run
    :param locks: Releases the lock of a new run in the end
    :param args: See ``ExperimentManager``
    :param kwargs: See ``ExperimentManager``, whose ``vec_env_type`` may be "envpool", too
    """

    def __init__(self, *args, run: Run | None = None, locks: ExitStack | None = None, **kwargs):
        #: Whether to train in EnvPool, which is no type of rl-zoo3's. Evaluations are in the ordinary environment
        self.in_envpool = kwargs.get("vec_env_type") == "envpool"
        if self.in_envpool:
            kwargs["vec_env_type"] = "dummy"
            # (they are not, on purpose)
            warnings.filterwarnings("ignore", "Training and eval env are not of the same type")
        super().__init__(*args, **kwargs)
        # (a random one is another in each process)
        self.seed = distributed.broadcast(self.seed)
        self.show_progress = self.show_progress and distributed.rank() == 0
        # (what makes one, in place of a class: rl-zoo3 only calls it)
        self.vec_env_class = patches.warned_once(self.vec_env_class)  # type: ignore[assignment, arg-type]
        self.has_own_hyperparams = False
        self.deterministic_eval = self.deterministic_eval and self.algo not in EVALUATED_WITH_NOISE
        if self.trial_id == 0:
            # rl-zoo3 takes the first trial for none
            self.trial_id = _TrueZero()
        self.has_completed_trial = False
        self.run = run
        self.locks = ExitStack() if locks is None else locks
        #: Gradient steps that the timesteps of the run begin with
        self.offline_steps = 0
        #: Timesteps that the run has already
        self.resumed_timesteps = 0
        self.is_interrupted = False
        self.has_new_folder = False
        #: Folders that the new one is in, and that were not there before, the innermost first
        self.new_parents: list[Path] = []
        #: Monitor logs that were renamed for those of this process, and their new names
        self.earlier_logs: list[tuple[Path, Path]] = []
        if run is not None:
            self.resumed_timesteps = run.state.num_timesteps
            self.save_path = str(run.folder)
            self.params_path = f"{self.save_path}/{self.env_name}"
            # Not the random numbers of the beginning again
            self.seed = int(np.random.SeedSequence([self.seed, self.resumed_timesteps]).generate_state(1)[0])

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Those of the run that is resumed. For a new one, the hyperparameters of the environment (or those of the ordinary one,
        for a task of EnvPool), else those of its namespace (``default/dm_control``), else the default ones. Observations of
        dm_control, each a Dict, are flattened.
        """
        if self.run is not None:
            # Whatever has become of the file that they are from. Its dataset may be elsewhere by now
            moved = {name: value for name, value in (self.custom_hyperparams or {}).items() if name == "dataset"}
            self.has_own_hyperparams = True
            if self.in_envpool:
                # (where the run may not have been)
                check_hyperparams_for_envpool(self.run.config, self._where)
            return self.run.config | moved, self.run.config | moved
        env_name, blocks = self.env_name, {}
        with contextlib.suppress(Exception):
            # (what is wrong with the file is told below)
            blocks = dict(read_conf_file(self.config))
        env_id = env_name.gym_id
        ordinary_id = to_ordinary_id(env_id) if env_id.startswith(NAMESPACE) else env_id
        namespace = ordinary_id.rpartition(":")[2].rpartition("/")[0]
        # rl-zoo3 takes that block whether it is there or not
        self._is_atari = self._is_atari and "atari" in blocks
        own = (env_id, ordinary_id)
        block = next((name for name in (*own, f"default/{namespace}") if name in blocks), env_id)
        self.has_own_hyperparams = block in own and block in blocks
        if block != env_id:
            print(f"Using {block!r} hyperparameters")
            self.env_name = EnvironmentName(block)
        try:
            hyperparams, saved_hyperparams = super().read_hyperparameters()
        finally:
            self.env_name = env_name
        is_flattened = "env_wrapper" not in hyperparams and "Mlp" in hyperparams.get("policy", "")
        # (in EnvPool whatever the hyperparameters say, and then in the evaluations too)
        if namespace == "dm_control" and (is_flattened or (self.in_envpool and not hyperparams.get("env_wrapper"))):
            print(f"Observations of dm_control are flattened: env_wrapper={FLATTEN!r}")
            hyperparams["env_wrapper"] = saved_hyperparams["env_wrapper"] = FLATTEN
        if self.in_envpool:
            check_hyperparams_for_envpool(hyperparams, self._where)
        return hyperparams, saved_hyperparams

    def _is_default(self, name: str) -> bool:
        """Whether a hyperparameter was chosen neither for this environment nor for this run."""
        return not self.has_own_hyperparams and name not in (self.custom_hyperparams or {})

    def _preprocess_action_noise(
        self, hyperparams: dict[str, Any], saved_hyperparams: dict[str, Any], env: VecEnv
    ) -> dict[str, Any]:
        # (here the observations are known for the first time)
        policy = hyperparams.get("policy")
        if self._is_default("policy") and isinstance(policy, str) and policy != policy_for(env.observation_space, policy):
            hyperparams["policy"] = saved_hyperparams["policy"] = policy_for(env.observation_space, policy)
            print(f"Policy for these observations: {hyperparams['policy']}")
        return super()._preprocess_action_noise(hyperparams, saved_hyperparams, env)

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]):
        self.offline_steps = hyperparams.get("offline_steps", 0) if self.run is None else self.run.offline_steps
        if self.n_timesteps == 0:
            # rl-zoo3 takes it for the number of the hyperparameters
            hyperparams["n_timesteps"] = 0
        if self.offline_steps and self.optimize_hyperparameters and self.n_evaluations is None:
            # As rl-zoo3, one every 100,000 timesteps, but of both phases
            n_timesteps = self.n_timesteps if self.n_timesteps > 0 else int(hyperparams["n_timesteps"])
            self.n_evaluations = max(1, (self.offline_steps + n_timesteps) // 100_000)
        processed = super()._preprocess_hyperparams(hyperparams)
        if self.n_timesteps > 0 and not getattr(ALGOS[self.algo], "learns_online", True):
            raise InputError(
                f"argument -n/--n-timesteps: found {self.n_timesteps}, but {self.algo} learns offline only, expected 0: "
                "the number of its gradient steps is `offline_steps` (-params offline_steps:100000)"
            )
        if self.n_timesteps + self.offline_steps + hyperparams.get("pretrain_steps", 0) == 0:
            raise InputError("argument -n/--n-timesteps: 0 timesteps, and no `offline_steps`: there is nothing to learn")
        if not self._eval_env_kwargs_args:
            # rl-zoo3 forgets those of the YAML file
            self.eval_env_kwargs = self.env_kwargs
        if self.run is not None:
            # Those of an offline phase come on top of what is to be learned online
            total = self.offline_steps + self.n_timesteps
            print(f"Resuming {self.save_path} after {self.resumed_timesteps} of {total} timesteps")
            self.n_timesteps -= min(max(self.resumed_timesteps - self.offline_steps, 0), self.n_timesteps)
        return processed

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        # A model is to be continued with the statistics that were saved with it
        statistics = SavedModel.of(Path(self.trained_agent), self.env_name).statistics
        if not (self.continue_training and statistics.is_file()):
            if self.normalize and self._is_default("normalize"):
                self.normalize_kwargs |= normalization_for(env.observation_space)
            return super()._maybe_normalize(env, eval_env)
        env = VecNormalize.load(str(statistics), env)
        if eval_env:
            env.training = False
            env.norm_reward = False
        return env

    def create_log_folder(self) -> None:
        if self.optimize_hyperparameters:
            # A search has no run of its own, which would be taken for the latest one
            return
        if distributed.rank() == 0:
            self._create_log_folder()
        self.save_path = distributed.broadcast(self.save_path)
        self.params_path = f"{self.save_path}/{self.env_name}"
        # (another machine may have a disk of its own)
        os.makedirs(self.save_path, exist_ok=True)
        # Rank 0 is not to remove it before
        distributed.gather(None)

    def _create_log_folder(self) -> None:
        if self.run is not None:
            remove_unfinished(self.run.folder)
            self._rename_earlier_logs(self.run.folder)
            return
        self.new_parents = [folder for folder in Path(self.save_path).parents if not folder.exists()]
        while not self.has_new_folder:
            try:
                os.makedirs(self.save_path)
                self.has_new_folder = True
            except FileExistsError:
                # Another process was faster
                path = Path(self.save_path)
                number = re.compile(rf"(?<=^{re.escape(self.env_name)}_)\d+")
                self.save_path = str(path.with_name(number.sub(lambda match: str(int(match[0]) + 1), path.name)))
        self.params_path = f"{self.save_path}/{self.env_name}"
        os.makedirs(self.params_path)
        self.locks.enter_context(lock(Path(self.save_path)))

    def _rename_earlier_logs(self, folder: Path) -> None:
        """New Monitor files beside the old ones: each has a clock of its own, that their readers take into account."""
        n_resumed = len({path.name.split(".")[0] for path in folder.glob("before_*.monitor.csv")})
        for path in folder.glob("[0-9]*.monitor.csv"):
            if not path.read_text():
                # The process was killed before it wrote the header, without which no reader can do
                path.unlink()
                continue
            self.earlier_logs.append((path, path.rename(path.with_name(f"before_{n_resumed + 1}.{path.name}"))))

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        no_log = no_log or self.optimize_hyperparameters
        if eval_env:
            return super().create_envs(n_envs, eval_env, no_log)
        manager = self
        if self.in_envpool:
            # (a copy, as trials may run in several threads; what makes one, in place of a class: rl-zoo3 only calls it)
            manager = copy.copy(self)
            manager.vec_env_class = partial(self._make_envpool, None if no_log else self.save_path)  # type: ignore[assignment]
        n_envs = distributed.share("n_envs", n_envs)
        with patches.envs_from(distributed.rank() * n_envs):
            env = super(FlowExperimentManager, manager).create_envs(n_envs, eval_env, no_log)
        # (nor before their Monitor files are there)
        distributed.gather(None)
        return env

    def _make_envpool(self, monitor_dir: str | None, env_fns: list[Callable[[], gym.Env]]) -> VecEnv:
        """In place of a class of a ``VecEnv``, which makes it of as many environments."""
        return make_envpool(
            self.env_name.gym_id, len(env_fns), monitor_dir=monitor_dir, **self.monitor_kwargs, **self.env_kwargs
        )

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        try:
            return super().setup_experiment()
        except BaseException:
            # Ctrl-C included
            self._leave_as_it_was()
            raise

    def _leave_as_it_was(self) -> None:
        """Nothing was learned: a new run leaves no folder, another is as it was."""
        if self.has_new_folder:
            shutil.rmtree(self.save_path, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in self.new_parents:
                    # Unless another process has a run in it by now
                    folder.rmdir()
        for path, renamed in self.earlier_logs:
            renamed.replace(path)

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if distributed.rank() > 0:
            return
        if self.run is None:
            # Which of those of the YAML file and of the command line they are
            self.args.env_kwargs = self.env_kwargs or None
            self.args.offline_steps = self.offline_steps
            params_path = Path(self.params_path)
            with written_whole(params_path) as unfinished:
                self.params_path = str(unfinished)
                super()._save_config(saved_hyperparams)
            self.params_path = str(params_path)
        elif self.args.n_timesteps > self.run.n_timesteps:
            with written_whole(Path(self.params_path)) as unfinished:
                args = OrderedDict({**self.run.args, "n_timesteps": self.args.n_timesteps})
                (unfinished / "args.yml").write_text(yaml.dump(args))

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        agent = SavedModel.of(Path(self.trained_agent), self.env_name)
        print(f"Loading {agent.path}")
        # The policy is as it was
        kwargs = {name: value for name, value in hyperparams.items() if name not in ("policy", "policy_kwargs")}
        model = ALGOS[self.algo].load(
            agent.path,
            env=env,
            seed=self.seed,
            tensorboard_log=self.tensorboard_log,
            verbose=self.verbose,
            device=self.device,
            **kwargs,
        )
        if isinstance(model, OffPolicyAlgorithm):
            self._load_replay_buffer(model, agent)
        if self.run is None:
            # A run of its own
            self.offline_steps = max(self.offline_steps - getattr(model, "_n_offline_updates", 0), 0)
            model.num_timesteps = 0
        return model

    def _load_replay_buffer(self, model: OffPolicyAlgorithm, agent: SavedModel) -> None:
        # (that of the end of the run, if that of a checkpoint is not kept)
        paths = [agent.replay_buffer, *([agent.path.with_name("replay_buffer.pkl")] if self.run is None else [])]
        paths = [path for path in paths if path.is_file()]
        reason = None if self.run is None else self.run.state.why_no_replay_buffer
        if distributed.world_size() > 1:
            reason = f"each of the {distributed.world_size()} processes has a replay buffer of its own"
        if paths and reason is None:
            print(f"Loading replay buffer {paths[0]}")
            model.load_replay_buffer(paths[0], truncate_last_traj=self.truncate_last_trajectory)
        elif model.num_timesteps > self.offline_steps:
            reason = reason or f"there is no {agent.replay_buffer.name}, see --save-replay-buffer"
            print(f"What {agent.path} had collected is lost: {reason}")
            # As in the beginning
            model.learning_starts += self.resumed_timesteps

    def create_callbacks(self) -> None:
        # Ours in place of rl-zoo3's
        save_freq, eval_freq, self.save_freq, self.eval_freq = self.save_freq, self.eval_freq, -1, -1
        super().create_callbacks()
        if distributed.rank() > 0:
            return
        folder = Path(self.save_path)
        periodic: list[BaseCallback] = []
        if save_freq > 0:
            periodic.append(
                WholeCheckpoints(max(save_freq // self.n_envs, 1), self.save_path, save_replay_buffer=self.save_replay_buffer)
            )
        if eval_freq > 0 and not self.optimize_hyperparameters:
            evaluations = WholeEvaluations(
                self.create_envs(self.n_eval_envs, eval_env=True),
                folder,
                self.env_name,
                n_eval_episodes=self.n_eval_episodes,
                eval_freq=max(eval_freq // self.n_envs, 1),
                deterministic=self.deterministic_eval,
            )
            evaluations.restore(self.resumed_timesteps)
            periodic.append(evaluations)
        for callback in periodic:
            # At the timesteps where the uninterrupted run would have had them
            n_online = max(self.resumed_timesteps - self.offline_steps, 0)
            callback.n_calls = self.resumed_timesteps - n_online + n_online // self.n_envs
        self.callbacks += periodic

    def objective(self, trial: optuna.Trial) -> float:
        # Which of the workers ran it
        trial.set_user_attr("pid", os.getpid())
        value = super().objective(trial)
        # (one of NaN fails)
        self.has_completed_trial = self.has_completed_trial or not np.isnan(value)
        return value

    def _run_shared_study(self) -> optuna.Study:
        """
        The trials of a study in a storage with a heartbeat: workers take over the trials of those that were killed.

        :return: the study, with all of its ``max_total_trials`` done
        """
        assert self.storage is not None
        study = optuna.create_study(
            sampler=self._create_sampler(self.sampler),
            pruner=self._create_pruner(self.pruner),
            storage=open_storage(self.storage),
            study_name=self.study_name,
            load_if_exists=True,
            direction="maximize",
        )
        if study.trials:
            # Not the same suggestions again
            study.sampler.reseed_rng()
        try:
            if self.max_total_trials is not None:
                optimize_together(study, self.objective, self.max_total_trials, self.n_jobs)
                self.n_trials = self.max_total_trials
            else:
                study.optimize(self.objective, n_jobs=self.n_jobs, n_trials=self.n_trials, gc_after_trial=True)
        except KeyboardInterrupt:
            pass
        return study

    def hyperparameters_optimization(self) -> None:
        """A trial learns offline first, as a training does, and is evaluated and pruned along the way of both phases."""
        offline_steps = self._hyperparams.get("offline_steps", 0)
        self.n_timesteps += offline_steps
        study = None
        with patches.timesteps_of_both_phases(self.algo, offline_steps):
            if self.storage is not None:
                study = self._run_shared_study()
                # rl-zoo3 finds it finished, and writes the report
                self.study_name, self.max_total_trials = study.study_name, 0
            try:
                super().hyperparameters_optimization()
            except ValueError as error:
                if self.has_completed_trial or (study and study.get_trials(states=[TrialState.COMPLETE])):
                    raise
                raise InputError("no trial was completed: all were pruned or failed") from error
        if study is not None:
            number = study.best_trial.number
            print(f"The best trial is number {number}, to train with: --study-name {study.study_name} --trial-id {number}")

    def learn(self, model: BaseAlgorithm) -> None:
        def learn(*args, **kwargs) -> BaseAlgorithm:
            try:
                self._continue_tensorboard(model)
                return model.learn(*args, **{**kwargs, "reset_num_timesteps": self.run is None})
            except KeyboardInterrupt:
                # rl-zoo3 keeps it to itself
                self.is_interrupted = True
                # (it may have been that of another process)
                distributed.ignore_signals()
                raise
            except distributed.RankError as error:
                if error.reason is not None:
                    raise
                # Another one was killed: nothing of what was learned is lost
                self.is_interrupted = True
                distributed.ignore_signals()
                if distributed.tells(error):
                    hint = "" if distributed.rank() == 0 else f". To go on: sb3-flow train --resume {self.save_path}"
                    print(f"sb3-flow: error: {error}{hint}", file=sys.stderr)
                raise KeyboardInterrupt from None

        try:
            # (rl-zoo3 uses no more of the model than this)
            super().learn(SimpleNamespace(env=model.env, policy=model.policy, learn=learn))  # type: ignore[arg-type]
        except Exception:
            # (an interruption closes progress bars that were not open yet, and processes that it has ended)
            if not self.is_interrupted:
                if model.num_timesteps == self.resumed_timesteps:
                    self._leave_as_it_was()
                raise
        if self.is_interrupted and model.num_timesteps == self.resumed_timesteps:
            self._leave_as_it_was()
            raise KeyboardInterrupt

    def _continue_tensorboard(self, model: BaseAlgorithm) -> None:
        """In the folder of the run. SB3 takes the latest one, which may be that of another run."""
        if model.tensorboard_log is None or distributed.rank() > 0:
            return
        remembered = Path(self.params_path) / "tensorboard.txt"
        is_own = self.run is not None and self.run.args["tensorboard_log"] == self.args.tensorboard_log
        if is_own and remembered.is_file() and Path(remembered.read_text()).is_dir():
            formats = ["tensorboard"] if model.verbose == 0 else ["stdout", "tensorboard"]
            model.set_logger(configure(remembered.read_text(), formats))
            return
        name = signature(model.learn).parameters["tb_log_name"].default
        model.set_logger(configure_logger(model.verbose, model.tensorboard_log, name))
        assert model.logger.dir is not None
        with written_whole(Path(self.params_path)) as unfinished:
            (unfinished / "tensorboard.txt").write_text(str(Path(model.logger.dir).absolute()))

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        if distributed.rank() > 0:
            return
        print(f"Saving to {self.save_path}")
        with written_whole(Path(self.save_path)) as unfinished:
            model.save(unfinished / f"{self.env_name}.zip")
            if self.save_replay_buffer and isinstance(model, OffPolicyAlgorithm):
                print("Saving replay buffer")
                model.save_replay_buffer(unfinished / "replay_buffer.pkl")
            if (normalization := model.get_vec_normalize_env()) is not None:
                (unfinished / self.env_name).mkdir()
                normalization.save(str(unfinished / self.env_name / "vecnormalize.pkl"))
        if self.is_interrupted:
            print(f"Interrupted after {model.num_timesteps} timesteps. To go on: sb3-flow train --resume {self.save_path}")
