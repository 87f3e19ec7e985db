"""Tests of one folder that share runs stay on one worker, and no property fails by the clock."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Training runs are made once a worker, so all that look at them go to the same one."""
    for item in items:
        if Path(item.path).parent.name == "training":
            item.add_marker(pytest.mark.xdist_group("training"))
