"""Gate values of every layer, along a text and over the channels, and a figure of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.core.contracts.gate import Weights
from fusiontree.core.model.model import LanguageModel
from fusiontree.core.probes.gate_statistics import Real
from fusiontree.core.probes.probes import evaluating, gates, watch
from fusiontree.errors import FusionTreeError


@dataclass(frozen=True)
class GateMap:
    """Values of one gate along one text.

    Attributes:
        path: the path of the gate.
        values: by branch name, each [time, units] in [0, 1]; over the branches they sum to 1. Units are equal
            groups of channels, each with its own value: the whole width, the channels of a head, or one channel.
    """

    path: str
    values: Mapping[str, Float[Tensor, "time units"]]

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of the branches."""
        return tuple(self.values)


@torch.no_grad()
def gate_maps(model: LanguageModel, tokens: Int[Tensor, "time"]) -> list[GateMap]:
    """The values of every gate at every token of one text, in evaluation mode.

    >>> import torch
    >>> from fusiontree import build, load_spec
    >>> found = gate_maps(build(load_spec("quickstart")), torch.tensor([104, 105]))
    >>> found[0].path, found[0].branches, list(found[0].values["mamba"].shape)
    ('layers.0.mixer.gate', ('mamba', 'attention'), [2, 128])

    Raises:
        FusionTreeError: the model has no gate, or a gate that runs at several places.
    """
    seen: dict[str, Weights] = {}

    def keep(path: str, weights: Weights, real: Real | None) -> None:
        if path in seen:
            raise FusionTreeError(f"gate map: {path} is used more than once; a map shows one use")
        seen[path] = {n: v if v.ndim == 1 or real is None else v[:, real[0]] for n, v in weights.items()}

    with watch(gates(model), keep), evaluating(model):
        model(tokens[None])
    if not seen:
        raise FusionTreeError("gate map: the model has no gate")
    return [_map(path, weights, len(tokens)) for path, weights in seen.items()]


def _map(path: str, weights: Weights, time: int) -> GateMap:
    along = {name: value[0] if value.ndim == 3 else value.expand(time, -1) for name, value in weights.items()}
    return GateMap(path, {name: value.float().cpu() for name, value in along.items()})


def draw(
    maps: Sequence[GateMap], text: str | Sequence[str], file: Path | str, *, title: str = "Gates along a text"
) -> None:
    """Write a figure: above, each gate's mean over its units at every token; below, where there are gates of several
    units, each unit's mean over the text, sorted. Needs matplotlib (fusiontree[plot]).

    A gate of two branches has one row, with the share of its first branch. A gate of more branches has one row per
    branch. The middle colour is an equal share.

    Args:
        text: the labels of the tokens: a text with as many characters or bytes as there are tokens, or a list.
        title: the title of the figure.

    Raises:
        FusionTreeError: no maps, or labels for another number of tokens.
    """
    if not maps:
        raise FusionTreeError("gate map: expected at least one gate, found none")
    labels = _labels(text, len(next(iter(maps[0].values.values()))))
    try:
        import matplotlib as mpl
    except ImportError:
        raise FusionTreeError("gate map: matplotlib is not installed; pip install 'fusiontree[plot]'") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = _rows(maps)
    wide = [row for row in rows if row.values.shape[1] > 1]
    heights = [len(part) for part in (rows, wide) if part]
    width = min(max(9.0, 3 + 0.09 * len(labels)), 60)
    size = (width, 1.3 * len(heights) + 0.42 * sum(heights))
    with plt.rc_context({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            len(heights), 1, figsize=size, layout="constrained", height_ratios=heights, squeeze=False
        )
        image = _along(axes[0, 0], rows, labels, title)
        if wide:
            _across(axes[1, 0], wide)
        _scale(figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01, ticks=[0, 0.5, 1]), maps)
        figure.savefig(file, dpi=160)
        plt.close(figure)


def _labels(text: str | Sequence[str], time: int) -> list[str]:
    """One label per token. A character of several bytes labels its first byte; the others have no label."""
    if isinstance(text, str) and len(text) != time:
        text = [part for character in text for part in [character] + [""] * (len(character.encode()) - 1)]
    if len(text) != time:
        raise FusionTreeError(f"gate map: {time} tokens need as many labels, found {len(text)}")
    return list(text)


@dataclass(frozen=True)
class _Row:
    """The share of a branch in a gate [time, units], scaled so that an equal share is 1/2."""

    label: str
    values: Tensor


