"""Checks of hyperparameters, of the command line or of a YAML file, before anything is made of them."""

import argparse
import inspect
import json
import numbers
import types
import typing
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from pprint import pprint
from typing import Any

import gymnasium as gym
import optuna
import rl_zoo3.exp_manager
import yaml
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS, get_class_by_name
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_flow.common.save_load import check_model_file
from sb3_flow.dppo.presets import PRESETS as DPPO_PRESETS
from sb3_flow.fpo.presets import PRESETS as FPO_PRESETS
from sb3_flow.zoo import default_conf_file
from sb3_flow.zoo.arguments import new_folder
from sb3_flow.zoo.defaults import FLATTEN
from sb3_flow.zoo.errors import InputError, did_you_mean, one_line, user_input

#: What rl-zoo3 takes itself, beside the arguments of the algorithm
ZOO_HYPERPARAMS: dict[str, Any] = {
    "n_envs": int,
    "n_timesteps": float,
    "policy": str | type,
    "normalize": bool | dict,
    "frame_stack": int | None,
    "env_wrapper": Any,
    "vec_env_wrapper": Any,
    "callback": Any,
    "env_kwargs": dict | None,
    "monitor_kwargs": dict,
    "noise_type": str | None,
    "noise_std": float,
}
#: What it passes to the algorithm itself, from other options
NOT_HYPERPARAMS = {
    "env": "--env",
    "device": "--device",
    "seed": "--seed",
    "verbose": "--verbose",
    "tensorboard_log": "--tensorboard-log",
    "_init_setup_model": "nothing",
}
#: Hyperparameters that have a name, by algorithm
PRESETS = {"fpo": FPO_PRESETS, "dppo": DPPO_PRESETS}
#: Hyperparameters that it evaluates, if they are texts
EVALUATED = ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs", "monitor_kwargs", "normalize")
#: Those that may be "lin_VALUE"
SCHEDULES = ("learning_rate", "critic_learning_rate", "clip_range", "clip_range_vf", "delta_std")
COUNTS = ("n_envs", "n_steps", "batch_size", "n_epochs", "buffer_size", "frame_stack", "n_mc_samples", "n_flow_steps")
NOT_NEGATIVE = (
    "n_timesteps", "offline_steps", "pretrain_steps", "learning_starts", "learning_rate", "critic_learning_rate", "noise_std",
)  # fmt: skip
POSITIVE = ("clip_range", "max_grad_norm", "action_scale")
FRACTIONS = ("gamma", "gae_lambda", "tau")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what an annotation says, as far as that can be told."""
    origin = typing.get_origin(annotation)
    if annotation is None or annotation is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(annotation))
    if annotation in (int, float):
        kind = numbers.Integral if annotation is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, *typing.get_args(annotation)) for item in value)
    if origin is dict:
        item_type = typing.get_args(annotation)[1]
        return isinstance(value, dict) and all(_fits(item, item_type) for item in value.values())
    if origin in (type, Callable):
        # For a class, a function that makes one will do
        return callable(value)
    if annotation in (bool, str, dict, type):
        return isinstance(value, annotation)
    return True


def _describe(annotation: Any) -> str:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, typing.get_args(annotation)))
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a text",
        dict: "a dict",
        type: "a class",
        type(None): "None",
        Callable: "a function",
    }
    return names.get(annotation) or names.get(typing.get_origin(annotation)) or str(annotation)


def _check_range(key: str, value: Any) -> str | None:
    """What is expected, if the value is out of the range that all algorithms share."""
    if key == "net_arch":
        parts = value if isinstance(value, dict) else {"pi": value or []}
        sizes: list[Any] = [size for part in parts.values() if isinstance(part, (list, tuple)) for size in part]
        fits = parts.keys() <= {"pi", "vf", "qf"} and all(size >= 1 for size in sizes if isinstance(size, (int, float)))
        return None if fits else "numbers of units, 1 or more each, or a dict of them for 'pi' and 'vf' (or 'qf')"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    number: Any = value
    for keys, fits, expected in (
        (COUNTS, number >= 1, "1 or more"),
        (NOT_NEGATIVE, number >= 0, "0 or more"),
        (POSITIVE, number > 0, "more than 0"),
        (FRACTIONS, 0 <= number <= 1, "between 0 and 1"),
    ):
        if key in keys and not fits:
            return expected
    return None


def _parameters(cls: Any) -> dict[str, Any] | None:
    """Names and annotations of the arguments of a constructor, those that it passes on included. None: not known."""
    annotations: dict[str, Any] = {}
    for base in inspect.getmro(cls) if isinstance(cls, type) else ():
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                annotations.setdefault(parameter.name, parameter.annotation)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            return annotations
    return None


def check_arguments(where: str, given: Mapping[str, Any], known: Mapping[str, Any] | None) -> None:
    """
    Check the names and types of keyword arguments, and the ranges of those that all algorithms have.

    :param where: What the error message begins with
    :param given: Keyword arguments
    :param known: Annotations of those that there are. None: not known
    :raises InputError: if one of them is wrong
    """
    for key, value in given.items():
        if known is not None and key not in known:
            raise InputError(f"{where}: found {key!r}, which is unknown{did_you_mean(str(key), known)}")
        annotation = Any if known is None else known[key]
        expected = _check_range(key, value) if _fits(value, annotation) else _describe(annotation)
        if expected is not None:
            raise InputError(f"{where}: found {key}:{value!r}, expected {expected}")


def evaluate(where: str, key: str, value: Any) -> Any:
    """
    :param where: What the error message begins with
    :param key: Name of a hyperparameter
    :param value: Its value
    :return: the value as rl-zoo3 evaluates it
    """
    if key not in EVALUATED or not isinstance(value, str):
        return value
    try:
        return eval(value, dict(vars(rl_zoo3.exp_manager)))
    except Exception as error:
        raise InputError(f"{where}: found {key}:{value!r}, expected an expression of Python: {one_line(error)}") from error


def find_preset(algo: str, hyperparams: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any] | None:
    """
    :param algo: Name of the algorithm
    :param hyperparams: Hyperparameters, as rl-zoo3 reads them, which may have a ``preset``
    :param where: Where a hyperparameter is from, for the error message
    :return: hyperparameters of the preset, None if there is none
    :raises InputError: if the algorithm has no such preset
    """
    if "preset" not in hyperparams:
        return None
    name, presets = hyperparams["preset"], PRESETS.get(algo)
    found = f"{where('preset')}: found preset:{name!r}"
    if presets is None:
        raise InputError(f"{found}, but {algo} has no presets: {' and '.join(PRESETS)} have")
    if name not in list(presets):
        raise InputError(f"{found}, expected one of {', '.join(map(repr, presets))}")
    return presets[name]


def expand_preset(algo: str, hyperparams: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """
    Put the hyperparameters of a ``preset`` in its place. Those beside it win, also within ``policy_kwargs``.

    :param algo: Name of the algorithm
    :param hyperparams: Hyperparameters, as rl-zoo3 reads them
    :param where: Where a hyperparameter is from, for the error message
    :return: hyperparameters without ``preset``
    :raises InputError: if the algorithm has no such preset
    """
    preset = find_preset(algo, hyperparams, where)
    given = {name: value for name, value in hyperparams.items() if name != "preset"}
    if preset is None:
        return given
    policy_kwargs = evaluate(where("policy_kwargs"), "policy_kwargs", given.get("policy_kwargs", {}))
    if isinstance(policy_kwargs, dict):
        given["policy_kwargs"] = {**preset["policy_kwargs"], **policy_kwargs}
    return {**preset, **given}


def _check_classes(where: str, key: str, value: Any) -> None:
    """Names of classes (of wrappers, callbacks, a policy), each by itself or with its arguments."""
    for item in value if isinstance(value, list) else [value]:
        name = next(iter(item)) if isinstance(item, dict) and len(item) == 1 else item
        if isinstance(name, type) or callable(name) or name is None:
            continue
        try:
            get_class_by_name(name)
        except Exception as error:
            raise InputError(f"{where}: found {key}:{item!r}, expected the name of a class: {one_line(error)}") from error


def policy_class(where: str, algorithm: type[BaseAlgorithm], policy: Any) -> type:
    """
    :param where: What the error message begins with
    :param algorithm: Algorithm
    :param policy: The hyperparameter, an alias or the name of a class
    :return: class of the policy
    """
    aliases = algorithm.policy_aliases
    if isinstance(policy, str) and "." in policy:
        _check_classes(where, "policy", policy)
        return get_class_by_name(policy)
    if isinstance(policy, str) and policy not in aliases:
        raise InputError(
            f"{where}: found policy:{policy!r}, expected one of {', '.join(aliases)}{did_you_mean(policy, aliases)}"
        )
    return aliases[policy] if isinstance(policy, str) else policy


def check_hyperparams(algo: str, hyperparams: Mapping[str, Any], where: Callable[[str], str]) -> None:
    """
    Check names, types and ranges of hyperparameters, those of the policy included.

    :param algo: Name of the algorithm
    :param hyperparams: Hyperparameters, as rl-zoo3 reads them
    :param where: Where a hyperparameter is from, for the error message
    :raises InputError: if one of them is wrong
    """
    algorithm = ALGOS[algo]
    arguments = _parameters(algorithm)
    known = None if arguments is None else {**arguments, **ZOO_HYPERPARAMS}
    for key in NOT_HYPERPARAMS:
        if key in hyperparams:
            raise InputError(f"{where(key)}: found {key!r}, which is no hyperparameter: see {NOT_HYPERPARAMS[key]}")
        if known is not None:
            known.pop(key, None)
    for key in ("policy", "n_timesteps"):
        if key not in hyperparams:
            raise InputError(f"{where(key)}: found no {key!r}, which is needed")
    values = {}
    for key, value in hyperparams.items():
        value = values[key] = evaluate(where(key), key, value)
        if key in SCHEDULES and isinstance(value, str):
            kind, _, initial = value.partition("_")
            try:
                values[key] = float(initial) if kind == "lin" else None
            except ValueError:
                values[key] = None
            if values[key] is None:
                raise InputError(f"{where(key)}: found {key}:{value!r}, expected a number or 'lin_NUMBER'")
        if key in ("env_wrapper", "vec_env_wrapper", "callback"):
            _check_classes(where(key), key, value)
    for key, value in values.items():
        check_arguments(where(key), {key: value}, known)
    policy = policy_class(where("policy"), algorithm, values["policy"])
    arguments = _parameters(policy)
    for space in ("observation_space", "action_space", "lr_schedule"):
        (arguments or {}).pop(space, None)
    check_arguments(f"{where('policy_kwargs')}: policy_kwargs", values.get("policy_kwargs") or {}, arguments)
    if isinstance(values.get("normalize"), dict):
        check_arguments(f"{where('normalize')}: normalize", values["normalize"], _parameters(VecNormalize))


def check_hyperparams_for_envpool(hyperparams: Mapping[str, Any], where: Callable[[str], str]) -> None:
    """
    Check that EnvPool can do what the hyperparameters want of the environment.

    :param hyperparams: Hyperparameters, as rl-zoo3 reads them
    :param where: Where a hyperparameter is from, for the error message
    :raises InputError: if it cannot
    """
    wrappers = hyperparams.get("env_wrapper")
    for item in wrappers if isinstance(wrappers, list) else [wrappers]:
        name, kwargs = next(iter(item.items())) if isinstance(item, dict) else (item, None)
        wrapper = get_class_by_name(name) if isinstance(name, str) else name
        if kwargs or wrapper not in (None, gym.wrappers.FlattenObservation):
            expected = f"{FLATTEN!r}, or --vec-env dummy: EnvPool has no wrappers of single environments"
            raise InputError(f"{where('env_wrapper')}: found env_wrapper:{item!r}, expected {expected}")
    if "MultiInput" in str(hyperparams["policy"]):
        expected = "'MlpPolicy': observations are flattened in EnvPool"
        raise InputError(f"{where('policy')}: found policy:{hyperparams['policy']!r}, expected {expected}")


def check_trained_agent(path: str | Path, algo: str, what: str = "model") -> None:
    """
    Check that a file is a model of an algorithm, and whole.

    :param path: Path of the model
    :param algo: Name of the algorithm
    :param what: What the error message begins with
    :raises InputError: if it is not
    """
    with user_input(what, ValueError):
        policy = check_model_file(path, ALGOS[algo])
    # A FlowPolicy is an ActorCriticPolicy too, but no model of PPO has one
    for base in policy.__mro__:
        algos = [name for name, algorithm in ALGOS.items() if base in algorithm.policy_aliases.values()]
        if algos:
            if algo not in algos:
                raise InputError(f"{what}: {path} is not a model of {algo}, but a model of {' or '.join(algos)}")
            return


def check_conf_file(config: str, env_id: str, is_atari: bool = False) -> None:
    """
    Check that a file of hyperparameters has a block for the environment.

    :param config: ``.yml`` or ``.py`` file, or name of a module
    :param env_id: Environment id
    :param is_atari: Whether it is a game of Atari, which share a block
    :raises InputError: if it cannot be read, or has no such block
    """
    where = "argument -conf/--conf-file"
    if not config.endswith((".yml", ".yaml")):
        if config.endswith(".py") and not Path(config).is_file():
            raise InputError(f"{where}: found {config!r}, expected a file")
        # A program: rl-zoo3 runs it
        return
    if not Path(config).is_file():
        raise InputError(
            f"{where}: found {config!r}, expected a file" + (" (it is a folder)" if Path(config).is_dir() else "")
        )
    try:
        with open(config) as file:
            blocks = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise InputError(f"{where}: {config} cannot be read: {one_line(error)}") from error
    if not isinstance(blocks, dict):
        found = "nothing" if blocks is None else f"a {type(blocks).__name__}"
        raise InputError(f"{where}: found {found} in {config}, expected hyperparameters by environment id")
    block = env_id if env_id in blocks else "atari" if is_atari else "default"
    if block not in blocks:
        hint = did_you_mean(env_id, blocks)
        raise InputError(f"{where}: found no {env_id!r} in {config}, and no 'default'{hint}")
    if not isinstance(blocks[block], dict):
        raise InputError(f"{where}: found {blocks[block]!r} for {block!r} in {config}, expected hyperparameters")


def check_study(storage: str, study_name: str, trial_id: int | None = None) -> None:
    """
    Check that a study is there, and that it has a trial, without writing anything.

    :param storage: Journal file (``.log``) or URL of a database
    :param study_name: Name of the study
    :param trial_id: Number of a trial
    :raises InputError: if there is none
    """
    studies = read_studies(storage)
    if study_name not in studies:
        names = f"one of {', '.join(studies)}" if studies else "a study of this storage, which has none"
        raise InputError(f"argument --study-name: found {study_name!r}, expected {names}{did_you_mean(study_name, studies)}")
    n_trials = studies[study_name]
    if trial_id is not None and trial_id >= n_trials:
        expected = f"a number from 0 to {n_trials - 1}" if n_trials else "another study: it has no trials"
        raise InputError(f"argument --trial-id: found {trial_id}, expected {expected}")


def read_studies(storage: str) -> dict[str, int]:
    """
    :param storage: Journal file (``.log``) or URL of a database
    :return: number of trials of each study
    :raises InputError: if it cannot be read
    """
    path = storage_path(storage)
    if path is not None and not path.is_file():
        raise InputError(f"argument --storage: found {storage!r}, expected a storage that is there")
    with user_input(f"argument --storage: {storage} cannot be read"):
        opened: BaseStorage
        if storage.endswith(".log"):
            with open(storage) as file:
                # Optuna takes a last line that is damaged for one that is being written
                first_line = next(file, "{}")
            json.loads(first_line)
            opened = JournalStorage(JournalFileBackend(storage))
        else:
            opened = RDBStorage(storage, skip_compatibility_check=True, skip_table_creation=True)
        return {study.study_name: opened.get_n_trials(study._study_id) for study in opened.get_all_studies()}


def check_storage(storage: str) -> None:
    """
    Check that a study can be made in a storage, or gone on with, without writing anything.

    :param storage: Journal file (``.log``) or URL of a database
    :raises InputError: if it cannot be read, or made
    """
    path = storage_path(storage)
    if path is not None and not path.exists():
        folder = path.absolute().parent
        if not storage.endswith(".log") and not folder.is_dir():
            raise InputError(f"argument --storage: found {storage!r}, expected a file in a folder that exists")
        try:
            new_folder(str(folder))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"argument --storage: {error}") from error
    elif storage.endswith(".log"):
        read_studies(storage)
    else:
        import sqlalchemy

        with user_input(f"argument --storage: found {storage!r}, expected a database that can be reached"):
            sqlalchemy.inspect(sqlalchemy.create_engine(storage)).get_table_names()


def storage_path(storage: str) -> Path | None:
    """
    :param storage: Journal file (``.log``) or URL of a database
    :return: its file, if it is in one
    :raises InputError: if it is neither
    """
    if storage.endswith(".log"):
        return Path(storage)
    import sqlalchemy

    try:
        url = sqlalchemy.make_url(storage)
        url.get_dialect()
    except Exception as error:
        expected = "a journal file, which ends in .log, or the URL of a database, such as sqlite:///study.db"
        raise InputError(f"argument --storage: found {storage!r}, expected {expected} ({one_line(error)})") from error
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


class CheckedExperimentManager(ExperimentManager):
    """rl-zoo3's ``ExperimentManager``, which checks its inputs before it makes anything, and knows presets."""

    _trial_hyperparams: dict[str, Any]

    def _where(self, key: str) -> str:
        from_user = key in (self.custom_hyperparams or {})
        return "argument -params/--hyperparams" if from_user else f"hyperparameters of {self.env_name.gym_id} in {self.config}"

    def load_trial(self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True) -> dict[str, Any]:
        check_study(storage, study_name, trial_id)
        if convert and self.algo not in HYPERPARAMS_CONVERTER:
            raise InputError(f"argument --algo: found {self.algo!r}, which has no search space")
        with user_input(f"argument --trial-id: found trial {trial_id} of {study_name}, expected one of {self.algo}"):
            self._trial_hyperparams = super().load_trial(storage, study_name, trial_id, convert)
        return self._trial_hyperparams

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        check_conf_file(self.config, self.env_name.gym_id, self._is_atari)
        self._trial_hyperparams = {}
        with user_input(f"argument -conf/--conf-file: {self.config}"):
            hyperparams, saved_hyperparams = super().read_hyperparameters()
        if "preset" in hyperparams:
            hyperparams = self._expand_preset(hyperparams)
            # The run is that of its values, whatever becomes of the preset
            saved_hyperparams = OrderedDict(sorted(hyperparams.items()))
            print("With those of the preset in its place:")
            pprint(saved_hyperparams)
        check_hyperparams(self.algo, hyperparams, self._where)
        return hyperparams, saved_hyperparams

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        hyperparams = ExperimentManager._preprocess_schedules(hyperparams)
        # One that rl-zoo3 does not know
        name = "critic_learning_rate"
        if isinstance(hyperparams.get(name), str):
            schedule = ExperimentManager._preprocess_schedules(dict(learning_rate=hyperparams[name]))["learning_rate"]
            hyperparams = {**hyperparams, name: schedule}
        return hyperparams

    def _expand_preset(self, hyperparams: dict[str, Any]) -> dict[str, Any]:
        """A preset is above what was there before it: that of the command line above the file, but beneath a trial."""
        custom, trial = self.custom_hyperparams or {}, self._trial_hyperparams
        beneath = {}
        if "preset" in custom:
            beneath, hyperparams = hyperparams, {**trial, **custom}
        expanded = {**beneath, **expand_preset(self.algo, hyperparams, self._where)}
        if "policy_kwargs" in trial and "policy_kwargs" not in custom:
            # As in the search, where those that are sampled are all there are
            expanded["policy_kwargs"] = trial["policy_kwargs"]
        return {name: value for name, value in expanded.items() if name != "preset"}

    def setup_experiment(self) -> tuple[BaseAlgorithm, dict[str, Any]] | None:
        what = f"{self.algo} on {self.env_name.gym_id}"
        # With values of the user's own, whatever goes wrong is about them
        shipped = (default_conf_file(self.algo), str(Path(rl_zoo3.__file__).parent / "hyperparams" / f"{self.algo}.yml"))
        own = (self.custom_hyperparams, self.env_kwargs, self._eval_env_kwargs_args, self.trained_agent)
        kinds = (Exception,) if any(own) or self.config not in shipped else (ValueError, AssertionError)
        if self.trained_agent:
            what += f", from {self.trained_agent} and the files beside it"
        if self.custom_hyperparams:
            what += " (argument -params/--hyperparams)"
        with user_input(what, *kinds):
            experiment = super().setup_experiment()
            if experiment is None:
                self._try_trial()
            return experiment

    def _try_trial(self) -> None:
        """A search makes its first model after its study: the same is made before, to see whether it can be."""
        if self.algo not in HYPERPARAMS_SAMPLER:
            known = ", ".join(HYPERPARAMS_SAMPLER)
            raise InputError(f"argument --algo: found {self.algo!r}, which has no search space, expected one of {known}")
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(self.seed)).ask()
        optuna.logging.set_verbosity(verbosity)
        hyperparams = self._hyperparams
        her = dict(
            using_her_replay_buffer=hyperparams.get("replay_buffer_class") == HerReplayBuffer,
            her_kwargs=hyperparams.get("replay_buffer_kwargs", {}),
        )
        env = self.create_envs(self.n_envs, no_log=True)
        sampled = HYPERPARAMS_SAMPLER[self.algo](trial, self.n_actions, self.n_envs, her)
        ALGOS[self.algo](env=env, device=self.device, **{**hyperparams, **sampled})
        env.close()
