"""How far families are from transformers' full forward pass, ours and transformers' own caches and padding.

    python tests/zoo/differences.py

rewrites the table of `docs/zoo.md`. Tiny random models in float32; figures are the largest difference of logits over
max(1, the largest logit).
"""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from public import CONFIGS, VOCABULARY, Pair, pair
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
TIME, PADS = 37, 9
CUTS = {"decode": [20, *[1] * 17], "chunks": [20, 17]}
KEEPS_ITS_CACHE = ("recurrent_gemma",)
"""Families whose results have no cache: it has to be made before."""
SAME = 1e-4
"""What rounding alone can do to a tiny model in float32."""


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


def padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows behind padding, and where there is none."""
    pads = torch.zeros(len(tokens), PADS, dtype=torch.long)
    return torch.cat([pads, tokens], 1), torch.cat([pads, torch.ones_like(tokens)], 1)


def ours(both: Pair, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Our ways to the logits."""
    model, (rows, real) = both.ours, padded(tokens)

    def cut(sizes: list[int]) -> Tensor:
        cache = model.new_cache(len(tokens), TIME)
        return torch.cat([model(part, cache=cache) for part in tokens.split(sizes, 1)], 1)

    return {
        "full": lambda: model(tokens),
        **{name: lambda sizes=sizes: cut(sizes) for name, sizes in CUTS.items()},
        "left padding": lambda: model(rows, documents=real - 1)[:, PADS:],
    }


def theirs(both: Pair, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Theirs, told every position."""
    model, (rows, real) = both.theirs, padded(tokens)
    takes = inspect.signature(model.forward).parameters
    memory = "cache_params" if "cache_params" in takes else "past_key_values"

    def call(part: Tensor, positions: Tensor, **options: Any) -> Any:
        where = {"position_ids": positions} if "position_ids" in takes else {}
        return model(part, **where, **options)

    def cut(sizes: list[int]) -> Tensor:
        places, parts = torch.arange(TIME).expand_as(tokens), []
        cache = transformers.DynamicCache(config=model.config) if model.config.model_type in KEEPS_ITS_CACHE else None
        for part, at in zip(tokens.split(sizes, 1), places.split(sizes, 1), strict=True):
            found = call(part, at, **{memory: cache}, use_cache=True)
            cache = found.get(memory, cache)
            parts.append(found.logits)
        return torch.cat(parts, 1)

    positions = (real.cumsum(1) - 1).clamp(min=0)
    return {
        **{name: lambda sizes=sizes: cut(sizes) for name, sizes in CUTS.items()},
        "left padding": lambda: call(rows, positions, attention_mask=real, use_cache=False).logits[:, PADS:],
    }


@torch.no_grad()
def measured(name: str) -> tuple[Pair, dict[str, float], dict[str, str]]:
    """A pair, and how far each way of either side is from transformers' full forward pass."""
    both = pair(name)
    tokens = torch.randint(0, VOCABULARY, (2, TIME), generator=torch.Generator().manual_seed(1))
    wanted = both.theirs(tokens, use_cache=False).logits
    here = {way: off(run(), wanted) for way, run in ours(both, tokens).items()}
    return both, here, {way: judged(run, wanted) for way, run in theirs(both, tokens).items()}


def judged(run: Callable[[], Tensor], wanted: Tensor) -> str:
    """How far transformers is off, in words; nothing where it is not."""
    try:
        found = off(run(), wanted)
    except Exception as error:  # whatever stops it there is what the table is about
        return f"raises {type(error).__name__}"
    return f"{found:.1g}" if found > SAME else ""


def kinds(both: Pair) -> str:
    """What the spec is made of."""
    return ", ".join(dict.fromkeys(f"`{node.kind}`" for _, node in both.ours.spec.nodes()))  # pyright: ignore


def rows() -> Iterator[list[str]]:
    """A line for each configuration."""
    for name in CONFIGS:
        both, here, there = measured(name)
        wrong = "; ".join(f"{way} {found}" for way, found in there.items() if found)
        yield [name, kinds(both), f"{here.pop('full'):.0e}", f"{max(here.values()):.0e}", wrong]


def main() -> None:
    """Measure and write."""
    head = ["configuration", "made of", "full forward", "cut or padded", "transformers itself is off by"]
    lines = [head, ["---", "---", "---:", "---:", "---"], *rows()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    marks = "<!-- table -->", "<!-- end of table -->"
    about = f"float32, torch {torch.__version__}, transformers {transformers.__version__}"
    made = f"{marks[0]}\n{about}\n\n{table}\n{marks[1]}"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: made, page, flags=re.DOTALL), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
