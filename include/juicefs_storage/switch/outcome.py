"""How a run ended: worked out from the current state of the volume and from evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from include.juicefs_storage.switch.change import TWO_STORES, Change

RunOutcome = Literal[
    "switched",
    "reverted",
    "planned",
    "refused",
    "rejected",
    "failed",
    "held",
    "rolled back",
    "half rolled back",
    "moved on",
    "superseded",
    "unknown",
]
#: The outcomes of a run that did what it was for.
GREEN: frozenset[RunOutcome] = frozenset({"switched", "reverted", "planned"})
#: What each outcome means for the person who reads it.
RUN_MEANING: Mapping[RunOutcome, str] = {
    "switched": "Every client that was there is proven on the new store and no block is missing there.",
    "reverted": "The volume is on the store of the backup: every client that was there is proven and no block is "
    "missing.",
    "planned": "Dry run: nothing was changed. Trigger again with dry_run=false to carry the plan out.",
    "refused": "Nothing was changed. Remove what was refused, then trigger again.",
    "rejected": "The plan was not approved. Nothing was changed.",
    "failed": "The run stopped before the setting was written: the volume is where it was.",
    "held": "The run changed the setting or a Secret, did not prove everything after that, and left things as they "
    "are. Clear the failed task with Downstream to continue, or `decide` with Downstream to have the run "
    "judged again.",
    "rolled back": "A step failed; the volume is back on the old store, every client proven there.",
    "half rolled back": "A step failed and the rollback did not finish. A person must look: see the failed tasks.",
    "moved on": "Every step passed, but now the setting or a Secret does not name the new store: somebody changed it "
    "since. A person must look.",
    "superseded": "Another run has moved the volume since. This run changed nothing after that and left the volume "
    "where the other run put it.",
    "unknown": "Where the volume is could not be read. Clear `finalize` as soon as the metadata database, the cluster "
    "and the folder of backups answer.",
}

#: The same, where the clients keep their store.
_IN_ONE_STORE: Mapping[RunOutcome, str] = {
    "switched": "Every client that was there is proven to use the new {what}, and no block is missing.",
    "reverted": "The volume has the {what} of the backup: every client that was there is proven and no block is "
    "missing.",
    "rolled back": "A step failed; the volume has its old {what} again, and every client is proven.",
}
#: The outcomes that say of every client that it is proven.
_ALL_PROVEN: frozenset[RunOutcome] = frozenset({"switched", "reverted", "rolled back"})


def meaning_of(outcome: RunOutcome, accepted: Sequence[str], change: Change = TWO_STORES) -> str:
    """Say what an outcome means.

    Args:
        outcome: How the run ended.
        accepted: The clients that are no mount pods and were accepted as not proven.
        change: How the storage changes.
    """
    meaning = RUN_MEANING[outcome]
    if change.one_store:
        meaning = _IN_ONE_STORE.get(outcome, meaning).format(what=change.what)
    if outcome not in _ALL_PROVEN or not accepted:
        return meaning
    meaning = meaning.replace("Every client", "Every mount pod").replace("every client", "every mount pod")
    return f"{meaning} **Not proven**, and accepted by name: {', '.join(f'`{name}`' for name in accepted)}."


#: Follows the reason why a run that failed did not go back.
LEFT = (
    "So the run did not go back: the volume is on the new store. Clear the failed task with Downstream to continue "
    "there; once the old store serves again, clear `decide` with Downstream to go back."
)


@dataclass(frozen=True)
class Observed:
    """The volume as it is at the end of a run.

    Attributes:
        unreadable: What could not be read; empty where everything could.
        on_new: The setting names the new store and its keys.
        differs: What differs from the backup: the setting, Secrets, a write fence; empty where nothing does.
        not_on_new: The Secrets and clients that do not use the new store, each with what was found.
        clients: UID of every mount pod of the volume -> its name.
    """

    unreadable: str = ""
    on_new: bool = False
    differs: tuple[str, ...] = ()
    not_on_new: tuple[str, ...] = ()
    clients: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Progress:
    """How far a run came.

    Attributes:
        refused: A check refused, or no plan was made.
        dry_run: The run ends with its plan.
        rejected: The plan was not approved.
        backed_up: The run has a backup, so that it may have changed something.
        superseded_by: The backup of a run that moved the volume since; empty where there is none.
        went_back: The rollback was decided on, or had begun before.
        unproven: Tasks of the way forward that left no valid evidence, with the reason.
        unproven_back: Likewise, of the way back.
        proven_clients: UIDs of the mount pods that were proven on the new store.
        returns: The run goes back to a backup (`juicefs_storage_revert`).
    """

    refused: bool = False
    dry_run: bool = False
    rejected: bool = False
    backed_up: bool = False
    superseded_by: str = ""
    went_back: bool = False
    unproven: Mapping[str, str] | None = None
    unproven_back: Mapping[str, str] | None = None
    proven_clients: frozenset[str] = frozenset()
    returns: bool = False


def judge(observed: Observed, progress: Progress) -> tuple[RunOutcome, tuple[str, ...]]:
    """Work out how a run ended.

    Args:
        observed: The volume now.
        progress: What the run did and proved.

    Returns:
        The outcome, and what it is missing to be another, one line each.
    """
    if not progress.backed_up:
        return _untouched(progress), ()
    if progress.superseded_by:
        return "superseded", (f"the backup of the other run is {progress.superseded_by}",)
    unreadable = (observed.unreadable,) if observed.unreadable else ()
    if progress.went_back:
        if observed.differs and observed.on_new and not observed.not_on_new:
            return "held", _lines(progress.unproven_back)  # the rollback could not begin
        missing = (*_lines(progress.unproven_back), *observed.differs, *unreadable)
        return ("half rolled back" if missing else "rolled back"), missing
    if unreadable:
        return "unknown", unreadable
    return _forward(observed, progress)


def _untouched(progress: Progress) -> RunOutcome:
    if progress.refused:
        return "refused"
    if progress.dry_run:
        return "planned"
    return "rejected" if progress.rejected else "failed"


def _forward(observed: Observed, progress: Progress) -> tuple[RunOutcome, tuple[str, ...]]:
    strangers = [name for uid, name in (observed.clients or {}).items() if uid not in progress.proven_clients]
    missing = (
        *_lines(progress.unproven),
        *(f"client {name} is not among those that were proven" for name in strangers),
    )
    if missing:
        return ("held", (*missing, *observed.not_on_new)) if observed.differs else ("failed", missing)
    if not observed.on_new or observed.not_on_new:
        return "moved on", observed.not_on_new or ("the setting names another store",)
    return ("reverted" if progress.returns else "switched"), ()


def _lines(unproven: Mapping[str, str] | None) -> tuple[str, ...]:
    return tuple(f"{task} {why}" for task, why in (unproven or {}).items())


def failed_first(order: Sequence[str], states: Mapping[str, str], unproven: Mapping[str, str]) -> str:
    """Return the task that failed first, else the first that ended without evidence; empty where there is none.

    Args:
        order: The tasks in the order of the runbook.
        states: As Airflow has them.
        unproven: Tasks without valid evidence.
    """
    failed = next((task for task in order if states.get(task) == "failed"), "")
    return failed or next((task for task in order if task in unproven and states.get(task) == "success"), "")