def _rows(maps: Sequence[GateMap]) -> list[_Row]:
    """The rows of the figure: one for a gate of two branches, else one a branch. Labels name the branches where gates
    differ."""
    alike = len({gate.branches for gate in maps}) == 1 and len(maps[0].branches) == 2
    rows = []
    for gate in maps:
        place = gate.path.removesuffix(".gate").removesuffix(".mixer")
        for name in gate.branches if len(gate.branches) != 2 else gate.branches[:1]:
            rows.append(_Row(place if alike else f"{place} {name}", _scaled(gate.values[name], len(gate.branches))))
    return rows


def _scaled(share: Tensor, branches: int) -> Tensor:
    """Scale shares piecewise linearly: 0 to 0, an equal share to 1/2, 1 to 1."""
    equal = 1 / max(branches, 2)
    return torch.where(share < equal, share / equal, 1 + (share - equal) / (1 - equal)) / 2


def _scale(bar: Any, maps: Sequence[GateMap]) -> None:
    """Label the colour bar, with branch names if all gates have the same two branches."""
    names = maps[0].branches if len({gate.branches for gate in maps}) == 1 else ()
    bar.ax.set_yticklabels([names[1], "both alike", names[0]] if len(names) == 2 else ["nothing", "equal share", "all"])
    bar.outline.set_visible(False)


def _image(axes: Any, values: Float[Tensor, "gates columns"]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("branches", ["#c2500b", "#eaa46a", "#f7f4ef", "#6fb0bd", "#0f5f74"])
    image = axes.imshow(values.numpy(), cmap=colors, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    for row in range(1, len(values)):
        axes.axhline(row - 0.5, color="white", linewidth=2.5)
    return image


def _along(axes: Any, rows: Sequence[_Row], labels: Sequence[str], title: str) -> Any:
    image = _image(axes, torch.stack([row.values.mean(1) for row in rows]))
    axes.set_title(f"{title}, mean over the units", loc="left", weight="bold")
    families, written = _written(labels)
    turned = 90 if max(map(len, written), default=0) > 1 else 0
    plain = [label.replace("$", r"\$") for label in written]  # matplotlib would read `$` as the start of a formula
    axes.set_xticks(range(len(labels)), plain, family=families, size=6.5, rotation=turned)
    axes.tick_params(axis="x", length=0, pad=2)
    _name(axes, [row.label for row in rows])
    return image


def _across(axes: Any, rows: Sequence[_Row]) -> None:
    """Draw the mean of each unit, sorted. Rows with fewer units are stretched to the widest row."""
    means = [row.values.mean(0).sort().values for row in rows]
    widest = max(map(len, means))
    _image(axes, torch.stack([mean[torch.arange(widest) * len(mean) // widest] for mean in means]))
    counts = sorted({len(mean) for mean in means})
    axes.set_title(
        "Each unit of a gate (a channel, or a head's channels), mean over the text", loc="left", weight="bold"
    )
    axes.set_xlabel(f"{' or '.join(map(str, counts))} units, sorted")
    axes.set_xticks([])
    _name(axes, [row.label for row in rows])


def _name(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


_SHOWN: Mapping[str, str] = {"\n": "\u21b5", "\t": "\u21e5", " ": "\u00b7"}


def _written(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Font families of this machine that have the characters of the labels, and the labels to draw. A character that no
    font has, or that is not printable, is written as its number."""
    shown = ["".join(_SHOWN.get(character, character) for character in label) for label in labels]
    needed = {character for label in shown for character in label if character.isprintable()}
    families, known = _fonts(needed)
    numbers = {c: f"{ord(c):04x}" for label in shown for c in label if c not in known}
    return families, ["".join(numbers.get(c, c) for c in label) for label in shown]


def _fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """Font families, matplotlib's own first, and the characters that they have."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    own = font_manager.findfont("DejaVu Sans Mono")
    families, known = ["DejaVu Sans Mono"], {c for c in characters if FT2Font(own).get_char_index(ord(c))}
    for entry in font_manager.fontManager.ttflist if known < characters else ():
        new = {c for c in characters - known if FT2Font(entry.fname).get_char_index(ord(c))}
        if new and "Last" not in entry.name:  # the font Last Resort draws a box for every character
            families.append(entry.name)
            known |= new
    return list(dict.fromkeys(families)), known
