"""Sphinx configuration: Markdown through MyST, the furo theme, a reference page read off the spec classes."""

from pathlib import Path
from typing import Any

from fusiontree.core.contracts.registries import REGISTRIES
from fusiontree.core.model.spec import ModelSpec
from fusiontree.data.source import sources
from fusiontree.encodings.rope_scaling import scalings
from fusiontree.pruning import policies
from fusiontree.reference import below, markdown
from fusiontree.training import RunSpec

project = "FusionTree"
author = "The FusionTree authors"
copyright = "The FusionTree authors, MIT licence"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "FusionTree"
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_preserve_defaults = True
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__init__, __new__"}
suppress_warnings = ["myst.xref_missing"]


def _reference() -> str:
    parts = ["# Reference", "Every field of every spec, as `fusiontree kinds KIND` prints it.", "## The model"]
    parts += [markdown(spec.__name__, spec) for spec in below(ModelSpec)]
    for registry in [*REGISTRIES.values(), scalings, sources, policies]:
        parts.append(f"## Kinds: {registry.name}")
        parts += [markdown(kind, spec) for kind, spec in registry.usable()]
    own = [spec for spec in below(RunSpec) if spec not in below(ModelSpec)]
    return "\n\n".join([*parts, "## The run file", *(markdown(spec.__name__, spec) for spec in own)])


def _trim(app: Any, page: str, source: list[str]) -> None:
    """Doctest wants an empty line at the end of an example; a reader does not."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")


def setup(app: Any) -> None:
    """Write the reference before pages are read."""
    app.connect("source-read", _trim)
    Path(__file__).with_name("reference.md").write_text(_reference(), encoding="utf-8")
