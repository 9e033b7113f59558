"""The order of imports, and what importing the package does not import."""

import ast
from pathlib import Path
import subprocess
import sys

import jax_bn

PACKAGE = Path(str(jax_bn.__file__)).parent
MAY_IMPORT = {  # of this package; downward only
    "__init__": {"_batch_norm", "_batch_renorm", "_residuals", "_statistics", "reference"},
    "recalibrate": {
        "_arguments",
        "_batch_norm",
        "_intercept",
        "_needs_flax",
        "_shapes",
        "_statistics",
        "linen",
        "nnx",
    },
    "fold": {"_adjacent", "_arguments", "_intercept", "_needs_flax", "linen", "nnx"},
    "_adjacent": {"_arguments", "_intercept", "_shapes"},
    "_needs_flax": set(),
    "_intercept": {"linen._replace"},
    "linen": {"_needs_flax", "linen._batch_norm", "linen._batch_renorm", "linen._replace"},
    "linen._replace": {"_arguments", "linen._batch_norm"},
    "linen._batch_renorm": {"_batch_renorm", "linen._batch_norm"},
    "linen._batch_norm": {"_arguments", "_batch_norm", "_shapes", "_statistics"},
    "nnx": {"_needs_flax", "nnx._batch_norm", "nnx._batch_renorm", "nnx._replace"},
    "nnx._replace": {"_arguments", "nnx._batch_norm"},
    "nnx._batch_renorm": {"_batch_renorm", "nnx._batch_norm"},
    "nnx._batch_norm": {"_arguments", "_batch_norm", "_shapes", "_statistics"},
    "_batch_norm": {"_arguments", "_residuals", "_shapes", "_stages", "_statistics", "_training"},
    "_batch_renorm": {"_arguments", "_residuals", "_statistics", "_training"},
    "_training": {"_arguments", "_implementation", "_shapes", "_statistics", "_vjp"},
    "torch": {"torch._layer", "torch._model"},
    "torch._model": {"torch._layer"},
    "torch._layer": set(),
    "_arguments": {"_activations", "_shapes"},
    "_implementation": {
        "_devices",
        "_platform",
        "_stages",
        "kernels._one_device",
        "kernels.mosaic_gpu",
    },
    "kernels._one_device": {"_platform"},
    "kernels": set(),
    "kernels.mosaic_gpu": {
        "_activations",
        "_shapes",
        "_stages",
        "kernels._resident",
        "kernels._slabs",
        "kernels._stream",
    },
    "kernels._resident": {"kernels._slabs"},
    "kernels._slabs": set(),
    "kernels._stream": set(),
    "_vjp": {"_activations", "_devices", "_jvp", "_residuals", "_stages", "_statistics"},
    "_jvp": {"_compiler", "_devices", "_residuals", "_stages"},
    "_devices": set(),
    "_residuals": set(),
    "_statistics": {"_arguments", "_devices"},
    "_stages": {"_activations", "_compiler", "_shapes", "_sums"},
    "_sums": {"_compiler", "_platform", "_shapes"},
    "_compiler": {"_platform"},
    "_platform": set(),
    "_activations": set(),
    "_shapes": set(),
    "reference": set(),
}
FLAX = "linen", "nnx", "recalibrate", "fold", "_intercept"
MAY_IMPORT_FLAX = {name for name in MAY_IMPORT if name.split(".")[0] in FLAX}
LAYERS = {
    f"{flax}.{layer}" for flax in ("linen", "nnx") for layer in ("_batch_norm", "_batch_renorm")
}


def files():
    """Path of each module of the package by its name, without that of the package."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts), path


def imported(path):
    """Dotted names of all modules that a file imports, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path.name}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_downward():
    modules = dict(files())
    assert modules.keys() == MAY_IMPORT.keys()
    for name, path in modules.items():
        found = set(imported(path))
        ours = {m.removeprefix("jax_bn.") for m in found if m.startswith("jax_bn.")}
        too_many = (ours & modules.keys()) - MAY_IMPORT[name]
        assert not too_many, f"{name} imports {too_many}"
        uses_pallas = any("pallas" in m for m in found)
        assert uses_pallas <= name.startswith("kernels."), f"{name} imports pallas"
        uses_flax = any(m.split(".")[0] == "flax" for m in found)
        assert uses_flax <= (name in MAY_IMPORT_FLAX), f"{name} imports flax"


def test_layers_do_no_arithmetic():
    modules = dict(files())
    for name in LAYERS:
        tree = ast.parse(modules[name].read_text())
        annotations = {
            id(inner)
            for node in ast.walk(tree)
            for field in ("annotation", "returns")
            if getattr(node, field, None) is not None
            for inner in ast.walk(getattr(node, field))
        }
        found = [
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, (ast.BinOp, ast.AugAssign)) and id(node) not in annotations
        ]
        assert not found, f"{name} computes {found}"


def test_files_stay_small():
    for _, path in files():
        assert len(path.read_text().splitlines()) <= 300, f"{path.name} is too long"


def test_importing_jax_bn_imports_neither_flax_nor_pallas():
    code = (
        "import jax_bn, sys\n"
        "import jax_bn.torch\n"
        "assert not {'flax', 'torch'} & sys.modules.keys()\n"
        "assert not [m for m in sys.modules if 'pallas' in m]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
