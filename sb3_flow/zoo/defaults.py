"""Hyperparameters of an environment that has none of its own: those of its namespace, or the default ones, made to fit it."""

import importlib
from pathlib import Path
from typing import Any

import yaml
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

#: For environments whose observations are a Dict of vectors
FLATTEN = "gymnasium.wrappers.FlattenObservation"
#: Pixels of a side of the smallest image that the CNN of SB3 can take
MIN_IMAGE_SIZE = 36


def read_conf_file(config: str) -> dict[str, dict[str, Any]]:
    """
    What a ``--conf-file`` holds, in the three formats of rl-zoo3.

    :param config: Path of a YAML file, path of a Python file, or name of a Python module
    :return: hyperparameters by environment id
    """
    if config.endswith((".yml", ".yaml")):
        return yaml.safe_load(Path(config).read_text()) or {}
    if config.endswith(".py"):
        variables: dict[str, Any] = {}
        exec(Path(config).read_text(), variables)
        return variables["hyperparams"]
    return importlib.import_module(config).hyperparams


def policy_for(observation_space: spaces.Space, policy: str) -> str:
    """
    :param observation_space: Observation space
    :param policy: Name of a policy for vectors, ``"MlpPolicy"`` or ``"MlpLstmPolicy"``
    :return: name of the policy of the same kind for these observations
    """
    if isinstance(observation_space, spaces.Dict):
        return policy.replace("Mlp", "MultiInput")
    if is_image_space(observation_space) and sorted(observation_space.shape or ())[1] >= MIN_IMAGE_SIZE:
        return policy.replace("Mlp", "Cnn")
    return policy


def normalization_for(observation_space: spaces.Space) -> dict[str, Any]:
    """
    Images have a normalization of their own, and only numbers can be normalized.

    :param observation_space: Observation space
    :return: arguments of ``VecNormalize`` for these observations
    """
    if not isinstance(observation_space, spaces.Dict):
        return {} if _is_vector(observation_space) else dict(norm_obs=False)
    keys = [key for key, space in observation_space.spaces.items() if _is_vector(space)]
    if len(keys) == len(observation_space.spaces):
        return {}
    return dict(norm_obs_keys=keys) if keys else dict(norm_obs=False)


def _is_vector(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and not is_image_space(space)
