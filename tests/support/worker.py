"""The process of one task: the task's own function, with as much of Airflow as it uses.

A test can order the process to be killed or an adapter to fail. The product has no hook for this: the adapters'
methods are wrapped here, in this process alone.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from tests.support.graph import find_dag

Point = Literal["before", "during", "after"]
#: How long a command in a pod has run when its caller is killed "during" it, in seconds.
_INTO_COMMAND_S, _INTO_SHORT_COMMAND_S = 0.15, 0.03
_SHORT_COMMANDS = ("JuiceFSCommand.write_storage", "JuiceFSCommand.unmount_fresh")


@dataclass(frozen=True)
class Fault:
    """What happens to a task.

    Attributes:
        task: The task's id.
        point: Before, during or after the effect.
        effect: `module:Class.method` of an adapter, or the empty string for the task's function itself.
        nth: Which call of it.
        having: Only calls whose arguments have this text in them count.
        tries: On how many tries of the task.
        error: Empty: the process is killed. Else the text of a PermanentError that is raised instead.
    """

    task: str
    point: Point
    effect: str = ""
    nth: int = 1
    tries: int = 1
    error: str = ""
    having: str = ""


@dataclass(frozen=True)
class Job:
    """One try of one task."""

    folder: Path
    dag_id: str
    task_id: str
    run_id: str
    try_number: int
    params: dict[str, Any]
    environment: dict[str, str]
    fault: Fault | None
    #: When the task was rescheduled for the first time; None at its first poke.
    put_off_since: datetime | None = None
    triggered_at: datetime | None = None

    @property
    def result(self) -> Path:
        """Where the process leaves how it ended; absent where it was killed."""
        return self.folder / f"{self.task_id}.result.json"

    def xcom(self, task_id: str, key: str) -> Path:
        """Return the file of an XCom."""
        return self.folder / "xcom" / f"{task_id}.{key}.json"


class TaskInstance:
    """The part of Airflow's task instance that the tasks use."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.task_id, self.dag_id, self.run_id, self.try_number = job.task_id, job.dag_id, job.run_id, job.try_number

    def xcom_pull(self, task_ids: str, key: str = "return_value", map_indexes: int = -1) -> Any:
        file = self._job.xcom(task_ids, key)
        return json.loads(file.read_text()) if file.exists() else None

    def xcom_push(self, key: str, value: Any) -> None:
        self._job.xcom(self.task_id, key).write_text(json.dumps(value))

    def get_first_reschedule_date(self, _: Any) -> datetime | None:
        return self._job.put_off_since

    def get_task_states(self, *, task_ids: list[str], run_ids: list[str], **_: str) -> dict[str, dict[str, str]]:
        states = json.loads((self._job.folder / "states.json").read_text())
        return {run_ids[0]: {task: state for task, state in states.items() if task in task_ids}}


