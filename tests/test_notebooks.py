"""The notebooks as committed: executed to the end, no warning, no machine's path, every statement.

`make notebooks` executes them; this reads the files alone.
"""

import json
from pathlib import Path
import re

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PATH = re.compile(r"/(?:home|root|tmp|usr|Users|work|opt|var)/|[A-Z]:\\\\")


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_they_are_there():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert {o["output_type"] for o in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(o["name"] == "stdout" for o in outputs if o["output_type"] == "stream")
    without_pictures = [
        {k: v for k, v in o.get("data", {}).items() if k != "image/png"} | {"text": o.get("text")}
        for o in outputs
    ]
    assert not PATH.search(json.dumps(without_pictures))
    assert "Warning" not in json.dumps(without_pictures)


def test_each_statement_of_the_derivation_is_stated_and_checked():
    """A heading for each of D1 to D17, and below it a cell whose printed check passed."""
    path = next(p for p in NOTEBOOKS if p.stem == "01_derivation")
    row, printed = None, {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^### D(\d+): ", source, re.M)
            row = int(headings[-1]) if headings else row
            for heading in headings:
                assert "$$" in source.split(f"### D{heading}: ")[1], f"D{heading} has no formula"
                printed[int(heading)] = ""
        elif row is not None:
            printed[row] += "".join("".join(o.get("text", "")) for o in cell["outputs"])
    assert list(printed) == list(range(1, 18))
    for row, text in printed.items():
        assert re.search(rf"^D{row}\b.*largest error < 1e-1[02]$", text, re.M), f"D{row}"
