"""What importing the package costs, what it asks of its dependencies, and what is known of them."""

import json
from pathlib import Path
import runpy
import subprocess
import sys
import tomllib
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTS = """
import json, sys, time
start = time.process_time()
import jax
there, middle = set(sys.modules), time.process_time()
import jax_bn
end = time.process_time()
print(json.dumps([sorted(sys.modules.keys() - there), (end - middle) / (middle - start)]))
"""


def test_the_import_adds_nothing_but_itself_to_that_of_jax():
    """No Flax, no Pallas, no part of JAX that it had not loaded; at most 15% of its time."""
    shares = []
    for _ in range(2):  # of processor time; the smaller one, for other work disturbs
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True, cwd=ROOT
        )
        added, share = json.loads(done.stdout)
        shares.append(share)
        # jax.ad_checkpoint gives public names to what is loaded already.
        others = [m for m in added if m.split(".")[0] != "jax_bn" and m != "jax.ad_checkpoint"]
        assert not others and "jax_bn._vjp" in added
    assert min(shares) < 0.15


def test_dependencies_have_a_least_version_and_no_greatest():
    """Of the package itself and of its layers; see the comment in pyproject.toml."""
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["flax"]
    assert [w.split(">=")[0] for w in wanted] == ["jax", "flax"]
    for requirement in [*wanted, f"python{PROJECT['requires-python']}"]:
        name, *least = requirement.split(">=")
        assert least and name.isalnum() and least[0].replace(".", "").isdigit(), requirement


def test_every_least_version_is_what_the_gate_installs_on_the_oldest_python():
    done = subprocess.run(
        [sys.executable, ROOT / ".ci/lowest.py"], check=True, capture_output=True, text=True
    )
    said = set(done.stdout.split())
    extras = PROJECT["optional-dependencies"].values()
    wanted = PROJECT["dependencies"] + [w for extra in extras for w in extra]
    bounds = {w.replace(">=", "==") for w in wanted if set("<>=!~") & set(w)}
    assert said == bounds and "jax==0.10.2" in said


# ---- the audit -----------------------------------------------------------------------------------


class Answer(NamedTuple):
    status_code: int
    version: str = ""

    def json(self):
        return dict(info=dict(version=self.version))


@pytest.mark.parametrize(
    "pages, found",
    [
        ({"a/1.0": Answer(200, "1.0"), "a": Answer(200, "2.0")}, "a/1.0"),
        ({"a": Answer(200, "1.0.0")}, "a"),
        ({"a": Answer(200, "2.0")}, None),  # of which it says nothing about 1.0
        ({"a/1.0": Answer(500), "a": Answer(200, "1.0")}, "a/1.0"),
        ({}, None),
    ],
)
def test_the_audit_takes_the_page_of_a_project_for_its_newest_version_alone(pages, found):
    page = runpy.run_path(str(ROOT / ".ci/audit.py"))["page"]
    answers = {f"index/{path}/json": answer for path, answer in pages.items()}
    missing = Answer(404)
    answer = page(lambda url, timeout: answers.get(url, missing), "index/a/1.0/json", timeout=1)
    assert answer is (pages[found] if found else missing)
