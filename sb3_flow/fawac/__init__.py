from sb3_flow.fawac.fawac import FAWAC
from sb3_flow.fawac.policies import CnnPolicy, FAWACPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["FAWAC", "CnnPolicy", "FAWACPolicy", "MlpPolicy", "MultiInputPolicy"]
