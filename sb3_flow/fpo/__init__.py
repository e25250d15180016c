from sb3_flow.fpo import presets
from sb3_flow.fpo.fpo import FPO
from sb3_flow.fpo.policies import CnnPolicy, FlowPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["FPO", "CnnPolicy", "FlowPolicy", "MlpPolicy", "MultiInputPolicy", "presets"]
