"""How the manual is built: ``make docs``, or ``sphinx-build -W docs build/manual``. Nothing is fetched.

The reference pages are written into ``generated/`` first, from what the package itself says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import tracekit

sys.path.insert(0, str(Path(__file__).parent))
import reference

project = "tracekit"
author = "The tracekit authors"
version = release = tracekit.__version__

extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["generated/README.md"]

html_theme = "alabaster"
html_title = "tracekit manual"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_theme_options = {
    "description": "What a Mixture-of-Experts model's routing allows",
    "fixed_sidebar": True,
    "page_width": "1140px",
    "sidebar_width": "240px",
    "show_powered_by": False,
}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"


# To skip a node is not to write its text a second time.
def _inline(translator: Any, node: Any) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: Any) -> None:
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def _write(app: Sphinx) -> None:
    reference.write(Path(app.srcdir) / "generated")


def setup(app: Sphinx) -> None:
    """Draw formulas as MathML, which browsers know without a script, and write the reference first."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("builder-inited", _write)
