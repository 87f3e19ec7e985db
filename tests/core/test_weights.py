"""Weights: how they start, and models on disk, read strictly and written all or nothing."""

import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from core_cases import MIXER, MLP, complaint, data, edited, model, spec, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fusiontree import ModelSpec, build, load, machine, save
from fusiontree.branches import Mlp
from fusiontree.core.model import weights
from fusiontree.core.model.initialise import generator, initialise

WEIGHT = "layers.0.mixer.branches.attention.q.weight"


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class TestInitial:
    def test_equal_specs_and_seeds_give_equal_weights(self) -> None:
        for name, tensor in build(spec(), seed=3).state_dict().items():
            assert torch.equal(tensor, build(spec(), seed=3).state_dict()[name])
        assert not torch.equal(build(spec(), seed=3).state_dict()[WEIGHT], build(spec(), seed=4).state_dict()[WEIGHT])

    def test_they_do_not_depend_on_other_components(self) -> None:
        whole = build(spec()).state_dict()
        swapped = {"attention": MIXER["branches"]["attention"], "mamba": MLP}
        other = edited("layers.0.mixer.branches", swapped) | {"vocab_size": 5}
        other["layers"] += [{"mixer": MIXER}]
        found = build(ModelSpec.parse(other)).state_dict()
        kept = [
            name for name in found if name.startswith(("layers.0.mixer.branches.attention.", "layers.1.", "encodings."))
        ]
        assert kept
        for name in kept:
            assert torch.equal(found[name], whole[name])
        assert not torch.equal(found[WEIGHT], found[WEIGHT.replace("layers.0", "layers.2")])

    def test_they_do_not_depend_on_the_order_of_drawing_nor_on_the_global_generator(self) -> None:
        whole, part = build(spec()), build(spec()).requires_grad_(False)
        for parameter in part.parameters():
            parameter.zero_()
        torch.manual_seed(99)
        torch.rand(7)
        for module in reversed(list(part.layers)):
            assert all(p.abs().sum() == 0 for p in module.parameters())
        initialise(part, 0)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_another_type_rounds_the_same_draws(self, dtype: torch.dtype) -> None:
        found, single = build(spec(), dtype=dtype).state_dict(), build(spec()).state_dict()
        assert all(torch.equal(found[name], single[name].to(dtype)) for name in single)

    def test_a_parameter_is_drawn_from_its_seed_and_path_alone(self) -> None:
        weight = build(spec(), seed=11).state_dict()[WEIGHT]
        rows, columns = weight.shape
        drawn = torch.empty(rows, columns).normal_(0.0, columns**-0.5, generator=generator(11, WEIGHT))
        assert torch.equal(weight, drawn)

    def test_branches_start_equal(self) -> None:
        built = build(spec())
        with built.observe() as seen:
            built(tokens(2, 5))
        statistics = seen["layers.0.mixer.gate"]
        assert [statistics[name].mean for name in ("mamba", "attention")] == [0.5, 0.5]


@pytest.mark.parametrize("activation", sorted(get_args(Mlp.model_fields["activation"].annotation)))
def test_a_model_with_any_activation_is_pickled(activation: str) -> None:
    written = io.BytesIO()
    built = build(ModelSpec.parse(data(layers=[{"ffn": {"kind": "mlp", "hidden": 8, "activation": activation}}])))
    torch.save(built, written)
    written.seek(0)
    assert torch.equal(torch.load(written, weights_only=False)(tokens(2, 5)), built(tokens(2, 5)))


