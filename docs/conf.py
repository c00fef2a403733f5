"""How sphinx builds the documentation: `make docs`."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Any, Generic, get_origin

from sphinx.application import Sphinx

project = "sgclassify"
author = "The sgclassify maintainers"
copyright = author
version = release = installed_version("sgclassify")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc"]
templates_path = ["_templates"]
exclude_patterns = ["_templates"]
html_theme = "furo"
html_title = f"sgclassify {release}"

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

autosummary_generate = True
autosummary_imported_members = False
autodoc_member_order = "bysource"
# types stand in the docstrings
autodoc_typehints = "none"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# `make docs` fails where a reference leads nowhere. A name in single backticks is a reference. Only names that begin
# with `sgclassify.` are checked: arguments stand in single backticks too, and references into other projects need a
# network.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:obj", r"(?!sgclassify\.).*"),
    ("py:class", r"(?!sgclassify\.).*"),
]
# Sphinx 9.0 fails on the text signatures of cKDTree and of aliases such as tuple[float, float] without it.
autodoc_use_legacy_class_based = True


def public_bases(app: Sphinx, name: str, kind: type, options: Any, bases: list[Any]) -> None:
    """Leave out what a reader cannot look up: private bases, and `Generic` with its type variables."""
    bases[:] = [
        base for base in bases if get_origin(base) is not Generic and not getattr(base, "__name__", "").startswith("_")
    ] or [object]


def setup(app: Sphinx) -> None:
    """Called by sphinx."""
    app.connect("autodoc-process-bases", public_bases)
