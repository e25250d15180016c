from pathlib import Path

import sb3_flow.envs  # noqa: F401 registers the environments
from sb3_flow.dppo import DPPO
from sb3_flow.fawac import FAWAC
from sb3_flow.fbrac import FBRAC
from sb3_flow.flow_bc import FlowBC
from sb3_flow.fpo import FPO, presets
from sb3_flow.fql import FQL
from sb3_flow.ifql import IFQL
from sb3_flow.qc import QC

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = ["DPPO", "FAWAC", "FBRAC", "FPO", "FQL", "IFQL", "QC", "FlowBC", "__version__", "presets"]
