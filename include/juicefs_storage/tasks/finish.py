"""The tasks of `juicefs_storage_finish`: find what carries other values, replace mount pods, report."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from airflow.sdk import BaseHook, TriggerRule, get_current_context

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.finish.certificate import Claim, Evidence, public_key_of, read_private_key, sign
from include.juicefs_storage.finish.idle import check_idle
from include.juicefs_storage.finish.params import FinishParams, resolve_finish_params
from include.juicefs_storage.finish.plan import FinishPlan, FinishReport, in_order
from include.juicefs_storage.finish.refresh import Refresh, Refreshed
from include.juicefs_storage.names import CERTIFICATE_CONN_ID
from include.juicefs_storage.switch.backup import Backup, read_backup
from include.juicefs_storage.switch.checks import check_door, check_old_key, ok
from include.juicefs_storage.switch.findings import Finding, findings_markdown, warning
from include.juicefs_storage.switch.lease import check_leases
from include.juicefs_storage.switch.marks import Mark
from include.juicefs_storage.switch.moved_back import check_setting, last_move
from include.juicefs_storage.tasks.approval import require_second_person
from include.juicefs_storage.tasks.context import log, mask, pull, push, run_id, why_it_failed
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.registry import read_registry
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.runtime import VolumeRuntime
from include.juicefs_storage.tasks.switch.run import volume_leases
from include.juicefs_storage.volume.canary import canary_name
from include.juicefs_storage.volume.carriers import Carrier, find_carriers
from include.juicefs_storage.volume.difference import missing_blocks
from include.juicefs_storage.volume.mount_pods import find_mount_path, running_mount_pods
from include.juicefs_storage.volume.setting import Setting
from include.juicefs_storage.volume.users import session_name, unknown_sessions

_REPLACED = "replaced"


@runbook_task
def resolve_params() -> dict[str, Any]:
    """Validate the params and fill in what the registry knows about the volume.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    return resolve_finish_params(dict(get_current_context()["params"]), read_registry()).model_dump()


class _Run:
    """What the tasks of a run share."""

    def __init__(self) -> None:
        given = pull("resolve_params")
        if not given:
            raise PermanentError(
                "The params of this run were not validated.", next_step="clear resolve_params with Downstream"
            )
        self.params = FinishParams.model_validate(given)
        self.runtime = VolumeRuntime(self.params)

    def refresh(self, setting: Setting) -> Refresh:
        """Return the step that replaces a mount pod."""
        config = self.runtime.source(setting)
        return Refresh(
            self.runtime.volume_pods(setting),
            config,
            self.runtime.store_of(config, self.params.store_conn_id),
            canary_name(run_id()),
            time.monotonic,
            time.sleep,
            volume_leases(self.runtime, setting.uuid, needs_all=True).confirm,
        )

    @cached_property
    def moved(self) -> tuple[Mark, Backup] | None:
        """The last run that moved the volume: how it is marked, and its backup; None where no run is known."""
        setting = self.runtime.setting()
        try:
            if found := last_move(self.runtime.vault, setting):
                return found[0], read_backup(self.runtime.vault, found[1])
        except StorageSwitchError as error:
            log.warning("Which store the volume has left is not known: %s", error.problem)
        return None

    def look(self, setting: Setting) -> tuple[list[Carrier], list[Finding]]:
        """Find what carries other values than the setting, and what that means."""
        pods, now = self.runtime.volume_pods(setting), self.runtime.source(setting)
        left = self.runtime.source(self.moved[1].setting) if self.moved else None
        carriers = find_carriers(pods, self.params.secret_name, now, left=[left.bucket] if left else [])
        if left is None:
            unknown = "no backup says which store the volume has left"
            found = (
                ok("door", "nothing carries other values") if not carriers else warning("door", unknown, "ask there")
            )
            return carriers, [found]
        try_storage = self.runtime.try_storage
        return carriers, [*check_door(carriers, left, try_storage), check_old_key(left, try_storage)]


