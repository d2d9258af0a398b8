"""Write the setting: the cut-over, and its way back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from include.juicefs_storage.errors import LostAnswerError, NeedsHumanError, TransientError
from include.juicefs_storage.ports import JuiceFS, MetadataStore
from include.juicefs_storage.switch.concurrent_changes import lost_fields, watch_setting
from include.juicefs_storage.switch.step import LeaseCheck, no_lease
from include.juicefs_storage.volume.setting import Setting, StorageConfig

#: How long a `juicefs config` whose answer was lost may run, in seconds: it gives up on a store after 12.
_LATE_S = 20
#: Within how many seconds of the confirmation of the Lease a write must begin, by the clock of where it is made. With
#: the 85 s that a `juicefs config` may take it is far below the Lease's TTL: a run that was paused for longer writes
#: nothing, whoever holds the volume since.
BEGIN_WITHIN_S = 300
_TRIES = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What writing the setting changed.

    Attributes:
        written: False where the target was in place already.
        put_right: Fields that another administrator changed meanwhile, that this write took back, and that have the
            administrator's values again.
        lost: Fields of these that could not be put right.
    """

    written: bool
    put_right: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


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
        """Read the setting as it is now.

        Raises:
            NeedsHumanError: It is neither what was backed up, setting or Secrets, nor the target.
        """
        now = self.metadata.read_setting()
        if now.uuid != self.before.uuid:
            raise NeedsHumanError(
                f"The metadata database holds volume {now.uuid}, expected {self.before.uuid}.",
                state="nothing was written by this step",
                next_step="compare the metadata connection with the Secret's metaurl",
            )
        if not now.uses_one_of((self.target, self.before.config, *self.stale)):
            raise NeedsHumanError(
                f"The setting's bucket or keys changed during this run: now {now.bucket}; "
                f"expected {self.before.bucket} (as backed up) or {self.target.bucket} (as planned).",
                state="this step left the setting as it found it",
                next_step="find out who changed it (a mount pod started with other values?), then start a new run",
            )
        return now

    def plan(self) -> str:
        """Say what `apply` does."""
        how = "one UPDATE that compares and sets" if self.recorded else "`juicefs config`"
        return f"{how}: bucket `{self.before.bucket}` → `{self.target.bucket}`, keys likewise"

    def apply(self) -> Written:
        """Write the setting and read it back.

        Raises:
            NeedsHumanError: Its storage is unknown to this run, or the run lost the Lease.
            TransientError: It was not written, or came too late.
        """
        now = self.observe()
        if now.uses(self.target):
            return Written(written=False)
        if self.recorded:
            self._replace(now, now.with_storage_of(self.recorded))
            self.verify()
            return Written(written=True)
        with watch_setting(self.metadata.read_setting, now) as seen:
            self._configure()
        self.verify()
        return self._put_right([setting for setting in seen if not setting.uses(self.target)])

    def _configure(self) -> None:
        # The clock first: the deadline must not begin after the Lease was confirmed.
        began = self.juicefs.now()
        self.confirm_lease()
        try:
            self.juicefs.write_storage(self.target, not_after=began + BEGIN_WITHIN_S)
        except LostAnswerError:
            # The row decides. Nobody may judge this step while the command is in flight.
            if not self._written_late():
                raise

    def _put_right(self, earlier: Sequence[Setting]) -> Written:
        """Give fields that another administrator changed during the write the administrator's values again."""
        lost: tuple[str, ...] = ()
        for _ in range(_TRIES):
            now = self.observe()
            if not (found := lost_fields(earlier, now)):
                return Written(written=True, put_right=lost)
            lost = found
            log.warning("Others changed %s while the setting was written; their values are put back.", ", ".join(lost))
            self.metadata.replace_setting(now, now.with_fields_of(earlier[-1], lost))
        return Written(written=True, lost=lost)

    def _written_late(self) -> bool:
        for _ in range(_LATE_S):
            if self.observe().uses(self.target):
                return True
            self.sleep(1)
        return self.observe().uses(self.target)

    def _replace(self, now: Setting, new: Setting) -> None:
        """Write the row by compare-and-set, soon after the Lease was confirmed."""
        began = self.metadata.now()
        self.confirm_lease()
        if not self.metadata.replace_setting(now, new, not_after=began + BEGIN_WITHIN_S):
            raise TransientError(
                "The setting changed between reading it and writing other values into it, or the write came "
                f"later than {BEGIN_WITHIN_S} s after the Lease was confirmed.",
                state="this step left the setting as it found it",
                next_step="the task tries again",
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
                next_step="the task tries again; if that does not help, look for mount pods that start with old values",
            )

    def rewrite(self) -> None:
        """Write the target once more, in other bytes: every client reloads it, also one that failed to before.

        Raises:
            PermanentError: The setting holds no encrypted secret.
            TransientError: Somebody else wrote it meanwhile.
        """
        now = self.observe()
        if now.uses(self.target):
            self._replace(now, now.reencrypted())

    @property
    def back(self) -> WriteSetting:
        """The step that puts the old storage back: by compare-and-set, other fields stay as they are."""
        return replace(self, target=self.before.config, recorded=self.before, stale=(self.target, *self.stale))

    def undo(self) -> bool:
        """Put the old storage back; the row is never absent.

        Returns:
            False where the old storage was in place already.
        """
        return self.back.apply().written
