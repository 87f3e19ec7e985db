"""Support for components that define the older `example` in the place of `examples`."""

import warnings
from collections.abc import Iterator
from typing import Any


def by_older_name(component: type[Any], *scope: Any) -> Iterator[Any]:
    """Yield the result of the class method `example`, with a DeprecationWarning.

    Raises:
        NotImplementedError: the class has neither `examples` nor `example`.
    """
    name = component.__qualname__
    if not hasattr(component, "example"):
        raise NotImplementedError(f"{name}: has no examples; define the class method `examples`, which yields some")
    text = f"{name}.example: define `examples`, which yields several, in its place"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    yield component.example(*scope)
