"""The task that proves that a move is finished, and signs what it saw."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import BaseHook, TriggerRule

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.finish.certificate import Claim, Evidence, public_key_of, read_private_key, sign
from include.juicefs_storage.finish.idle import check_idle
from include.juicefs_storage.names import CERTIFICATE_CONN_ID
from include.juicefs_storage.switch.backup import Backup
from include.juicefs_storage.switch.checks import ok
from include.juicefs_storage.switch.findings import Finding, warning
from include.juicefs_storage.switch.marks import Mark
from include.juicefs_storage.switch.moved_back import check_setting
from include.juicefs_storage.tasks.context import mask, pull, push, run_id
from include.juicefs_storage.tasks.finish.run import FinishRun, two_stores
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.difference import missing_blocks
from include.juicefs_storage.volume.mount_pods import find_mount_path, running_mount_pods
from include.juicefs_storage.volume.setting import Setting
from include.juicefs_storage.volume.users import session_name, unknown_sessions


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
def certify() -> dict[str, Any] | None:
    """Prove that the move is finished, where `certify` asks for it, and sign the evidence (XCom `certificate`).

    Lists the old store, and compares the volume's own store with the metadata. **Changes** nothing.
    **Safe to clear**: yes. What is not as it must be fails the task, all of it in one message.
    """
    run = FinishRun()
    if not run.params.certify:
        return None
    setting = run.runtime.setting()
    mark, backup = run.last_move
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


def prove_finished(run: FinishRun, setting: Setting, mark: Mark, backup: Backup) -> list[Finding]:
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
    carriers, door = run.look(setting, ask_door=True)
    others = unknown_sessions(runtime.metadata.sessions(), map(find_mount_path, running_mount_pods(runtime.clusters)))
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
            f"every client with a session is a mount pod of {_which(runtime.clusters)}",
            [session_name(session) for session in others],
            "unmount them: what they were made with is not known here",
        ),
        check_idle(runtime.store_of(before, params.old_conn_id), setting, mark.at, params.idle_s)
        if two_stores(backup)
        else ok("old store", "the run copied nothing: it is the volume's own store, or had moved as a whole"),
        _claim(
            "blocks",
            f"all {difference.present} blocks that files refer to are on {setting.bucket}, by key and length",
            [f"{lacking} blocks are missing or cut: {'; '.join(difference.examples)}"] if lacking else [],
            "copy them from the old store (juicefs_storage_sync, plan=metadata)",
        ),
        *([ok("watch", seen["seen"])] if (seen := pull("watch")) else []),
        ok("backup", f"{backup.backup_id} of {backup.created_at:%Y-%m-%d %H:%M} UTC can be opened"),
    ]


def _claim(check: str, seen: str, against: list[str], remedy: str) -> Finding:
    """Make a finding of what was seen, or of what speaks against it."""
    return warning(check, "; ".join(against), remedy) if against else ok(check, seen)


def _which(clusters: Clusters) -> str:
    return f"these clusters: the first, {', '.join(clusters.more)}" if clusters.more else "this cluster"


def signing_key() -> str:
    """Read the private key that certificates are signed with."""
    key = BaseHook.get_connection(CERTIFICATE_CONN_ID).password or ""
    mask(key)
    return key
