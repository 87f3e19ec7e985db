"""The commands `import` and `export`, which convert models from and to other formats."""

from pathlib import Path
from typing import Annotated

import typer

from fusiontree.cli.console import Out, Saved, console


def import_(
    source: Annotated[
        Path, typer.Argument(help="A directory with config.json and safetensors, as transformers writes.")
    ],
    out: Out,
    ignore: Annotated[
        list[str] | None, typer.Option(help="An unknown key of the config to pass over; may be given again.")
    ] = None,
) -> None:
    """Convert a public model to a FusionTree model."""
    from fusiontree.zoo.directory import import_model, left_behind, read_config

    spec = import_model(source, out, ignore=ignore or ())
    if "auto_map" in read_config(source):
        console.print("auto_map: names code beside the weights, which is not run")
    if left_behind(source):
        console.print(f"not read and not carried along: {', '.join(left_behind(source))}")
    console.print(f"{spec.lineage[-1].edit}, digest {spec.digest()}, written to {out}")


def export(
    model: Saved,
    out: Out,
    to: Annotated[str, typer.Option(help="A family, by the model_type that transformers gives it; hf: our own class.")],
) -> None:
    """Write a saved model for transformers: as a model of a public family that can express it, or as FusionTree's own
    class (`import fusiontree.zoo.hf` there)."""
    from fusiontree.zoo import family_of
    from fusiontree.zoo.directory import export_model

    export_model(model, out, family_of("fusiontree" if to == "hf" else to))
    console.print(f"written to {out}")
