from sb3_flow.dppo import presets
from sb3_flow.dppo.dppo import DPPO
from sb3_flow.dppo.policies import CnnPolicy, DPPOPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["DPPO", "CnnPolicy", "DPPOPolicy", "MlpPolicy", "MultiInputPolicy", "presets"]
