"""Nothing that a switch and its way back need may lie on what is switched."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from include.juicefs_storage.ports import Place
from include.juicefs_storage.switch.findings import Finding, refusal, warning
from include.juicefs_storage.volume.setting import StorageConfig


def check_places(places: Sequence[Place], volume: str, ends: Sequence[StorageConfig]) -> list[Finding]:
    """Refuse a folder on the volume itself; name one on another JuiceFS volume, or on a store of this switch.

    Args:
        places: The folders of backups, logs and so on.
        volume: The volume's name.
        ends: The storages that it leaves and goes to.
    """
    stores = {urlsplit(end.bucket).netloc for end in ends}
    found = []
    for place in places:
        if place.volume == volume:
            found.append(
                refusal(
                    "vault",
                    f"{place.what} ({place.url}) lies on volume {volume}, which is switched: what the run and its way "
                    "back need is gone when the volume stands still.",
                    "put it on a disk or a store that has nothing to do with this volume",
                )
            )
        elif place.volume:
            found.append(
                warning(
                    "vault",
                    f"{place.what} ({place.url}) lies on JuiceFS volume {place.volume}, which may be switched one day.",
                    "put it on a disk or a store that is no JuiceFS volume's",
                )
            )
        elif place.store and place.store in stores:
            found.append(
                warning(
                    "vault",
                    f"{place.what} ({place.url}) lies on {place.store}, a store of this switch: when that is away, so "
                    "is the way back.",
                    "put it on a store that is neither end of the switch",
                )
            )
    return found
