"""Sequences as long as the library is for: what drifts, and what memory is taken."""

import subprocess
import sys
import textwrap

import pytest
import torch

import fusiontree as ft

STEPS = 10_000
MILLION = 2**20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_decode_steps_drift_less_than_rounding():
    """Windowed and global heads beside Mamba-2 in float32, against one forward pass over everything."""
    torch.manual_seed(0)
    attention = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "window": 64, "encodings": ["rope"]}
    attention |= {"global_heads": 2, "global_kv_heads": 1}
    mamba = {"kind": "mamba2", "heads": 4, "head_dim": 16, "state": 16, "encodings": ["rope"]}
    mixer = {"kind": "gated", "branches": {"mamba": mamba, "attention": attention}, "gate": {"kind": "sigmoid"}}
    layers = [{"repeat": 2, "layers": [{"mixer": mixer, "ffn": {"kind": "swiglu", "hidden": 64}}]}]
    spec = {"vocab_size": 61, "width": 32, "encodings": {"rope": {"kind": "rope"}}, "layers": layers}
    model = ft.build(ft.ModelSpec.model_validate(spec)).requires_grad_(False)
    tokens = torch.randint(0, 61, (1, STEPS))
    cache = model.new_cache(1, STEPS)
    found = torch.cat([model(token, cache=cache) for token in tokens.split(1, 1)], 1)
    assert (found - model(tokens)).abs().max() < 1e-4


def megabytes_beyond_inputs(code):
    """Peak memory of a process that has its inputs, beyond what it had then."""
    peak = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024"
    names = "from fusiontree.kernels.attention import attention\nfrom fusiontree.kernels.ssd import ssd\n"
    script = f"import resource, torch\n{names}{textwrap.dedent(code)}"
    script = script.replace("RUN", f"before = {peak}\n") + f"\nprint({peak} - before)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return float(done.stdout)


@pytest.mark.slow
def test_a_million_tokens_of_ssd_in_bounded_memory():
    """Values and gradients: what is kept is the outputs, the gradients and the states between chunks' steps."""
    taken = megabytes_beyond_inputs(
        f"""
        time, heads, width, state = {MILLION}, 2, 16, 16
        x, dt = torch.ones(1, time, heads, width, requires_grad=True), torch.full((1, time, heads), 0.1)
        A, B, C = -torch.ones(heads), *(torch.ones(1, time, 1, state, requires_grad=True) for _ in range(2))
        RUN
        y, end = ssd(x, dt, A, B, C)
        y.sum().backward()
        assert torch.isfinite(x.grad).all() and abs(float(y[0, -1, 0, 0]) - 1.6 / (1 - 2.718281828 ** -0.1)) < 1e-3
        """
    )
    outputs_and_gradients = 4 * MILLION * (2 * 2 * 16 + 2 * 16 + 2 * 16) / 2**20
    assert taken < 3 * outputs_and_gradients


@pytest.mark.slow
def test_a_million_tokens_of_windowed_attention_in_bounded_memory():
    taken = megabytes_beyond_inputs(
        f"""
        q, k, v = (torch.ones(1, {MILLION}, heads, 16, requires_grad=True) for heads in (2, 1, 1))
        RUN
        y = attention(q, k, v, window=128, scale=0.25)
        y.sum().backward()
        assert torch.equal(y, torch.ones_like(y)) or float((y - 1).abs().max()) < 1e-5
        assert abs(float(v.grad[0, 5000, 0, 0]) - 2) < 1e-3
        """
    )
    outputs_and_gradients = 4 * MILLION * 16 * (2 + 2 + 1 + 1) / 2**20
    assert taken < 3 * outputs_and_gradients
