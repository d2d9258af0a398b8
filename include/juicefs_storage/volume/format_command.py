"""The `juicefs format` with which the driver's containers begin: what a start of one writes into the setting.

The driver (0.32, GenFormatCmd of pkg/config/command.go) writes storage, bucket and access key into the command as they
are in the Secret at that moment, and the secret key as `${secretkey}`, which a container takes from the volume's own
Secret each time it starts. It adds `--no-update` where the Secret lacks `storage` or `bucket`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

#: Where the driver's command turns from `format` to the mount itself.
MOUNT_COMMAND = re.compile(r"mount\.juicefs\s|juicefs\s+mount\s")
_FORMAT = re.compile(r"juicefs\s+format\s")
# The driver quotes a value with `&` in it as $'…'.
_OPTION = re.compile(r"--(?P<name>storage|bucket|access-key)[= ](?:\$?'|\")?(?P<value>[^\s'\"]+)")
_VOLUME = re.compile(r"\$\{metaurl\}['\"]?\s+(?P<name>[^\s'\";]+)")


@dataclass(frozen=True, slots=True)
class FormatCommand:
    """One such command.

    Attributes:
        volume: The volume's name; empty where it cannot be read.
        storage: The kind of the store; empty where it names none.
        bucket: Likewise.
        access_key: Likewise.
        updates: Whether it writes these into the setting of a volume that exists.
    """

    volume: str
    storage: str
    bucket: str
    access_key: str
    updates: bool


def find_format(commands: Iterable[str]) -> FormatCommand | None:
    """Read the `format` among the commands of a pod's containers; None where there is none."""
    for command in commands:
        before_mount = MOUNT_COMMAND.split(command, maxsplit=1)[0]
        found = _FORMAT.split(before_mount, maxsplit=1)
        if len(found) < 2:
            continue
        # What the driver appends later, such as format-options, wins in JuiceFS too.
        options = {option["name"]: option["value"] for option in _OPTION.finditer(found[1])}
        named = _VOLUME.search(found[1])
        return FormatCommand(
            volume=named["name"] if named else "",
            storage=options.get("storage", "").lower(),
            bucket=options.get("bucket", ""),
            access_key=options.get("access-key", ""),
            updates="--no-update" not in found[1].split(),
        )
    return None
