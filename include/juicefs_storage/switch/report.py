"""The report that ends every run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from include.juicefs_storage.failures import Failure
from include.juicefs_storage.markdown import bullets, counted
from include.juicefs_storage.records import Record
from include.juicefs_storage.switch.change import MEANING, TWO_STORES, Change
from include.juicefs_storage.switch.findings import Finding, findings_markdown
from include.juicefs_storage.switch.outcome import RunOutcome
from include.juicefs_storage.switch.plan import StorageView
from include.juicefs_storage.switch.prove_blocks import blocks_there

#: The result of a task that wrote the setting: when it had done so (UTC, ISO 8601).
WRITTEN_AT = "written_at"
#: Within how many seconds the runbook expects a client to use a new setting.
EXPECTED_S = 30
_WITHIN = f"within the {EXPECTED_S} s that the runbook expects"
_LATER = f"later than the {EXPECTED_S} s that the runbook expects"
_UNKNOWN = f"whether within the {EXPECTED_S} s that the runbook expects is not known, its log does not say"
#: What no run can see, and what ends it for good.
CLOSE_THE_DOOR = (
    (
        "A writer without a session (`juicefs gc --compact`, a machine that was suspended) may still write to the "
        "store that the clients have left. What it writes is missing on the new one."
    ),
    (
        "Withdraw the old key on that store, or let a write fence stay up there (`fence_conn_id`). Such a writer fails "
        "then and loses nothing."
    ),
)


#: The same, where only the keys change.
OLD_KEY = (
    "The store still takes the old key, unless it has been withdrawn. That no client uses it is proven above, by "
    "writes while it was refused or by the clients' logs alone; a writer without a session may use it. Withdraw it."
)
#: The same, where the store refuses it.
_OLD_KEY_REFUSED = "The store does not take the old key any more: nothing that has kept it can use the store."


class Report(Record):
    """What happened in a run, in the order in which a person asks.

    Attributes:
        failure: The task that failed first; None where none did.
        missing: What the run did not prove, one line each.
        approval: Who approved or rejected the plan.
        accepted: The clients that are no mount pods and were accepted as not proven.
        carriers: What carries other values than the setting at the end of the run, one line each.
        door: What that means.
        old_key_refused: The key in the backup opens the store that the volume was on no more, or that store is gone.
    """

    outcome: RunOutcome
    meaning: str
    failure: Failure | None = None
    missing: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    run_id: str
    volume: str | None
    before: StorageView | None
    after: StorageView | None
    change: Change = Change()
    setting_now: str | None
    backup_id: str | None
    approved_by: str | None
    approval: str
    findings: tuple[Finding, ...]
    states: dict[str, str]
    took_s: dict[str, float]
    proofs: tuple[str, ...]
    results: dict[str, dict[str, Any]]
    carriers: tuple[str, ...] = ()
    door: tuple[str, ...] = ()
    old_key_refused: bool = False

    def to_note(self) -> str:
        """Say how the run ended, in a line. The plugin puts the task that failed first before it."""
        what = [self.outcome, f"volume `{self.volume}`" if self.volume else ""]
        if self.before and self.after:
            what.append(f"from `{self.before.bucket}` to `{self.after.bucket}`")
        refused = sum(finding.level == "refusal" for finding in self.findings)
        refusals = f"Refusals: {refused}." if refused else ""
        accepted = f"Not proven, accepted by name: {counted(len(self.accepted), 'client')}." if self.accepted else ""
        more = [refusals, accepted, f"Backup: `{self.backup_id}`." if self.backup_id else ""]
        return " ".join(filter(None, [f"{', '.join(filter(None, what))}.", *more]))

    def to_error(self) -> str:
        """Say why the run is red: what failed first, what that means, what is missing."""
        lines = [f"{self.outcome}: {self.meaning}"]
        if self.failure:
            lines += self.failure.to_text()
        return "\n".join([*lines, *(f"- not proven: {line}" for line in self.missing)])

    def to_markdown(self) -> str:
        """Render the report for a person."""
        lines = [f"## {self.outcome.capitalize()}: volume `{self.volume or '?'}`"]
        if self.failure:
            lines += [self.failure.to_markdown(), ""]
            lines += [f"State at that time: {self.failure.state}.", ""] if self.failure.state else []
        lines += [self.meaning, ""]
        lines += ["Not proven:", *bullets(list(self.missing)), ""] if self.missing else []
        if self.before and self.after:
            lines += [
                "| | storage | bucket | access key |",
                "|---|---|---|---|",
                f"| before | {self.before.storage} | `{self.before.bucket}` | `{self.before.access_key}` |",
                f"| planned | {self.after.storage} | `{self.after.bucket}` | `{self.after.access_key}` |",
                "",
                f"{MEANING[self.change.kind]} The setting now names `{self.setting_now}`.",
                "",
            ]
        lines += [f"Backup: `{self.backup_id or 'none'}`. {self.approval}.", ""]
        if self.backup_id and self.outcome in {"switched", "reverted"}:
            lines += [self._undo(), ""]
        lines += ["### Proofs", *bullets(list(self.proofs)), ""]
        if self.outcome in {"switched", "reverted"}:
            lines += ["### To close the door", *bullets([*self.door, *self._open_doors()]), ""]
            lines += ["### What still carries other values", *bullets(list(self.carriers)), ""]
        lines += ["### Findings", *findings_markdown(self.findings), ""]
        lines += ["### Steps", "| task | state | seconds |", "|---|---|---|"]
        lines += [
            f"| {task} | {state} | {self.took_s.get(task, '')} |"
            for task, state in self.states.items()
            if state != "skipped"
        ]
        return "\n".join(lines)

    def _undo(self) -> str:
        revert = f"`juicefs_storage_revert` with `backup_id` = `{self.backup_id}`"
        if not self.old_key_refused or not self.before:
            return f"To undo it, at any time: {revert}."
        return (
            f"To undo it: the key in the backup does not open `{self.before.bucket}` any more, or nothing serves "
            f"there. Have that store take that key again, then {revert}; or go back with another key for that bucket "
            "(`juicefs_storage_switch`)."
        )

    def _open_doors(self) -> tuple[str, ...]:
        if self.change.kind == "keys":
            return (_OLD_KEY_REFUSED if self.old_key_refused else OLD_KEY,)
        return CLOSE_THE_DOOR if self.change.copies else ()


def accepted_in(planned: Iterable[str], results: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Name the clients that were accepted as not proven: those in the plan, and those that were there later.

    Args:
        planned: Those in the plan.
        results: Task id -> what it returned.
    """
    later = (results.get(task, {}).get("accepted", ()) for task in ("prove_clients", "prove_clients_on_old"))
    return tuple(sorted({*planned, *(name for names in later for name in names)}))


