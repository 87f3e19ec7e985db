"""A checkpoint of real size, with weights that transformers has written: nothing is held more often than needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MAKE = """
import sys, torch, transformers
torch.manual_seed(0)
sizes = {"vocab_size": 32784, "hidden_size": 1024, "num_hidden_layers": 36, "intermediate_size": 2048}
heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 1e11}
mamba = {"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128}
model = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**sizes, **heads, **mamba)).eval()
tokens = torch.randint(0, 32784, (2, 33))
with torch.no_grad():
    logits = model(tokens, use_cache=False).logits
model.save_pretrained(sys.argv[1] + "/theirs", max_shard_size="1GB")
torch.save({"tokens": tokens, "logits": logits}, sys.argv[1] + "/logits.pt")
"""
"""The sizes of tiiuae/Falcon-H1-0.5B-Base."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_falcon_h1_of_half_a_billion(tmp_path):
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path)], check=True)
    script = Path(__file__).with_name("real_size.py")
    done = subprocess.run([sys.executable, script, tmp_path / "theirs"], check=True, stdout=subprocess.PIPE)
    report = json.loads(done.stdout)
    print(report)
    assert report["weights"] == 4 * 521_411_104
    assert report["error"] <= 2e-5
    assert report["generated"] == 16
    assert report["pruned"]
    for stage in ("import", "load", "run", "prune", "save", "export"):
        assert report[stage] < 2.5 * report["weights"], stage
