"""Saying once what holds for several."""

from collections.abc import Mapping


def by_reason(refusals: Mapping[str, str]) -> dict[str, list[str]]:
    """The names that share a reason, by reason, in the order in which they come.

    >>> by_reason({"fla": "only on CUDA devices", "reference": "slower here", "varlen": "only on CUDA devices"})
    {'only on CUDA devices': ['fla', 'varlen'], 'slower here': ['reference']}
    """
    return {reason: [name for name in refusals if refusals[name] == reason] for reason in refusals.values()}
