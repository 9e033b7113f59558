"""Looks for known vulnerabilities of what is installed beside this Python: `python .ci/audit.py`.

PyPI has the advisories of the Python Packaging Authority and of GitHub. It is asked for the page of
each version; an index that keeps none, as a mirror, for that of the project, whose advisories are
those of its newest version. pip-audit stops at such an index.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
import json
import subprocess
import sys
from urllib.error import HTTPError
from urllib.request import urlopen

INDEX = "https://pypi.org/pypi"


def page(path: str) -> dict | None:
    """What the index says of a project or of one version; None where it has no such page."""
    try:
        with urlopen(f"{INDEX}/{path}/json", timeout=60) as answer:
            return json.load(answer)
    except HTTPError as e:
        if e.code != 404:
            raise
        return None


def vulnerabilities(name: str, version: str, ask: Callable = page) -> list[str]:
    """The advisories of one version, a line each; raises LookupError where they are not known."""
    found = ask(f"{name}/{version}") or ask(name)
    if found is None:
        raise LookupError(f"{name} {version}: not at {INDEX}")
    if (newest := found["info"]["version"]) != version:
        raise LookupError(f"{name} {version}: {INDEX} has only its newest version, {newest}")
    return [
        f"{name} {version}: {v['id']}, fixed in {', '.join(v['fixed_in']) or 'no version'}"
        for v in found["vulnerabilities"]
        if not v["withdrawn"]
    ]


def main() -> None:
    """Exits with what was found, or could not be looked up."""
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    frozen = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout.split("\n")
    # A version of one's own, such as 2.13.0+cpu, has the advisories of the one it is built from.
    installed = [line.split("+")[0].split("==") for line in frozen if line]

    def look_up(package: list[str]) -> list[str]:
        if len(package) != 2:
            return [f"{package[0]}: not from an index"]
        try:
            return vulnerabilities(*package)
        except LookupError as e:
            return [str(e)]

    with ThreadPoolExecutor(8) as pool:
        if wrong := list(chain.from_iterable(pool.map(look_up, installed))):
            sys.exit("\n".join(wrong))
    print(f"{len(installed)} packages looked up: no known vulnerability")


if __name__ == "__main__":
    main()
