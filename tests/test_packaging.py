"""What importing the package costs, what it asks of its dependencies, and what is known of them."""

import json
from pathlib import Path
import runpy
import subprocess
import sys
import tomllib

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

ADVISORY = dict(id="A-1", fixed_in=["1.1"], summary="s", details="d", withdrawn=None)


def of_version(version, *advisories):
    return dict(info=dict(version=version), vulnerabilities=list(advisories))


@pytest.mark.parametrize(
    "pages, expected",
    [
        ({"a/1.0": of_version("1.0")}, []),
        ({"a/1.0": of_version("1.0", ADVISORY)}, ["a 1.0: A-1, fixed in 1.1"]),
        (
            {"a/1.0": of_version("1.0", ADVISORY | dict(fixed_in=[]))},
            ["a 1.0: A-1, fixed in no version"],
        ),
        ({"a/1.0": of_version("1.0", ADVISORY | dict(withdrawn="2026-01-01T00:00:00Z"))}, []),
        ({"a": of_version("1.0", ADVISORY)}, ["a 1.0: A-1, fixed in 1.1"]),
        ({"a": of_version("1.1")}, "only its newest version, 1.1"),
        ({}, "a 1.0: not at"),
    ],
)
def test_the_audit_tells_what_is_known_and_what_is_not(pages, expected):
    vulnerabilities = runpy.run_path(str(ROOT / ".ci/audit.py"))["vulnerabilities"]
    if isinstance(expected, list):
        assert vulnerabilities("a", "1.0", pages.get) == expected
    else:
        with pytest.raises(LookupError, match=expected):
            vulnerabilities("a", "1.0", pages.get)
