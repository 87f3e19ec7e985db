"""Commands that run a model: train, generate."""

import sys
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from fusiontree.cli.console import Saved
from fusiontree.errors import FusionTreeError


def train(
    run: Annotated[Path, typer.Argument(help="A run file, or a recipe's name: quickstart, v1, v2, v3.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="path=value, any number.")] = None,
) -> None:
    """Train what a run file describes; the same command again resumes. For several processes use torchrun."""
    from fusiontree.recipes.train import main as train_main

    raise typer.Exit(train_main([str(run), *(overrides or [])]))


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
    """Continue a text, byte by byte, as it is drawn."""
    from fusiontree.core.generation import Sampling, stream
    from fusiontree.core.weights import load
    from fusiontree.data import ByteTokenizer
    from fusiontree.zoo.carried import end_tokens

    tokenizer, loaded = ByteTokenizer(), load(model)
    if loaded.spec.vocab_size != tokenizer.vocab_size:
        found = f"{model}: its vocabulary has {loaded.spec.vocab_size} tokens"
        raise FusionTreeError(f"{found}; only byte vocabularies ({tokenizer.vocab_size}) can be read as text")
    text = tokenizer.encode(sys.stdin.buffer.read() if prompt == "-" else prompt)
    ends = [tokenizer.end, *end_tokens(model, loaded.spec)]
    endings = [*((end,) for end in ends), *(tokenizer.encode(ending).tolist() for ending in stop or [])]
    tokens, sampling = [text.tolist() or [tokenizer.end]], Sampling(temperature, top_k, top_p, seed)
    longest = loaded.spec.longest
    if longest is not None and len(tokens[0]) + max_new_tokens > longest:
        found = f"{len(tokens[0])} of the prompt and {max_new_tokens} new ones"
        raise FusionTreeError(f"--max-new-tokens: the encodings have {longest} positions, found {found}")
    steps = stream(loaded, tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop=endings)
    first = next(steps)  # what cannot be done is said before anything is written
    out = sys.stdout.buffer
    out.write(tokenizer.decode_bytes(text))
    for (token,) in chain([first], steps):
        if token is not None and token != tokenizer.end:
            out.write(bytes([token]))
        out.flush()
    out.write(b"\n")
