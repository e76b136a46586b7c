"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.models import ARCHITECTURES
from hypothesis import HealthCheck, settings

settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, so that no worker of xdist begins one when the others are done.

    Those of engine/ start most processes; of the others, those with the most slow tests.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.parent.name != "engine", -slow[item.path]))


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("COCONUT_CACHE")
    os.environ["COCONUT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["COCONUT_CACHE"]
    else:
        os.environ["COCONUT_CACHE"] = before


@pytest.fixture(autouse=True, scope="module")
def _launcher_variables() -> Iterator[None]:
    """Of each file: it leaves no variable behind by which a later test takes itself for one of several processes."""
    before = launcher_variables()
    yield
    after = launcher_variables()
    for name in after.keys() - before.keys():
        del os.environ[name]
    os.environ |= before
    assert after == before


def launcher_variables() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: os.environ[name] for name in names if name in os.environ}


@pytest.fixture(params=list(ARCHITECTURES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """torch.distributed with this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
