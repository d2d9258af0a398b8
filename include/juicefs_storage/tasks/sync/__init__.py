"""The tasks of `juicefs_storage_sync`, as the DAG names them."""

from include.juicefs_storage.tasks.sync.listing import list_source
from include.juicefs_storage.tasks.sync.plan import check, plan_partitions
from include.juicefs_storage.tasks.sync.report import finalize, reconcile
from include.juicefs_storage.tasks.sync.work import copy, list_to_verify, verify

__all__ = ["check", "copy", "finalize", "list_source", "list_to_verify", "plan_partitions", "reconcile", "verify"]