class TestBeside:
    def test_files_are_copied_whether_named_by_text_or_path(self, tmp_path: Path) -> None:
        for name in ("a.json", "b.json"):
            (tmp_path / name).write_text(name)
        save(model(), tmp_path / "out", beside=[str(tmp_path / "a.json"), tmp_path / "b.json"])
        assert {"a.json", "b.json", "spec.yaml", "model.safetensors"} == {*files(tmp_path / "out")}

    @pytest.mark.parametrize(
        ("beside", "found"),
        [
            ("a.json", "expected a list of files, found 'a.json'"),
            (None, "expected a list of files, found None"),
            (["absent.json"], "expected the path of a file, found 'absent.json'"),
            ([3], "expected the path of a file, found 3"),
            (["."], "expected the path of a file, found '.'"),
            (["below/spec.yaml"], "below/spec.yaml: a file called spec.yaml is written already"),
            (["a.json", "below/a.json"], "below/a.json: a file called a.json is written already"),
        ],
    )
    def test_all_else_is_refused_before_anything_is_written(
        self, beside: Any, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "below").mkdir()
        for name in ("a.json", "below/a.json", "below/spec.yaml"):
            (tmp_path / name).write_text(name)
        complaint(lambda: save(model(), tmp_path / "out", beside=beside), f"beside: {found}")
        assert not (tmp_path / "out").exists()


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_a_model_comes_back_bit_by_bit(self, tmp_path: Path, dtype: torch.dtype) -> None:
        written = model().to(dtype)
        save(written, tmp_path / "m")
        again = load(tmp_path / "m")
        assert again.spec.data() == written.spec.data()
        assert list(again.state_dict()) == list(written.state_dict())
        for name, tensor in written.state_dict().items():
            assert again.state_dict()[name].dtype == dtype
            assert torch.equal(again.state_dict()[name], tensor)
        assert all(parameter.requires_grad for parameter in again.parameters())

    def test_it_may_be_read_in_another_type(self, tmp_path: Path) -> None:
        save(build(spec()), tmp_path / "m")
        assert {p.dtype for p in load(tmp_path / "m", dtype=torch.float64).parameters()} == {torch.float64}

    def test_there_is_a_spec_and_weights_and_nothing_else(self, tmp_path: Path) -> None:
        save(model(), tmp_path / "deep" / "m")
        assert sorted(files(tmp_path)) == ["deep/m/model.safetensors", "deep/m/spec.yaml"]

    def test_a_model_is_replaced_and_other_files_stay(self, tmp_path: Path) -> None:
        save(model(), tmp_path / "m")
        (tmp_path / "m" / "notes.txt").write_text("mine")
        save(model(width=32), tmp_path / "m")
        assert load(tmp_path / "m").spec.width == 32
        assert sorted(files(tmp_path / "m")) == ["model.safetensors", "notes.txt", "spec.yaml"]

    def test_an_empty_directory_will_do(self, tmp_path: Path) -> None:
        save(model(), tmp_path)
        assert load(tmp_path).spec == spec()
        assert [p.name for p in tmp_path.parent.iterdir() if p.name.startswith(f".{tmp_path.name}")] == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(model(), tmp_path / "m")
    return tmp_path / "m"


