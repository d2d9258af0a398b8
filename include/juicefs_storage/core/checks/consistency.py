"""Whether the new store holds what the old one does."""

from __future__ import annotations

from include.juicefs_storage.core.checks.findings import ok, refusal, warning
from include.juicefs_storage.core.copying import Difference, compare_listings, volume_objects
from include.juicefs_storage.core.plan import Finding
from include.juicefs_storage.core.ports import ObjectStore
from include.juicefs_storage.core.setting import Setting


def check_consistency(
    source: ObjectStore, target: ObjectStore, setting: Setting, *, catch_up: bool
) -> tuple[list[Finding], Difference]:
    """Compare the new store's listing with the old one's: every block is there, with the same size.

    A volume in use is always ahead of its copy. With `catch_up` a copy that is behind is a warning, since the rest is
    copied before the setting is written; a copy that was not made at all is a refusal.
    """
    check, difference = (
        "consistency",
        compare_listings(volume_objects(source, setting), volume_objects(target, setting)),
    )
    examples = "; ".join(difference.examples)
    copy = "copy the volume (`juicefs sync`, see docs/switch.md), then start again"
    findings = []
    if difference.different:
        findings.append(
            refusal(
                check,
                f"{difference.different} of {difference.expected} blocks differ in size on the new store: {examples}.",
                "find out what wrote them; nothing here overwrites an object that differs",
            )
        )
    if difference.missing and (not difference.present or not catch_up):
        findings.append(
            refusal(
                check,
                f"{difference.missing} of {difference.expected} blocks are not on the new store: {examples}.",
                copy,
            )
        )
    elif difference.missing:
        findings.append(
            warning(
                check,
                f"{difference.missing} of {difference.expected} blocks are not on the new store yet.",
                "they are copied before the setting is written (catch_up=true)",
            )
        )
    return findings or [
        ok(check, f"all {difference.expected} blocks of the old store are on the new one, by key and size")
    ], difference
