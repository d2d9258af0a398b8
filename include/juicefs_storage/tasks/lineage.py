"""What a copy reads and writes, for Airflow's hook lineage: the OpenLineage provider makes events of it.

Where no provider reads it, Airflow keeps nothing.
"""

from __future__ import annotations

from airflow.sdk import BaseHook
from airflow.sdk.lineage import get_hook_lineage_collector

from include.juicefs_storage.copy.params import SyncParams


def report_datasets(params: SyncParams) -> None:
    """Tell that the task reads the source's bucket and prefix, and writes the target's.

    By scheme, not by URI: of a prefix that makes no URI Airflow then drops the dataset, and the copy goes on.
    """
    collector, hook = get_hook_lineage_collector(), BaseHook()
    source = {"bucket": params.source_bucket, "key": params.source_prefix}
    target = {"bucket": params.target_bucket, "key": params.target_prefix}
    collector.add_input_asset(hook, scheme="s3", asset_kwargs=source)
    collector.add_output_asset(hook, scheme="s3", asset_kwargs=target)
