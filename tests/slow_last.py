"""A pytest plugin of `run_tests.sh`: the slow tests run after all others, so that a plain mistake shows in seconds."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts slow tests to the end; the order is kept otherwise."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
