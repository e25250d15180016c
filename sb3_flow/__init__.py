from pathlib import Path

import sb3_flow.envs  # noqa: F401 registers the environments
from sb3_flow.dppo import DPPO
from sb3_flow.fpo import FPO, presets
from sb3_flow.fql import FQL

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = ["DPPO", "FPO", "FQL", "__version__", "presets"]
