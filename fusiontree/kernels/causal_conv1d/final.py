"""The final state of `causal_conv1d`, for backends whose kernel does not return it; reads only the last inputs."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.kernels.causal_conv1d.op import ConvInputs
from fusiontree.kernels.common.documents import padding_joined, real


def final_state(inputs: ConvInputs) -> Float[Tensor, "batch taps-1 channels"]:
    """The inputs up to each row's last real token, those of other documents set to zero."""
    x, history, segments = inputs.x, inputs.history(), inputs.segments
    taps = history.shape[1]
    if segments is None:
        recent = torch.cat([history, x[:, max(x.shape[1] - taps, 0) :]], dim=1)
        return recent[:, recent.shape[1] - taps :]
    places = real(segments).sum(1, keepdim=True) + torch.arange(taps, device=x.device) - taps
    owners = _at(segments[..., None], segments.new_zeros(len(segments), taps, 1), places)[..., 0]
    kept = owners == padding_joined(segments)[:, -1:]
    return torch.where(kept[..., None], _at(x, history, places), 0.0)


def _at(
    values: Float[Tensor, "batch time features"],
    before: Float[Tensor, "batch taps-1 features"],
    places: Int[Tensor, "batch taps-1"],
) -> Float[Tensor, "batch taps-1 features"]:
    """What is at some places in time, which may lie before the first."""
    index = places[..., None].expand(-1, -1, values.shape[2])
    earlier = before.gather(1, (index + before.shape[1]).clamp(max=max(before.shape[1] - 1, 0)))
    return torch.where(index >= 0, values.gather(1, index.clamp(min=0)), earlier)
