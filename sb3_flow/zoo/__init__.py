"""
rl-zoo3 with the algorithms of this package: ``sb3-flow train``, ``sb3-flow enjoy``, ...

A script of its own can do ``import sb3_flow.zoo; sb3_flow.zoo.register()`` and go on with rl_zoo3.
"""

from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_flow
from sb3_flow.envs.dm_control import register_dm_control
from sb3_flow.envs.envpool import NAMESPACE, register_envpool

#: The algorithms that :func:`register` adds to rl-zoo3, by the name that ``--algo`` takes.
FLOW_ALGOS: dict[str, type[BaseAlgorithm]] = {
    "fpo": sb3_flow.FPO,
    "dppo": sb3_flow.DPPO,
    "fql": sb3_flow.FQL,
    "ifql": sb3_flow.IFQL,
    "qc": sb3_flow.QC,
    "fbrac": sb3_flow.FBRAC,
    "fawac": sb3_flow.FAWAC,
    "flow_bc": sb3_flow.FlowBC,
}

#: Those that are evaluated with noise unless told otherwise, as their authors do.
EVALUATED_WITH_NOISE = ("fql", "ifql", "qc", "fbrac", "fawac", "flow_bc")


def register() -> None:
    """
    Add the algorithms of this package, and their search spaces, to those of rl-zoo3. Can be called more than once.

    :raises ImportError: if rl-zoo3 is not installed
    """
    try:
        import rl_zoo3.import_envs  # noqa: F401 registers its environments
        from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
        from rl_zoo3.utils import ALGOS

        from sb3_flow.zoo.search_spaces import CONVERTERS, SAMPLERS
    except ImportError as error:
        raise ImportError('rl-zoo3 is not installed, it comes with: pip install "sb3-flow[zoo]"') from error
    ALGOS.update(FLOW_ALGOS)
    HYPERPARAMS_SAMPLER.update(SAMPLERS)
    HYPERPARAMS_CONVERTER.update(CONVERTERS)


def default_conf_file(algo: str) -> str:
    """
    Path of the tuned hyperparameters of an algorithm of this package.

    :param algo: Name of the algorithm
    :return: path of the YAML file
    """
    return str(data_folder("hyperparams") / f"{algo}.yml")


def data_folder(name: str) -> Path:
    """
    :param name: "hyperparams" or "trained_agents"
    :return: where it is: inside an installed package, or at the top of a checkout
    """
    package = Path(sb3_flow.__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def register_envs(env_id: str) -> None:
    """
    Make the environments known to gymnasium that are only registered when they are needed.

    :param env_id: Environment id
    :raises ImportError: if that package is not installed
    """
    if env_id.startswith("dm_control/"):
        register_dm_control(env_id)
    elif env_id.startswith(NAMESPACE):
        register_envpool()
