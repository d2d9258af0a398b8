"""What each task proved, by what it left when it ran to its end: never by task states, which people can set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

#: Task -> the tasks whose changes it must have seen to prove anything; a key is a result that says "changed".
_AFTER_CHANGE: Mapping[str, tuple[tuple[str, str], ...]] = {
    "settle": (("write_setting", "written"),),
    "prove_clients": (("write_setting", "written"),),
    "prove_fresh_mount": (("write_setting", "written"),),
    "prove_no_restarts": (("write_setting", "written"), ("restart_csi", "restarted")),
    "wait_for_rollouts": (("restart_csi", "restarted"),),
    "settle_again": (("restore_setting", "restored"),),
    "prove_clients_on_old": (("restore_setting", "restored"),),
    "wait_for_rollouts_again": (("restart_csi_again", "restarted"),),
}
#: The proof of the blocks -> the proof of the clients that it must have begun after: what clients wrote on their way is
#: seen only from then on.
_BLOCKS_AFTER_CLIENTS = (
    ("prove_blocks", "prove_clients"),
    ("catch_up_late", "prove_clients"),
    ("prove_blocks_on_old", "prove_clients_on_old"),
    ("copy_back_late", "prove_clients_on_old"),
)


def looks_back_at(task: str) -> tuple[str, ...]:
    """List the tasks that this one must have run after, for what it proves to hold."""
    changes = [other for other, _ in _AFTER_CHANGE.get(task, ())]
    return (*changes, *(clients for blocks, clients in _BLOCKS_AFTER_CLIENTS if blocks == task))


#: The tasks that prove clients on the new store.
_PROVE_CLIENTS = ("prove_clients", "settle", "prove_no_restarts")


@dataclass(frozen=True)
class Evidence:
    """What a task left when it ran to its end. A task that is set to success by a person leaves none.

    Attributes:
        began_at: Of the try that ended well (UTC).
        ended_at: Of that try (UTC).
        plan: Identifies the plan that it carried out; empty where there was none.
        result: What it returned.
        seen: Task that it must run after -> when that one had ended, as it said itself, when this try began; None
            where it had not. Workers' clocks differ: only equality tells anything.
    """

    began_at: datetime
    ended_at: datetime
    plan: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    seen: Mapping[str, datetime | None] = field(default_factory=dict)

    @classmethod
    def of(cls, left: Mapping[str, Any], result: Any) -> Evidence:
        """Read the XComs of a task.

        Args:
            left: XCom `timing`, which a task pushes when it has run to its end.
            result: What the task returned.
        """
        return cls(
            datetime.fromisoformat(left["began_at"]),
            datetime.fromisoformat(left["applied_at"]),
            left.get("plan") or "",
            result if isinstance(result, Mapping) else {},
            {task: datetime.fromisoformat(at) if at else None for task, at in left.get("seen", {}).items()},
        )

    def began_after(self, task: str, other: Evidence) -> bool:
        """Return whether this try began after another task had ended as it did."""
        if task in self.seen:
            return self.seen[task] == other.ended_at
        return self.began_at >= other.ended_at  # left by an earlier version, which had the clocks alone


def unproven(tasks: Sequence[str], evidence: Mapping[str, Evidence], plan: str) -> dict[str, str]:
    """Return the tasks that did not prove what they are for, each with the reason.

    Args:
        tasks: In the order of the runbook.
        evidence: Task -> what it left.
        plan: Identifies the plan that the run carries out.
    """
    return {task: why for task in tasks if (why := _why_not(task, evidence, plan))}


def _why_not(task: str, evidence: Mapping[str, Evidence], plan: str) -> str:
    own = evidence.get(task)
    if own is None:
        return "left no evidence: it did not run to its end, or its state was set by hand"
    if own.plan != plan:
        return "carried out another plan than the one in the backup"
    for other, changed in _AFTER_CHANGE.get(task, ()):
        change = evidence.get(other)
        if change and change.result.get(changed) and not own.began_after(other, change):
            return f"ran before the last change by {other}"
    return ""


def stale_proofs_of_blocks(tasks: Sequence[str], evidence: Mapping[str, Evidence]) -> list[str]:
    """Return the proofs of blocks that are older than the proof of the clients, as after a clear of that proof alone.

    Args:
        tasks: Those of the way that is looked at.
        evidence: Task -> what it left.
    """
    return [
        blocks
        for blocks, clients in _BLOCKS_AFTER_CLIENTS
        if blocks in tasks
        and blocks in evidence
        and clients in evidence
        and not evidence[blocks].began_after(clients, evidence[clients])
    ]


def proven_clients(evidence: Mapping[str, Evidence]) -> frozenset[str]:
    """Return the UIDs of the mount pods that some task proved on the new store."""
    rows = [row for task in _PROVE_CLIENTS if task in evidence for row in evidence[task].result.get("clients", ())]
    return frozenset(row["uid"] for row in rows if row.get("uid"))
