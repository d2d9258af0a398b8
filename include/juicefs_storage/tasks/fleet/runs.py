"""The runs of a fleet: its own, with its plan, and those of `juicefs_storage_switch` that it starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from airflow.sdk import get_current_context
from airflow.sdk.exceptions import DagRunTriggerException

from include.juicefs_storage.errors import NeedsHumanError, PermanentError
from include.juicefs_storage.fleet.plan import FleetPlan
from include.juicefs_storage.names import SWITCH
from include.juicefs_storage.switch.backup import FLEET_PREFIX
from include.juicefs_storage.tasks.context import pull, run_id
from include.juicefs_storage.tasks.runtime import open_vault

#: How often a volume's run, and a volume after it, is looked at, in seconds.
POLL_S = 15
LONGEST_WAIT_S = 14 * 86400
ACTIVE = ["queued", "running"]


def exists(*volume_runs: str, states: Sequence[str] | None = None) -> bool:
    """Return whether one of these runs is there, where wanted in one of these states."""
    ti: Any = get_current_context()["ti"]
    return bool(ti.get_dr_count(dag_id=SWITCH, run_ids=list(volume_runs), states=states))


def trigger(volume_run: str, conf: dict[str, Any]) -> NoReturn:
    """Start a run of `juicefs_storage_switch`; ends the task.

    This is what TriggerDagRunOperator raises. Its module imports the tables of Airflow's database, which would take
    longer than all that a DAG file may.

    Raises:
        NeedsHumanError: The DAG is paused: the run would wait forever.
    """
    ti: Any = get_current_context()["ti"]
    if ti.get_dag(SWITCH).is_paused:
        raise NeedsHumanError(
            f"DAG {SWITCH} is paused.", state="no run was started", next_step="unpause it, then clear this task"
        )
    raise DagRunTriggerException(
        trigger_dag_id=SWITCH, dag_run_id=volume_run, conf=conf, reset_dag_run=False, skip_when_already_exists=False,
        wait_for_completion=False, allowed_states=[], failed_states=[], poke_interval=0, deferrable=False,
    )  # fmt: skip


def run_state(volume_run: str) -> str:
    """Return the state of a volume's run."""
    ti: Any = get_current_context()["ti"]
    state = ti.get_dagrun_state(SWITCH, volume_run)
    # A plain string in the type hints, a member of an enum in fact.
    return str(getattr(state, "value", state))


def pull_of_run(volume_run: str, task_id: str, key: str = "return_value") -> Any:
    """Pull an XCom of a volume's run; None where there is none.

    Args:
        volume_run: The run's id.
        task_id: The task.
        key: The XCom's key.
    """
    ti: Any = get_current_context()["ti"]
    return ti.xcom_pull(dag_id=SWITCH, run_id=volume_run, task_ids=task_id, key=key)


def approved_plan() -> FleetPlan:
    """Read what was planned, and approved where approval is required.

    Raises:
        PermanentError: There is no plan.
    """
    found = pull("plan")
    if not found:
        raise PermanentError("This run has no plan.", next_step="clear plan with Downstream")
    return FleetPlan.model_validate(found)


def planned_or_none() -> FleetPlan | None:
    """Read what was planned, also where it was refused."""
    found = pull("plan", "planned")
    return FleetPlan.model_validate(found) if found else None


def _record_name() -> str:
    return f"{FLEET_PREFIX}{re.sub(r'[^A-Za-z0-9._-]+', '-', run_id())}"


def record_plan(planned: FleetPlan) -> None:
    """Keep the plan beside the backups before the first volume is touched: XComs go when their task is cleared."""
    vault = open_vault()
    if vault.load(_record_name()) is None:
        vault.save(_record_name(), planned.model_dump_json().encode())


def recorded_plan() -> FleetPlan | None:
    """Read the plan that this run has begun to carry out; None where it has not."""
    found = open_vault().load(_record_name())
    return FleetPlan.model_validate_json(found) if found else None
