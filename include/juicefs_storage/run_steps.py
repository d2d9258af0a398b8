"""The steps of each DAG in the runbook's order, and what each does, in words. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

from include.juicefs_storage.failures import LAST
from include.juicefs_storage.names import FINISH, FLEET, REHEARSAL, REVERT, SWITCH, SYNC

#: The tasks of the way back: shown where one of them has begun.
ROLLBACK: Mapping[str, str] = {
    "collect_diagnostics": "collects what tells why the step failed",
    "copy_back": "copies to the old store what only the new one has",
    "follow_writes_back": "copies back what clients still write to the new store",
    "restore_secret": "puts the Secrets back",
    "restore_setting": "puts the setting back",
    "settle_again": "guards the old setting and the Secrets",
    "restart_csi_again": "restarts the CSI workloads again",
    "wait_for_rollouts_again": "waits for the restarted CSI workloads",
    "prove_clients_on_old": "proves every client on the old store",
    "copy_back_again": "copies back what is left of what clients wrote to the new store",
    "prove_blocks_on_old": "proves that no block is missing on the old store",
    "copy_back_late": "waits for late commits, then copies back and proves the blocks once more",
}
_MOVE: Mapping[str, str] = {
    "resolve_params": "validates the params",
    "check_rights": "asks Kubernetes for every right that the run uses",
    "check_csi": "checks the CSI driver",
    "check_volume": "checks that every client can follow and can be proven",
    "check_secrets": "checks every Secret of the volume",
    "check_vault": "checks the folder of backups and its key",
    "check_target_bucket": "checks the new bucket",
    "check_consistency": "compares the stores",
    "plan": "collects the findings and writes the plan",
    "choose_path": "ends a dry run, and continues any other",
    "approve": "waits for a person who approves or rejects the plan",
    "backup": "backs up the setting and the Secrets",
    "copy_ahead": "copies what the new store still lacks",
    "follow_writes": "copies what clients still write to the store that they leave",
    "write_setting": "writes the setting: from here on the clients move",
    "patch_secret": "patches the Secrets",
    "settle": "guards the setting and the Secrets against old values",
    "restart_csi": "restarts the CSI workloads",
    "wait_for_rollouts": "waits for the restarted CSI workloads",
    "prove_clients": "proves every client on the new store",
    "catch_up": "copies what is left of what clients wrote to the store that they left",
    "prove_blocks": "proves that no block is missing",
    "prove_fresh_mount": "proves a fresh mount with an empty cache",
    "prove_no_restarts": "proves that no pod restarted",
    "catch_up_late": "waits for late commits, then copies and proves the blocks once more",
    "decide": "decides whether the run finishes or rolls back",
    **ROLLBACK,
    LAST: "writes the report",
}
STEPS: Mapping[str, Mapping[str, str]] = {
    SWITCH: _MOVE,
    REVERT: {"choose_backup": "asks which backup to go back to", **_MOVE},
    SYNC: {
        "check": "validates the params and checks both buckets",
        "list_source": "lists the source",
        "plan_partitions": "writes the plan and cuts it into partitions",
        "copy": "copies the partitions",
        "list_to_verify": "takes the partitions that are to be compared",
        "verify": "compares the partitions",
        "reconcile": "accounts for every partition",
        LAST: "writes the report",
    },
    FLEET: {
        "resolve_params": "validates the params",
        "find_volumes": "finds the volumes of the store",
        "start_dry_run": "starts a dry run for each volume",
        "wait_for_dry_run": "waits for the dry runs",
        "plan": "writes one plan for all volumes",
        "choose_path": "ends a dry run, and continues any other",
        "approve": "waits for a person who approves or rejects the plan",
        "start_canary": "starts the run of the first volume",
        "watch_canary": "waits for the first volume, then watches it",
        "approve_rest": "waits for a person who has seen the first volume",
        "later_volumes": "lists the volumes of the waves",
        "start": "starts the volumes' runs, wave by wave",
        "watch": "waits for the volumes' runs, then watches them",
        "restart_csi": "restarts the CSI workloads",
        "wait_for_rollouts": "waits for the restarted CSI workloads",
        LAST: "writes the report",
    },
    REHEARSAL: {
        "list_volumes": "lists the registered volumes",
        "rehearse": "rehearses each volume",
        LAST: "writes the report",
    },
    FINISH: {
        "resolve_params": "validates the params",
        "plan": "finds what still carries other values, and writes the plan",
        "choose_path": "ends a dry run, and continues any other",
        "approve": "waits for a person who approves or rejects the plan",
        "refresh_mount_pods": "replaces the mount pods that carry other values, one after the other",
        "close_door": "has the old store refuse the old key's writes, and proves it",
        "rehearse_off": "denies the old key everything for a while, as if the old store were off",
        "watch": "watches for whatever still uses the old store",
        "certify": "proves that the move is finished",
        LAST: "writes the report",
    },
}
#: Tasks that wait for a person's answer, which is due within 24 hours (tasks/approval.py, tasks/revert.py).
HUMAN = frozenset({"choose_backup", "approve", "approve_rest"})
#: Tasks that work beside the others.
BESIDE = frozenset({"follow_writes", "settle", "follow_writes_back", "settle_again"})
#: Tasks of finishing that are not to be aborted, and why.
FINISH_NOT_NOW: Mapping[str, str] = {
    "refresh_mount_pods": "A mount pod may be half replaced. The run stops by itself at one that is not as before.",
    "rehearse_off": "The old key is denied for now. It is allowed again at the first error, and at the end.",
}
