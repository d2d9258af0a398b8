"""The two storages of a switch."""

from __future__ import annotations

from dataclasses import dataclass

from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.volume.setting import StorageConfig


@dataclass(frozen=True)
class Location:
    """A storage of the volume.

    Attributes:
        config: The storage as the clients are told to reach it.
        store: Its bucket, as Airflow reaches it.
    """

    config: StorageConfig
    store: Bucket
