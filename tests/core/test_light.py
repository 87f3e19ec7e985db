"""What is not needed is not imported: seen in processes of their own, by what is in `sys.modules`."""

import json
import os
import subprocess
import sys
import textwrap

import fusiontree

SLOW = (
    *("torch.distributed.tensor", "torch.distributed.fsdp"),  # DTensor: a second, with sympy; for sharded weights
    *("torch._dynamo", "torch._inductor", "sympy"),  # the compiler: two seconds or more; for what is compiled
    *("torchtitan", "tensorboard"),  # for training
    *("transformers", "tokenizers", "datasets", "lm_eval", "pandas", "sklearn"),  # for public models and tasks
    "matplotlib",  # for figures
    *("typer", "rich"),  # for the command line
)
FAMILIES = "fusiontree.zoo.llama"  # a file that stands for the maps of all public families
VERBS = ("kinds", "validate", "schema", "doctor", "show", "train", "generate", "export", "import", "eval")
GROUPS = {"prune": ("plan", "diff", "apply", "verify", "simplify"), "bench": ("kernels",)}


def run(code: str, **environment: str) -> str:
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing() -> None:
    found = run("""
        import sys
        before = {name.split(".")[0] for name in sys.modules}
        import fusiontree
        after = {name.split(".")[0] for name in sys.modules}
        print(sorted(after - before - set(sys.stdlib_module_names)))
    """)
    assert found == "['fusiontree']\n"


def test_a_spec_is_read_a_model_built_and_run_without_what_is_slow() -> None:
    found = run(f"""
        import sys
        from fusiontree import ModelSpec, build, load_spec
        load_spec("v1")
        slow = {SLOW!r}
        print([name for name in (*slow, {FAMILIES!r}) if name in sys.modules])
        import torch
        edits = {{"width": 16, "layers.*.mixer.branches.mamba.state": 4}}
        model = build(load_spec("quickstart").replace(edits)).eval()
        with torch.no_grad(), model.drop(["layers.0.mixer.branches.mamba"]):
            model(torch.zeros(1, 3, dtype=torch.long))
        model.generate([[1, 2]], max_new_tokens=2)
        print([name for name in slow if name in sys.modules])
    """)
    assert found == "[]\n[]\n"


def test_help_version_and_completion_do_without_torch() -> None:
    lines = [["--help"], ["--version"], *([verb, "--help"] for verb in (*VERBS, *GROUPS))]
    lines += [[group, verb, "--help"] for group, verbs in GROUPS.items() for verb in verbs]
    found = run(f"""
        import contextlib, io, json, sys
        from fusiontree.cli import app, main
        said = {{}}
        for line in {lines!r}:
            sys.argv, out = ["fusiontree", *line], io.StringIO()
            with contextlib.redirect_stdout(out):
                try:
                    main()
                except SystemExit as ended:
                    assert not ended.code, (line, ended.code)
            said[" ".join(line)] = out.getvalue()
            heavy = [name for name in ("torch", "numpy") if name in sys.modules]
            assert not heavy, (line, heavy)
        commands = {{command.name or command.callback.__name__ for command in app.registered_commands}}
        groups = {{group.name for group in app.registered_groups}}
        print(json.dumps([said, sorted(commands | groups)]))
    """)
    said, verbs = json.loads(found)
    assert set(verbs) - {"evaluate", "import_"} <= {*VERBS, *GROUPS}, "a verb that this test does not know"
    assert said["--version"] == f"{fusiontree.__version__}\n"
    assert all("Usage" in text for line, text in said.items() if line != "--version")


def test_a_shell_completes_verbs_and_options_without_torch() -> None:
    code = """
        import atexit, sys
        atexit.register(lambda: print("torch" in sys.modules))
        sys.argv = ["fusiontree"]
        from fusiontree.cli import main
        main()
    """
    words = {"COMP_WORDS": "fusiontree sh", "COMP_CWORD": "1"}
    assert run(code, _FUSIONTREE_COMPLETE="complete_bash", **words).split() == ["show", "False"]
    options = {"COMP_WORDS": "fusiontree generate m x --max", "COMP_CWORD": "4"}
    assert run(code, _FUSIONTREE_COMPLETE="complete_bash", **options).split() == ["--max-new-tokens", "False"]
    assert "_fusiontree_completion" in run(code, _FUSIONTREE_COMPLETE="source_bash")


def test_names_are_found_whichever_way_they_are_asked_for() -> None:
    found = run("""
        import fusiontree
        assert set(fusiontree.__all__) <= set(dir(fusiontree))
        named = {}
        exec("from fusiontree import *", named)
        missing = [name for name in fusiontree.__all__ if getattr(fusiontree, name) is not named[name]]
        assert not missing, missing
        assert fusiontree.errors.SpecError and fusiontree.core.model.spec.ModelSpec is fusiontree.ModelSpec
        for wrong in ("nothing", "_nothing", "__wrapped__", "a.b", "errors.b"):
            assert not hasattr(fusiontree, wrong)
        from fusiontree import zoo
        assert {"llama", "fusiontree"} <= set(zoo.FAMILIES) and isinstance(zoo.family_of("llama"), zoo.llama.Llama)
        assert not hasattr(zoo, "nothing")
        print("found")
    """)
    assert found == "found\n"


def test_registries_hold_the_library_s_kinds_whatever_was_imported_before() -> None:
    """Whoever imports a module of the core alone finds every kind, and cannot take the name of one."""
    found = run("""
        import sys
        from typing import Literal
        from fusiontree.components import EncodingSpec, branches, encodings
        assert "fusiontree.branches" not in sys.modules and "fusiontree.encodings" not in sys.modules

        class Rope(EncodingSpec):
            kind: Literal["rope"] = "rope"

        try:
            encodings.register(Rope)
        except ValueError as error:
            print(error)
        from fusiontree.core.model.spec import ModelSpec
        layer = {"mixer": {"kind": "attention", "heads": 2, "kv_heads": 1, "head_dim": 8}}
        print(ModelSpec.parse({"vocab_size": 9, "width": 16, "layers": [layer]}).node("layers.0.mixer").kind)
        from fusiontree.zoo import family_of
        print(family_of("llama").name)
    """)
    both = "fusiontree.encodings.rope.Rope and __main__.Rope"
    assert found == f"two encoding kinds are called 'rope': {both}\nattention\nllama\n"
