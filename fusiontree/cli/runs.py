"""Commands that run a model: train, generate."""

import os
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from fusiontree.cli.console import Saved
from fusiontree.errors import FusionTreeError


def train(
    run: Annotated[Path, typer.Argument(help="A run file, or a recipe's name: quickstart, v1, v2, v3.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="path=value, any number.")] = None,
    processes: Annotated[int, typer.Option(help="That train together on this machine.", min=1)] = 1,
) -> None:
    """Train the model of a run file. The same command again resumes. Over several machines use torchrun."""
    from fusiontree.recipes.launch import launch
    from fusiontree.recipes.train import check
    from fusiontree.recipes.train import main as train_main

    arguments = [str(run), *(overrides or [])]
    if processes == 1:
        raise typer.Exit(train_main(arguments))
    check(arguments)
    raise typer.Exit(launch(arguments, processes))


def generate(
    model: Saved,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely tokens with this mass.")] = None,
    seed: int = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End behind this text; may be given again.")] = None,
) -> None:
    """Continue a text and print it as it is drawn. Tokens are bytes, or those of the model's tokenizer.json."""
    from fusiontree.core.model.generation import Sampling, stream
    from fusiontree.core.model.weights import load
    from fusiontree.data.file_tokenizer import tokenizer_in
    from fusiontree.zoo.carried import end_tokens

    loaded = load(model)
    tokenizer = tokenizer_in(model, loaded.spec.vocab_size)
    ends = tuple(dict.fromkeys([*end_tokens(model, loaded.spec), *tokenizer.ends]))
    given = sys.stdin.buffer.read() if prompt == "-" else prompt.encode(errors="surrogateescape")
    tokens = tokenizer.encode(given).tolist() or list(ends[:1])
    longest, endings = loaded.spec.longest, [os.fsencode(ending) for ending in stop or []]
    if longest is not None and len(tokens) + max_new_tokens > longest:
        found = f"{len(tokens)} of the prompt and {max_new_tokens} new ones"
        raise FusionTreeError(f"--max-new-tokens: the encodings have {longest} positions, found {found}")
    if b"" in endings:
        raise FusionTreeError("--stop: expected a text, found ''")
    sampling = Sampling(temperature, top_k, top_p, seed)
    steps = stream(loaded, [tokens], max_new_tokens=max_new_tokens, sampling=sampling, stop=ends)
    drawn = chain([next(steps)], steps)  # errors are raised before anything is written
    new = (token for (token,) in drawn if token is not None)
    out = sys.stdout.buffer
    for piece in chain([given], _until(tokenizer.pieces(tokens, new), endings), [b"\n"]):
        out.write(piece)
        out.flush()


def _until(pieces: Iterable[bytes], endings: list[bytes]) -> Iterator[bytes]:
    """The pieces of a text up to and including the first ending in it."""
    kept, behind = max(map(len, endings), default=1) - 1, b""
    for piece in pieces:
        text = behind + piece
        ended = [text.index(ending) + len(ending) for ending in endings if ending in text]
        if ended:
            yield text[len(behind) : min(ended)]
            return
        yield piece
        behind = text[-kept:] if kept else b""
