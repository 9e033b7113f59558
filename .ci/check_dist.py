"""Checks what `python -m build` made: `check_dist.py FOLDER AGAIN`, of two builds of one source.

The two are the same, byte for byte, and the wheel holds the package, its metadata and nothing else.
"""

from pathlib import Path
import sys
import zipfile

ROOT = Path(__file__).parents[1]


def main(folder: Path, again: Path) -> None:
    """Exits with what is wrong."""
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    if sorted(Path(name).suffix for name in made) != [".gz", ".whl"]:
        sys.exit(f"{folder} holds {sorted(made)}; expected a wheel and an sdist")
    if differing := [n for n, v in made.items() if v != (again / n).read_bytes()]:
        sys.exit(f"built twice, {differing} differ")
    (wheel,) = folder.glob("*.whl")
    files = (p for p in (ROOT / "jax_bn").rglob("*") if p.is_file() and p.suffix != ".pyc")
    package = {p.relative_to(ROOT).as_posix() for p in files}
    dist_info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    metadata = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    expected = package | {f"{dist_info}/{name}" for name in metadata}
    found = set(zipfile.ZipFile(wheel).namelist())
    if found != expected:
        sys.exit(f"{wheel.name} lacks {expected - found}, and holds {found - expected} beside")
    print(f"{wheel.name}: the same twice, {len(package)} files and {len(metadata)} of metadata")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
