"""Examples of components that were written when a class had one."""

import warnings
from collections.abc import Iterator
from typing import Any


def by_older_name(component: type[Any], *scope: Any) -> Iterator[Any]:
    """What `example` returns, with a warning.

    Raises:
        NotImplementedError: the class has neither `examples` nor `example`.
    """
    name = component.__qualname__
    if not hasattr(component, "example"):
        raise NotImplementedError(f"{name}: has no examples; define the class method `examples`, which yields some")
    text = f"{name}.example: define `examples`, which yields several, in its place"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    yield component.example(*scope)
