"""dm_control's environments, as gymnasium's: ``dm_control/cheetah-run-v0``, ..."""

import gymnasium as gym


def register_dm_control(env_id: str) -> None:
    """
    Register dm_control's environments with gymnasium.

    :param env_id: The one that they are needed for, for the error message
    :raises ImportError: if shimmy is not installed
    """
    try:
        import shimmy
    except ImportError as error:
        raise ImportError(f'{env_id} needs dm_control and shimmy: pip install "sb3-flow[dmc]"') from error
    gym.register_envs(shimmy)  # no-op: importing it registered them
