"""Runs of a DAG without a scheduler: the DAG's own graph and functions, a process a task, killed where a test says so.

The tasks are real: they work on the metadata, the stores and the cluster of the lab. Retries are those of Airflow.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lab.environment import Lab
from lab.process import binary
from tests.support.graph import GraphRun, find_dag
from tests.support.worker import Fault, Job, work

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.vault import FileVault

DAG_ID, REVERT_ID, FINISH_ID = "juicefs_storage_switch", "juicefs_storage_revert", "juicefs_storage_finish"
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.support.preload"])
_TASK_S, _ROLLOUT_POLL_S = 240.0, 0.3
#: They run beside other tasks, until these have ended.
_BESIDE = ("follow_writes", "follow_writes_back")
_KEY = base64.b64encode(secrets.token_bytes(32)).decode()
#: The lab's heartbeat is one second.
SHORT = {
    "settle_s": 2, "client_timeout_s": 20, "rollout_timeout_s": 60, "late_commit_s": 2, "require_approval": False,
    "dry_run": False,
}  # fmt: skip


def connections(lab: Lab) -> dict[str, str]:
    """Return the connections of the lab, as Airflow takes them from the environment."""

    def aws(store: Any) -> dict[str, Any]:
        extra = {"endpoint_url": store.endpoint_url, "region_name": "us-east-1"}
        extra["config_kwargs"] = {"s3": {"addressing_style": "path"}}
        return {"conn_type": "aws", "login": store.access_key, "password": store.secret_key, "extra": extra}

    backups = lab.state / "backups"
    backups.mkdir(exist_ok=True)
    found = {
        "KUBERNETES_DEFAULT": {"conn_type": "kubernetes", "extra": {"kube_config_path": str(lab.kube.kubeconfig)}},
        "MINIO_OLD": aws(lab.old_store),
        "MINIO_NEW": aws(lab.new_store),
        "JUICEFS_BACKUP": {"conn_type": "generic", "password": _KEY, "extra": {"path": backups.as_uri()}},
    }
    return {f"AIRFLOW_CONN_{name}": json.dumps(value) for name, value in found.items()}


def backup_key() -> str:
    """Return the key of the runs' backups, base64."""
    return _KEY


def vault(lab: Lab) -> FileVault:
    """Return the backups of the runs."""
    from airflow.sdk import ObjectStoragePath

    from include.juicefs_storage.adapters.vault import FileVault, Keyring

    return FileVault(Keyring(base64.b64decode(_KEY)), ObjectStoragePath((lab.state / "backups").as_uri()))


@dataclass
class Run(GraphRun):
    """One run. `states` is what the UI would show; `struck` counts the faults that happened.

    `took_s` is the time a task and its retries would take in Airflow, one task after the other.

    `before` runs in the test's own process before a task starts: task id -> function.
    """

    lab: Lab
    folder: Path
    run_id: str
    params: dict[str, Any]
    faults: Sequence[Fault] = ()
    dag_id: str = DAG_ID
    states: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    took_s: dict[str, float] = field(default_factory=dict)
    struck: dict[Fault, int] = field(default_factory=dict)
    triggered_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    before: dict[str, Callable[[], object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "xcom").mkdir(parents=True, exist_ok=True)
        path = f"{Path(binary('juicefs')).parent}:{os.environ['PATH']}"
        self.environment = connections(self.lab) | {"AIRFLOW_HOME": str(self.folder.parent / "airflow"), "PATH": path}

    def go(self) -> str:
        """Run every task that can run; return the outcome that `finalize` reported."""
        progress = True
        with ThreadPoolExecutor(len(_BESIDE)) as pool:
            beside: list[Future[None]] = []
            while progress or beside:
                if not progress:  # everything else waits for one of them
                    beside.pop(0).result()
                progress = False
                for task in find_dag(self.dag_id).topological_sort():
                    for other in (find_dag(self.dag_id).task_dict[name] for name in self._beside()):
                        if other.task_id not in self.states and self.may_start(other):
                            self.states[other.task_id] = "running"
                            beside.append(pool.submit(self._step, other))
                            progress = True
                    if task.task_id not in self.states and self.may_start(task):
                        self._step(task)
                        progress = True
                    self._show_states()
        return str((self.xcom("finalize", "report") or {}).get("outcome"))

    def _beside(self) -> list[str]:
        return [name for name in _BESIDE if name in find_dag(self.dag_id).task_dict]

    def xcom(self, task_id: str, key: str = "return_value") -> Any:
        """Read an XCom; None where there is none."""
        file = self.folder / "xcom" / f"{task_id}.{key}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def _step(self, task: Any) -> None:
        self.before.get(task.task_id, lambda: None)()
        begun = time.monotonic()
        while True:
            self.tries[task.task_id] = self.tries.get(task.task_id, 0) + 1
            end, first = self._try(task), datetime.now(UTC)
            while end["state"] == "up_for_reschedule":
                if time.monotonic() - begun > _TASK_S:
                    raise TimeoutError(f"{task.task_id} still waits after {_TASK_S:g} s")
                time.sleep(_ROLLOUT_POLL_S)
                end = self._try(task, put_off_since=first)
            if end["state"] == "success" or end["final"] or self.tries[task.task_id] > task.retries:
                break
        waited_s = (self.tries[task.task_id] - 1) * task.retry_delay.total_seconds()
        self.took_s[task.task_id] = round(time.monotonic() - begun + waited_s, 1)
        self.states[task.task_id] = end["state"]
        self.errors[task.task_id] = end["error"]
        if end["state"] == "success":
            self.states |= dict.fromkeys(task.downstream_task_ids - self.kept(task.task_id), "skipped")

    def _show_states(self) -> None:
        """Write the states for the tasks that run."""
        shown = self.folder / "states.json.new"
        shown.write_text(json.dumps(self.states))
        shown.replace(self.folder / "states.json")

    def _try(self, task: Any, *, put_off_since: datetime | None = None) -> dict[str, Any]:
        fault = next(self._due(task.task_id), None)
        if task.task_id not in _BESIDE:
            self._show_states()
        job = Job(
            self.folder, self.dag_id, task.task_id, self.run_id, self.tries[task.task_id],
            {**find_dag(self.dag_id).params.dump(), **self.params}, self.environment, fault, put_off_since,
            self.triggered_at,
        )  # fmt: skip
        job.result.unlink(missing_ok=True)
        process = _PROCESSES.Process(target=work, args=(job,))
        process.start()
        process.join(_TASK_S)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{task.task_id} did not end within {_TASK_S:g} s")
        end: dict[str, Any] = {"state": "failed", "final": False, "error": "killed"}
        if job.result.exists():
            end = {"final": False, **json.loads(job.result.read_text())}
        elif process.exitcode != -9:
            raise RuntimeError(f"{task.task_id} ended with {process.exitcode} and left no result")
        if fault and (end["error"] == "killed" or (fault.error and fault.error in end["error"])):
            self.struck[fault] = self.struck.get(fault, 0) + 1
        return end

    def _due(self, task_id: str) -> Iterator[Fault]:
        for fault in self.faults:
            if fault.task == task_id and self.struck.get(fault, 0) < fault.tries:
                yield fault


#: Makes a run with some faults in it; named arguments are params.
Start: TypeAlias = Callable[..., Run]
#: Adds a line to the table of faults: step, fault, what was done then, outcome.
Tell: TypeAlias = Callable[[str, str, str, str], None]
