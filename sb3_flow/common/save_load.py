"""Saved models, checked before they are loaded."""

import io
import json
import pathlib
import zipfile
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import json_to_data, open_path
from stable_baselines3.common.type_aliases import GymEnv


def check_model_file(
    path: str | pathlib.Path | io.BufferedIOBase,
    algorithm: type[BaseAlgorithm],
    custom_objects: dict[str, Any] | None = None,
) -> type[BasePolicy]:
    """
    Check that a file is a model of an algorithm, and whole.

    :param path: Path of the model, with or without .zip, or a file
    :param algorithm: Class of the algorithm
    :param custom_objects: Objects to replace upon loading, see ``BaseAlgorithm.load``
    :return: class of the policy
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is damaged, or not a model of this algorithm
    """
    file = open_path(path, "r", verbose=0, suffix="zip")
    start = file.tell()
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            # Of all that was saved, only this is loaded here
            policy = {"policy_class": json.loads(archive.read("data"))["policy_class"]}
            policy_class = json_to_data(json.dumps(policy), custom_objects)["policy_class"]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a model, or damaged: {error}") from error
    # NotImplementedError: a compression that zipfile does not know
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a model, or damaged: there is no class of a policy in it") from error
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()
        else:
            file.seek(start)
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} in it is not what was saved")
    if not issubclass(policy_class, tuple(algorithm.policy_aliases.values())):
        found = f"{policy_class.__module__}.{policy_class.__name__}"
        raise ValueError(f"{path} is not a model of {algorithm.__name__}, but one with the policy {found}")
    return policy_class


class CheckedLoad(BaseAlgorithm):
    """An algorithm with policies of its own, whose ``load`` tells what is wrong with a file that is not a model of it."""

    def _check_policy_class(self) -> None:
        """
        :raises ValueError: if the policy is one of another algorithm
        """
        wanted = self.policy_aliases["MlpPolicy"]
        if not issubclass(self.policy_class, wanted):
            raise ValueError(f"`policy` must be a {wanted.__name__}, it is {self.policy_class}")

    # (what is not looked at here is passed on, and not named again: not the signature of BaseAlgorithm to mypy)
    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        *args,
        **kwargs,
    ):
        """
        Load the model from a zip-file, see ``BaseAlgorithm.load``.

        :param path: Path to the file, or a file-like, to load the agent from
        :param env: The new environment to run the loaded model on
        :param device: Device on which the code should run
        :param custom_objects: Objects to replace upon loading
        :param args: See ``BaseAlgorithm.load``
        :param kwargs: See ``BaseAlgorithm.load``
        :return: new model instance with loaded parameters
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if it is damaged, or not a model of this algorithm
        """
        check_model_file(path, cls, custom_objects)
        return super().load(path, env, device, custom_objects, *args, **kwargs)
