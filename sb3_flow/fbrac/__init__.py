from sb3_flow.fbrac.fbrac import FBRAC
from sb3_flow.fbrac.policies import CnnPolicy, FBRACPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["FBRAC", "CnnPolicy", "FBRACPolicy", "MlpPolicy", "MultiInputPolicy"]
