"""Prints the least version that pyproject.toml allows of each dependency, for `pip --constraint`.

The gate installs these on the first Python that it runs on, and the newest on the others.
"""

from pathlib import Path
import tomllib


def main() -> None:
    """One line for each `name>=version`, extras left out."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"].values()
    for wanted in sorted({*project["dependencies"], *(w for extra in extras for w in extra)}):
        name, *least = wanted.split(">=")
        if least:
            print(f"{name.split('[')[0]}=={least[0]}")


if __name__ == "__main__":
    main()
