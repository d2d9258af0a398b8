"""The checks before a switch. All are read-only but for objects and files of our own, left out of a dry run."""

from include.juicefs_storage.switch.checks.clients import (
    check_expired_sessions,
    check_fence,
    check_late_commits,
    check_runner,
    check_volume,
)
from include.juicefs_storage.switch.checks.cluster import (
    check_csi,
    check_distinct,
    check_each,
    check_rights,
    needed_rights,
    rights_to_finish,
)
from include.juicefs_storage.switch.checks.consistency import check_consistency
from include.juicefs_storage.switch.checks.door import check_door, check_old_key
from include.juicefs_storage.switch.checks.places import check_places
from include.juicefs_storage.switch.checks.proofs import (
    check_canaries,
    check_metadata,
    check_room,
    check_secret_leads_to,
)
from include.juicefs_storage.switch.checks.secret import check_secrets
from include.juicefs_storage.switch.checks.target import (
    check_absent,
    check_one_store,
    check_reach,
    check_served,
    check_target,
    check_use,
    only_pods_reach,
)
from include.juicefs_storage.switch.checks.vault import check_readable
from include.juicefs_storage.switch.findings import gather, ok, refusal, warning

__all__ = [
    "check_absent",
    "check_canaries",
    "check_consistency",
    "check_csi",
    "check_distinct",
    "check_door",
    "check_each",
    "check_expired_sessions",
    "check_fence",
    "check_late_commits",
    "check_metadata",
    "check_old_key",
    "check_one_store",
    "check_places",
    "check_reach",
    "check_readable",
    "check_rights",
    "check_room",
    "check_runner",
    "check_secret_leads_to",
    "check_secrets",
    "check_served",
    "check_target",
    "check_use",
    "check_volume",
    "gather",
    "needed_rights",
    "ok",
    "only_pods_reach",
    "refusal",
    "rights_to_finish",
    "warning",
]