@runbook_task
def plan() -> dict[str, Any]:
    """Find everything that carries other values than the setting, and write down which mount pods are replaced.

    Reads the setting, the Secrets, pods, workloads and PersistentVolumes; juicefs opens the store that the volume has
    left with the keys that a pod would have that restarts. **Changes** nothing. **Safe to clear**: yes, with
    Downstream.
    """
    run = _Run()
    setting = run.runtime.setting()
    carriers, door = run.look(setting)
    lease = check_leases(volume_leases(run.runtime, setting.uuid, needs_all=True))
    findings = [*check_setting(run.runtime.vault, setting), *lease, *door]
    if refused := [finding for finding in findings if finding.level == "refusal"]:
        push("markdown", "\n".join(["## Refused", *findings_markdown(findings)]))
        lines = "\n".join(f"{finding.message} Remedy: {finding.remedy}" for finding in refused)
        raise PermanentError(lines, state="nothing was changed")
    stale = {carrier.name for carrier in carriers if carrier.kind == "mount pod"}
    mounts = [mount for mount in run.runtime.volume_pods(setting).mounts() if mount.name in stale]
    planned = FinishPlan(
        volume=setting.name,
        uuid=setting.uuid,
        bucket=setting.bucket,
        carriers=tuple(carrier.line for carrier in carriers),
        mount_pods=in_order(mounts),
        refresh=run.params.refresh_mount_pods,
        most_pods=run.params.most_pods,
        findings=tuple(findings),
    )
    push("markdown", planned.to_markdown())
    push("subject", f"{planned.title}?")
    return planned.model_dump(mode="json")


