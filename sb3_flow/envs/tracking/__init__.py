"""Humanoid motion tracking: ``sb3_flow/HumanoidTracking-v0``, ``-root_hands-v0`` and ``-root-v0``."""

import gymnasium as gym

#: Which bodies of the reference a policy sees, with the end of the id that has them
CONDITIONINGS = {"all": "", "root_hands": "-root_hands", "root": "-root"}


def register_tracking() -> None:
    """Register the environments with gymnasium, without importing what they are made of."""
    for conditioning, end in CONDITIONINGS.items():
        gym.register(
            f"sb3_flow/HumanoidTracking{end}-v0",
            entry_point="sb3_flow.envs.tracking.env:HumanoidTrackingEnv",
            kwargs=dict(conditioning=conditioning),
        )
