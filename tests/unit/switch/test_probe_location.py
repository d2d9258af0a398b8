"""Clients are sent to a location only where it serves them, asked as they would ask."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from include.juicefs_storage import ports
from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.ports import ExecResult
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.switch.probe_location import find_problem
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import OLD, FakeCluster, FakeJuiceFS, FakeMetadata, FakeStore, setting

ROWS = [(7, 5), (8, 5), (9, 5), (10, 5)]
BLOCKS = [f"myjfs/chunks/0/0/{slice_id}_0_5" for slice_id in (7, 8, 9)]


@dataclass
class Cluster(FakeCluster):
    """Pods that reach the endpoint, or not."""

    answers: dict[str, ExecResult] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)

    def exec(self, pod: str, container: str, *_: object, **__: object) -> ExecResult:
        self.asked.append((pod, container))
        if pod in self.gone:
            raise PermanentError(f"Kubernetes answered 404 Not Found to: exec in pod {pod}.")
        return self.answers.get(pod, ExecResult(0, "", ""))


def find(
    juicefs: FakeJuiceFS,
    store: FakeStore | None = None,
    *,
    write: bool = True,
    answers: dict[str, ExecResult] | None = None,
    gone: str = "",
    lost_before: Collection[str] = (),
    config: StorageConfig = OLD,
) -> str:
    cluster = cast("ports.Cluster", Cluster(answers=answers or {}, gone={gone}))
    location = Location(config, store or FakeStore())
    metadata = juicefs.metadata
    return find_problem(
        cluster,
        cast("ports.JuiceFS", juicefs),
        metadata,
        metadata.row,
        location,
        ["one", "two"],
        write=write,
        lost_before=lost_before,
    )


def juicefs(rows: list[tuple[int, int]] = ROWS, problem: str = "") -> FakeJuiceFS:
    return FakeJuiceFS(FakeMetadata(setting(OLD), rows), problem=problem)


def test_the_oldest_blocks_and_a_new_key_are_tried_with_the_clients_own_keys() -> None:
    fake = juicefs()
    assert find(fake) == find(fake) == ""
    (config, blocks, first), (_, _, second) = fake.probed
    assert (config, blocks) == (OLD, BLOCKS)
    assert first is not None
    assert first.startswith("myjfs/storage-switch-probe-")
    assert first != second


def test_nothing_is_written_where_writes_are_refused_for_now() -> None:
    fake = juicefs()
    assert find(fake, write=False) == ""
    assert fake.probed == [(OLD, BLOCKS, None)]


def test_an_empty_volume_has_no_block_to_read() -> None:
    fake = juicefs([])
    assert find(fake) == ""
    assert fake.probed[0][1] == []


def test_blocks_that_were_accepted_as_lost_are_not_tried() -> None:
    fake = juicefs()
    assert find(fake, lost_before=BLOCKS[:2]) == ""
    assert fake.probed[0][1] == [BLOCKS[2], "myjfs/chunks/0/0/10_0_5"]


def test_another_block_of_a_slice_is_tried_where_its_first_is_lost() -> None:
    fake = juicefs([(7, 5 << 20)])
    assert find(fake, lost_before=[f"myjfs/chunks/0/0/7_0_{4 << 20}"]) == ""
    assert fake.probed[0][1] == [f"myjfs/chunks/0/0/7_1_{1 << 20}"]


def test_a_volume_that_lost_all_its_blocks_has_none_to_read() -> None:
    fake = juicefs(ROWS[:3])
    assert find(fake, lost_before=BLOCKS) == ""
    assert fake.probed[0][1] == []


def test_a_pod_that_does_not_reach_it_is_named() -> None:
    refused = ExecResult(7, "", "curl: (7) Failed to connect")
    assert find(juicefs(), answers={"two": refused}) == f"pod two cannot use http://old:9000: {refused.stderr}"


def test_a_pod_that_is_gone_meanwhile_is_no_problem() -> None:
    fake = juicefs()
    assert find(fake, gone="two") == ""
    assert len(fake.probed) == 1


def test_what_juicefs_says_is_the_problem() -> None:
    assert find(juicefs(problem="cannot write: AccessDenied")) == "cannot write: AccessDenied"


INSECURE = replace(OLD, bucket="https://old:9000/data?tls-insecure-skip-verify=true")


@pytest.mark.parametrize(("write", "below"), [(True, "myjfs"), (False, "")])
def test_a_store_whose_certificate_nobody_checks_is_opened_as_the_clients_do(write: bool, below: str) -> None:
    """`juicefs sync`, which reads blocks, checks every certificate: Airflow looks for them."""
    fake = juicefs()
    assert find(fake, FakeStore(dict.fromkeys(BLOCKS, 5)), write=write, config=INSECURE) == ""
    assert (fake.tried, fake.probed) == ([(INSECURE, below)], [])
    assert find(fake, config=INSECURE) == f"none of 3 blocks is in {INSECURE.bucket}"
    assert find(juicefs(problem="api error AccessDenied"), config=INSECURE) == "api error AccessDenied"


class Gone(FakeStore):
    """A store that Airflow does not reach either."""

    def check(self, below: str = "") -> None:
        raise TransientError("Connection refused.")


class Limited(FakeStore):
    """A store whose keys may list below the volume's name alone."""

    def check(self, below: str = "") -> None:
        if below != "myjfs/":
            raise PermanentError("AccessDenied")


@pytest.mark.parametrize(
    ("store", "words"),
    [
        (FakeStore({BLOCKS[1]: 5}), ""),
        (Limited({BLOCKS[1]: 5}), ""),
        (FakeStore(), "none of 3 blocks is in http://old:9000/data"),
        (Gone(), "Connection refused. No pod could be asked either: No ready pod."),
    ],
)
def test_where_no_pod_can_be_asked_airflow_asks(store: FakeStore, words: str) -> None:
    assert find(FakeJuiceFS(FakeMetadata(setting(OLD), ROWS), no_pod=True), store) == words
