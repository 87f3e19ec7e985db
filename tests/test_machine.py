"""What is asked of the machine, with what systems really answer: processors, containers, limits."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from fusiontree import machine
from fusiontree.errors import FusionTreeError
from fusiontree.recipes import launch

CPU = torch.device("cpu")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of a system, by path; there are no others."""
    found: dict[str, str] = {}
    monkeypatch.setattr(machine, "_lines", lambda path: found.get(path, "").splitlines())
    machine._cpuinfo.cache_clear()
    machine.multiplies.cache_clear()
    yield found
    machine._cpuinfo.cache_clear()
    machine.multiplies.cache_clear()


@pytest.mark.parametrize(
    ("flags", "torch_has", "ratio", "native"),
    [
        ("fpu avx2", True, 0.5, False),  # AMD EPYC 7003
        ("fpu avx2 avx512f", True, 1.1, False),  # oneDNN emulates bfloat16 there
        ("fpu avx2 avx512f avx512_bf16", True, 0.5, True),  # AMD EPYC 9004
        ("fpu avx2 avx512_bf16 amx_bf16", True, 0.1, True),  # Intel Xeon 4
        ("fpu avx2 avx512_bf16", False, 0.5, False),  # a torch without oneDNN
        ("fpu avx2 avx512_bf16", True, 8.0, False),  # a oneDNN that is kept from the units
    ],
)
def test_units_have_to_be_there_and_to_be_fast(files, monkeypatch, flags, torch_has, ratio, native):
    files["/proc/cpuinfo"] = f"processor\t: 0\nflags\t\t: {flags}\n"
    monkeypatch.setattr(machine, "_torch_has", lambda name: torch_has)
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype: ratio if dtype == torch.bfloat16 else 1.0)
    assert machine.multiplies(torch.bfloat16) == native
    assert machine.multiplies(torch.float32) and machine.multiplies(torch.float64)
    assert not machine.multiplies(torch.float16)


def test_a_processor_that_does_not_tell_is_measured(files, monkeypatch):
    monkeypatch.setattr(machine, "_torch_has", lambda name: True)
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype: 1.0)
    assert machine.multiplies(torch.bfloat16)
    assert machine.matrix_units() is None


def test_the_measured_product_is_one_on_any_device_and_in_any_context():
    with torch.device("meta"), torch.autocast("cpu"), torch.inference_mode():
        assert 0 < machine._product_seconds(torch.float32) < 60


@pytest.mark.parametrize(
    ("group", "files_of_groups", "quota"),
    [
        ("0::/", {"/sys/fs/cgroup/cpu.max": "max 100000"}, []),
        ("0::/job", {"/sys/fs/cgroup/job/cpu.max": "150000 100000"}, [1.5]),
        ("0::/a/b", {"/sys/fs/cgroup/a/cpu.max": "100000 100000"}, [1.0]),
        ("3:cpu,cpuacct:/x", {f"/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_{n}_us": v for n, v in (("quota", "-1"),)}, []),
        (
            "3:cpu:/x",
            {"/sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "200000", "/sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"},
            [2.0],
        ),
    ],
)
def test_a_quota_of_cores_is_obeyed(files, group, files_of_groups, quota):
    files |= {"/proc/self/cgroup": group} | files_of_groups
    assert list(machine._core_quotas()) == quota
    assert machine.cores() >= 1
    assert machine.cores() <= max(1, int(min([*quota, 10**6])))


@pytest.mark.parametrize(("processes", "threads"), [("1", 3), ("2", 2), ("9", 1)])
def test_processes_share_the_cores(monkeypatch, processes, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert machine.threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert machine.threads() == 3  # torch has read it already


@pytest.mark.parametrize(
    ("said", "counts"), [("7", True), ("4,2", True), ("", False), ("0", False), ("abc", False), ("-1", False)]
)
def test_threads_are_set_where_openmp_obeys(monkeypatch, said, counts):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert machine.threads_are_set() == counts
    assert machine.threads() == (3 if counts else 1)
    with launch._shared_cores(2):
        assert os.environ["OMP_NUM_THREADS"] == (said if counts else "2")
    assert os.environ["OMP_NUM_THREADS"] == said


@pytest.mark.parametrize("found", ["0", "x", "-1", "", "1.5"])
def test_a_number_of_torchrun_that_is_none_is_one_line(monkeypatch, found):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", found)
    with pytest.raises(
        FusionTreeError, match=f"^environment: LOCAL_WORLD_SIZE: expected a whole number from 1 on, found {found!r}$"
    ):
        machine.threads()


GIB = 2**30


@pytest.mark.parametrize(
    ("found", "free"),
    [
        ({}, 8 * GIB),
        ({"/sys/fs/cgroup/memory.max": "max", "/sys/fs/cgroup/memory.current": "7"}, 8 * GIB),
        ({"/sys/fs/cgroup/memory.max": f"{4 * GIB}", "/sys/fs/cgroup/memory.current": f"{GIB}"}, 3 * GIB),
        (
            {
                "/sys/fs/cgroup/memory.max": f"{4 * GIB}",
                "/sys/fs/cgroup/memory.current": f"{3 * GIB}",
                "/sys/fs/cgroup/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}",
            },
            3 * GIB,
        ),
        ({"/sys/fs/cgroup/memory.max": "100", "/sys/fs/cgroup/memory.current": "300"}, 0),
    ],
)
def test_free_memory_is_what_the_control_group_leaves(files, found, free):
    files |= {"/proc/meminfo": f"MemAvailable: {8 * GIB // 1024} kB", "/proc/self/cgroup": "0::/"} | found
    assert machine.free_bytes(CPU) == free


def test_free_memory_is_what_ulimit_leaves():
    job = """
        import resource, sys
        from pathlib import Path
        import fusiontree as ft
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (here + 800_000_000, resource.RLIM_INFINITY))
        spec = ft.ModelSpec.parse({"vocab_size": 200_000, "width": 2048, "layers": [{}]})
        try:
            ft.build(spec)
        except ft.errors.WeightsError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(job)], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("weights: 1638408192 bytes do not fit on cpu, "), done.stderr
    assert int(done.stdout.split(", ")[1].split()[0]) <= 800_000_000


def test_a_machine_that_tells_nothing_has_unknown_memory(files, monkeypatch):
    monkeypatch.setattr(machine.os, "sysconf_names", {})
    monkeypatch.setattr(machine, "_limit_bytes", lambda: [])
    assert machine.free_bytes(CPU) is None


def test_no_compiler_is_found_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine.compile_refusal.cache_clear()
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("tried"))
    assert machine.compile_refusal("cpu") == "there is no C++ compiler"
    machine.compile_refusal.cache_clear()


def test_preparing_obeys_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    machine.prepare()
    assert machine.os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    machine.prepare()
    assert machine.os.environ["GOMP_SPINCOUNT"] == machine.SPINS
    monkeypatch.undo()


def test_the_vector_library_is_resolved_before_threads_meet_in_it() -> None:
    """One process in about a thousand had float64 results that were off by 1e-9 (pytorch issue 188792)."""
    job = """
        import torch
        called, plain = set(), torch.exp
        torch.exp = lambda x: called.add((str(x.dtype), x.numel())) or plain(x)
        import fusiontree.branches
        print(sorted(called))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(job)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[('torch.float32', 1), ('torch.float64', 1)]", done.stderr
