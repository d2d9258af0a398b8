"""Is a volume ready to be switched today? What a rehearsal finds out, and since when it has been so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.ports import Vault
from include.juicefs_storage.records import Record
from include.juicefs_storage.switch.backup import Backup, backup_ids, read_backup
from include.juicefs_storage.switch.checks import ok, refusal, warning
from include.juicefs_storage.switch.findings import Finding, findings_markdown
from include.juicefs_storage.volume.clusters import name_in
from include.juicefs_storage.volume.setting import Setting


class Readiness(Record):
    """The result of one rehearsal of one volume: plain data, for an asset event and for people.

    Attributes:
        volume: The volume's name in the registry.
        ready: Whether a switch would be planned now.
        since: Since when it has been as it is, ready or not (UTC).
        rehearsed_at: When this was found out (UTC).
        blockers: What forbids the switch, each with its remedy.
        warnings: How many warnings there are.
        backup_id: The newest backup, proven readable; None where there is none.
        backup_at: When it was made (UTC).
    """

    volume: str
    ready: bool
    since: datetime
    rehearsed_at: datetime
    blockers: tuple[str, ...]
    warnings: int
    backup_id: str | None
    backup_at: datetime | None
    findings: tuple[Finding, ...]

    def to_markdown(self) -> str:
        """Render one volume of the report."""
        state = "ready" if self.ready else "**not ready**"
        backup = f"`{self.backup_id}` of {_minute(self.backup_at)}" if self.backup_at else "none yet"
        lines = [f"### `{self.volume}`: {state} since {_minute(self.since)}", f"Newest backup: {backup}.", ""]
        return "\n".join([*lines, *findings_markdown(self.findings)])

    def event(self) -> dict[str, Any]:
        """Return what the asset event carries. The findings stay with the run."""
        return self.model_dump(mode="json", exclude={"findings"})


def _minute(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else "never"


def judge(
    volume: str,
    findings: Sequence[Finding],
    backup: Backup | None,
    *,
    before: Sequence[Mapping[str, Any]],
    now: datetime,
) -> Readiness:
    """Put the findings of a rehearsal together.

    Args:
        volume: The volume's name in the registry.
        findings: What the checks found.
        backup: The newest backup.
        before: Earlier events, the latest first, of this and of other volumes.
        now: When the rehearsal was made.
    """
    blockers = tuple(
        f"{finding.check}: {finding.message} Remedy: {finding.remedy}"
        for finding in findings
        if finding.level == "refusal"
    )
    last = next((event for event in before if event.get("volume") == volume), None)
    same = last is not None and last.get("ready") is (not blockers)
    return Readiness(
        volume=volume,
        ready=not blockers,
        since=datetime.fromisoformat(str(last["since"])) if last and same else now,
        rehearsed_at=now,
        blockers=blockers,
        warnings=sum(finding.level == "warning" for finding in findings),
        backup_id=backup.backup_id if backup else None,
        backup_at=backup.created_at if backup else None,
        findings=tuple(findings),
    )


def rehearse_restore(vault: Vault, setting: Setting) -> tuple[list[Finding], Backup | None]:
    """Read every backup of a volume, and restore the newest one into a scratch place as a revert would.

    A file that cannot be read is a warning: it may be another volume's of the same name, and blocks no run.

    Args:
        vault: Where the backups lie.
        setting: The volume's setting now.

    Returns:
        The findings, and the newest backup.
    """
    check, findings = "backup", []
    backups = []
    for name in backup_ids(vault, setting.name):
        try:
            backup = read_backup(vault, name)
            if backup.setting.uuid == setting.uuid:
                backups.append(backup)
        except StorageSwitchError as error:
            findings.append(warning(check, f"{name}: {error.problem}", f"{error.next_step}; or move the file away"))
    if not backups:
        return [*findings, warning(check, "There is no backup that can be read.", "the next switch makes one")], None
    newest = max(backups, key=lambda backup: backup.created_at)
    try:
        problems = list(_differences(newest, setting))
    except StorageSwitchError as error:
        problems = [error.problem]
    findings += [
        refusal(check, f"Backup {newest.backup_id} cannot be gone back to: {problem}", "keep an older one at hand")
        for problem in problems
    ]
    if not problems:
        message = f"{len(backups)} readable; the newest, {newest.backup_id}, was restored into a scratch place"
        findings.append(ok(check, message))
    return findings, newest


def _differences(backup: Backup, setting: Setting) -> Iterator[str]:
    """Restore a backup into a scratch copy of the setting, in memory; tell where it is not what the backup says."""
    recorded = backup.setting
    # What a revert would put into the row, made and read again here: keys are in it, so it touches no disk.
    restored = Setting(setting.with_storage_of(recorded).raw)
    if not restored.uses(recorded.config):
        yield f"restoring it would give bucket {restored.bucket}, it holds {recorded.bucket}."
    if restored.with_storage_of(setting).raw != setting.raw or restored.name != setting.name:
        yield "restoring it would change more than the storage."
    changed = backup.plan.secrets if backup.plan else ()
    kept = {(cluster, name) for cluster, secrets in backup.secrets_by_cluster.items() for name in secrets}
    if missing := {name_in(*one) for one in {(change.cluster, change.name) for change in changed} - kept}:
        yield f"it lacks Secrets {', '.join(sorted(missing))}."