def work(job: Job) -> None:
    """Run the task; write its XComs and its end to files."""
    os.environ.update(job.environment)
    from airflow.sdk import PokeReturnValue
    from airflow.sdk.exceptions import AirflowFailException, AirflowRescheduleException
    from airflow.sdk.execution_time.context import set_current_context

    dag = find_dag(job.dag_id)
    task, instance = dag.get_task(job.task_id), TaskInstance(job)
    context: Any = {
        "ti": instance, "task": task, "dag": dag, "run_id": job.run_id, "params": job.params,
        "dag_run": SimpleNamespace(run_after=job.triggered_at),
    }  # fmt: skip
    for stale in (job.folder / "xcom").glob(f"{job.task_id}.*.json"):
        stale.unlink()
    end: dict[str, Any]
    try:
        with set_current_context(context):
            function = _armed(job.fault, task.python_callable) if job.fault else task.python_callable
            value = function()
        state = "success"
        if isinstance(value, PokeReturnValue):
            state, value = ("success" if value.is_done else "up_for_reschedule"), value.xcom_value
        if value is not None:
            instance.xcom_push("return_value", value)
        end = {"state": state, "value": value, "error": ""}
    except AirflowRescheduleException:
        end = {"state": "up_for_reschedule", "error": ""}
    except AirflowFailException as error:
        end = {"state": "failed", "final": True, "error": str(error)}
    except Exception as error:  # noqa: BLE001  as Airflow does: whatever it is, the task failed
        end = {"state": "failed", "final": False, "error": f"{type(error).__name__}: {error}"}
    job.result.write_text(json.dumps(end, default=str))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _armed(fault: Fault, function: Callable[[], Any]) -> Callable[[], Any]:
    from include.juicefs_storage.errors import PermanentError

    def strike() -> None:
        if fault.error:
            raise PermanentError(fault.error)
        _die()

    if not fault.effect:
        # Around what the decorator does: its errors become Airflow's, and success is not yet known to Airflow.
        def whole() -> Any:
            if fault.point == "before":
                if fault.error:
                    from airflow.sdk.exceptions import AirflowFailException

                    raise AirflowFailException(fault.error)
                _die()
            result = function()
            strike()
            return result

        return whole
    module, _, path = fault.effect.partition(":")
    owner_name, _, name = path.partition(".")
    owner = getattr(importlib.import_module(module), owner_name)
    original, calls = getattr(owner, name), itertools.count(1)

    def struck(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Clients are proven side by side: each call has a number of its own.
        number = next(calls) if fault.having in repr((args, kwargs)) else 0
        if number != fault.nth:
            return original(self, *args, **kwargs)
        if fault.point == "before":
            strike()
        if fault.point == "during":
            _arm_inside(f"{owner_name}.{name}")
        result = original(self, *args, **kwargs)
        if fault.point == "after":
            strike()
        return result

    setattr(owner, name, struck)
    return function


def _arm_inside(effect: str) -> None:
    """Have the process killed when the effect has begun and its end is not known."""
    match effect:
        case "KubernetesCluster.patch_secret" | "KubernetesCluster.stamp_template":
            # The request is in flight; its answer is never read.
            from http.client import HTTPConnection

            HTTPConnection.getresponse = lambda *_, **__: _die()  # type: ignore[assignment,method-assign]
        case "MySqlMetadata.replace_setting":
            from MySQLdb.connections import Connection

            Connection.commit = lambda *_: _die()
        case "FileVault.save":
            from airflow.sdk import ObjectStoragePath

            write = ObjectStoragePath.write_bytes

            def half(self: Any, content: bytes, **more: Any) -> int:
                write(self, content[: len(content) // 2], **more)
                _die()
                return 0

            ObjectStoragePath.write_bytes = half  # type: ignore[assignment,method-assign]
        case "NativeEngine.copy":
            # An object is on its way to the store; its last byte is never sent.
            import socket

            send = socket.socket.sendmsg

            def cut(self: Any, parts: Any, *more: Any) -> int:
                data = b"".join(parts)
                if not data.startswith(b"PUT "):
                    return send(self, parts, *more)
                send(self, [data[:-1]], *more)
                _die()
                return 0

            socket.socket.sendmsg = cut  # type: ignore[method-assign]
        case _:
            # A command in a pod outlives its caller; or it runs on the worker.
            from subprocess import Popen

            from kubernetes.stream.ws_client import WSClient

            after_s = _INTO_SHORT_COMMAND_S if effect in _SHORT_COMMANDS else _INTO_COMMAND_S

            def soon(wait: Callable[..., Any]) -> Callable[..., Any]:
                def armed(*args: Any, **more: Any) -> Any:
                    timer = threading.Timer(after_s, _die)
                    timer.daemon = True
                    timer.start()
                    return wait(*args, **more)

                return armed

            WSClient.update = soon(WSClient.update)
            Popen.communicate = soon(Popen.communicate)  # type: ignore[method-assign]
