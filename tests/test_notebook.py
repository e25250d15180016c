"""The notebook runs, at a small scale."""

import json
from pathlib import Path

import pytest

papermill = pytest.importorskip("papermill", reason='needs pip install "sb3-flow[tests]"')
for package in ("matplotlib", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason='needs pip install "sb3-flow[plots,export]"')

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "first_steps.ipynb"


def test_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = dict(STEPS=2048, GRADIENT_STEPS=20, N_EPISODES=2)
    cells = papermill.execute_notebook(NOTEBOOK, "out.ipynb", parameters=few, progress_bar=False).cells
    outputs = {i: cell.outputs[-1] for i, cell in enumerate(cells) if cell.cell_type == "code" and cell.outputs}
    # The exported file acts as the model
    difference = next(float(output.data["text/plain"].split("(")[-1].rstrip(")")) for output in reversed(outputs.values()))
    assert difference < 1e-4
    assert any("image/gif" in output.get("data", {}) for output in outputs.values())


def test_notebook_is_without_outputs():
    """Which would get old."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
