"""The two sides, the engines and the metadata of a run."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from include.juicefs_storage.copy.pace import Steering
from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.copy.plan import SyncPlan
from include.juicefs_storage.copy.run import Options, Transfer
from include.juicefs_storage.copy.scope import below_prefix, shard_at
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.switch.params import resolve_switch_params
from include.juicefs_storage.tasks.context import mask, run_id
from include.juicefs_storage.tasks.registry import read_registry
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.sync.folder import manifests_folder
from include.juicefs_storage.volume.block_contents import CODECS, BlockContents
from include.juicefs_storage.volume.comparison import NeededBlocks, still_needed
from include.juicefs_storage.volume.layout import UUID_OBJECT

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.mysql import MySqlMetadata
    from include.juicefs_storage.adapters.s3.store import S3Store
    from include.juicefs_storage.objects.model import MirrorTool


#: How many partitions of a run are worked on at once, for the DAG processor's environment; the pool limits all runs.
TASKS = int(os.environ.get("JUICEFS_STORAGE_SYNC_TASKS") or 8)
#: Compressed blocks that a task reads and decompresses at once: each is held in memory, 16 MiB at most.
_BLOCKS_AT_ONCE = 8
#: Of `juicefs sync`, where the params do not say how many.
_TOOL_THREADS = 32
#: A store that is down for some minutes is no reason to have a person clear the task.
RETRIES = {"retries": 3, "retry_exponential_backoff": True}


class SyncRuntime:
    """The two sides, the engines and the manifests of a run. Every secret value is registered with Airflow's masker."""

    def __init__(self, params: SyncParams) -> None:
        self.params = params

    def stores(self) -> tuple[S3Store, S3Store]:
        """Return source and target, as their connections describe them."""
        from include.juicefs_storage.adapters.s3.store import S3Store

        params = self.params
        stores = (
            S3Store.from_connection(params.source_conn_id, params.source_bucket, params.source_prefix),
            S3Store.from_connection(params.target_conn_id, params.target_bucket, params.target_prefix),
        )
        for store in stores:
            mask(store.access_key, store.secret_key, store.session_token)
        return stores[0], replace(stores[1], storage_class=params.storage_class or "")

    def transfer(self, plan: SyncPlan, steering: Steering) -> Transfer:
        """Build what a task copies and compares by.

        Args:
            plan: Of the run.
            steering: Limits and pauses it.
        """
        from include.juicefs_storage.adapters.s3.bucket import S3Bucket
        from include.juicefs_storage.adapters.s3.engine import NativeEngine

        source, target = self.stores()
        engine = NativeEngine(source, target, steering.concurrency, flow=steering.flow)
        steering.set_bound = engine.set_bound
        return Transfer(
            S3Bucket(source),
            S3Bucket(target),
            engine,
            self.options,
            needed_blocks(plan, self, source),
            plan.made_at if "copy" in plan.phases else None,
            lists_copied="verify" not in plan.phases,
        )

    def tool(self, steering: Steering) -> MirrorTool | None:
        """Find the program that copies; None: the native engine copies.

        Args:
            steering: Tells bandwidth and concurrency, as they are now: a program keeps what it began with.
        """
        params, rate = self.params, steering.flow.bandwidth.bytes_s
        if params.engine == "native":
            return None
        source, target = self.stores()
        if params.engine == "juicefs":
            from include.juicefs_storage.adapters.tools.juicefs_sync import JuiceFSSync

            threads = steering.concurrency or _TOOL_THREADS
            return JuiceFSSync(source, target, threads, rate, params.include, params.exclude)
        from include.juicefs_storage.adapters.tools.mc_mirror import McMirror

        return McMirror(source, target, rate, params.include, params.exclude)

    def find_tool(self) -> None:
        """Refuse an engine whose program is not on this worker.

        Raises:
            PermanentError: It is not.
        """
        from include.juicefs_storage.adapters.tools import juicefs_sync, mc_mirror

        {"juicefs": juicefs_sync.find, "mc": mc_mirror.find}.get(self.params.engine, str)()

    @cached_property
    def metadata(self) -> MySqlMetadata:
        """The metadata database of the volume whose blocks are copied (plan=metadata)."""
        from include.juicefs_storage.adapters.mysql import MySqlMetadata

        params = self.params
        if params.meta_conn_id and not params.volume:
            return MySqlMetadata.from_connection(params.meta_conn_id)  # a copy needs no cluster
        named = {"volume": params.volume, "meta_conn_id": params.meta_conn_id}
        places = {"target_conn_id": params.target_conn_id, "target_bucket": params.target_bucket}
        return Runtime(resolve_switch_params({**named, **places}, read_registry())).metadata

    def check_volume(self, source: S3Store) -> None:
        """Check that the metadata is that of the volume whose objects lie at the source.

        Raises:
            PermanentError: It is another volume's, or the prefix or the bucket is not where it keeps its blocks.
        """
        from include.juicefs_storage.adapters.s3.bucket import S3Bucket

        setting = self.metadata.read_setting()
        below_prefix(setting, self.params.source_prefix)
        shard_at(setting, source.endpoint, source.bucket)
        key = f"{setting.name}/{UUID_OBJECT}"
        found = S3Bucket(replace(source, prefix="")).read(key)
        if found is not None and found.decode(errors="replace").strip() != setting.uuid:
            raise PermanentError(
                f"{key} on the source names another volume than the metadata, which is that of {setting.uuid}.",
                next_step="correct `volume` or `meta_conn_id`, or the source",
            )

    @property
    def options(self) -> Options:
        """How partitions are compared."""
        params = self.params
        return Options(params.compare, params.overwrite, params.include, params.exclude)


def needed_blocks(plan: SyncPlan, runtime: SyncRuntime, source: S3Store) -> NeededBlocks | None:
    """Read what the volume needs, as the plan recorded it; None where the plan follows a listing.

    Args:
        plan: The plan of the run.
        runtime: Of the run.
        source: Where blocks are read, where their size does not prove them.
    """
    from include.juicefs_storage.adapters.needed_files import NeededFiles
    from include.juicefs_storage.adapters.s3.bucket import S3Bucket

    if plan.needed is None:
        return None
    sizes, params = plan.needed.sizes, plan.params
    # A size proves what is stored as it is, and nothing reads what is encrypted.
    read = params.compare == "content" and sizes.compression in CODECS and not sizes.encrypted
    concurrency = min(params.concurrency or _BLOCKS_AT_ONCE, _BLOCKS_AT_ONCE)
    blocks = BlockContents(S3Bucket(source), sizes, concurrency) if read else None
    return NeededBlocks(
        chunks=plan.needed.chunks,
        sizes=sizes,
        pages=NeededFiles(manifests_folder(run_id()) / plan.needed.folder).pages,
        still=still_needed(runtime.metadata),
        problems=blocks.problems if blocks else None,
        delta=bool(params.since_id),
    )
