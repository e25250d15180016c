"""
Runs in a log folder: which there are, with what options they were started, and from which of their models they can go on.

A run is a folder of rl-zoo3, ``logs/ALGO/ENV_1`` (``ENV_1_UUID`` with ``--uuid``). In it are ``ENV/args.yml`` and
``ENV/config.yml``, its options and hyperparameters; ``rl_model_*_steps.zip``, its checkpoints; ``ENV.zip``, its final model.
"""

import argparse
import contextlib
import inspect
import json
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import rl_zoo3.exp_manager
import yaml
from filelock import FileLock, Timeout
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from sb3_flow import distributed
from sb3_flow.zoo.errors import InputError, one_line
from sb3_flow.zoo.hyperparams import EVALUATED, expand_preset

#: Options that may be given anew with ``--resume``, with the reason why they do not change what is learned
FREE_OPTIONS = {
    "verbose": "only what is printed",
    "progress": "only what is printed",
    "log_interval": "only how often the logger writes",
    "tensorboard_log": "only where the logger writes",
    "num_threads": "only speed",
    "device": "only speed",
    "vec_env": "only speed: the same environments, in one process, in several, or in EnvPool",
    "save_freq": "only how often the run can go on from",
    "save_replay_buffer": "only what is saved",
    "eval_freq": "only how often the model is evaluated",
    "n_eval_envs": "only speed: the same number of episodes",
    "log_folder": "only where the run is looked for",
    "uuid": "only the name of a new folder",
}
#: Options that :meth:`Run.differences` compares in another way: the values of the run are not their defaults
COMPARED_BY_CONTENT = ("n_timesteps", "hyperparams", "conf_file", "trained_agent")
#: What rl-zoo3 does without these hyperparameters
ZOO_DEFAULTS: dict[str, Any] = dict(n_envs=1, normalize=False, frame_stack=None, env_wrapper=None, vec_env_wrapper=None)

