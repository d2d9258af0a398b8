"""Go back to a backup: which one, and what the run that made it knew. The rest is the runbook of a switch."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Context, get_current_context

from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.ports import Vault
from include.juicefs_storage.switch.backup import Backup, backup_ids, read_backup
from include.juicefs_storage.switch.checks import refusal
from include.juicefs_storage.switch.marks import End, read_mark
from include.juicefs_storage.switch.params import RevertForm, resolve_revert_params
from include.juicefs_storage.switch.plan import StorageView
from include.juicefs_storage.tasks.context import log, pull, push
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.runtime import Runtime, open_vault

#: How many backups are offered at most, the newest first.
OFFERED = 30
#: How a run that made a backup may have ended, as it is marked beside the backup; the first that is there counts.
ENDS: tuple[End, ...] = ("rolled-back", "switched")
#: How much of a volume's UUID tells two volumes of one name apart.
_UUID_SHOWN = 8


def readable_backups(vault: Vault, volume: str | None = None) -> list[Backup]:
    """Read the backups in a vault, the newest first. One that cannot be read is logged and left out."""
    found = []
    for name in backup_ids(vault, volume):
        try:
            backup = read_backup(vault, name)
            StorageView.of(backup.setting.config)
            found.append(backup)
        except StorageSwitchError as error:
            log.warning("%s", error)
    return sorted(found, key=lambda backup: backup.created_at, reverse=True)


def offer(backups: Iterable[Backup], vault: Vault) -> str:
    """Format the backups as a table in Markdown. Keys are masked."""
    rows = []
    for backup in backups:
        setting = backup.setting
        there, left = StorageView.of(setting.config), backup.new.bucket if backup.target else "not recorded"
        rows.append(
            f"| `{backup.backup_id}` | {setting.name} ({setting.uuid[:_UUID_SHOWN]}) "
            f"| {backup.created_at:%Y-%m-%d %H:%M} UTC "
            f"| `{there.bucket}` {there.access_key} | `{left}` | {_ended(vault, backup.backup_id)} |"
        )
    head = "| backup | volume | made | goes back to | made before the move to | that run |"
    return "\n".join(["The newest first.", "", head, "|---|---|---|---|---|---|", *rows])


def _ended(vault: Vault, backup_id: str) -> str:
    """Say how the run of a backup ended."""
    try:
        return next((how for how in ENDS if read_mark(vault, backup_id, how)), "unfinished")
    except StorageSwitchError as error:
        log.warning("%s", error)
        return "not known"


class ChooseBackup(HITLOperator):
    """Ask which backup, where the param `backup_id` is empty; else answer at once.

    The trigger form cannot list the backups: it is built when the DAG file is parsed, which does no I/O.
    """

    def execute(self, context: Context) -> Any:
        """Offer what lies in the vault. A param that is wrong is left to resolve_params, which refuses it by name."""
        try:
            form = RevertForm.validated(context["params"])
            if form.backup_id:
                return {"chosen_options": [form.backup_id]}
            with missing_connections_explained():
                vault = open_vault()
                backups = readable_backups(vault)[:OFFERED]
                body = offer(backups, vault)
        except StorageSwitchError as error:
            log.warning("%s", error)
            return None
        if not backups:
            return None
        self.options = [backup.backup_id for backup in backups]
        self.body = body
        return super().execute(context)

    def validate_chosen_options(self, chosen_options: list[str]) -> None:
        """Accept the answer: the API server has compared it with the offer, which this process has not seen."""


def choose_backup() -> HITLOperator:
    """Choose the backup to go back to: the param, or a human's choice among those that are there."""
    return ChooseBackup(
        task_id="choose_backup",
        subject="Which backup should the volume go back to?",
        options=["(the backups that are there)"],
        response_timeout=timedelta(hours=24),
        execution_timeout=None,
        notifiers=[Notify("asks which backup to go back to", source="choose_backup")],
        doc_md="Where the param `backup_id` is empty: offer the known backups, the newest first, and wait up to 24 "
        "hours. **Changes** nothing. **Safe to clear**: yes, with Downstream; it asks again.",
    )


def choose_and_resolve() -> Any:
    """Wire `choose_backup`, then `resolve_params`, which is returned."""
    return choose_backup() >> resolve_params()


@runbook_task
def resolve_params() -> dict[str, Any]:
    """Validate the params, read the backup, and take from the run that made it what the form leaves open.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    try:
        with missing_connections_explained():
            return resolve(dict(get_current_context()["params"]), pull("choose_backup"), open_vault())
    except StorageSwitchError as error:
        push("findings", [refusal("resolve_params", error.problem, error.next_step).model_dump()])
        raise


def resolve(given: dict[str, Any], chosen: dict[str, Any] | None, vault: Vault) -> dict[str, Any]:
    """Resolve the params of the run from the form, the answer of choose_backup and the backup.

    Args:
        given: The form's values.
        chosen: What choose_backup answered; None: it did not ask.
        vault: The folder of backups.

    Raises:
        PermanentError: A param is refused, there is no such backup, or it is another volume's.
    """
    form = RevertForm.validated(given)
    name = form.backup_id or next(iter((chosen or {}).get("chosen_options", ())), None)
    if not name:
        raise PermanentError(
            "There is no readable backup in the folder of connection `juicefs_backup`.",
            next_step="every switch makes one; give the id of one in `backup_id` if you know it",
        )
    backup = read_backup(vault, name)
    bucket = backup.setting.config.endpoint_and_bucket[1]
    params = resolve_revert_params(form, name, backup.params, bucket, still_there=False)
    now = Runtime(params).setting()
    if now.uuid != backup.setting.uuid:
        raise PermanentError(
            f"Backup {name} is of volume {backup.setting.name} ({backup.setting.uuid}); "
            f"the metadata database holds {now.name} ({now.uuid}).",
            next_step="correct `namespace`, `secret_name` or `meta_conn_id`, or choose another backup",
        )
    still_there = backup.target is not None and now.bucket == backup.new.bucket
    return resolve_revert_params(form, name, backup.params, bucket, still_there=still_there).model_dump()
