"""Keys and values that later layers read instead of making their own, within one forward pass (cross-layer sharing;
Hymba, arXiv 2411.13676; arXiv 2405.12981)."""

from collections.abc import Mapping
from dataclasses import replace

from fusiontree.core.contracts.context import Context, SharedValues


def split(path: str) -> tuple[int, str]:
    """The layer of a path, and the path within the layer."""
    _, layer, local_path = path.split(".", 2)
    return int(layer), local_path


class SharingPlan:
    """Which node reads the values of which: by reading layer and local path, the source's layer and local path; and
    by source layer, the last layer that reads from it."""

    def __init__(self, kv_sources: Mapping[str, str]) -> None:
        self.sources: dict[int, dict[str, tuple[int, str]]] = {}
        self.last_reader: dict[int, int] = {}
        for reader, source in kv_sources.items():
            layer, local_path = split(reader)
            self.sources.setdefault(layer, {})[local_path] = split(source)
            self.last_reader[split(source)[0]] = max(layer, self.last_reader.get(split(source)[0], 0))

    def __bool__(self) -> bool:
        return bool(self.sources)


class SharingPass:
    """The values shared in one forward pass; values are kept until their last reader has run."""

    def __init__(self, plan: SharingPlan) -> None:
        self.plan = plan
        self.published: dict[int, SharedValues] = {}

    def enter(self, layer: int, context: Context) -> Context:
        """The context of a layer: the values that its nodes read, and a place for the values that they publish."""
        sources = self.plan.sources.get(layer, {}).items()
        received = SharedValues({path: self.published[there].values[name] for path, (there, name) in sources})
        published = SharedValues()
        last = self.plan.last_reader
        self.published = {there: values for there, values in self.published.items() if last[there] > layer}
        if layer in last:
            self.published[layer] = published
        return replace(context, received=received, published=published)
