"""pip-audit, also beside an index that has no pages of versions: `audit.py OPTIONS-OF-PIP-AUDIT`.

The package index tells the advisories of a version on that version's page. A mirror may have none,
only that of each project, which tells those of its newest version; pip-audit alone then finds
nothing of any package.
"""

from collections.abc import Callable
from typing import Any

from packaging.version import Version


def page(ask: Callable, url: str, **options) -> Any:
    """The answer on .../NAME/VERSION/json; if there is none, on NAME, if that is its newest."""
    answer = ask(url=url, **options)
    if answer.status_code != 404:
        return answer
    project, version, _ = url.rsplit("/", 2)
    of_project = ask(url=f"{project}/json", **options)
    newest = of_project.status_code == 200 and of_project.json()["info"]["version"]
    return of_project if newest and Version(newest) == Version(version) else answer


def main() -> None:
    """Runs pip-audit on the command line's arguments."""
    from pip_audit import _cli

    class Service(_cli.PyPIService):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            ask = self.session.get
            self.session.get = lambda url, **options: page(ask, url, **options)

    _cli.PyPIService = Service
    _cli.audit()


if __name__ == "__main__":
    main()