#: Name of a checkpoint of SB3's ``CheckpointCallback``, as rl-zoo3 has them
CHECKPOINT = re.compile(r"rl_model_(\d+)_steps\.zip")
#: Beginning of the names of folders that hold what is not written whole yet
UNFINISHED = ".unfinished_"


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """
    Files that are written into the folder that this yields appear in ``folder`` when all of them are written, each of them
    at once, models (.zip) last. Nothing appears in case of an error, or if the process is killed.

    :param folder: Where the files are to be
    :return: where to write them
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as unfinished:
        yield Path(unfinished)
        paths = [path for path in Path(unfinished).rglob("*") if path.is_file()]
        for path in sorted(paths, key=lambda path: path.suffix == ".zip"):
            target = folder / path.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


class SavedModel(NamedTuple):
    """A model, and the paths of what is saved with it, if it is."""

    path: Path
    statistics: Path
    replay_buffer: Path

    @classmethod
    def of(cls, path: Path, env_name: str) -> "SavedModel":
        """
        :param path: Path of a model of SB3's ``CheckpointCallback``, of the best model, or of the final model of a run
        :param env_name: Name of the environment in the names of files
        :return: the model, with the paths where ``CheckpointCallback`` and rl-zoo3 save what belongs to it
        """
        if match := CHECKPOINT.fullmatch(path.name):
            names = f"rl_model_vecnormalize_{match[1]}_steps.pkl", f"rl_model_replay_buffer_{match[1]}_steps.pkl"
        else:
            names = f"{env_name}/vecnormalize.pkl", "replay_buffer.pkl"
            if path.name == "best_model.zip" and path.with_name("best_model_vecnormalize.pkl").is_file():
                names = "best_model_vecnormalize.pkl", names[1]
        return cls(path, path.parent / names[0], path.parent / names[1])

    @property
    def num_timesteps(self) -> float:
        """As in the name of a checkpoint, or in another model. Infinite if it cannot be read: that may be the latest."""
        if match := CHECKPOINT.fullmatch(self.path.name):
            return int(match[1])
        try:
            with zipfile.ZipFile(self.path) as archive:
                return int(json.loads(archive.read("data"))["num_timesteps"])
        except Exception:
            return float("inf")


class State(NamedTuple):
    """Where a run can go on."""

    model: SavedModel
    num_timesteps: int
    #: Why what was collected up to there is lost. None if it is not
    why_no_replay_buffer: str | None
    #: Later models that do not load, each with the reason
    skipped: list[str]


class RunIsFinished(Exception):
    """There is nothing left to do."""


class Run:
    """
    A run of rl-zoo3.

    :param folder: Its folder, e.g. logs/fpo/HalfCheetah-v5_1
    :raises InputError: if it is not the folder of a run
    """

    #: Where it goes on, after :meth:`resume`
    state: State

    def __init__(self, folder: Path):
        self.folder = folder
        paths = list(folder.glob("*/args.yml"))
        if len(paths) != 1:
            raise InputError(f"{folder} is not the folder of a run: there is no {folder}/ENV/args.yml")
        try:
            #: Its options, as the parser of rl-zoo3 has them
            self.args: dict[str, Any] = dict(yaml.unsafe_load(paths[0].read_text()))
            #: Its hyperparameters, as they are in a YAML file
            self.config: dict[str, Any] = dict(yaml.unsafe_load(paths[0].with_name("config.yml").read_text()))
            self.algo, self.env, self.env_name = self.args["algo"], self.args["env"], EnvironmentName(self.args["env"])
            if self.algo not in ALGOS:
                raise ValueError(f"unknown algorithm {self.algo!r}")
        except Exception as error:
            # What a damaged YAML file leads to can be anything
            raise InputError(f"the options of {folder} cannot be read: {one_line(error)}") from error

    @property
    def n_timesteps(self) -> int:
        """Number of timesteps that it was started for, without those of an offline phase."""
        n_timesteps = self.args["n_timesteps"]
        return n_timesteps if n_timesteps >= 0 else int(self.config["n_timesteps"])

    @property
    def offline_steps(self) -> int:
        """Number of gradient steps of its offline phase, which its timesteps begin with."""
        return int(self.args.get("offline_steps", self.config.get("offline_steps") or 0))

    def defaults(self) -> dict[str, Any]:
        """
        :return: its options, as defaults for the parser of rl-zoo3
        """
        return {name: value for name, value in self.args.items() if name not in COMPARED_BY_CONTENT}

    def differences(self, args: argparse.Namespace) -> list[str]:
        """
        What the user asks for that the run does not have.

        :param args: Options, for which those of :meth:`defaults` are the defaults
        :return: the differences, named as on the command line. Only the number of timesteps may grow, and what does not
            change the run
        """
        found = []
        for name, value in self.defaults().items():
            if name not in FREE_OPTIONS and not _same(getattr(args, name), value):
                found.append(f"--{name.replace('_', '-')}: the run has {value!r}, given {getattr(args, name)!r}")
        if args.n_timesteps >= 0 and args.n_timesteps < self.n_timesteps:
            found.append(f"-n/--n-timesteps: the run has {self.n_timesteps}, given {args.n_timesteps}, which is not more")
        given = args.hyperparams or {}
        hyperparams = expand_preset(self.algo, given, lambda _: "argument -params/--hyperparams")
        if args.conf_file:
            try:
                hyperparams = self._read_conf_file(args.conf_file, (self.args["hyperparams"] or {}) | given)
            except Exception as error:
                # It can be a program
                return [*found, f"-conf/--conf-file: {one_line(error)}"]
            # What it says of the number of timesteps is a default of -n
            hyperparams["n_timesteps"] = self.config["n_timesteps"]
            for name in sorted(self.config.keys() - hyperparams.keys()):
                found.append(f"-conf/--conf-file: the run has {name}:{self.config[name]!r}, {args.conf_file} does not")
        for name, value in hyperparams.items():
            own = self._hyperparameter(name)
            same_name = name == "dataset" and isinstance(value, str) and isinstance(own, str)
            if not (_same(_plain(name, value), _plain(name, own)) or (same_name and Path(value).name == Path(own).name)):
                option = "-params/--hyperparams" if name in given or "preset" in given else "-conf/--conf-file"
                found.append(f"{option}: the run has {name}:{own!r}, given {name}:{value!r}")
        return found

    def resume(self, args: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
        """
        Look where the run can go on, without changing anything.

        :param args: Options, for which those of :meth:`defaults` are the defaults. They become those to go on with.
        :return: lock of the run, to be released in the end
        :raises RunIsFinished: if it has all of its timesteps
        :raises InputError: if it has other options, cannot be resumed, or is being trained by another process
        """
        if differences := self.differences(args):
            raise InputError(f"argument --resume: {self.folder} has other options: {'; '.join(differences)}")
        args.n_timesteps = max(args.n_timesteps, self.n_timesteps)
        total = self.offline_steps + args.n_timesteps
        self.state = self.last_state(args.n_timesteps)
        for reason in self.state.skipped:
            print(f"Skipped {reason}")
        learns_online = getattr(ALGOS[self.algo], "learns_online", True)
        if self.state.num_timesteps >= total and self.state.model.path == self.final_model:
            raise RunIsFinished(
                f"{self.folder} is finished, after {self.state.num_timesteps} of {total} timesteps: "
                + ("it goes on with a larger -n/--n-timesteps" if learns_online else "it learns offline only")
            )
        args.trained_agent = str(self.state.model.path)
        return lock(self.folder) if distributed.rank() == 0 else contextlib.nullcontext()

    @property
    def final_model(self) -> Path:
        """Where rl-zoo3 saves the model in the end."""
        return self.folder / f"{self.env_name}.zip"

    def _hyperparameter(self, name: str) -> Any:
        """Of the run, or what it does without."""
        if name in self.config:
            return self.config[name]
        parameter = inspect.signature(ALGOS[self.algo]).parameters.get(name)
        default = parameter.default if parameter is not None else None
        return ZOO_DEFAULTS.get(name, default)

    def _read_conf_file(self, conf_file: str, given: dict[str, Any]) -> dict[str, Any]:
        """As for a new run, with those of a trial and of the command line on top."""
        options: dict[str, Any] = {name: self.args.get(name) for name in ("storage", "study_name", "trial_id", "env_kwargs")}
        # Which imports this module
        from sb3_flow.zoo.experiment import FlowExperimentManager

        reader = FlowExperimentManager(
            argparse.Namespace(), self.algo, self.env, str(self.folder), config=conf_file, hyperparams=given, **options
        )
        with contextlib.redirect_stdout(None):
            hyperparams = dict(reader.read_hyperparameters()[0])
        if not reader.has_own_hyperparams:
            # Made to fit the observations, which are not known here
            hyperparams["policy"] = self.config["policy"]
        return hyperparams

    def saved_models(self) -> list[SavedModel]:
        """
        :return: its final model and its checkpoints, whether they load or not, the latest first
        """
        checkpoints = [path for path in self.folder.glob("*.zip") if CHECKPOINT.fullmatch(path.name)]
        models = [SavedModel.of(path, self.env_name) for path in (self.final_model, *checkpoints) if path.is_file()]
        # The final model has learned from its last steps, a checkpoint has not
        return sorted(models, key=lambda model: (model.num_timesteps, model.path == self.final_model), reverse=True)

    def last_state(self, n_timesteps: int) -> State:
        """
        The latest model that loads, with its statistics and its replay buffer. If none of them has a replay buffer, the
        latest that loads without.

        :param n_timesteps: What the run is to go on to. With all of them nothing is left to be learned from a replay buffer
        :return: where the run can go on
        :raises InputError: if there is no model that loads
        """
        skipped: list[str] = []
        without_buffer: State | None = None
        for model in self.saved_models():
            try:
                num_timesteps = self._load(model)
            except Exception as error:
                # What damaged files lead to can be anything
                skipped.append(f"{model.path.name}: {one_line(error)}")
                continue
            if num_timesteps <= self.offline_steps and without_buffer is not None:
                # It needs no replay buffer, but has not learned from one
                break
            reason = self._why_no_replay_buffer(model, num_timesteps)
            if reason is None or num_timesteps >= self.offline_steps + n_timesteps:
                return State(model, num_timesteps, reason, skipped)
            if without_buffer is None:
                without_buffer = State(model, num_timesteps, reason, list(skipped))
            skipped.append(f"{model.path.name}: {reason}")
        if without_buffer is not None:
            return without_buffer
        reasons = "; ".join(skipped) if skipped else "it has no checkpoint yet"
        raise InputError(f"{self.folder} cannot be resumed: {reasons}")

    def _load(self, saved: SavedModel) -> int:
        """
        Load a model, to see whether that is possible.

        :param saved: Model
        :return: its number of timesteps
        :raises Exception: if it does not load, or what it needs does not
        """
        algorithm = ALGOS[self.algo]
        kwargs: dict[str, Any] = {}
        if issubclass(algorithm, OffPolicyAlgorithm):
            # Without its replay buffer, which may need the environment
            kwargs = dict(buffer_size=1, optimize_memory_usage=False, n_steps=1)
            kwargs |= dict(replay_buffer_class=None, replay_buffer_kwargs={})
        with zipfile.ZipFile(saved.path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
        with warnings.catch_warnings():
            # Of what is given again when it is resumed
            warnings.simplefilter("ignore")
            model = algorithm.load(saved.path, device="cpu", **kwargs)
        if CHECKPOINT.fullmatch(saved.path.name) and saved.num_timesteps != model.num_timesteps:
            raise ValueError(f"it is a model of {model.num_timesteps} timesteps")
        if self.config.get("normalize") not in (None, False):
            load_pickle(saved.statistics, VecNormalize)
        return model.num_timesteps

    def _why_no_replay_buffer(self, saved: SavedModel, num_timesteps: int) -> str | None:
        """:return: what is wrong with the replay buffer that a model is to be resumed with, if anything"""
        has_one = self.args.get("save_replay_buffer") or saved.replay_buffer.is_file()
        if distributed.world_size() > 1:
            # (each process has one of its own)
            return None
        if not has_one or num_timesteps <= self.offline_steps or not issubclass(ALGOS[self.algo], OffPolicyAlgorithm):
            return None
        try:
            load_pickle(saved.replay_buffer, ReplayBuffer)
        except Exception as error:
            return one_line(error)
        return None


def lock(folder: Path) -> FileLock:
    """
    :param folder: Folder of a run
    :return: lock, held until it is released, or the process is dead
    :raises InputError: if another process has it
    """
    file_lock = FileLock(folder / ".lock", timeout=0)
    try:
        file_lock.acquire()
    except Timeout as error:
        raise InputError(f"{folder} is being trained by another process") from error
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}") from error
    return file_lock


def run_folders(log_path: Path, env_name: str) -> list[Path]:
    """
    :param log_path: e.g. logs/fpo
    :param env_name: Name of the environment in the names of folders
    :return: folders of its runs, also of those with a uuid, the latest first
    """
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    numbers = {}
    for path in log_path.glob("*"):
        match = re.fullmatch(rf"{re.escape(env_name)}_(\d+)(_{uuid})?", path.name)
        if match and path.is_dir():
            # Those with a uuid do not count for the numbers of others
            command = path / env_name / "command.txt"
            numbers[path] = int(match[1]), command.stat().st_mtime if command.is_file() else 0.0
    return sorted(numbers, key=lambda path: numbers[path], reverse=True)


class RunId(int):
    """Number of a run, which is written with its uuid, if it has one, as in the name of its folder."""

    uuid = ""

    def __format__(self, _: str) -> str:
        return f"{int(self)!r}{self.uuid}"


def latest_run_id(log_path: str | Path, env_name: str) -> RunId:
    """
    rl-zoo3's ``get_latest_run_id``, which finds runs with a uuid, too.

    :param log_path: e.g. logs/fpo
    :param env_name: Name of the environment in the names of folders
    :return: number of the latest run, 0 if there is none
    """
    folders = run_folders(Path(log_path), env_name)
    if not folders:
        return RunId(0)
    number, *uuid = folders[0].name.removeprefix(f"{env_name}_").split("_")
    run_id = RunId(number)
    run_id.uuid = "".join(f"_{part}" for part in uuid)
    return run_id


def find_run(log_path: Path, env_id: str) -> Run:
    """
    The latest run of an environment whose training has begun.

    :param log_path: e.g. logs/fpo
    :param env_id: Environment id
    :return: the run
    :raises InputError: if there is none
    """
    env_name = EnvironmentName(env_id)
    for folder in run_folders(log_path, env_name):
        if (folder / env_name / "args.yml").is_file():
            return Run(folder)
    raise InputError(f"argument --resume: there is no run of {env_id} in {log_path}")


def remove_unfinished(folder: Path) -> None:
    """
    :param folder: Folder of a run, where a process that was killed may have left what it had not written whole
    """
    for path in folder.rglob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def load_pickle(path: Path, kind: type) -> Any:
    """
    :param path: Path of a pickle
    :param kind: Class of what it should be
    :return: what is in it
    :raises ValueError: if it is not there, does not load, or is something else
    """
    try:
        with open(path, "rb") as file:
            loaded = pickle.load(file)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path.name}") from error
    except Exception as error:
        raise ValueError(f"{path.name} does not load: {one_line(error)}") from error
    if not isinstance(loaded, kind):
        raise ValueError(f"{path.name} is a {type(loaded).__name__}, not a {kind.__name__}")
    return loaded


def _same(first: Any, second: Any) -> bool:
    """Whether two values of an option are the same: nothing is an empty dict, too."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return bool(first == second) or (first in (None, {}) and second in (None, {}))


def _plain(name: str, value: Any) -> Any:
    """A hyperparameter, for which there may be several spellings."""
    if name in EVALUATED and isinstance(value, str):
        with contextlib.suppress(Exception):
            return eval(value, dict(vars(rl_zoo3.exp_manager)))
    if isinstance(value, str) and (match := re.fullmatch(r"lin_([-+.\deE]+)", value)):
        return "lin", float(match[1])
    return value
