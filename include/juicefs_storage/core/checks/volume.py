"""What the volume must be like: every client can follow, and can be proven."""

from __future__ import annotations

from collections.abc import Sequence

from include.juicefs_storage.core.checks.findings import ok, refusal, warning
from include.juicefs_storage.core.clients import MountPod, unknown_sessions
from include.juicefs_storage.core.plan import Finding
from include.juicefs_storage.core.ports import MetadataStore
from include.juicefs_storage.core.setting import Setting

MINIMUM_VERSION = (1, 1)


def _version(text: str) -> tuple[int, ...]:
    numbers = text.split("+", maxsplit=1)[0].split("-", maxsplit=1)[0].split(".")
    return tuple(int(number) for number in numbers[:2] if number.isdigit())


def check_volume(
    setting: Setting,
    secret_storage: tuple[str | None, str | None],
    mounts: Sequence[MountPod],
    metadata: MetadataStore,
    client_timeout_s: float,
) -> list[Finding]:
    """The volume and its clients can follow a change of the setting, and every client can be proven.

    Args:
        setting: The setting as it is now.
        secret_storage: `storage` and `bucket` of the Secret; None where the Secret lacks the key.
        mounts: The volume's mount pods.
        metadata: Where the sessions are listed.
        client_timeout_s: How long a client may take to follow, in seconds.
    """
    check, findings = "volume", []
    if setting.shards > 1:
        findings.append(
            refusal(check, f"The volume is sharded over {setting.shards} buckets.", "sharded volumes cannot be moved")
        )
    held = [value for value in secret_storage if value is not None]
    if held and held != [setting.storage, setting.bucket][-len(held) :]:
        findings.append(
            warning(
                check,
                f"The Secret says {' '.join(held)}, the setting {setting.storage} {setting.bucket}.",
                "a starting mount pod writes the Secret's values into the setting; the switch makes both agree",
            )
        )
    for mount in mounts:
        name = f"Mount pod {mount.name}"
        if _version(mount.version) < MINIMUM_VERSION:
            findings.append(refusal(check, f"{name} runs JuiceFS {mount.version}, needs 1.1.", "upgrade the client"))
        if mount.heartbeat_s > client_timeout_s:
            findings.append(
                refusal(
                    check,
                    f"{name} has a heartbeat of {mount.heartbeat_s:g} s, longer than client_timeout_s.",
                    f"set client_timeout_s to more than {2 * mount.heartbeat_s:g}",
                )
            )
        if mount.bucket != setting.bucket:
            findings.append(
                refusal(
                    check,
                    f"{name} uses bucket {mount.bucket}, the setting {setting.bucket}: it runs with an override.",
                    "remove bucket/storage from the PV's mountOptions and start the mount pod anew",
                )
            )
        if mount.read_only:
            findings.append(
                refusal(
                    check,
                    f"{name} is mounted read-only: no block can be written through it to prove it.",
                    "unmount it for the time of the switch",
                )
            )
        if mount.writeback:
            findings.append(
                refusal(
                    check,
                    f"{name} runs with writeback: blocks that wait in its cache cannot be seen from here.",
                    "mount it without writeback",
                )
            )
    findings += [
        refusal(
            check,
            f"Session {session.sid} on {session.host} at {session.mount_point} is no mount pod of this cluster: "
            "it cannot be proven to have followed.",
            "unmount it for the time of the switch, or wait until its session has expired if it is dead",
        )
        for session in unknown_sessions(metadata.sessions(), mounts)
    ]
    return findings or [ok(check, f"{setting.name} ({setting.uuid}), {len(mounts)} mount pods, all can follow")]
