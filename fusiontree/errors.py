"""Errors of user input: one line with the place, the value found, the allowed values and the nearest known name."""

from collections.abc import Iterable
from difflib import get_close_matches

MANY, FEW = 24, 5
"""The most names that an error lists in full, and how many it lists of a longer list."""


class FusionTreeError(ValueError):
    """Bad input. The command line prints it as one line and exits with 2."""

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.splitlines()))


class SpecError(FusionTreeError):
    """A spec, or a path into a spec, that describes no model. Its text has the first problem and a count of the others.

    >>> error = SpecError("width: is needed", "layers: is needed")
    >>> str(error), [*error.within("a.yaml").problems]
    ('width: is needed (and 1 more)', ['a.yaml: width: is needed', 'a.yaml: layers: is needed'])
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(" ".join(problem.splitlines()) for problem in problems)
        more = len(problems) - 1
        super().__init__(problems[0] + (f" (and {more} more)" if more else ""))

    def within(self, where: object) -> "SpecError":
        """The same problems, each prefixed with `where`: the file, or part of a file, that contains the problem."""
        return SpecError(*(f"{where}: {problem}" for problem in self.problems))


class WeightsError(FusionTreeError):
    """A checkpoint that is not the one its spec describes."""


def suggest(found: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, and the known names (of many, the nearest few).

    >>> suggest("mamba", ["attention", "mamba2"])
    ", did you mean 'mamba2'? (known: attention, mamba2)"
    """
    names = sorted(set(known))
    near = get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f", did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names) or "none"
    if len(names) > MANY:
        some = get_close_matches(found, names, n=FEW, cutoff=0.0)
        listed = f"{', '.join(some)} and {len(names) - len(some)} more"
    return f"{hint} (known: {listed})"
