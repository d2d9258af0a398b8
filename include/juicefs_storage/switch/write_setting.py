"""Write the setting: the cut-over, and its way back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from include.juicefs_storage.errors import (
    LostAnswerError,
    NeedsHumanError,
    TransientError,
)
from include.juicefs_storage.ports import JuiceFS, MetadataStore
from include.juicefs_storage.switch.step import LeaseCheck, no_lease
from include.juicefs_storage.volume.setting import Setting, StorageConfig

#: How long a `juicefs config` whose answer was lost may go on, in seconds: it gives up on a store after 12.
_LATE_S = 20


@dataclass(frozen=True)
class WriteSetting:
    """Point the volume's setting at a storage; the clients follow on their next heartbeat. This is the cut-over.

    Attributes:
        recorded: An earlier setting whose storage fields are taken to the letter; else `juicefs config` writes them.
        stale: What Secrets held before, where that is neither `before` nor `target`: a mount pod may have written it.
    """

    metadata: MetadataStore
    juicefs: JuiceFS
    before: Setting
    target: StorageConfig
    recorded: Setting | None = None
    confirm_lease: LeaseCheck = no_lease
    sleep: Callable[[float], None] = time.sleep
    stale: Sequence[StorageConfig] = ()

    def observe(self) -> Setting:
        """The setting as it is now.

        Raises:
            NeedsHumanError: It is neither what was backed up, setting or Secrets, nor the target: somebody changed it.
        """
        now = self.metadata.read_setting()
        if now.uuid != self.before.uuid:
            raise NeedsHumanError(
                f"The metadata database holds volume {now.uuid}, expected {self.before.uuid}.",
                state="nothing was written by this step",
                next_step="compare the metadata connection with the Secret's metaurl",
            )
        if not any(now.uses(config) for config in (self.target, self.before.config, *self.stale)):
            raise NeedsHumanError(
                f"The setting's bucket or keys changed during this run: now {now.bucket}; "
                f"expected {self.before.bucket} (as backed up) or {self.target.bucket} (as planned).",
                state="this step left the setting as it found it",
                next_step="find out who changed it (a mount pod started with other values?), then start a new run",
            )
        return now

    def plan(self) -> str:
        """What `apply` does, in words."""
        how = "one UPDATE that compares and sets" if self.recorded else "`juicefs config`"
        return f"{how}: bucket `{self.before.bucket}` → `{self.target.bucket}`, keys likewise"

    def apply(self) -> bool:
        """Write the setting and read it back.

        Returns:
            False where it was already written.
        """
        now = self.observe()
        if now.uses(self.target):
            return False
        self.confirm_lease()
        try:
            if self.recorded:
                self._replace(now, self.recorded)
            else:
                self.juicefs.write_storage(self.target)
        except LostAnswerError:
            # The row decides; and whoever judges this step must not do so while the command is still under way.
            if not self._written_late():
                raise
        self.verify()
        return True

    def _written_late(self) -> bool:
        for _ in range(_LATE_S):
            if self.observe().uses(self.target):
                return True
            self.sleep(1)
        return self.observe().uses(self.target)

    def _replace(self, now: Setting, storage_of: Setting) -> None:
        """Give the row the storage of another setting by compare-and-set; its other fields stay as they are."""
        if not self.metadata.replace_setting(expected=now, new=now.with_storage_of(storage_of)):
            raise self._changed()

    def _changed(self) -> TransientError:
        return TransientError(
            "The setting changed between reading it and putting other values into it.",
            state="the setting is as somebody else wrote it",
            next_step="the task tries again by itself",
        )

    def verify(self) -> None:
        """Compare the row with the target, field by field.

        Raises:
            TransientError: The write reported success and the row does not show it.
        """
        now = self.observe()
        if not now.uses(self.target):
            raise TransientError(
                f"The setting still shows bucket {now.bucket}, expected {self.target.bucket}.",
                state="the clients stay on the old store, or go back to it on their next heartbeat",
                next_step="the task tries again; if it goes on, look for mount pods that start with old values",
            )

    def rewrite(self) -> None:
        """Write the target once more, in other bytes: a client that could not build the new storage tries again then.

        Raises:
            PermanentError: The setting has no secret that could be encrypted anew.
            TransientError: Somebody else wrote it meanwhile.
        """
        now = self.observe()
        if now.uses(self.target):
            self.confirm_lease()
            if not self.metadata.replace_setting(expected=now, new=now.sealed_anew()):
                raise self._changed()

    @property
    def back(self) -> WriteSetting:
        """The step that puts the old storage back: by compare-and-set, other fields stay as they are."""
        return replace(self, target=self.before.config, recorded=self.before, stale=(self.target, *self.stale))

    def undo(self) -> bool:
        """Put the old storage back; the row is never absent.

        Returns:
            False where the old storage was in place already.
        """
        return self.back.apply()
