"""Every public name with its signature, as `public_api.txt` has them, so that a change is meant.

`python tests/test_public_api.py` writes the file anew; what then differs is what users will notice.
"""

from dataclasses import is_dataclass
import importlib
import inspect
from pathlib import Path

FILE = Path(__file__).with_name("public_api.txt")
PACKAGES = "jax_bn", "jax_bn.linen", "jax_bn.nnx", "jax_bn.torch"  # what they import is public
MODULES = "jax_bn.reference", "jax_bn.recalibrate", "jax_bn.fold"  # what they define is public


def text(default):
    """A default as it is written. Functions have names; a sentinel's repr would hold an address."""
    words = getattr(default, "__qualname__", None) or repr(default)
    return type(default).__name__ if " at 0x" in words else words


def signature(f):
    """Names, kinds and defaults; annotations are for the type checker to compare."""
    words, star = [], False
    for p in inspect.signature(f).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            words.append("*")
        star |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        bare = str(p.replace(annotation=p.empty, default=p.empty))
        words.append(bare if p.default is p.empty else f"{bare}={text(p.default)}")
    return f"({', '.join(words)})"


def members(cls: type):
    """A class's fields or arguments, and its public methods, as far as jax_bn defines them."""
    yield "", cls if is_dataclass(cls) else cls.__init__
    ours = [vars(c) for c in inspect.getmro(cls) if c.__module__.startswith("jax_bn")]
    names = {n for c in ours for n in c if n == "__call__" or n[0] != "_"}
    methods = ((n, getattr(cls, n, None)) for n in sorted(names))
    for name, f in methods:
        if inspect.isfunction(f) and f.__module__.startswith("jax_bn"):
            yield f".{name}", f


def surface():
    for module_name in (*PACKAGES, *MODULES):
        for name, value in sorted(vars(importlib.import_module(module_name)).items()):
            origin = getattr(value, "__module__", "")
            ours = origin == module_name if module_name in MODULES else origin.startswith("jax_bn")
            if ours and not name.startswith("_"):
                parts = members(value) if isinstance(value, type) else [("", value)]
                yield from (f"{module_name}.{name}{part}{signature(f)}" for part, f in parts)


def test_public_names_and_signatures_are_the_written_ones():
    assert list(surface()) == FILE.read_text().splitlines(), f"see {Path(__file__).name}"


def test_every_public_module_is_listed():
    """A module without an underscore is public; kernels are chosen by `implementation`."""
    package = Path(str(importlib.import_module("jax_bn").__file__)).parent
    files = (p.relative_to(package) for p in package.rglob("*.py"))
    paths = (p.parent if p.stem == "__init__" else p.with_suffix("") for p in files)
    public = {".".join(("jax_bn", *p.parts)) for p in paths if "_" not in {n[0] for n in p.parts}}
    kernels = {name for name in public if name.startswith("jax_bn.kernels")}
    assert public - kernels == {*PACKAGES, *MODULES}


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in surface()))
