from sb3_flow.ifql.ifql import IFQL
from sb3_flow.ifql.policies import CnnPolicy, IFQLPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["IFQL", "CnnPolicy", "IFQLPolicy", "MlpPolicy", "MultiInputPolicy"]
