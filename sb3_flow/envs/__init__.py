"""Environments. Importing this package registers them with gymnasium, without importing what they are made of."""

from sb3_flow.envs.envpool import EnvPoolVecEnv, make_envpool
from sb3_flow.envs.gridworld import register_gridworld
from sb3_flow.envs.multi_goal import register_multi_goal
from sb3_flow.envs.ogbench import register_ogbench

register_gridworld()
register_multi_goal()
register_ogbench()

__all__ = ["EnvPoolVecEnv", "make_envpool"]
