"""The runbook as a graph: what a switch does, and what going back to a backup does, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from airflow.sdk import TaskGroup

from include.juicefs_storage.tasks.approval import approve
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.switch import apply, check, finalize, rollback
from include.juicefs_storage.tasks.switch.plan import choose_path, plan


def move_volume(resolve_params: Callable[[], Any]) -> None:
    """Wire check, plan, approve, apply, verify, decide, rollback and finalize.

    Args:
        resolve_params: Makes the task of that name: it alone decides where the volume moves.
    """
    with TaskGroup("check", prefix_group_id=False, tooltip="Asked before anything is touched; changes nothing"):
        checks = [
            check.check_rights(), check.check_csi(), check.check_volume(), check.check_secrets(),
            check.check_vault(), check.check_target_bucket(), check.check_consistency(),
        ]  # fmt: skip
        resolve_params() >> checks

    planned, path, approval = plan(), choose_path(), approve()
    checks >> planned >> path >> approval

    with TaskGroup("apply", prefix_group_id=False, tooltip="Back up, then move the volume"):
        backup, patched, settled, rolled = (
            apply.backup(),
            apply.patch_secret(),
            apply.settle(),
            apply.wait_for_rollouts(),
        )
        followed, written = apply.follow_writes(), apply.write_setting()
        [path, approval] >> backup >> apply.copy_ahead() >> [followed, written]
        written >> patched
        patched >> [settled, restarted := apply.restart_csi()]
        restarted >> rolled

        with TaskGroup("verify", prefix_group_id=False, tooltip="Every client moved, no block lost, no pod restarted"):
            blocks, mounted, late = apply.prove_blocks(), apply.prove_fresh_mount(), apply.catch_up_late()
            rolled >> apply.prove_clients() >> apply.catch_up() >> blocks
            [blocks, settled] >> mounted >> apply.prove_no_restarts() >> late

    # Every run ends with this task, which fails unless all is well: its end is the news.
    notify = Notify("ended")
    decided = rollback.decide()
    finalized = finalize.finalize.override(on_success_callback=notify, on_failure_callback=notify)()
    # All of them: the guard of the setting must have ended before a rollback writes it, and so must the copies.
    [followed, settled, blocks, late] >> decided

    with TaskGroup("rollback", prefix_group_id=False, tooltip="Back to the old store, every client proven there"):
        first, restored, blocks, late = (
            rollback.collect_diagnostics(), rollback.restore_setting(), rollback.prove_blocks_on_old(),
            rollback.copy_back_late(),
        )  # fmt: skip
        followed, secret = rollback.follow_writes_back(), rollback.restore_secret()
        first >> rollback.copy_back() >> [followed, secret]
        secret >> restored >> rollback.settle_again() >> blocks
        (
            restored >> rollback.restart_csi_again() >> rollback.wait_for_rollouts_again()
            >> rollback.prove_clients_on_old() >> rollback.copy_back_again() >> blocks
        )  # fmt: skip
        [followed, blocks] >> late

    decided >> [first, finalized]
    [path, late] >> finalized
