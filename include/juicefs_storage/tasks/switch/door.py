"""Whether the way back to the old store is open, before a run and at its end."""

from __future__ import annotations

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.switch.checks import check_door, check_old_key
from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.carriers import find_carriers
from include.juicefs_storage.volume.setting import Setting


def planned_door(runtime: Runtime, setting: Setting) -> list[Finding]:
    """Check what would carry the old values after a run; nothing where the volume is on its new storage already."""
    before, after = runtime.source(setting), runtime.target(setting)
    if setting.uses(after):
        return []
    pods, params = runtime.volume_pods(setting), runtime.params
    carriers = find_carriers(pods, params.secret_name, after, left=[before.bucket], will_patch=True)
    return check_door(
        carriers,
        before,
        runtime.try_storage,
        # Where the bucket stays no fence stays: it would refuse the new key's writes as well.
        fenced=bool(params.fence_conn_id) and before.place != after.place,
        required=params.require_closed_door,
    )


def door_now(run: SwitchRun) -> tuple[list[str], list[str], bool]:
    """Say at the end of a run what carries other values, one line each, and what that means. Never fails.

    Returns:
        What carries them, what a restart of it would do, and whether the store that was left refuses its old key.
    """
    try:
        setting = run.runtime.setting()
        pods, after = run.runtime.volume_pods(setting), run.runtime.source(setting)
        carriers = find_carriers(pods, run.runtime.params.secret_name, after, left=[run.before.bucket])
        fenced = bool(run.write_fence and run.write_fence.is_up())
        before = run.runtime.source(run.before)
        found = check_door(carriers, before, run.runtime.try_storage, fenced=fenced)
        refused = check_old_key(before, run.runtime.try_storage).level == "ok"
    except StorageSwitchError as error:
        return [], [f"what still carries other values could not be found out: {error.problem}"], False
    meaning = [f"{finding.message}{f' Remedy: {finding.remedy}' if finding.remedy else ''}" for finding in found]
    return [carrier.line for carrier in carriers], meaning, refused