@runbook_task(kind="branch")
def choose_path() -> str:
    """End here in a dry run, or where there is nothing to do; else continue, through approval where required.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    params, planned = _Run().params, FinishPlan.model_validate(pull("plan"))
    if params.dry_run or not (planned.chosen or params.certify):
        return "finalize"
    if not planned.chosen:
        return "certify"
    require_second_person(asked=params.require_approval)
    return "approve" if params.require_approval else "refresh_mount_pods"


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS, retries=0)
def refresh_mount_pods() -> list[dict[str, Any]]:
    """Replace the planned mount pods one after the other, and prove each: it writes a block, and the store has it.

    **Changes** mount pods, by the driver's own smooth upgrade; business pods go on, and their UIDs and restarts are
    compared. Stops at the first that is not as before. **Safe to clear**: yes. What was replaced is left alone.
    """
    run, planned = _Run(), FinishPlan.model_validate(pull("plan"))
    setting = run.runtime.setting()
    if (setting.uuid, setting.bucket) != (planned.uuid, planned.bucket):
        raise NeedsHumanError(
            f"The setting names {setting.bucket}, the plan was made for {planned.bucket}.",
            state="nothing was changed",
            next_step="trigger the DAG again, and look at its finding `setting`",
        )
    lease = volume_leases(run.runtime, setting.uuid, needs_all=True)
    lease.acquire()
    replaced: list[Refreshed] = []
    with lease.kept_renewed():
        for mount in planned.chosen:
            done = run.refresh(setting).apply(mount, pause_s=run.params.pause_s)
            if done is None:
                log.info("%s was replaced before.", mount.name)
                continue
            replaced.append(done)
            push(_REPLACED, [row.model_dump() for row in replaced])
    return [row.model_dump() for row in replaced]


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
def certify() -> dict[str, Any] | None:
    """Prove that the move is finished, where `certify` asks for it, and sign the evidence (XCom `certificate`).

    Lists the old store, and compares the volume's own store with the metadata. **Changes** nothing.
    **Safe to clear**: yes. What is not as it must be fails the task, all of it in one message.
    """
    run = _Run()
    if not run.params.certify:
        return None
    setting = run.runtime.setting()
    if run.moved is None:
        raise PermanentError(
            "No run has moved this volume, or its backup cannot be read: there is no move to certify.",
            next_step="see the log; put the key of the backups back (docs/backups.md)",
        )
    mark, backup = run.moved
    findings = prove_finished(run, setting, mark, backup)
    push("findings", [finding.model_dump() for finding in findings])
    if open_points := [finding for finding in findings if finding.level != "ok"]:
        lines = "\n".join(f"- {row.check}: {row.message} Remedy: {row.remedy}" for row in open_points)
        raise NeedsHumanError(f"Not certified:\n{lines}", state="nothing was changed", next_step="see docs/finish.md")
    evidence = Evidence(
        volume=setting.name,
        uuid=setting.uuid,
        bucket=setting.bucket,
        left=backup.setting.bucket,
        moved_at=mark.at,
        backup_id=backup.backup_id,
        run_id=run_id(),
        at=datetime.now(UTC),
        claims=tuple(Claim(what=finding.check, seen=finding.message) for finding in findings),
    )
    key = read_private_key(signing_key())
    push("certificate", sign(evidence, key))
    return {"public_key": public_key_of(key), "claims": len(evidence.claims)}


def prove_finished(run: _Run, setting: Setting, mark: Mark, backup: Backup) -> list[Finding]:
    """Make every proof that a certificate rests on. Reads only.

    Args:
        run: The run.
        setting: The volume's setting.
        mark: How the run that moved the volume is marked.
        backup: Of that run; it was opened just now.

    Raises:
        StorageSwitchError: The cluster, the metadata or a store cannot be read.
    """
    runtime, params = run.runtime, run.params
    carriers, door = run.look(setting)
    others = unknown_sessions(runtime.metadata.sessions(), map(find_mount_path, running_mount_pods(runtime.cluster)))
    before, now = runtime.source(backup.setting), runtime.source(setting)
    difference = missing_blocks(runtime.metadata, setting, runtime.store_of(now, params.store_conn_id))
    lacking = difference.missing + difference.different
    return [
        *check_setting(runtime.vault, setting),
        *door,
        _claim(
            "carriers", "nothing carries other values", [carrier.line for carrier in carriers], "see docs/finish.md"
        ),
        _claim(
            "clients",
            "every client with a session is a mount pod of this cluster",
            [session_name(session) for session in others],
            "unmount them: what they were made with is not known here",
        ),
        check_idle(runtime.store_of(before, params.old_conn_id), setting, mark.at, params.idle_s),
        _claim(
            "blocks",
            f"all {difference.present} blocks that files refer to are on {setting.bucket}, by key and length",
            [f"{lacking} blocks are missing or cut: {'; '.join(difference.examples)}"] if lacking else [],
            "copy them from the old store (juicefs_storage_sync, plan=metadata)",
        ),
        ok("backup", f"{backup.backup_id} of {backup.created_at:%Y-%m-%d %H:%M} UTC can be opened"),
    ]


def _claim(check: str, seen: str, against: list[str], remedy: str) -> Finding:
    """Make a finding of what was seen, or of what speaks against it."""
    return warning(check, "; ".join(against), remedy) if against else ok(check, seen)


def signing_key() -> str:
    """Read the private key that certificates are signed with."""
    key = BaseHook.get_connection(CERTIFICATE_CONN_ID).password or ""
    mask(key)
    return key


@runbook_task(trigger_rule=TriggerRule.ALL_DONE, retries=0)
def finalize() -> dict[str, Any]:
    """Write the report: what was replaced, what still carries other values, and what is left to a person.

    The run is green only if every mount pod of the plan carries the setting's values now. Releases the volume's Lease.
    **Changes** nothing. **Safe to clear**: yes. The report is XCom `report`, as Markdown `markdown`, in a line `note`.
    """
    planned = FinishPlan.model_validate(found) if (found := pull("plan")) else None
    problem = "\n".join(why_it_failed())
    replaced = [Refreshed.model_validate(row) for row in pull("refresh_mount_pods", _REPLACED) or ()]
    carriers: list[Carrier] = []
    door: list[Finding] = []
    outcome = "failed"
    if planned:
        try:
            run = _Run()
            setting = run.runtime.setting()
            volume_leases(run.runtime, setting.uuid, needs_all=True).release()
            carriers, door = run.look(setting)
            outcome, left = _judge(run, planned, setting)
        except StorageSwitchError as error:
            left = f"What is there now is not known: {error.problem}"
        problem = problem or left
    certified = pull("certify") or {}
    report = FinishReport(
        outcome="failed" if problem else outcome,
        run_id=run_id(),
        volume=planned.volume if planned else None,
        problem=problem,
        replaced=tuple(replaced),
        carriers=tuple(carrier.line for carrier in carriers),
        door=tuple(door),
        public_key=certified.get("public_key", ""),
    )
    push("report", report.model_dump(mode="json"))
    push("markdown", report.to_markdown())
    push("note", report.to_note())
    if report.outcome == "failed":
        raise PermanentError(problem or "Nothing was planned.", next_step="see the report")
    return {"outcome": report.outcome}


def _judge(run: _Run, planned: FinishPlan, setting: Setting) -> tuple[str, str]:
    """Return the outcome by the pods as they are now, and what is wrong where it is none."""
    if run.params.dry_run:
        return "planned", ""
    if not planned.chosen:
        done = "certified" if pull("certify") else "nothing to do"
        return done if not planned.mount_pods else "named", ""
    step = run.refresh(setting)
    now = {mount.name: step.observe(mount) for mount in planned.chosen}
    if behind := [name for name, pod in now.items() if pod is None or step.is_stale(pod)]:
        return "failed", f"These mount pods were not replaced, or nothing serves their mounts: {', '.join(behind)}."
    return "refreshed", ""


#: Every run ends with `finalize`: its end is the news.
_NOTIFY = Notify("ended")
finalize_and_notify = finalize.override(on_success_callback=_NOTIFY, on_failure_callback=_NOTIFY)
