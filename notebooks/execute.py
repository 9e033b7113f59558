"""Runs the notebooks from clean kernels, and compares what they print with what is committed.

    python notebooks/execute.py            fails if a cell fails or warns, or prints another text
    python notebooks/execute.py --write    commits to it: puts the new outputs into the files

Printed text has to be the same again; pictures, and cells tagged `varies`, whose text depends on
what is installed, only have to be there. The notebooks run beside this file, so that no path of a
machine is in them, on the CPU, and in two processes at a time.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import difflib
import os
from pathlib import Path
import re
import sys
import time

from nbclient import NotebookClient
import nbformat

HERE = Path(__file__).parent
SECONDS = 120  # what a notebook may take; a cell that hangs is stopped
PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|usr|work|Users|opt|var)/|[A-Z]:\\\\")


def executed(path: Path):
    """The notebook with new outputs, and the seconds that it took."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    start = time.perf_counter()
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", coalesce_streams=True)
    client.execute(cwd=str(HERE))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    notebook.metadata.language_info = {"name": "python"}  # not the version
    return notebook, time.perf_counter() - start


def faults(notebook) -> list[str]:
    """What must not be among the outputs: errors, warnings, paths of a machine, nothing at all."""
    found = []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in cells):
        found.append("it has no outputs")
    for number, cell in enumerate(cells, 1):
        if cell.execution_count != number:
            found.append(f"code cell {number} was not executed in its turn")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"code cell {number} failed: {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"code cell {number} wrote to stderr: {output.text.strip()}")
        printed = text_of(cell)
        if "Warning:" in printed or PATH.search(printed):
            found.append(f"code cell {number} printed a warning or a path: {printed.strip()}")
    return found


def text_of(cell) -> str:
    """What a code cell printed and returned, as text; of a picture only that there is one."""
    lines = []
    for output in cell.outputs:
        if output.output_type == "stream":
            lines.append(output.text)
        elif "image/png" in output.get("data", {}):
            lines.append("<picture>\n")
        else:
            lines.append(output.get("data", {}).get("text/plain", "") + "\n")
    return "".join(lines)


def difference(old, new) -> str:
    """The lines in which the outputs differ, those of cells that vary apart."""

    def lines(notebook):
        for cell in notebook.cells:
            if cell.cell_type == "code" and "varies" not in cell.metadata.get("tags", ()):
                yield from text_of(cell).splitlines()

    return "\n".join(
        difflib.unified_diff([*lines(old)], [*lines(new)], "committed", "now", "", "", 0)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the new outputs into the files")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    args = parser.parse_args()
    os.environ.update(
        JAX_PLATFORMS="cpu", PYTHONWARNINGS="default", PYDEVD_DISABLE_FILE_VALIDATION="1"
    )
    failed = False
    paths = args.notebooks or sorted(HERE.glob("*.ipynb"))
    with ThreadPoolExecutor(max_workers=2) as pool:
        for path, future in [(path, pool.submit(executed, path)) for path in paths]:
            try:
                notebook, seconds = future.result()
            except Exception as error:  # of a cell, of its kernel, or a timeout: all are told
                print(f"{path.name}: {error}", file=sys.stderr)
                failed = True
                continue
            wrong = faults(notebook)
            if args.write and not wrong:
                path.write_text(nbformat.writes(notebook) + "\n")
            elif changed := difference(nbformat.read(path, as_version=4), notebook):
                wrong.append(f"it prints another text than is committed (see --write):\n{changed}")
            print(f"{path.name}: {seconds:.0f} s", *wrong, sep="\n  ")
            failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
