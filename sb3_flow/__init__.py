from pathlib import Path

from sb3_flow.fpo import FPO

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = ["FPO", "__version__"]