def accepted_lines(accepted: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say of each client that was accepted as not proven what was seen of it on the store that was left.

    Args:
        accepted: Their names.
        results: Task id -> what it returned.
    """
    late = results.get("copy_back_late") or results.get("catch_up_late") or {}
    if "late_writes" not in late:
        why = late.get("unseen") or "the store that the clients leave was not looked at afterwards"
        seen = f"nothing was seen of it: {why}"
    elif late["late_writes"]:
        seen = (
            f"{late['late_writes']} blocks were written to the store that the others had left, which it may have "
            "written; they were copied"
        )
    else:
        seen = (
            f"no new block was on the store that the others had left, {late['waited_s']} s after the last of them, "
            f"while clients took {late.get('slice_ids', 0)} slice ids; whether it wrote anything was not seen"
        )
    return [f"client `{name}` is **not proven**, which was accepted; {seen}" for name in accepted]


def proof_lines(results: Mapping[str, Mapping[str, Any]], change: Change = TWO_STORES) -> list[str]:
    """Say what the steps proved, a sentence each.

    Args:
        results: Task id -> what it returned.
        change: How the storage changes.
    """
    lines = []
    sentences = _IN_ONE_STORE if change.one_store else _SENTENCES
    for task, side, write in (
        ("prove_clients", "new", "write_setting"),
        ("prove_clients_on_old", "old", "restore_setting"),
    ):
        lines += _client_lines(task, results.get(task, {}), side, results.get(write, {}).get(WRITTEN_AT))
    if denied := results.get("prove_clients", {}).get("denied"):
        lines.append(f"{denied} clients wrote a block while the store refused the old key: none uses it any more")
    for task, text in sentences.items():
        # A task whose process died as it ended has left when it did so, and no result.
        if result := results.get(task):
            lines.append(text.format(**result, there=_blocks(result), what=change.what))
    lines += _damaged_lines(results)
    lines += _written_lines(results.get("write_setting", {}))
    lines += _pod_lines(results.get("prove_no_restarts", {}))
    for task, side in (("follow_writes", "old"), ("follow_writes_back", "new")):
        lines += _follow_lines(results.get(task, {}), side)
    for task in ("prove_no_restarts", "prove_blocks_on_old"):
        lines += _failed_lines(results.get(task, {}))
    for task in ("catch_up_late", "copy_back_late"):
        lines += _late_lines(results.get(task, {}))
    return [*lines, *_settle_lines(results.get("settle", {}))]


def _damaged_lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name blocks that were damaged before, which no client reads on either store."""
    keys = sorted({key for result in results.values() for key in result.get("damaged", ())})
    if not keys:
        return []
    named = ", ".join(f"`{key}`" for key in keys[:3])
    what = "their content does not match the checksum that JuiceFS wrote, and clients read them on neither store"
    return [f"**{len(keys)} blocks were damaged before this run** and were copied as they are ({named}): {what}"]


def _client_lines(task: str, result: Mapping[str, Any], side: str, written_at: str | None) -> list[str]:
    """Say by what each client was proven, and how long after the setting was written."""
    if "clients" in result and not result["clients"]:
        return [f"no client was there: none was proven on the {side} store"]
    return [
        f"client `{client['pod']}` on {client['node']} {PROVEN_BY[client.get('by') or 'block'].format(side=side)} "
        f"{_when(client, task, written_at)}{_WAS_STUCK if client.get('was_stuck') else ''}"
        for client in result.get("clients", ())
    ]


def _when(client: Mapping[str, Any], task: str, written_at: str | None) -> str:
    if not (written_at and client.get("at")):
        return f"{client['after_s']} s into `{task}`"
    proven_s = (datetime.fromisoformat(client["at"]) - datetime.fromisoformat(written_at)).total_seconds()
    proven = f"{proven_s:.0f} s after the setting was written"
    if (reloaded_s := client.get("reloaded_s")) is not None:
        held = _WITHIN if reloaded_s <= EXPECTED_S else _LATER
        return f"{proven}, which it had read after {reloaded_s:.0f} s: {held}"
    return f"{proven}: {_WITHIN if proven_s <= EXPECTED_S else _UNKNOWN}"


def _written_lines(result: Mapping[str, Any]) -> list[str]:
    """Say whether clients uploaded when the setting was written, and what another administrator changed meanwhile."""
    lines = [_quiet_line(quiet)] if (quiet := result.get("quiet")) else []
    if put_right := result.get("put_right"):
        lines.append(
            f"another administrator changed {', '.join(put_right)} of the setting while it was written; the new values "
            "were put back"
        )
    if lost := result.get("lost"):
        lines.append(
            f"another administrator changed {', '.join(lost)} of the setting while it was written, and that is lost: "
            "set it again with `juicefs config`"
        )
    return lines


def _quiet_line(quiet: Mapping[str, Any]) -> str:
    if quiet["quiet"]:
        return f"no client uploaded when the setting was written: that took {quiet['waited_s']} s"
    busy = "; ".join(f"`{pod}`: {load}" for pod, load in quiet["busy"].items()) or "none at the last look"
    return (
        f"`wait_for_quiet_s` was over after {quiet['waited_s']} s and the setting was written while clients uploaded: "
        f"{busy}"
    )


def _pod_lines(result: Mapping[str, Any]) -> list[str]:
    """Say what became of the pods that must not restart."""
    if not result:
        return []
    pods = f"{result['mount_pods']} mount pods and {result['business_pods']} business pods"
    if not (restarted := result["restarted"]):
        return [f"{pods}: same UIDs, 0 restarts"]
    listed = "; ".join(restarted)
    named = f"of {pods} these restarted or were replaced while the volume moved, which this run does to none: {listed}"
    return [f"{named}. Every client that is there now, and all {result['blocks']} blocks, were proven after that"]


def _follow_lines(result: Mapping[str, Any], side: str) -> list[str]:
    """Say what clients still wrote to the store that they were leaving."""
    lines = []
    if "slowest_s" in result:
        slowest = f", the slowest {result['slowest_s']} s after it was seen" if result["copied"] else ""
        lines.append(
            f"{result['copied']} blocks that clients still wrote to the {side} store while they moved were copied at "
            f"once{slowest}"
        )
    if problem := result.get("problem"):
        lines.append(
            f"at its end the following of the clients' writes failed, the later copies made up for it: {problem}"
        )
    return lines


def _failed_lines(result: Mapping[str, Any]) -> list[str]:
    """Say what the clients could not read or write at once, by their own count."""
    if "failed_requests" not in result:
        return []
    failed = [f"{number} in `{pod}`" for pod, number in result.get("failed_in", {}).items()]
    where = f": {', '.join(failed)}; each try counts" if failed else ""
    return [f"{result['failed_requests']} object requests failed in the clients while they moved{where}"]


def _blocks(result: Mapping[str, Any]) -> str:
    """Say which blocks a task proved, where it proved some."""
    return blocks_there(result.get("blocks", 0), result.get("lost_before", 0))


def _late_lines(result: Mapping[str, Any]) -> list[str]:
    """Say what was committed minutes after it was written."""
    if not result:
        return []
    if result.get("one_store"):
        return ["late commits need no wait: the clients keep their store"]
    if not result["waited_s"]:
        return ["late commits were not waited for: late_commit_s=0"]
    found = (
        f"{result['waited_s']} s after the last client had moved {result['copied']} more blocks were found and copied"
    )
    lines = [f"{found}; {_blocks(result)} that files then referred to were there"]
    if late := result.get("late_writes"):
        lines.append(
            f"**{late} blocks were written to the store that the clients had left, by a writer that no session "
            f"shows**, such as {'; '.join(result['late_examples'])}; they were copied. Find that writer"
        )
    if unseen := result.get("unseen"):
        lines.append(f"whether something still writes to the store that the clients left was not seen: {unseen}")
    return lines


def _settle_lines(result: Mapping[str, Any]) -> list[str]:
    """Say who may have written old values while the setting was guarded, and who still may."""
    lines = []
    if repaired := result.get("repaired"):
        pods = ", ".join(f"`{pod}`" for pod in result["wrote"]) or "none was seen"
        lines.append(
            f"put right while the setting was guarded: {'; '.join(repaired)}. "
            f"Mount pods that started with old values: {pods}"
        )
    if waiting := result.get("waiting"):
        pods = ", ".join(f"`{pod}`" for pod in waiting)
        lines.append(f"mount pods made with old values have not started, and may write them yet: delete {pods}")
    return lines


#: How a client was proven, by `ClientProof.by`.
PROVEN_BY: Mapping[str, str] = {
    "block": "wrote a block to the {side} store alone",
    "key": "wrote a block while the store knew the {side} key alone,",
    "read": "read a block that it had never read and that only the {side} store has,",
    "read_key": "read a block while the store knew the {side} key alone,",
    "log": "is proven by its log alone, since a block does not tell: it reloaded the {side} values",
    "start": "is proven by its start after the setting was written, since a block does not tell:",
}
_WAS_STUCK = ", when the setting had been written once more: it could not use it before"
_SENTENCES: Mapping[str, str] = {
    "copy_ahead": "{copied} blocks were copied before the setting was written",
    "catch_up": "{copied} more blocks that clients wrote to the old store while they moved were copied to the new one",
    "prove_blocks": "{there} that files refer to are on the new store",
    "prove_fresh_mount": "a fresh mount with an empty cache read, wrote and listed on the new store",
    "collect_diagnostics": "diagnostics of the failure are kept as `{diagnostics_id}`, "
    "see docs/rollback.md for how to read them",
    "copy_back": "{copied} blocks were copied back before the setting was restored",
    "copy_back_again": "{copied} blocks were copied back after the clients had returned",
    "prove_blocks_on_old": "{there} that files refer to are on the old store",
}
#: The same, where the clients keep their store.
_IN_ONE_STORE: Mapping[str, str] = {
    "copy_ahead": "nothing was copied: the clients keep their store",
    "prove_blocks": "{there} that files refer to are on the store",
    "prove_fresh_mount": "a fresh mount with an empty cache read, wrote and listed by the new {what}",
    "collect_diagnostics": _SENTENCES["collect_diagnostics"],
    "prove_blocks_on_old": "{there} that files refer to are on the store",
}
