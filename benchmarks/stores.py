"""The servers that the programs copy between: two stubs, or two SeaweedFS."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from benchmarks.peers import Place
from benchmarks.population import Population, etag
from include.juicefs_storage.adapters.s3.client import S3Client
from include.juicefs_storage.adapters.s3.store import S3Store
from lab.process import LabError, Server, free_ports, wait_for
from lab.seaweed import Store


class Stores(Protocol):
    """A source and a target."""

    def source(self, population: Population) -> Place:
        """A bucket that holds this, written before or now."""

    def target(self, population: Population | None) -> Place:
        """A bucket or prefix that holds this and nothing else."""

    def digest(self, place: Place) -> str:
        """Of all keys, sizes and ETags there."""

    def requests(self, *places: Place) -> tuple[int, int]:
        """How many were made in these buckets so far, and how many of them were throttled; not known: 0, 0."""


def expected_digest(population: Population) -> str:
    """What `Stores.digest` answers for exactly this population."""
    objects = sorted(population.objects())
    return digest((key, size, etag(size, tail)) for key, size, tail in objects)


def digest(objects: Iterator[tuple[str, int, str]]) -> str:
    """A hash over keys, sizes and ETags, in the order of the keys."""
    return hashlib.sha256("".join(f"{key}\t{size}\t{tag}\n" for key, size, tag in objects).encode()).hexdigest()


class StubStores:
    """Two servers of benchmarks.stub_store.

    Args:
        state: A folder for their logs.
        latency_ms: Before each answer.
        at_once: Requests at once on each, more are refused; 0: any number.
        per_second: Requests a second on each, more are refused; 0: any number.
    """

    def __init__(self, state: Path, latency_ms: float = 0, at_once: int = 0, per_second: int = 0) -> None:
        self.ports = free_ports(2)
        self.servers = []
        for name, port in zip(("source", "target"), self.ports, strict=True):
            argv = [
                *(sys.executable, "-m", "benchmarks.stub_store", f"--port={port}", f"--latency-ms={latency_ms}"),
                *(f"--at-once={at_once}", f"--per-second={per_second}"),
            ]
            server = Server.start(state, f"stub-{name}", argv)
            self.servers.append(server)
            wait_for(f"the stub {name} answers", partial(_answers, port), deadline_s=30, server=server)

    def source(self, population: Population) -> Place:
        """See Stores."""
        return self._populate(0, population)

    def target(self, population: Population | None) -> Place:
        """See Stores."""
        return self._populate(1, population or Population(0))

    def _populate(self, side: int, population: Population) -> Place:
        place = Place(f"http://127.0.0.1:{self.ports[side]}", "bench", "", "stub-key", "stub-secret")
        _ask(place, "populate", json.dumps(asdict(population)))
        return place

    def digest(self, place: Place) -> str:
        """See Stores."""
        state = _ask(place, "state")
        if refused := state["requests"].get("refused"):
            raise LabError(f"the stub refused {refused} requests as not implemented: {state['requests']}")
        return str(state["digest"])

    def requests(self, *places: Place) -> tuple[int, int]:
        """See Stores."""
        counts = [_ask(place, "state")["requests"] for place in places]
        throttled = sum(count.pop("throttled", 0) for count in counts)
        return sum(sum(count.values()) for count in counts), throttled

    def stop(self) -> None:
        """Stop both servers."""
        for server in self.servers:
            server.stop()


def _ask(place: Place, verb: str, query: str = "") -> dict[str, dict[str, int]]:
    with urllib.request.urlopen(f"{place.endpoint}/-/{verb}/{place.bucket}?{quote(query)}", timeout=120) as answer:  # noqa: S310
        state: dict[str, dict[str, int]] = json.load(answer)
        return state


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
            return True
    except OSError:
        return False


class SeaweedStores:
    """Two SeaweedFS servers. A target is a prefix of its own, below which nothing was before."""

    def __init__(self, state: Path) -> None:
        self.source_store = Store.create(state, "source", "bench")
        self.target_store = Store.create(state, "target", "bench")
        self._places: dict[Population, Place] = {}
        self._targets: dict[Population | None, Place] = {}
        self._prefixes = 0

    def source(self, population: Population) -> Place:
        """See Stores."""
        if population not in self._places:
            self._places[population] = self._fill(self.source_store, population, f"source-{len(self._places)}/")
        return self._places[population]

    def target(self, population: Population | None) -> Place:
        """See Stores."""
        if population in self._targets:
            return self._targets[population]
        self._prefixes += 1
        place = self._fill(self.target_store, population or Population(0), f"target-{self._prefixes}/")
        if population is not None:  # whoever finds nothing to do leaves it as it is, which is checked each time
            self._targets[population] = place
        return place

    @staticmethod
    def _fill(store: Store, population: Population, prefix: str) -> Place:
        from concurrent.futures import ThreadPoolExecutor

        from benchmarks.population import content

        place = S3Store(store.endpoint_url, store.bucket, prefix, store.access_key, store.secret_key)
        own = threading.local()

        def put(item: tuple[str, int, bytes]) -> None:
            key, size, tail = item
            if not hasattr(own, "client"):
                own.client = S3Client(place)
            answer = own.client.call("PUT", own.client.path(key), parts=[content(size, tail)], length=size)
            if answer.status != 200:
                raise own.client.refused(f"PUT {key}", answer)

        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(put, population.objects()):
                pass
        return Place(store.endpoint_url, store.bucket, prefix, store.access_key, store.secret_key)

    def digest(self, place: Place) -> str:
        """See Stores."""
        store = self.target_store if place.endpoint == self.target_store.endpoint_url else self.source_store
        found = store.objects(place.prefix)
        ordered = sorted((key.removeprefix(place.prefix), size, tag.strip('"')) for key, (size, tag) in found.items())
        return digest(iter(ordered))

    def requests(self, *_: Place) -> tuple[int, int]:
        """See Stores."""
        return 0, 0

    def stop(self) -> None:
        """Stop both servers."""
        self.target_store.stop()
        self.source_store.stop()


@contextmanager
def stub_stores(folder: Path, latency_ms: float = 0, at_once: int = 0, per_second: int = 0) -> Iterator[StubStores]:
    """Two stubs for as long as the block lasts. See StubStores."""
    stores = StubStores(folder, latency_ms, at_once, per_second)
    try:
        yield stores
    finally:
        stores.stop()


@contextmanager
def seaweed_stores(folder: Path) -> Iterator[SeaweedStores]:
    """Two SeaweedFS servers for as long as the block lasts."""
    stores = SeaweedStores(folder)
    try:
        yield stores
    finally:
        stores.stop()
