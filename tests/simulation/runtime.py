"""What the tasks of a simulated run work with."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from include.juicefs_storage.switch.backup import Backup, read_backup
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.switch.params import RevertParams
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.volume.setting import Setting, StorageConfig
from tests.simulation.adapters import (
    Ask,
    SimulatedCluster,
    SimulatedFence,
    SimulatedJuiceFS,
    SimulatedMetadata,
    SimulatedVault,
)
from tests.simulation.patches import HERE
from tests.simulation.stores import SimulatedBucket, SimulatedEngine


class SimulatedRuntime(Runtime):
    """The adapters of a run, on the world that is simulated."""

    @cached_property
    def _ask(self) -> Ask:
        return Ask(HERE.world)

    @cached_property
    def cluster(self) -> Any:
        return SimulatedCluster(self._ask)

    @cached_property
    def client_environment(self) -> dict[str, str]:
        return {}

    @cached_property
    def metadata(self) -> Any:
        return SimulatedMetadata(self._ask)

    @cached_property
    def juicefs(self) -> Any:
        return SimulatedJuiceFS(self._ask)

    @cached_property
    def vault(self) -> Any:
        return SimulatedVault(self._ask)

    @cached_property
    def recorded(self) -> Backup | None:
        return read_backup(self.vault, self.params.backup_id) if isinstance(self.params, RevertParams) else None

    def target(self, setting: Setting) -> StorageConfig:
        return self.recorded.setting.config if self.recorded else HERE.world.new

    @cached_property
    def target_store(self) -> Any:
        return self._bucket(self.recorded.setting.config if self.recorded else HERE.world.new)

    @cached_property
    def lacks_bucket(self) -> bool:
        return False

    def source_store(self, config: StorageConfig) -> Any:
        return self._bucket(config)

    def _by_setting(self, config: StorageConfig) -> Any:
        return self._bucket(config)

    def clients_store(self, config: StorageConfig) -> Any:
        return self._bucket(config)

    def fence(self, setting: Setting) -> Any:
        return SimulatedFence(self._ask, setting.config) if self.params.fence_conn_id else None

    def _bucket(self, config: StorageConfig) -> SimulatedBucket:
        world = HERE.world
        return SimulatedBucket(world.scheduler, world.store_of(config), config, self._ask)


def open_vault() -> SimulatedVault:
    """Open the backups."""
    return SimulatedVault(Ask(HERE.world))


def simulated_engine(
    run: Any, source: Location, target: Location, flow: object = None, *, fail_fast: bool = False
) -> SimulatedEngine:
    """Make the copying engine between two locations; takes the place of `SwitchRun.engine`."""
    return SimulatedEngine(run.runtime._bucket(source.config), run.runtime._bucket(target.config))
