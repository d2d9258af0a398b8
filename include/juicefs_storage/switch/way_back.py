"""The way back from a backup alone, for the day on which Airflow is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.markdown import bullets
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.switch.backup import Backup
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.restart_csi import RestartCsi
from include.juicefs_storage.switch.step import LeaseCheck, no_lease
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods
from include.juicefs_storage.volume.setting import Setting, masked
from include.juicefs_storage.volume.users import unknown_sessions


@dataclass(frozen=True)
class WayBackPlan:
    """What going back would change. No key in it.

    Attributes:
        volume: Name and UUID.
        now: The bucket in the setting, and the access key, masked.
        back: The same of the backup.
        setting: Whether the setting would be written.
        unexpected: Whether the setting names neither the backup's storage nor the one that its run moved to.
        secrets: Each Secret that would be patched, with the names of its keys.
        clients: Where each client is.
        strangers: Clients that are no mount pods: nobody can be asked where they are.
    """

    volume: str
    now: str
    back: str
    setting: bool
    unexpected: bool
    secrets: tuple[str, ...]
    clients: tuple[str, ...]
    strangers: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """The plan for a person."""
        if self.setting:
            write = (
                "UPDATE jfs_setting SET value = (the backup's storage fields) WHERE name = 'format' AND value = (as it "
                "is now)"
            )
        else:
            write = "nothing: it names the backup's storage already"
        return [
            f"Volume: {self.volume}",
            f"Now: {self.now}",
            f"Back to: {self.back}",
            *(
                ["The setting names neither the backup's storage nor where its run moved to."]
                if self.unexpected
                else []
            ),
            "Secrets, patched first:",
            *bullets(list(self.secrets)),
            f"Setting: {write}",
            "Clients now:",
            *bullets([*self.clients, *(f"{name}: no mount pod, cannot be asked" for name in self.strangers)]),
        ]


@dataclass(frozen=True)
class WayBack:
    """Put a backup's storage back: Secrets, setting, restart. Nothing else in the setting or the Secrets changes.

    Attributes:
        backup: Where to go back to.
        clusters: Of the CSI driver.
        metadata: Of the volume.
        secret_name: The volume's main Secret, in each cluster.
        confirm_lease: Called before each write; raises where another run holds the volume.
    """

    backup: Backup
    clusters: Clusters
    metadata: MetadataStore
    secret_name: str
    confirm_lease: LeaseCheck = no_lease

    def observe(self) -> Setting:
        """Read the setting as it is now.

        Raises:
            NeedsHumanError: It is another volume's.
        """
        now, recorded = self.metadata.read_setting(), self.backup.setting
        if now.uuid != recorded.uuid:
            raise NeedsHumanError(
                f"The metadata database holds volume {now.name} ({now.uuid}); backup {self.backup.backup_id} is of "
                f"{recorded.name} ({recorded.uuid}).",
                state="nothing was changed",
                next_step="choose the metadata and the cluster of the backup's volume",
            )
        return now

    @property
    def secrets(self) -> PatchSecrets:
        """The step that puts the backed-up values into the Secrets."""
        recorded = self.backup.setting
        return PatchSecrets(
            self.clusters,
            self.secret_name,
            recorded.name,
            recorded.config,
            exact=self.backup.storage_values,
            confirm_lease=self.confirm_lease,
        )

    def plan(self) -> WayBackPlan:
        """Look at everything; change nothing."""
        now, recorded = self.observe(), self.backup.setting
        expected = [recorded.config, *([self.backup.new] if self.backup.target else [])]
        mounts = self.clients()
        strangers = unknown_sessions(self.metadata.sessions(), [mount.mount_path for mount in mounts])
        return WayBackPlan(
            volume=f"{now.name} ({now.uuid})",
            now=_shown(now),
            back=_shown(recorded),
            setting=not now.uses(recorded.config),
            unexpected=not now.uses_one_of(expected),
            secrets=tuple(f"{patch.name}: {', '.join(sorted(patch.values))}" for patch in self.secrets.plan()),
            clients=tuple(f"{mount.name} on {mount.node}: {mount.bucket}" for mount in mounts),
            strangers=tuple(f"{session.host}:{session.mount_point}" for session in strangers),
        )

    def clients(self) -> list[MountPod]:
        """Return the volume's mount pods."""
        return VolumePods(self.clusters, self.backup.setting, self.secret_name).mounts()

    def apply(self, *, restart: bool, stamp: str) -> list[str]:
        """Patch the Secrets, then write the setting, then restart the CSI components.

        Each is looked at first, so that it can be made again.

        Args:
            restart: Restart the CSI components.
            stamp: The restart's; another one restarts them again.

        Returns:
            What was changed, a line each.

        Raises:
            TransientError: Somebody else wrote the setting meanwhile.
        """
        # Secrets first: a mount pod that starts writes their values into the setting.
        done = [f"patched Secret {name}" for name in self.secrets.apply()]
        now, recorded = self.observe(), self.backup.setting
        if not now.uses(recorded.config):
            self.confirm_lease()
            if not self.metadata.replace_setting(expected=now, new=now.with_storage_of(recorded)):
                raise TransientError(
                    "The setting changed between reading it and putting the backup's storage into it.",
                    state="the setting is as somebody else wrote it; the Secrets hold the backup's values",
                    next_step="run the command again",
                )
            done.append(f"wrote the setting: {recorded.bucket}")
        if restart:
            restarted = RestartCsi(self.clusters, stamp, self.confirm_lease).apply()
            done += [f"restarted {name}" for name in restarted]
        return done

    def await_clients(
        self, *, timeout_s: float, clock: Callable[[], float], sleep: Callable[[float], None]
    ) -> Sequence[MountPod]:
        """Poll until every client shows the backup's bucket. They follow within a heartbeat.

        Args:
            timeout_s: For how long, in seconds.
            clock: A monotonic clock.
            sleep: Waits the given seconds.

        Returns:
            Those that do not show it; empty where all do.
        """
        deadline = clock() + timeout_s
        while True:
            behind = [mount for mount in self.clients() if mount.bucket != self.backup.setting.bucket]
            if not behind or clock() >= deadline:
                return behind
            sleep(1)


def _shown(setting: Setting) -> str:
    config = setting.config
    return f"{config.bucket} ({config.storage}, access key {masked(config.access_key)})"
