"""The notebook of docs/notebooks runs, from made-up embeddings alone, and shows what it has stored."""

import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "deduplicate.ipynb"


def shown(notebook: Any) -> list[str]:
    """The texts of all outputs; distances that rounding could change by a digit are left out."""
    texts = [
        output.get("text") or output["data"]["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    return [re.sub(r"0\.000\d+", "0.000...", text) for text in texts]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_shows_what_it_says(tmp_path: Path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")

    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    again = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        again, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert shown(again) == shown(stored)
    assert len(shown(stored)) == 7
    assert (tmp_path / "kept.npy").is_file()
