"""The quickstart notebook runs from top to bottom and shows what it says."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
CELL_S = 900  # seconds that one cell may take


@pytest.mark.timeout(1800)
def test_quickstart_runs_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        for output in outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3  # pairs with labels, the three accuracies, pairs with scores
    for picture in pictures:
        assert np.asarray(picture.convert("L")).std() > 10, "a figure is empty"
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "1,000 rows = 988 scored + 12 set aside" in text
    assert "8 answers over HTTP, as in the files" in text


def test_it_is_committed_without_outputs() -> None:
    """Outputs kept in the repository go stale, and tell on which machine they were made."""
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
