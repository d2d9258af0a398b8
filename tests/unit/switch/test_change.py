"""Which change it is, found out from what both stores answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from include.juicefs_storage.errors import PermanentError, TransientError, UnreachableError
from include.juicefs_storage.objects.bucket import StoredObject
from include.juicefs_storage.switch.change import Change, find_change
from tests.support.fakes import NEW, OLD, FakeStore

_OTHER_KEY = replace(OLD, access_key=NEW.access_key)


@dataclass
class Dated(FakeStore):
    """A bucket whose objects were written one after the other, `every_s` seconds apart."""

    began: datetime = datetime(2026, 11, 28, 10, tzinfo=UTC)
    every_s: int = 1

    def head(self, key: str) -> StoredObject | None:
        if not (found := super().head(key)):
            return None
        written = self.began + timedelta(seconds=sorted(self.objects).index(key) * self.every_s)
        return replace(found, modified=format_datetime(written, usegmt=True))


@dataclass
class ReplicatesTo(Dated):
    """A store that copies what is written to it to another one."""

    other: FakeStore = field(default_factory=FakeStore)

    def probe(self, key: str, while_there: Callable[[], None] = lambda: None) -> None:
        self.other.objects[key] = 1
        super().probe(key, while_there)
        del self.other.objects[key]


@dataclass
class Away(FakeStore):
    """A store that does not answer."""

    def check(self, below: str = "") -> None:
        raise TransientError("the old store does not answer.")


@dataclass
class Slow(Dated):
    """A store that answers nothing within seconds."""

    def ping(self) -> None:
        raise UnreachableError("no answer in time.")


def find(source: FakeStore, target: FakeStore, *, probe: str | None = "v/probe", problem: str = "") -> Change:
    return find_change(OLD, NEW, source, target, below="v/", probe_key=probe, why_not_served=lambda: problem)


@pytest.mark.parametrize("probe", [None, "v/probe"])
def test_another_store_is_told_from_another_address_of_one(probe: str | None) -> None:
    objects = {f"v/{number}": 1 for number in range(20)}
    one, copy = Dated(objects), Dated(dict(objects), began=datetime(2026, 11, 28, 11, tzinfo=UTC))
    assert find(one, one, probe=probe).kind == "address"
    assert find(one, copy, probe=probe) == Change()


def test_a_new_store_that_replicates_to_the_old_one_is_another_store() -> None:
    """It shows the probe in the old one too; its copies of what was there before have dates of their own."""
    objects = {f"v/{number}": 1 for number in range(20)}
    old = Dated(objects)
    new = ReplicatesTo(dict(objects), began=datetime(2026, 11, 28, 11, tzinfo=UTC), other=old)
    assert find(old, new) == Change()


def test_nothing_is_guessed_from_empty_buckets_or_stores_without_dates() -> None:
    assert find(Dated(), Dated(), probe=None).kind == "copied"
    assert find(FakeStore({"v/1": 1}), FakeStore({"v/1": 1}), probe=None).kind == "copied"


def test_dates_that_a_copy_may_have_by_chance_tell_nothing() -> None:
    """It was made within the second in which everything was written."""
    objects = {f"v/{number}": 1 for number in range(20)}
    assert find(Dated(objects, every_s=0), Dated(dict(objects), every_s=0), probe=None) == Change()


def test_one_object_that_differs_or_is_missing_makes_it_another_store() -> None:
    objects = {f"v/{number}": 1 for number in range(5)}
    assert find(Dated(objects), Dated({**objects, "v/3": 2}), probe=None).kind == "copied"
    assert find(Dated(objects), Dated({"v/0": 1}), probe=None).kind == "copied"
    assert find(Dated(objects), Dated({**objects, "v/juicefs_uuid": 36}), probe=None).kind == "copied"


def test_the_probe_decides_against_dates_that_a_copy_has_kept() -> None:
    objects = {"v/1": 1}
    assert find(Dated(objects), Dated(dict(objects))).kind == "copied"


@pytest.mark.parametrize("after", [{"bucket": OLD.bucket.replace("old", "OLD", 1) + "?region=eu-1"}, {"storage": "s3"}])
def test_one_place_with_the_same_keys_is_another_address_of_one_store(after: dict[str, Any]) -> None:
    """The host in capitals, a port that is the default, another region or kind of storage: no key changes."""
    changed = replace(OLD, **after)
    found = find_change(OLD, changed, Away(), Away(), below="v/", probe_key=None, why_not_served=lambda: "")
    assert found.kind == "address"
    assert OLD.bucket in found.why


def test_only_the_keys_change_where_the_bucket_stays_whatever_the_store_answers() -> None:
    found = find_change(OLD, _OTHER_KEY, Away(), Away(), below="v/", probe_key="v/probe", why_not_served=lambda: "")
    assert found.kind == "keys"
    assert found.one_store
    assert not found.copies


def test_a_store_has_moved_away_only_where_the_clients_are_not_served_either() -> None:
    found = find(Away(), FakeStore(), problem="pod a: connection refused")
    assert found.kind == "moved"
    assert "connection refused" in found.why
    assert not found.one_store
    assert not found.copies
    with pytest.raises(PermanentError, match="serves the clients, and Airflow cannot use it"):
        find(Away(), FakeStore())


def test_an_old_store_that_is_slow_and_serves_the_clients_is_waited_for() -> None:
    objects = {f"v/{number}": 1 for number in range(20)}
    assert find(Slow(objects), Dated(dict(objects), began=datetime(2026, 11, 28, 11, tzinfo=UTC))) == Change()
    assert find(Slow(objects), Dated(), problem="pod a: no answer").kind == "moved"
