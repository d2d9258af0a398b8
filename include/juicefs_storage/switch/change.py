"""How a volume's storage changes: what stays of the store decides what is copied, waited for and proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Literal

from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.one_store import may_be_one, shows_up
from include.juicefs_storage.records import Record
from include.juicefs_storage.volume.layout import UUID_OBJECT
from include.juicefs_storage.volume.setting import StorageConfig

ChangeKind = Literal["copied", "keys", "address", "moved"]

#: How many objects a dry run looks at, and how far apart the first and the last of them must have been written.
_DATES_COMPARED, _SPREAD = 16, timedelta(seconds=3)
#: What each kind is, for the first line of a plan.
MEANING: Mapping[ChangeKind, str] = {
    "copied": "Another store, which holds a copy of the data. The old store serves until the clients have moved.",
    "keys": "Other keys for the same bucket. No data is copied.",
    "address": "Another address of the same store. No data is copied.",
    "moved": "The store moved as a whole: the old address does not serve any more. Nothing can be copied from there.",
}


class Change(Record):
    """How a run changes the storage of its volume.

    Attributes:
        kind: `copied`: another store, side by side with the old one. `keys`: other keys, same bucket. `address`: the
            same store by another name or port. `moved`: the old address does not serve.
        why: How the kind was found out.
    """

    kind: ChangeKind = "copied"
    why: str = ""

    @property
    def copies(self) -> bool:
        """Whether there are two stores that both serve, so that blocks must be copied from one to the other."""
        return self.kind == "copied"

    @property
    def what(self) -> str:
        """What is another one for the clients afterwards."""
        return self.kind if self.kind in {"keys", "address"} else "store"

    @property
    def one_store(self) -> bool:
        """Whether the clients keep their store: a block that they write proves nothing about their setting then."""
        return self.kind in {"keys", "address"}


#: Where it is not known how the storage changes, the most is asked.
TWO_STORES = Change()


def find_change(
    before: StorageConfig,
    after: StorageConfig,
    source: Bucket,
    target: Bucket,
    *,
    below: str,
    probe_key: str | None,
    why_not_served: Callable[[], str],
) -> Change:
    """Find out how the storage changes. Reads only, but for the probe.

    Args:
        before: The storage that the setting names.
        after: The storage that it will name.
        source: The bucket that the volume is on, as Airflow reaches it.
        target: The new bucket.
        below: What the volume's keys begin with.
        probe_key: Key of an object that is written to the new bucket, looked for in the old one, and deleted from
            the new one; None: the dates of objects that both have are compared, which is a guess.
        why_not_served: Asks from where the clients are why the old store does not serve them; empty where it does.

    Raises:
        PermanentError: The old store serves the clients and cannot be read from Airflow.
        StorageSwitchError: The new bucket cannot be used.
    """
    if before.place == after.place:
        if replace(before, storage=after.storage, bucket=after.bucket) == after:
            return Change(kind="address", why=f"the setting names the same place as {before.bucket} ({before.storage})")
        return Change(kind="keys", why=f"the setting names {after.bucket} already, with other keys")
    try:
        source.ping()
        source.check(below)
    except StorageSwitchError as error:
        if problem := why_not_served():
            return Change(kind="moved", why=f"Airflow: {error.problem} Clients: {problem}")
        _require(source, below)
    if probe_key is None:
        same = _same_dates(source, target, below)
        return Change(kind="address", why=f"{same} objects have the same dates in both") if same else Change()
    # A new store that replicates to the old one shows the probe there as well: a copy has dates of its own.
    if may_be_one(source, target, below) and shows_up(probe_key, target, source):
        return Change(kind="address", why=f"{probe_key}, written to the new bucket, was seen in the old one")
    return Change()


def _require(source: Bucket, below: str) -> None:
    """Require that Airflow can use a store that serves the clients: it may be slow.

    Raises:
        PermanentError: It cannot.
    """
    try:
        source.check(below)
    except StorageSwitchError as error:
        raise PermanentError(
            f"The old store serves the clients, and Airflow cannot use it: {error.problem}",
            state="nothing was changed",
            next_step="give Airflow a way to it, or name a connection whose endpoint and keys work from Airflow: "
            "`source_conn_id`",
        ) from error


def _same_dates(source: Bucket, target: Bucket, below: str) -> int:
    """Count the objects that have one date in both buckets; 0 where that may be chance.

    A copy has dates of its own. Only objects that were written at different times tell it from the original.
    """
    keys = [item.key for item in islice(source.list(below), _DATES_COMPARED)]
    pairs = [(source.head(key), target.head(key)) for key in [*keys, f"{below}{UUID_OBJECT}"]]
    there = [left for left, right in pairs if left and left == right and left.modified]
    if len(there) < len([pair for pair in pairs if any(pair)]):
        return 0
    dates = sorted(parsedate_to_datetime(item.modified) for item in there)
    return len(there) if dates and dates[-1] - dates[0] >= _SPREAD else 0
