"""What a person does with a public checkpoint, in one process: prints what matched and the memory that it took.

python tests/zoo/real_size.py DIRECTORY   # of theirs, with logits.pt (tokens and logits) beside it
"""

import gc
import json
import resource
import sys
from pathlib import Path

import torch

import fusiontree as ft
import fusiontree.zoo.hf
from fusiontree.pruning import apply, plan_by_hand, verify
from fusiontree.zoo import family_of
from fusiontree.zoo.directory import export_model, import_model

BRANCH = "layers.20.mixer.branches.attention"


def peak() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(theirs: Path) -> None:
    """Import, match, generate, prune, save, load, export."""
    before, out = peak(), theirs.parent
    expected = torch.load(theirs.parent / "logits.pt", weights_only=True)
    report: dict[str, object] = {}

    def note(stage: str) -> None:
        gc.collect()
        report[stage] = peak() - before

    import_model(theirs, out / "ours")
    note("import")
    model = ft.load(out / "ours")
    report["weights"] = sum(p.nbytes for p in model.parameters())
    note("load")
    with torch.no_grad():
        logits = model(expected["tokens"])
    report["error"] = float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max())
    report["generated"] = model.generate(expected["tokens"][:, :8], max_new_tokens=8).shape[1]
    note("run")
    plan = plan_by_hand(model.spec, [BRANCH])
    pruned = apply(model, plan)
    verify(model, pruned, plan, length=16)
    del model
    note("prune")
    ft.save(pruned, out / "pruned")
    note("save")
    del pruned
    again = ft.load(out / "pruned")
    report["pruned"] = BRANCH not in dict(again.spec.nodes())
    del again
    export_model(out / "pruned", out / "exported", family_of("fusiontree"))
    note("export")
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(Path(sys.argv[1]))
