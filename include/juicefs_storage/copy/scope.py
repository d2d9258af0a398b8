"""Which of a volume's blocks the source of a copy holds: by its prefix and, of a sharded volume, by its bucket."""

from __future__ import annotations

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.volume.setting import Setting, normal_endpoint


def below_prefix(setting: Setting, prefix: str) -> str:
    """Return where the volume's blocks lie below a prefix.

    Raises:
        PermanentError: The prefix leads elsewhere.
    """
    chunks = f"{setting.name}/chunks/"
    if not chunks.startswith(prefix):
        raise PermanentError(
            f"Param `source_prefix`: expected `{setting.name}/`, where volume {setting.name} keeps its blocks; "
            f"found {prefix!r}.",
            next_step="correct `source_prefix`, or `volume` or `meta_conn_id`",
        )
    return chunks.removeprefix(prefix)


def shard_at(setting: Setting, endpoint: str, bucket: str) -> int | None:
    """Return which of the volume's shards a bucket is, counted from 0; None: the volume keeps all its blocks in one.

    Args:
        setting: The volume's.
        endpoint: Of the bucket. It counts only where the buckets at several endpoints have one name: clients may reach
            a store by another name than the workers.
        bucket: Its name.

    Raises:
        PermanentError: It is none of them.
    """
    if setting.shards <= 1:
        return None
    places = setting.shard_places
    found = [shard for shard, (_, name) in enumerate(places) if name == bucket]
    if len(found) > 1:
        found = [shard for shard in found if normal_endpoint(places[shard][0]) == normal_endpoint(endpoint)]
    if len(found) != 1:
        expected = ", ".join(f"`{name}`" for name in dict.fromkeys(name for _, name in places))
        raise PermanentError(
            f"Param `source_bucket`: volume {setting.name} spreads its blocks over {setting.shards} buckets, and a run "
            f"compares one of them: expected {expected}; found `{bucket}` at {endpoint}.",
            next_step="start a run for each of the buckets; where they have one name, the endpoint tells, and "
            "`source_conn_id` needs it as the setting has it",
        )
    return found[0]
