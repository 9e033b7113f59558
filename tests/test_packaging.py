"""What importing the package costs, and what it asks of its dependencies."""

import json
from pathlib import Path
import subprocess
import sys
import tomllib

ROOT = Path(__file__).parents[1]
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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["flax"]
    assert [w.split(">=")[0] for w in wanted] == ["jax", "flax"]
    for requirement in [*wanted, f"python{project['requires-python']}"]:
        name, *least = requirement.split(">=")
        assert least and name.isalnum() and least[0].replace(".", "").isdigit(), requirement
