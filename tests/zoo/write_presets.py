"""Presets of public models, written from their configs by their family.

    python tests/zoo/write_presets.py

rewrites `fusiontree/zoo/specs/*.yaml` for all of `published.py`, and the table of presets in `docs/zoo.md`.
"""

import re
import textwrap
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from published import PUBLISHED, TINY

import fusiontree as ft
from fusiontree.core.model.cost import costs
from fusiontree.core.spec import yaml
from fusiontree.zoo import family_of

ROOT = Path(__file__).parents[2]
SPECS, PAGE = ROOT / "fusiontree" / "zoo" / "specs", ROOT / "docs" / "zoo.md"
MARKS = "<!-- presets -->", "<!-- end of presets -->"


def comment(*paragraphs: str) -> str:
    """Lines of a file's head."""
    wrap = {"width": 118, "initial_indent": "# ", "subsequent_indent": "# ", "break_on_hyphens": False}
    return "".join(f"{line}\n" for text in paragraphs for line in textwrap.wrap(text, **wrap))


def head(name: str) -> str:
    """Where a preset comes from."""
    if name in TINY:
        return comment(f"A small model over bytes in the shape of {TINY[name]['model_type']}.")
    found = PUBLISHED[name]
    count = found.parameters if isinstance(found.parameters, str) else f"{found.parameters:,}"
    return comment(f"{found.title}.", f"Config: {found.source}.", f"{count} parameters: {found.counted}.")


def text_of(name: str, config: dict[str, Any]) -> str:
    """The YAML of a config's spec: layers that come again are named where they are first and then referred to."""
    spec = family_of(config["model_type"]).spec_of(config)
    data = spec.data(short=True)
    names: dict[str, str] = {}
    layers = "".join(line for entry in data.pop("layers") for line in entry_lines(entry, names, "  "))
    before, last = yaml.write({"format": spec.format, **data, "layers": 0}).split("layers: 0\n")[0], ""
    for key in ("norm", "head"):  # what stands behind the layers
        found = re.search(rf"^{key}:.*\n(?: .*\n)*", before, re.MULTILINE)
        if found:
            before, last = before.replace(found[0], ""), last + found[0]
    text = f"{head(name)}{before}layers:\n{layers}{last}"
    text = re.sub(r"- &(\w+)\n +(?!(?s:.*)\*\1\n)", "- ", text)  # a name that nothing refers to
    assert ft.ModelSpec.from_yaml(text) == spec, f"{name} does not read back"
    return text


def entry_lines(entry: dict[str, Any], names: dict[str, str], indent: str) -> Iterator[str]:
    """A layer, or a repeat of layers."""
    if "repeat" not in entry:
        yield from layer_lines(entry, names, indent)
        return
    yield f"{indent}- repeat: {entry['repeat']}\n{indent}  layers:\n"
    for layer in entry["layers"]:
        yield from layer_lines(layer, names, f"{indent}    ")


def layer_lines(layer: dict[str, Any], names: dict[str, str], indent: str) -> Iterator[str]:
    """A layer, or a reference to an equal one before."""
    body = yaml.write({"layer": layer}).removeprefix("layer:").removeprefix("\n")
    if body in names:
        yield f"{indent}- *{names[body]}\n"
        return
    names[body] = named(layer, set(names.values()))
    yield f"{indent}- &{names[body]}\n"
    yield (
        textwrap.indent(textwrap.dedent(body), f"{indent}  ") if "\n" in body.strip() else f"{indent}  {body.strip()}\n"
    )


def named(layer: dict[str, Any], taken: set[str]) -> str:
    """What a layer is called: by its mixer, by its network too, or by a number."""
    mixer, ffn = (layer.get(part, {}).get("kind") for part in ("mixer", "ffn"))
    choices = [mixer or ffn or "nothing", "_".join(filter(None, (mixer, ffn)))]
    if mixer == "attention":
        choices = ["local" if layer["mixer"].get("window") else "attention", "global", *choices]
    numbered = (f"{choices[0]}{number}" for number in count(2))
    return next(choice for choice in chain(choices, numbered) if choice not in taken)


def rows() -> Iterator[list[str]]:
    """A line for each preset."""
    for name in sorted(PUBLISHED):
        found, spec = PUBLISHED[name], ft.load_spec(name)
        short, long = (costs(spec, length=length, dtype=torch.bfloat16)[0] for length in (4096, 131072))
        said = "exactly" if isinstance(found.parameters, int) else f"{found.parameters}"
        yield [f"`{name}`", found.title, f"{short.parameters:,}", said, *map(size, (short, long))]


def size(cost: Any) -> str:
    """Bytes of a cache."""
    return f"{cost.cache_bytes / 1e6:,.0f}"


def table() -> str:
    """The page's table of presets."""
    lines = [["preset", "model", "parameters", "published", "cache at 4K", "at 128K"]]
    lines += [["---", "---", "---:", "---:", "---:", "---:"], *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def configs() -> dict[str, dict[str, Any]]:
    """Every preset's config."""
    return {name: found.config for name, found in PUBLISHED.items()} | TINY


def main() -> None:
    """Write files and table."""
    for name, config in configs().items():
        (SPECS / f"{name}.yaml").write_text(text_of(name, config), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    made = f"{MARKS[0]}\n{table()}\n{MARKS[1]}"
    PAGE.write_text(re.sub(f"{MARKS[0]}.*?{MARKS[1]}", lambda _: made, page, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
