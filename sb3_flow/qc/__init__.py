from sb3_flow.qc.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, QCPolicy
from sb3_flow.qc.qc import QC

__all__ = ["QC", "CnnPolicy", "MlpPolicy", "MultiInputPolicy", "QCPolicy"]
