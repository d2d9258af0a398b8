"""What the new store must be like."""

from __future__ import annotations

from include.juicefs_storage.core.checks.findings import ok, refusal, warning
from include.juicefs_storage.core.errors import StorageSwitchError
from include.juicefs_storage.core.plan import Finding
from include.juicefs_storage.core.ports import ObjectStore
from include.juicefs_storage.core.setting import Setting, StorageConfig

#: Written by `juicefs format`, holds the volume's UUID; may be absent.
UUID_OBJECT = "juicefs_uuid"


def check_target(
    store: ObjectStore, setting: Setting, target: StorageConfig, *, probe_key: str | None
) -> list[Finding]:
    """The new bucket exists, can be used with its keys, and belongs to this volume.

    Args:
        store: The new bucket.
        setting: The volume's setting.
        target: What the clients will be told to use.
        probe_key: Key of a small object that is written, read, listed and deleted; None leaves that out.
    """
    check, findings = "target", []
    try:
        store.check_bucket()
        if probe_key:
            store.probe(probe_key)
        content = store.read(f"{setting.name}/{UUID_OBJECT}")
    except StorageSwitchError as error:
        return [refusal(check, error.problem, error.next_step)]
    if content is None:
        findings.append(
            warning(
                check,
                f"{setting.name}/{UUID_OBJECT} is not in the new bucket, so that it cannot tell whose data it holds.",
                f"copy the whole prefix {setting.name}/, this object included",
            )
        )
    elif content.decode(errors="replace").strip() != setting.uuid:
        findings.append(
            refusal(
                check,
                f"The new bucket's {setting.name}/{UUID_OBJECT} names volume "
                f"{content[:36].decode(errors='replace')!r}, this volume is {setting.uuid}.",
                "choose the bucket that this volume was copied to",
            )
        )
    if setting.uses(target):
        findings.append(warning(check, "The setting names this bucket and these keys already.", "nothing to switch"))
    probed = "PUT, GET, LIST and DELETE work" if probe_key else "no write was tried (dry run)"
    return [*findings, ok(check, f"bucket `{target.bucket}` exists, {probed}")]
