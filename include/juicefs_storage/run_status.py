"""What is so in a run now, in words for a person: decided from the states of its tasks and what they left.

The plugin reads the rows and shows the words. Imports nothing heavy: every process that loads plugins loads this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from include.juicefs_storage.failures import LAST, NO_ERROR, SEE_LOG, Failure, first_failure, unreported_end
from include.juicefs_storage.markdown import counted
from include.juicefs_storage.names import FINISH, FLEET, REHEARSAL, SYNC, task_url
from include.juicefs_storage.run_state import ORDER, QUEUED, Run, Step
from include.juicefs_storage.run_steps import BESIDE, FINISH_NOT_NOW, HUMAN, ROLLBACK, STEPS

_TO_ABORT = "To abort, mark the run as failed."
_ANSWER_WITHIN = timedelta(hours=24)
#: Waits that end at a known time: the tasks that it is counted from, and the param with the seconds.
_WAITS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "catch_up_late": (("prove_clients", "settle"), "late_commit_s"),
    "copy_back_late": (("prove_clients_on_old", "settle_again"), "late_commit_s"),
}
#: What to do after each end that is red, as docs/re-running.md has it.
_AFTER = {
    "refused": "Remove what was refused, then trigger a new run. Or clear the failed check with Downstream.",
    "rejected": "Trigger a new run.",
    "failed": "Clear the failed task with Downstream, or trigger a new run.",
    "held": "Clear the failed task with Downstream to go on. To go back: a new run of juicefs_storage_revert.",
    "rolled back": "Remove the cause, then trigger a new run. This run never moves the volume forward again.",
    "half rolled back": "Remove the cause, then clear the failed task of the rollback with Downstream. Look now.",
    "superseded": "Nothing in this run: another one moved the volume since. See that run.",
    "moved on": "Find out who changed the setting or a Secret.",
    "unknown": "Clear finalize as soon as the metadata database, the cluster and the folder of backups answer.",
}


def describe(run: Run) -> dict[str, Any]:
    """Say what is so in a run now.

    Returns:
        What the page shows, as JSON has it: times are ISO 8601, URLs relative to the root of the UI.
        `ended`, `tone`, `started`, `finished`, `sentence`, `since`, `until`, `no_return`, `abort` (`safe`, `text`),
        `next`, `failure`, `progress`, `clients`, `steps`.
    """
    failure = _failure(run)
    main = _main(run)
    progress = [shown for task_id, records in run.progress.items() if (shown := _progress(run.step(task_id), records))]
    return {
        "ended": run.ended,
        "tone": _tone(run, failure, main),
        "started": _iso(run.started),
        "finished": _iso(run.finished),
        "sentence": _ended_sentence(run) if run.ended else _sentence(run, main, progress),
        "since": None if run.ended else _iso(main.started if main else None),
        "until": None if run.ended else _iso(_until(run, main)),
        "no_return": _no_return(run),
        "abort": None if run.ended else dict(zip(("safe", "text"), _abort(run, failure), strict=True)),
        "next": _next(run, failure),
        "failure": _shown_failure(failure),
        "progress": progress,
        "clients": _clients(run),
        "steps": [_shown_step(run, step) for step in run.steps.values() if _is_shown(run, step)],
    }


# The sentence


def _main(run: Run) -> Step | None:
    """Return the step that the sentence is about: the furthest one at work, those beside the others last."""
    active = [step for step in run.steps.values() if step.active]
    order = list(run.steps)
    rank = {"queued": 1, "scheduled": 2}
    active.sort(key=lambda step: (rank.get(step.state, 0), step.task_id in BESIDE, -order.index(step.task_id)))
    return active[0] if active else None


def _sentence(run: Run, main: Step | None, progress: Sequence[Mapping[str, Any]]) -> str:
    if run.state == "queued":
        return "The run is queued: Airflow starts it when the DAG is not paused and its other runs allow it."
    if main is None:
        return "No task is at work: the scheduler is about to start the next one."
    does = STEPS.get(run.dag_id, {}).get(main.task_id, "is at work")
    if main.state in QUEUED:
        return f"{main.task_id} waits for a worker: it {does}."
    if main.state == "up_for_retry":
        return f"{main.task_id} failed and is tried again in a moment: it {does}."
    parts = [f"{main.task_id} {does}", *_how_far(run, main, progress)]
    beside = [step.task_id for step in run.steps.values() if step.active and step.task_id in BESIDE - {main.task_id}]
    more = f" Beside it: {', '.join(beside)}." if beside else ""
    return f"{': '.join([parts[0], ', '.join(parts[1:])]) if parts[1:] else parts[0]}.{more}"


def _how_far(run: Run, step: Step, progress: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = []
    if clients := run.clients.get(step.task_id):
        parts.append(f"{sum(row['proven'] for row in clients):,} of {len(clients):,} proven")
    total = sum(step.states.values())
    if total > 1:
        parts.append(f"{step.states.get('success', 0):,} of {total:,} done")
        failed = step.states.get("failed", 0)
        parts += [f"{failed:,} failed"] if failed else []
    shown = next((each for each in progress if each["task"] == step.task_id), None)
    if shown and shown["percent"] is not None:
        parts.append(f"{shown['percent']:.1f} %")
    if shown and shown["because"]:
        parts.append(str(shown["because"]))
    return parts


def _ended_sentence(run: Run) -> str:
    states = {task_id: step.state for task_id, step in run.steps.items()}
    if run.note and states.get(LAST) in {"success", "failed"}:
        return _plain(_capital(run.note))
    return _plain(_capital(unreported_end(run.dag_id, run.state, states, run.results, run.params)))


def _tone(run: Run, failure: Failure | None, main: Step | None) -> Literal["good", "bad", "waits", "works"]:
    if run.state == "success":
        return "good"
    if run.state == "failed" or failure:
        return "bad"
    return "waits" if main and main.task_id in HUMAN and main.state != "running" else "works"


def _until(run: Run, main: Step | None) -> datetime | None:
    if main is None:
        return None
    if main.task_id in HUMAN:
        return main.started + _ANSWER_WITHIN if main.started else None
    after, param = _WAITS.get(main.task_id, ((), ""))
    times = [step.ended for step in map(run.step, after) if step.ended]
    seconds = run.params.get(param)
    # Past that time it copies and proves, for as long as that takes.
    if main.state != "up_for_reschedule" or not times or not isinstance(seconds, int | float):
        return None
    return max(times) + timedelta(seconds=seconds)


# The point of no return, and what aborting would do


def _no_return(run: Run) -> str:
    if run.dag_id == FLEET:
        return "Each volume's own run has one: see the page Volumes of this run."
    if run.dag_id == FINISH:
        begun = run.step("refresh_mount_pods").begun
        return "Passed for each mount pod that was replaced." if begun else "Not passed: no mount pod was replaced."
    return _no_return_of_move(run) if run.moves_a_volume else "None: this DAG moves no volume."


def _no_return_of_move(run: Run) -> str:
    write = run.step("write_setting")
    if not write.begun:
        return "Not passed: write_setting has not begun, and the setting is as it was."
    if run.step("restore_setting").state == "success":
        return "Passed and undone: restore_setting put the setting back."
    if write.state == "success":
        return "Passed: write_setting has written the setting, and the clients follow it."
    if write.active and write.state not in QUEUED:
        return "About to be passed: write_setting is at work, and the setting may name either store."
    return "May be passed: write_setting had begun, and the setting may name either store."


def _abort(run: Run, failure: Failure | None) -> tuple[Literal["yes", "no"], str]:
    if run.dag_id == SYNC:
        return "yes", f"What was copied stays, and nothing is deleted. {_TO_ABORT}"
    if run.dag_id == FLEET:
        started = run.step("start_canary").begun
        stays = "No volume was moved." if not started else "Runs of volumes that were started go on by themselves."
        return ("no" if started else "yes"), f"{stays} {_TO_ABORT}"
    if run.dag_id == REHEARSAL:
        return "yes", f"Nothing was changed. {_TO_ABORT}"
    if run.dag_id == FINISH:
        why_not = next((why for task_id, why in FINISH_NOT_NOW.items() if run.step(task_id).active), "")
        return ("no", why_not) if why_not else ("yes", f"What was changed stays so. {_TO_ABORT}")
    return _abort_move(run, failure) if run.moves_a_volume else ("no", "Nothing is known of this DAG.")


def _abort_move(run: Run, failure: Failure | None) -> tuple[Literal["yes", "no"], str]:
    write = run.step("write_setting")
    if run.goes_back:
        return "no", "The run rolls back. Let it end: until then clients may be on either store."
    if not write.begun:
        if write.active:
            return "no", "write_setting is about to begin. Wait until it has ended."
        return "yes", f"{_changed_before_the_write(run)} {_TO_ABORT}"
    if run.step("decide").active or run.step(LAST).active:
        return "no", "The run is about to end. Let it judge where the volume is."
    # What finalize said before the run was cleared stays until it begins again.
    if run.note.startswith(("switched", "reverted")):
        does = "leaves the volume where it is, since the run had ended green before"
    elif run.params.get("on_failure") == "hold":
        does = "leaves the volume where it is, since on_failure is hold"
    else:
        does = "rolls back, where the old store still serves"
    stays = "Marked as failed, the run would stop half-way and roll nothing back."
    if failure:
        return "no", f"{stays} A step has failed. Let the run end: decide {does}."
    return "no", f"{stays} To go back, mark the task that is at work as failed: decide then {does}."


def _changed_before_the_write(run: Run) -> str:
    if run.params.get("dry_run") or not run.step("backup").begun:
        return "Nothing was changed."
    made = "a bucket that the run made and " if run.params.get("create_bucket") else ""
    return (
        f"The setting and the Secrets are as they were. On the new store stay {made}blocks that the run copied; the "
        "volume's Lease expires within an hour. This holds until write_setting begins."
    )


# What comes next


def _next(run: Run, failure: Failure | None) -> str:
    if run.ended:
        return _after_end(run, failure)
    words = STEPS.get(run.dag_id, {})
    if main := _main(run):
        if main.task_id in HUMAN and main.state not in QUEUED:
            return f"Read the plan and answer in task {main.task_id}, under Required Actions. No answer rejects."
        after = list(run.steps)[list(run.steps).index(main.task_id) + 1 :]
    else:
        after = list(run.steps)
    if run.moves_a_volume and failure and not run.goes_back:
        after = [task_id for task_id in ("decide", LAST) if task_id in after]
    elif run.params.get("dry_run") and run.step(LAST).state == "none":
        after = [task_id for task_id in after if task_id in {"plan", LAST} or task_id.startswith("check")]
    back = run.goes_back
    for task_id in after:
        if run.step(task_id).state == "none" and (task_id not in ROLLBACK or back):
            return f"{task_id} {words.get(task_id, '')}".strip() + "."
    return "The run ends."


def _after_end(run: Run, failure: Failure | None) -> str:
    outcome = re.match(r"[a-z ]+", run.note)
    if run.state == "success":
        if outcome and outcome[0] == "planned":
            return "Read the plan. Trigger again with dry_run=false to carry it out."
        return "Nothing is left to do in this run: see the report."
    if run.moves_a_volume and outcome and outcome[0] in _AFTER:
        return _AFTER[outcome[0]]
    if failure:
        return f"Remove the cause, then clear {failure.task} with Downstream, or trigger a new run."
    return "See what is still held above, and the logs of the tasks that did not end."


def _failure(run: Run) -> Failure | None:
    found = first_failed(run.steps)
    return Failure.of(run.dag_id, run.run_id, *found, run.errors.get(found, {})) if found else None


def first_failed(steps: Mapping[str, Step]) -> tuple[str, int] | None:
    """Return the task instance whose error a page needs: the one that caused the others; None where none failed."""
    failed = [Failure(task, step.first["failed"]) for task, step in steps.items() if "failed" in step.first]
    found = first_failure(failed, steps)
    return (found.task, found.map_index) if found else None


def _shown_failure(failure: Failure | None) -> dict[str, str] | None:
    if failure is None:
        return None
    return {
        "task": failure.task,
        "url": failure.page,
        "problem": _plain(failure.problem) or NO_ERROR,
        "state": _plain(failure.state),
        # What a check refuses says itself what to do.
        "next": _plain(failure.next_step) or ("" if "Remedy: " in failure.problem else SEE_LOG),
    }


# Steps and progress


def _is_shown(run: Run, step: Step) -> bool:
    return step.task_id not in ROLLBACK or run.goes_back or step.active


def _shown_step(run: Run, step: Step) -> dict[str, Any]:
    total = sum(step.states.values())
    mapped = total > 1 or any(index >= 0 for index in step.first.values())
    url = task_url(run.dag_id, run.run_id, step.task_id)
    counts = ", ".join(f"{step.states[state]:,} {state}" for state in ORDER if state in step.states)
    return {
        "task": step.task_id,
        "about": STEPS.get(run.dag_id, {}).get(step.task_id, ""),
        "state": step.state,
        "counts": f"{counted(total, 'instance')}: {counts}" if mapped else "",
        "started": _iso(step.started),
        "ended": _iso(step.ended),
        "url": f"{url}/mapped" if mapped else url,
    }


def _progress(step: Step, records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Add up what the instances of a task have left. What is not known of one of them is not known of all."""
    if not records or not (step.active or any(record.get("objects") for record in records)):
        return None  # it had nothing to do
    whole = len(records) >= sum(step.states.values())
    working = [record for record in records if record.get("state") != "ended"] if step.active else []
    latest = max(records, key=lambda record: str(record.get("at", "")))

    def added(name: str, of: Iterable[Mapping[str, Any]]) -> float:
        return sum(record.get(name) or 0 for record in of)

    def expected(name: str) -> float | None:
        known = whole and all(record.get(name) is not None for record in records)
        return added(name, records) if known else None

    done = {"objects": added("objects", records), "bytes": added("bytes", records)}
    of = {"objects": expected("objects_expected"), "bytes": expected("bytes_expected")}
    shares = [100 * done[name] / total for name, total in of.items() if total]
    etas = [record.get("eta_s") for record in working]
    return {
        "task": step.task_id,
        "doing": latest.get("doing", "") if working else "ended",
        "because": latest.get("because", "") if working else "",
        "objects": done["objects"],
        "objects_expected": of["objects"],
        "bytes": done["bytes"],
        "bytes_expected": of["bytes"],
        "percent": round(min(100.0, *shares), 1) if shares else None,
        "objects_s": round(added("objects_s", working), 1),
        "bytes_s": round(added("bytes_s", working), 1),
        # Instances that wait for a worker come on top, for which nothing is known.
        "eta_s": max(filter(None, etas), default=None) if whole and all(eta is not None for eta in etas) else None,
        "at": latest.get("at", ""),
    }


def _clients(run: Run) -> list[Mapping[str, Any]]:
    """Return the rows of the proof that looked at the clients last: that of the way back, once it has begun."""
    asked = [step.task_id for step in run.steps.values() if step.begun and step.task_id in run.clients]
    return list(run.clients[asked[-1]]) if asked else []


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(text: str) -> str:
    """Take the marks of Markdown out: the page shows text as it is."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("**", "")
