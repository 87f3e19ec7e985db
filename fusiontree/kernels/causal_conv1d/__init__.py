"""The short depthwise convolution in front of a state-space layer (Gu and Dao 2023, arXiv 2312.00752)."""

from fusiontree.kernels.causal_conv1d import cases, causal_conv1d_cuda, fla, reference, shifted  # noqa: F401 - they register
from fusiontree.kernels.causal_conv1d.decode import causal_conv1d_step
from fusiontree.kernels.causal_conv1d.op import CONV, ConvInputs, ConvRequest, causal_conv1d

__all__ = [
    "CONV",
    "ConvInputs",
    "ConvRequest",
    "causal_conv1d",
    "causal_conv1d_step",
]
