"""Environments. Importing this package registers them with gymnasium, without importing what they are made of."""

from sb3_flow.envs.envpool import EnvPoolVecEnv, make_envpool
from sb3_flow.envs.gridworld import register_gridworld
from sb3_flow.envs.multi_goal import register_multi_goal
from sb3_flow.envs.ogbench import register_ogbench
from sb3_flow.envs.tracking import register_tracking
from sb3_flow.envs.two_peaks import register_two_peaks

register_gridworld()
register_multi_goal()
register_ogbench()
register_tracking()
register_two_peaks()

__all__ = ["EnvPoolVecEnv", "make_envpool"]
