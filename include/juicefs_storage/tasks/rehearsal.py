"""The scheduled dry run over the registered volumes: is each of them ready to be switched?"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from airflow.sdk import Asset, TriggerRule, get_current_context
from airflow.sdk.observability import stats

from include.juicefs_storage import names
from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.switch.backup import Backup
from include.juicefs_storage.switch.checks import ok, refusal
from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.switch.moved_back import CHECK as SETTING
from include.juicefs_storage.switch.moved_back import check_setting
from include.juicefs_storage.switch.params import RehearsalParams, resolve_switch_params
from include.juicefs_storage.switch.readiness import Readiness, judge, rehearse_restore
from include.juicefs_storage.switch.way_back import WayBack
from include.juicefs_storage.tasks.context import log, push, why_it_failed
from include.juicefs_storage.tasks.metrics import gauge
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.registry import read_registry
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch.check import CHECK_FUNCTIONS
from include.juicefs_storage.tasks.switch.plan import make_plan

#: One event for each volume and rehearsal; plugins/juicefs_storage_plugin.py shows the last of each volume.
READINESS = Asset(names.READINESS)


@runbook_task
def list_volumes() -> list[str]:
    """List the registered volumes that name a target; only the one in param `volume`, where that is given.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    only = RehearsalParams.validated(get_current_context()["params"]).volume
    registry = read_registry()
    if only is not None and only not in registry:
        raise PermanentError(
            f"Param `volume`: {only!r} is not in include/volumes.yaml; registered: {', '.join(registry) or 'none'}.",
            next_step="register the volume, or leave `volume` empty",
        )
    return [
        name
        for name, entry in registry.items()
        if only in (None, name) and (entry.get("target_conn_id") or entry.get("target_bucket"))
    ]


@runbook_task(
    map_index_template="{{ task.op_kwargs['volume'] }}",
    inlets=[READINESS],
    outlets=[READINESS],
    max_active_tis_per_dagrun=4,
)
def rehearse(volume: str) -> dict[str, Any]:
    """Make every check of a dry run, then the plan; restore the newest backup into a scratch place. One volume.

    The result is an event of the asset `juicefs_storage_readiness`; it names what blocks a switch, and since when.
    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    context: Any = get_current_context()
    events = context["inlet_events"][READINESS].ascending(False).limit(names.READINESS_LOOK_BACK)
    earlier = [event.extra for event in events]
    readiness = rehearse_volume(volume, read_registry(), earlier)
    context["outlet_events"][READINESS].extra = readiness.event()
    gauge("ready", readiness.ready, volume)
    gauge("rehearsed_at_seconds", readiness.rehearsed_at.timestamp(), volume)
    push("markdown", readiness.to_markdown())
    return readiness.model_dump(mode="json")


def rehearse_volume(volume: str, registry: dict[str, dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> Readiness:
    """Make the dry run of one volume. Whatever goes wrong is a finding.

    Args:
        volume: Its name in the registry.
        registry: include/volumes.yaml.
        earlier: Earlier events of the asset, the latest first.
    """
    findings: list[Finding] = []
    backup: Backup | None = None
    try:
        runtime = Runtime(resolve_switch_params({"volume": volume}, registry))
    except PermanentError as error:
        findings = [refusal("resolve_params", error.problem, error.next_step)]
    else:
        for name, check in CHECK_FUNCTIONS.items():
            findings += _attempt(name, lambda check=check: check(runtime))
        moved = _attempt(SETTING, lambda: check_setting(runtime.vault, runtime.setting()))
        # One line for whoever has metrics: 1 while something has written the setting since the last run.
        stats.gauge(f"juicefs_storage.setting_moved.{volume}", int(any(row.level == "refusal" for row in moved)))
        findings += moved
        kept: list[Backup | None] = []
        findings += _attempt("backup", lambda: _restored(runtime, kept))
        backup = kept[0] if kept else None
        if backup:
            findings += _attempt("way back", lambda: _way_back(runtime, backup))
        if not any(finding.level == "refusal" for finding in findings):
            findings += _attempt("plan", lambda: list(make_plan(runtime, [], None).refusals))
    return judge(volume, findings, backup, before=earlier, now=datetime.now(UTC))


def _restored(runtime: Runtime, kept: list[Backup | None]) -> list[Finding]:
    findings, newest = rehearse_restore(runtime.vault, runtime.setting())
    kept.append(newest)
    return findings


def _way_back(runtime: Runtime, backup: Backup) -> list[Finding]:
    """Make the plan that break-glass would carry out with the newest backup, without carrying it out."""
    plan = WayBack(backup, runtime.clusters, runtime.metadata, runtime.params.secret_name).plan()
    changes = [f"{len(plan.secrets)} Secrets", *(["the setting"] if plan.setting else [])]
    message = (
        f"break-glass with {backup.backup_id} would write {', '.join(changes)} and move {len(plan.clients)} clients"
    )
    return [ok("way back", message)]


def _attempt(name: str, check: Any) -> list[Finding]:
    """Make a check. One that could not be made, for whatever reason, is a refusal: it hides no other one."""
    try:
        with missing_connections_explained():
            found: list[Finding] = check()
    except StorageSwitchError as error:
        return [refusal(name, error.problem, error.next_step)]
    except Exception as error:  # noqa: BLE001  a client's own error in one check must not hide the others
        log.exception("%s could not be made.", name)
        return [refusal(name, f"{name} could not be made: {type(error).__name__}.", "see the log of this task")]
    return found


@runbook_task(
    trigger_rule=TriggerRule.ALL_DONE, retries=0, on_failure_callback=Notify("a volume is not ready to be switched")
)
def finalize(volumes: list[str] | None, rehearsed: Sequence[dict[str, Any] | None] | None) -> dict[str, Any]:
    """Write the report; fail unless every volume was rehearsed and is ready.

    **Changes** nothing. **Safe to clear**: yes. The report is XCom `report`, as Markdown `markdown`, as a line `note`.
    """
    if volumes is None:
        problem = "The volumes to rehearse are not known."
        push("markdown", "\n".join(["## Not rehearsed", *why_it_failed(), f"{problem} Nothing was changed."]))
        push("report", {"ready": [], "blocked": [problem]})
        push("note", "not rehearsed: the volumes are not known.")
        raise PermanentError(problem, next_step="see the log of list_volumes")
    found = {row["volume"]: Readiness.model_validate(row) for row in rehearsed or () if row}
    blocked = [f"{name}: {line}" for name in found for line in found[name].blockers]
    unknown = [name for name in volumes if name not in found]
    blocked += [f"{name}: was not rehearsed; see the log of its task." for name in unknown]
    head = f"## {len(volumes)} registered volumes, {sum(row.ready for row in found.values())} ready"
    rest = [row.to_markdown() for row in sorted(found.values(), key=lambda row: (row.ready, row.volume))]
    push("markdown", "\n\n".join([head, *(f"### `{name}`: **not rehearsed**" for name in unknown), *rest]))
    report = {"ready": sorted(name for name, row in found.items() if row.ready), "blocked": blocked}
    moved = sorted(name for name in found if any(line.startswith(SETTING) for line in found[name].blockers))
    # The first words of a notification.
    alarm = {"outcome": f"the setting of {', '.join(moved)} moved since the last switch"} if moved else {}
    push("report", report | alarm)
    push("note", f"{len(report['ready'])} of {len(volumes)} volumes ready to be switched.")
    if blocked:
        raise PermanentError("Not ready:\n" + "\n".join(f"- {line}" for line in blocked), state="nothing was changed")
    return report
