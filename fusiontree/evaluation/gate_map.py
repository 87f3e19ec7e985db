"""Where a model looks: gate values layer by layer, along a text and over the channels, and a figure of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.core.contracts import Weights
from fusiontree.core.model import LanguageModel
from fusiontree.core.observation import Real
from fusiontree.core.probes import evaluating, gates, watch
from fusiontree.errors import FusionTreeError


@dataclass(frozen=True)
class GateMap:
    """Values of one gate along one text.

    Attributes:
        path: of the gate.
        branches: their names; the values are the first one's.
        values: [time, units], in [0, 1].
    """

    path: str
    branches: tuple[str, ...]
    values: Float[Tensor, "time units"]


@torch.no_grad()
def gate_maps(model: LanguageModel, tokens: Int[Tensor, "time"]) -> list[GateMap]:
    """The first branch's gate values of every gate, along a text.

    Raises:
        FusionTreeError: the model has no gate.
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
    value = next(iter(weights.values()))
    along = value[0] if value.ndim == 3 else value.expand(time, -1)
    return GateMap(path, tuple(weights), along.float().cpu())


def draw(maps: Sequence[GateMap], text: str, file: Path) -> None:
    """Write a figure: above, each gate's mean over the channels along a text; below, its mean over the text for
    each channel, sorted. Needs matplotlib (fusiontree[plot])."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    along = torch.stack([gate.values.mean(1) for gate in maps])
    across = [gate.values.mean(0).sort().values for gate in maps]
    height = 0.42 * len(maps)
    with plt.rc_context({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 1, figsize=(12, 2.6 + 2 * height), layout="constrained", height_ratios=[1, 1.1])
        image = _along(axes[0], along, text, maps)
        _across(axes[1], across, maps)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01, ticks=[0, 0.5, 1])
        others = " + ".join(maps[0].branches[1:])
        bar.ax.set_yticklabels([others, "both alike", maps[0].branches[0]])
        bar.outline.set_visible(False)
        figure.savefig(file, dpi=160)
        plt.close(figure)


def _image(axes: Any, values: Float[Tensor, "gates columns"]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("branches", ["#c2500b", "#eaa46a", "#f7f4ef", "#6fb0bd", "#0f5f74"])
    image = axes.imshow(values.numpy(), cmap=colors, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    for row in range(1, len(values)):
        axes.axhline(row - 0.5, color="white", linewidth=2.5)
    return image


def _along(axes: Any, values: Float[Tensor, "gates time"], text: str, maps: Sequence[GateMap]) -> Any:
    image = _image(axes, values)
    axes.set_title("Gate along a held-out text, mean over the channels", loc="left", weight="bold")
    axes.set_xticks(range(len(text)), [_glyph(character) for character in text], family="monospace", size=6.5)
    axes.tick_params(axis="x", length=0, pad=2)
    _rows(axes, maps)
    return image


def _across(axes: Any, values: Sequence[Tensor], maps: Sequence[GateMap]) -> None:
    widest = max(len(value) for value in values)
    rows = [value.repeat_interleave(widest // len(value)) for value in values]
    padded = torch.stack([torch.nn.functional.pad(row, (0, widest - len(row)), value=torch.nan) for row in rows])
    _image(axes, padded)
    axes.set_title("Gate of each channel, mean over the text, sorted", loc="left", weight="bold")
    axes.set_xlabel("channels")
    _rows(axes, maps)


def _rows(axes: Any, maps: Sequence[GateMap]) -> None:
    axes.set_yticks(range(len(maps)), [gate.path.removesuffix(".mixer.gate") for gate in maps])
    axes.tick_params(axis="y", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _glyph(character: str) -> str:
    """What stands under a column: control characters get a visible sign."""
    shown: Mapping[str, str] = {"\n": "\u21b5", "\t": "\u21e5", " ": "\u00b7"}
    return shown.get(character, character if character.isprintable() else "?")
