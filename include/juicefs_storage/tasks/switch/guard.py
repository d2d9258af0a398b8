"""The guard of the setting and the Secrets while pods with other values may start."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.settle import guard_setting
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.tasks.context import log
from include.juicefs_storage.tasks.switch import copies, proofs
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.mount_pods import stale_mount_pods


def settle(
    run: SwitchRun, step: WriteSetting, secrets: PatchSecrets, *, source: Location, target: Location
) -> dict[str, Any]:
    """Guard the setting and the Secrets for `settle_s`; where something was put right, prove and copy once more.

    Args:
        run: Renews its Lease meanwhile.
        step: What wrote the setting.
        secrets: What wrote the Secrets.
        source: Where clients may have gone for a moment.
        target: Where they belong.
    """
    params, clusters, mounts = run.runtime.params, run.runtime.clusters, run.plan.mount_pods
    with run.lease.kept_renewed():
        settled = guard_setting(
            step,
            secrets,
            lambda: stale_mount_pods(clusters, mounts, target.config),
            for_s=params.settle_s,
            clock=time.monotonic,
            sleep=time.sleep,
        )
    result = {key: list(lines) for key, lines in asdict(settled).items()}
    if not settled.repaired:
        return result
    log.warning("Put right: %s. Mount pods that may have written it: %s", settled.repaired, settled.wrote or "none")
    copies_too = run.catches_up or (target is run.old and not run.change.one_store)
    proven = proofs.prove_clients(run, target)
    copied = copies.copy(run, source, target, timeout_s=copies.CATCH_UP_TIMEOUT_S) if copies_too else {"copied": 0}
    return {**result, **proven, **copied, **proofs.prove_blocks(run, target)}
