"""How Sphinx makes the site: README's sections in its pages, notebooks as committed, docstrings.

A line `<!-- README: Limits -->` in a page stands for that section of the README, so that no text is
written twice. Nothing is executed, and no page loads anything from another host: MathJax with its
fonts lies beside the pages, and the theme has none.
"""

from pathlib import Path
import re
import shutil

import jax_bn

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[1]
# Sphinx wants all pages in one folder: these are copies.
for folder, kinds in ("notebooks", ["*.ipynb"]), ("benchmarks/results", ["*.md", "*.png"]):
    copies = HERE / Path(folder).name
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()
    for kind in kinds:
        for path in (ROOT / folder).glob(kind):
            shutil.copy(path, copies)


project, author = "jax_bn", "The authors of jax_bn"
version = release = jax_bn.__version__
copyright = "Apache License 2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
highlight_language = "text"  # of blocks that name none: formulas
default_role = "py:obj"  # `batch_norm` in a docstring: a link if there is such a thing, else code

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings say more, and in fewer words
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"jax_bn {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_sphinx = False
mathjax_path = "mathjax/tex-chtml.js"

# The files that have a place on the page of the code, in the README's order.
CODE = (
    "_batch_norm _batch_renorm _training _implementation kernels/mosaic_gpu kernels/_stream "
    "kernels/_resident kernels/_slabs kernels/_one_device _vjp _jvp _statistics _devices "
    "_residuals _stages _sums _compiler _platform _arguments _activations _shapes reference"
).split()
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/results/2026-11-27-0943-cpu.md": "results/2026-11-27-0943-cpu.md",
    "benchmarks/results/2026-11-27-1348-cpu.md": "results/2026-11-27-1348-cpu.md",
    "benchmarks/results/2026-11-26-1428-cpu-stress.md": "results/2026-11-26-1428-cpu-stress.md",
    "benchmarks/results/2026-11-26-1651-h200-quick.md": "results/2026-11-26-1651-h200-quick.md",
    "benchmarks/results/2026-11-26-2354-h200.md": "results/2026-11-26-2354-h200.md",
    "benchmarks/results/2026-11-27-0004-h200-float32.md": (
        "results/2026-11-27-0004-h200-float32.md"
    ),
}


def readme(section: str) -> str:
    """The text of a section of the README, below its heading."""
    text = (ROOT / "README.md").read_text()
    if section == "jax_bn":  # what stands before the first section
        return text.split("\n", 1)[1].split("\n## ", 1)[0]
    parts = re.split(r"^## (.*)\n", text, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    if section not in sections:
        raise ValueError(f"README.md has no section {section!r}; it has {list(sections)}")
    return sections[section]


def anchor(name: str) -> str:
    """Of a file on the page of the code, as a heading there would have it."""
    return re.sub("[_/]+", "-", f"{name}-py").strip("-")


def link(match: re.Match) -> str:
    """A link of a file in the root folder, as it has to be in a page."""
    text, target = match.groups()
    name = target.removeprefix("jax_bn/").removesuffix(".py")
    if target in PAGES or target.endswith(".ipynb"):
        target = PAGES.get(target, target)
        return f"[{text}]({target})"
    if target == f"jax_bn/{name}.py" and name in CODE:
        return f"[{text}](code.md#{anchor(name)})"
    if (ROOT / target).is_dir():  # a page cannot show a folder
        return text
    return f"[{text}](../{target})"


def included(text: str) -> str:
    """A text of the root folder, with its links changed."""
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)([^)]+)\)", link, text)


def code(_: re.Match) -> str:
    return "\n".join(
        f"({anchor(name)})=\n## `{name}.py`\n\n"
        f"```{{literalinclude}} ../jax_bn/{name}.py\n:language: python\n```\n"
        for name in CODE
    )


def read(app, docname, source):
    """Fills in what a page asks for."""
    text = source[0]
    text = re.sub(r"^<!-- README: (.*) -->$", lambda m: included(readme(m[1])), text, flags=re.M)
    text = re.sub(
        r"^<!-- FILE: (.*) -->$", lambda m: included((ROOT / m[1]).read_text()), text, flags=re.M
    )
    source[0] = re.sub(r"^<!-- CODE -->$", code, text, flags=re.M)


def plain(app, what, name, obj, options, lines):
    """Keeps |mean| and 2*x as they are: in docstrings they are formulas, no markup."""
    literal = None  # the indentation of the paragraph that announced a literal block
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and literal is not None and indent <= literal:
            literal = None
        if literal is None and not line.lstrip().startswith(">>>"):
            parts = line.split("`")
            parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
            parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in parts[2::2]]  # `Param`s
            lines[i] = "`".join(parts)
        if literal is None and line.rstrip().endswith("::"):
            literal = indent


def setup(app):
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
