from sb3_flow.flow_bc.flow_bc import FlowBC
from sb3_flow.flow_bc.policies import CnnPolicy, FlowBCPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "FlowBC", "FlowBCPolicy", "MlpPolicy", "MultiInputPolicy"]
