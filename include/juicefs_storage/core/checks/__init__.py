"""The checks before a switch. All are read-only but for one probe object of our own, left out of a dry run."""

from include.juicefs_storage.core.checks.cluster import check_csi, check_rights, needed_rights
from include.juicefs_storage.core.checks.consistency import check_consistency
from include.juicefs_storage.core.checks.findings import ok, refusal, warning
from include.juicefs_storage.core.checks.target import check_target
from include.juicefs_storage.core.checks.volume import check_volume

__all__ = [
    "check_consistency",
    "check_csi",
    "check_rights",
    "check_target",
    "check_volume",
    "needed_rights",
    "ok",
    "refusal",
    "warning",
]