def change(saved: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(saved / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, saved / "model.safetensors")


def poison(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[WEIGHT][3, 2].fill_(value)


class TestBadCheckpoints:
    @pytest.mark.parametrize(
        ("edit", "parts"),
        [
            (lambda tensors: tensors.pop(WEIGHT), [WEIGHT, "missing"]),
            (lambda tensors: tensors.update({f"{WEIGHT}s": tensors[WEIGHT].clone()}), [f"{WEIGHT}s", f"'{WEIGHT}'"]),
            (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:3].clone()}), [WEIGHT, "(3, 16)", "(16, 16)"]),
            (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].flatten()}), [WEIGHT, "(256,)", "(16, 16)"]),
            (poison(float("nan")), [WEIGHT, "not finite"]),
            (poison(float("inf")), [WEIGHT, "not finite"]),
            (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].int()}), [WEIGHT, "int32", "F32"]),
            (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.complex64)}), [WEIGHT, "complex64"]),
            (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.float8_e4m3fn)}), [WEIGHT, "float8"]),
        ],
        ids=["missing", "extra", "rows", "dimensions", "nan", "inf", "integers", "complex", "float8"],
    )
    def test_tensors_that_are_not_the_spec_s(self, saved: Path, edit: Any, parts: list[str]) -> None:
        change(saved, edit)
        complaint(lambda: load(saved), str(saved), *parts)

    @pytest.mark.parametrize("length", [0, 4, 100, -1])
    def test_a_truncated_file(self, saved: Path, length: int) -> None:
        whole = (saved / "model.safetensors").read_bytes()
        (saved / "model.safetensors").write_bytes(whole[:length])
        complaint(lambda: load(saved), str(saved / "model.safetensors"), "truncated")

    def test_another_spec(self, saved: Path) -> None:
        (saved / "spec.yaml").write_text(spec(width=32).to_yaml())
        complaint(lambda: load(saved), str(saved), "shape", "32")

    def test_a_bad_spec(self, saved: Path) -> None:
        (saved / "spec.yaml").write_text("widht: 3\n")
        complaint(lambda: load(saved), str(saved / "spec.yaml"), "widht")

    @pytest.mark.parametrize("name", ["spec.yaml", "model.safetensors"])
    def test_a_directory_that_is_not_ours(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        complaint(lambda: load(saved), str(saved), name)

    def test_no_directory(self, tmp_path: Path) -> None:
        complaint(lambda: load(tmp_path / "none"), "none", "spec.yaml")


@pytest.mark.parametrize("device", ["cdua", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(saved: Path, device: str) -> None:
    complaint(lambda: build(spec(), device=device), "device: ", repr(device), "cannot be used here")
    complaint(lambda: load(saved, device=device), "device: ", repr(device), "cannot be used here")


class TestRoom:
    def test_building_is_refused_before_anything_is_allocated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = 4 * sum(p.numel() for p in build(spec(), device="meta").parameters())
        monkeypatch.setattr(machine, "free_bytes", lambda device: needed - 1)
        monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("allocated"))
        complaint(lambda: build(spec()), "weights: ", f"{needed} bytes", "cpu", f"{needed - 1} ")

    def test_just_enough_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = 2 * sum(p.numel() for p in build(spec(), device="meta").parameters())
        monkeypatch.setattr(machine, "free_bytes", lambda device: needed)
        assert build(spec(), dtype=torch.bfloat16)
        complaint(lambda: build(spec()), "weights: ", f"{2 * needed} bytes")

    @pytest.mark.parametrize(("dtype", "times"), [(None, 8), (torch.float32, 4), (torch.float64, 8)])
    def test_loading_is_refused_before_anything_is_read(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, times: int
    ) -> None:
        needed = times * sum(p.numel() for p in model().parameters())
        monkeypatch.setattr(machine, "free_bytes", lambda device: needed - 1)
        monkeypatch.setattr(weights, "_checked", lambda *_: pytest.fail("read"))
        complaint(lambda: load(saved, dtype=dtype), "weights: ", f"{needed} bytes", f"{needed - 1} ")

    def test_a_machine_that_does_not_tell_is_trusted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "free_bytes", lambda device: None)
        assert build(spec())

    def test_this_machine_has_some(self) -> None:
        free = machine.free_bytes(torch.device("cpu"))
        assert free is None or free > 2**20

    def test_a_terabyte_of_weights_is_refused_here(self) -> None:
        huge = ModelSpec.parse(data(width=2**20, encodings={}, layers=[{"ffn": MLP | {"hidden": 2**20}}]))
        complaint(lambda: build(huge), "weights: ", "bytes do not fit on")


class TestSaving:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("layers.0.mixer.gate.logit.bias", "layers.1.mixer.gate.logit.bias"),
            ("layers.0.mixer.gate.logit.weight", "layers.1.mixer.gate.logit.weight"),
            ("embedding.weight", "head.weight"),
        ],
    )
    def test_parameters_tied_by_hand_are_named(self, tmp_path: Path, one: str, other: str) -> None:
        net = model(layers=[{"mixer": MIXER}, {"mixer": MIXER}], head={"tied": False})
        module, _, name = other.rpartition(".")
        setattr(net.get_submodule(module), name, net.get_parameter(one))
        net(tokens(1, 3))
        complaint(lambda: save(net, tmp_path / "new"), repr(one), repr(other), "share memory", "a shared node")
        assert not list(tmp_path.iterdir())

    def test_parts_of_one_tensor_share_nothing(self, tmp_path: Path) -> None:
        net = build(spec())
        whole = {name: torch.stack([t, t], -1)[..., 0] for name, t in net.state_dict().items()}
        weights.save_weights(net.spec, whole, tmp_path / "new")
        assert torch.equal(load(tmp_path / "new").embedding.weight, net.embedding.weight)

    @pytest.mark.parametrize("content", [["a.txt"], ["spec.yaml"], ["model.safetensors", "config.json"]])
    def test_a_foreign_directory_is_refused_and_kept(self, tmp_path: Path, content: list[str]) -> None:
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        for name in content:
            (foreign / name).write_text("mine")
        before = files(tmp_path)
        complaint(lambda: save(model(), foreign), str(foreign), "not a model of ours")
        assert files(tmp_path) == before
        assert os.listdir(tmp_path) == ["foreign"]

    @pytest.mark.parametrize("below", ["", "m"])
    def test_a_file_is_refused_and_kept(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("mine")
        complaint(lambda: save(model(), tmp_path / "file" / below), str(tmp_path / "file"))
        assert files(tmp_path) == {"file": b"mine"}

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        complaint(lambda: save(model(), tmp_path / ("x" * 300)), "cannot be written")

    @pytest.mark.parametrize("broken", ["save_file", "write_text", "move 0"])
    def test_a_full_disk_leaves_nothing_new(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
        with monkeypatch.context() as patch:
            break_writing(patch, broken)
            complaint(lambda: save(model(), tmp_path / "m"), str(tmp_path / "m"), "No space left")
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("broken", ["save_file", "write_text", "move 0", "move 1", "move 2", "move 3"])
    def test_a_full_disk_leaves_the_old_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
    ) -> None:
        save(model(), tmp_path / "m")
        before = files(tmp_path)
        with monkeypatch.context() as patch:
            break_writing(patch, broken)
            complaint(lambda: save(model(width=32), tmp_path / "m"), str(tmp_path / "m"), "No space left")
        assert files(tmp_path) == before
        assert os.listdir(tmp_path) == ["m"], "nothing is left behind"
        assert load(tmp_path / "m").spec.width == 16

    def test_a_real_full_disk(self, tmp_path: Path) -> None:
        save(model(), tmp_path / "m")
        before = files(tmp_path)
        job = f"""
            import resource, signal
            from fusiontree import build, load_spec, save
            from fusiontree.errors import WeightsError
            model = build(load_spec("quickstart").replace({{"width": 64}}))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                save(model, {str(tmp_path / "m")!r})
            except WeightsError as error:
                print(error)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(job)], capture_output=True, text=True, check=True)
        assert "cannot be written" in done.stdout
        assert len(done.stdout.splitlines()) == 1
        assert files(tmp_path) == before


def tied_by_hand() -> nn.Module:
    found = build(spec(layers=[{"ffn": MLP}] * 2))
    found.layers[1].ffn.up.weight = found.layers[0].ffn.up.weight
    return found


def poisoned() -> nn.Module:
    found = model()
    torch.nn.init.constant_(found.norm.weight, float("nan"))
    return found


def parametrised() -> nn.Module:
    found = model()
    nn.utils.parametrizations.weight_norm(found.layers[0].mixer.branches["attention"].q)
    return found


def sharded() -> nn.Module:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return fully_shard(model(), mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner


class TestWhatIsSavedCanBeRead:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda inner: torch.compile(inner, backend="eager"),
            nn.DataParallel,
            torch.optim.swa_utils.AveragedModel,
            lambda inner: nn.DataParallel(torch.compile(inner, backend="eager")),
        ],
        ids=["compiled", "parallel", "averaged", "both"],
    )
    def test_the_model_inside_a_wrapper_is_saved(self, saved: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
        inner = build(spec(), seed=7)
        save(wrap(inner), saved)
        assert all(torch.equal(t, inner.state_dict()[name]) for name, t in load(saved).state_dict().items())

    @pytest.mark.parametrize(
        ("make", "parts"),
        [
            (lambda: nn.Linear(2, 2), ["expected a LanguageModel, found Linear"]),
            (lambda: Holder(model()), ["expected a LanguageModel, found Holder; save its `model`"]),
            (lambda: build(spec(), device="meta"), ["'embedding.weight' has no values here"]),
            (poisoned, ["'norm.weight' holds a value that is not finite; it was not saved"]),
            (parametrised, [f"'{WEIGHT}' is missing; it was not saved"]),
            (tied_by_hand, ["'layers.0.ffn.up.weight' and 'layers.1.ffn.up.weight' share memory"]),
            (sharded, ["'embedding.weight' is spread over processes"]),
        ],
        ids=["another module", "around one", "meta", "nan", "parametrised", "tied", "sharded"],
    )
    def test_what_could_not_be_loaded_does_not_replace_a_model(
        self, saved: Path, make: Callable[[], nn.Module], parts: list[str]
    ) -> None:
        before = files(saved.parent)
        complaint(lambda: save(make(), saved), *parts)
        assert files(saved.parent) == before

    def test_parameters_that_are_parts_of_one_piece_of_memory(self, tmp_path: Path) -> None:
        written = model()
        flat = torch.nn.utils.parameters_to_vector(written.parameters()).detach()
        torch.nn.utils.vector_to_parameters(flat, written.parameters())
        save(written, tmp_path / "m")
        assert all(torch.equal(t, written.state_dict()[name]) for name, t in load(tmp_path / "m").state_dict().items())


def break_writing(patch: pytest.MonkeyPatch, broken: str) -> None:
    """Let one kind of write, or the n-th move of a file, find the disk full."""
    full = OSError(28, "No space left on device")
    if broken == "save_file":

        def half(tensors: Any, path: Path, metadata: Any) -> None:
            path.write_bytes(b"half")
            raise full

        patch.setattr(weights, "save_file", half)
    elif broken == "write_text":

        def nothing(path: Path, *_: Any, **__: Any) -> None:
            raise full

        patch.setattr(Path, "write_text", nothing)
    else:
        left, real = [int(broken.split()[1])], os.replace

        def move(source: Any, target: Any) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise full
            real(source, target)

        patch.setattr(weights.os, "replace", move)


def test_a_loaded_model_is_in_evaluation_mode(tmp_path: Path) -> None:
    built = build(spec())
    assert built.training
    save(built, tmp_path / "m")
    assert not load(tmp_path / "m").training


def test_a_directory_with_a_model_inside_names_it(tmp_path: Path) -> None:
    save(build(spec()), tmp_path / "run" / "model")
    complaint(lambda: load(tmp_path / "run"), "not a model of ours", f"did you mean {tmp_path / 'run' / 'model'}?")


def test_a_cache_that_cannot_fit_is_refused_before_it_is_allocated() -> None:
    everywhere = {"kind": "attention", "heads": 2, "kv_heads": 1, "head_dim": 4}
    built = build(spec().replace({"layers.1.ffn": everywhere}))
    complaint(lambda: built.new_cache(1, max_length=10**30), "a cache of 1 x 1000", "bytes do not fit on", "free")
