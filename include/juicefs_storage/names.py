"""Names that tasks, the plugin and the DAG files share. Imports nothing: every Airflow process loads this."""

from __future__ import annotations

from typing import Literal
from urllib.parse import quote

DAG_PREFIX = "juicefs_storage_"
SWITCH, REVERT = f"{DAG_PREFIX}switch", f"{DAG_PREFIX}revert"
SYNC, FLEET, REHEARSAL = f"{DAG_PREFIX}sync", f"{DAG_PREFIX}fleet", f"{DAG_PREFIX}rehearsal"
FINISH = f"{DAG_PREFIX}finish"
#: How many runs of the switch, and of finishing, Airflow runs side by side. No wave of a fleet is larger; further dry
#: runs are queued.
SIDE_BY_SIDE = 8

#: The connection that says where backups are: password = key (base64 of 32 bytes), extra.path = folder.
BACKUP_CONN_ID = "juicefs_backup"
#: The connection that certificates are signed with: password = private key (base64 of 32 bytes).
CERTIFICATE_CONN_ID = "juicefs_certificate"
#: The pool of bulk copies; made by the lab and by deploy/init.sh. The tasks of the runbook take no slot of it: a volume
#: in mid-move never waits behind a copy.
COPY_POOL = "juicefs_storage"

#: The asset that has one event for each volume and rehearsal, and how many events are read to find a volume's last one.
READINESS, READINESS_LOOK_BACK = f"{DAG_PREFIX}readiness", 500

#: The Variable that changes the pace of a copy while it runs, or pauses it (copy/pace.py).
PACE = f"{SYNC}_pace"
#: The XCom in which a long task says how far it is, while it works (objects/progress.py: Progress).
PROGRESS = "progress"
#: The XCom in which a proof of the clients says which are proven, after each look (tasks/switch/client_progress.py).
CLIENTS = "clients"
#: The XCom of a task that compared a store with the metadata: how many blocks that needs.
NEEDED_BLOCKS = "needed_blocks"
#: The XCom of a task: what its first ETA said that it takes, and what it took, in seconds.
ESTIMATE = "estimate"

#: Where the plugin's pages are, relative to the root of the UI. No leading slash: the UI may be below a prefix.
PAGES = "juicefs-storage"
Page = Literal["run", "plan", "report"]


def run_url(dag_id: str, run_id: str) -> str:
    """Build the URL of a run in Airflow's UI, relative to the root of the UI."""
    return f"dags/{quote(dag_id, safe='')}/runs/{quote(run_id, safe='')}"


def page_url(page: Page, dag_id: str, run_id: str) -> str:
    """Build the URL of a page of a run, relative to the root of the UI.

    Args:
        page: Which of them.
        dag_id: The DAG.
        run_id: The run.
    """
    return f"{PAGES}/runs/{quote(dag_id, safe='')}/{quote(run_id, safe='')}/{page}"


def fleet_url(run_id: str) -> str:
    """Build the URL of the page of a fleet's volumes, relative to the root of the UI."""
    return f"{PAGES}/fleets/{quote(run_id, safe='')}"


def volume_run_id(fleet_run_id: str, key: str, *, dry_run: bool = False) -> str:
    """Build the id of the run that moves, or rehearses, a volume of a fleet. A cleared task finds its run by it.

    Args:
        fleet_run_id: The fleet's run.
        key: The volume's key.
        dry_run: Whether the run rehearses.
    """
    return f"{fleet_run_id}.{key}{'.plan' if dry_run else ''}"


def task_url(dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str:
    """Build the URL of a task instance, relative to the root of the UI.

    Args:
        dag_id: The DAG.
        run_id: The run.
        task_id: The task.
        map_index: -1 where the task is not mapped.
    """
    mapped = f"/mapped/{map_index}" if map_index >= 0 else ""
    return f"{run_url(dag_id, run_id)}/tasks/{quote(task_id, safe='')}{mapped}"
