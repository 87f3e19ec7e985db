"""Hymba (arXiv 2411.13676) once more, as its authors lay it out: one map in for both branches, meta tokens in front of
the sequence, a mask over all of it. No caches, no packing. The state-space half is Jamba's in transformers, rotations
are those of its Llama."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

WIDTH, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM, STATE, RANK, META, WINDOW, FFN = 48, 6, 2, 8, 16, 8, 5, 5, 7, 40
INNER = HEADS * VALUE_DIM
VOCABULARY, THETA = 97, 100.0
GLOBAL = (0, 3, 7)
READS = {2: 1, 5: 4, 6: 4}
"""Which layer's keys and values a layer uses."""
CONFIG = JambaConfig(
    hidden_size=WIDTH, mamba_d_state=STATE, mamba_d_conv=4, mamba_expand=INNER // WIDTH, mamba_dt_rank=RANK
)


class Mixer(nn.Module):
    """Heads and state-space model on the same input: the mean of both, normed, behind one map."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.window = None if layer in GLOBAL else WINDOW
        keys = 0 if layer in READS else KV_HEADS
        self.rows = [HEADS * HEAD_DIM, keys * HEAD_DIM, keys * VALUE_DIM, 2 * INNER]
        self.in_proj = nn.Linear(WIDTH, sum(self.rows), bias=False)
        self.mamba = JambaMambaMixer(CONFIG, layer)
        self.mamba.in_proj = self.mamba.out_proj = nn.Identity()
        self.norms = nn.ModuleList(LlamaRMSNorm(INNER) for _ in range(2))
        self.out_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor, lent: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output, and the keys and values for others."""
        batch, time, _ = x.shape
        q, k, v, inner = self.in_proj(x).split(self.rows, -1)
        cos, sin = angles(time)
        q = q.view(batch, time, HEADS, HEAD_DIM).transpose(1, 2)
        if lent is None:
            k = k.view(batch, time, KV_HEADS, HEAD_DIM).transpose(1, 2)
            k = apply_rotary_pos_emb(k, k, cos, sin)[1]
            lent = k, v.view(batch, time, KV_HEADS, VALUE_DIM).transpose(1, 2)
        q = apply_rotary_pos_emb(q, q, cos, sin)[0]
        keys, values = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in lent)
        scores = (q @ keys.mT) * HEAD_DIM**-0.5
        heads = scores.masked_fill(~visible(time, self.window), -torch.inf).softmax(-1) @ values
        heads = heads.transpose(1, 2).reshape(batch, time, INNER)
        both = self.norms[0](heads) + self.norms[1](self.mamba(inner))
        return self.out_proj(both / 2), lent


class Block(nn.Module):
    """A mixer and a gated feed-forward network, both on normed input."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.mixer = Mixer(layer)
        self.norms = nn.ModuleList(LlamaRMSNorm(WIDTH) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, FFN, bias=False) for _ in range(2))
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x: Tensor, lent: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The stream, and the mixer's keys and values."""
        y, lent = self.mixer(self.norms[0](x), lent)
        x = x + y
        u = self.norms[1](x)
        return x + self.down(F.silu(self.gate(u)) * self.up(u)), lent


class Hymba(nn.Module):
    """The model."""

    def __init__(self, layers: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.meta = nn.Parameter(torch.zeros(META, WIDTH))
        self.blocks = nn.ModuleList(Block(layer) for layer in range(layers))
        self.norm = LlamaRMSNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of one document a row."""
        x = torch.cat([self.meta.expand(len(tokens), -1, -1), self.embedding(tokens)], 1)
        lent: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, block in enumerate(self.blocks):
            x, lent[layer] = block(x, lent[READS[layer]] if layer in READS else None)
        return self.norm(x[:, META:]) @ self.embedding.weight.mT


def visible(time: int, window: int | None) -> Tensor:
    """Which keys [query, key] are seen: meta tokens always, others within the window."""
    query, key = torch.arange(time)[:, None], torch.arange(time)
    near = torch.ones(time, time, dtype=torch.bool) if window is None else query - key < window
    return (key <= query) & (near | (key < META))


def angles(time: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, time, head_dim]."""
    rates = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = (torch.arange(time)[:, None] * rates).repeat(1, 2)[None]
    return angle.cos(), angle.sin()
