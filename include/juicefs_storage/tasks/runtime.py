"""The adapters that a run works with, made from its params."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from include.juicefs_storage.errors import StorageSwitchError, UnreachableError
from include.juicefs_storage.names import BACKUP_CONN_ID
from include.juicefs_storage.ports import NO_ANSWER, Cluster, WriteFence
from include.juicefs_storage.switch.backup import Backup, read_backup
from include.juicefs_storage.switch.params import RevertParams, Runner, SwitchParams
from include.juicefs_storage.tasks.context import METADATA, is_away, mask, mask_keys, validated_params
from include.juicefs_storage.volume.setting import Setting, StorageConfig

if TYPE_CHECKING:
    from datetime import datetime

    from include.juicefs_storage.adapters.juicefs_command import JuiceFSCommand
    from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
    from include.juicefs_storage.adapters.mysql import MySqlMetadata
    from include.juicefs_storage.adapters.s3.bucket import S3Bucket
    from include.juicefs_storage.adapters.vault import FileVault
    from include.juicefs_storage.volume.clusters import Clusters
    from include.juicefs_storage.volume.metaurl import Metaurl
    from include.juicefs_storage.volume.mount_pods import VolumePods

#: For how long juicefs waits for a store that is silent towards Airflow, in seconds.
_SILENT_S = 12
log = logging.getLogger(__name__)


class VolumeParams(Protocol):
    """The params that say where a volume is. A run of whichever DAG has them."""

    @property
    def kubernetes_conn_id(self) -> str:
        """The cluster of the CSI driver."""

    @property
    def more_kubernetes_conn_ids(self) -> tuple[str, ...]:
        """Other clusters that have the volume mounted."""

    @property
    def namespace(self) -> str:
        """Where the CSI driver and its Secret are."""

    @property
    def secret_name(self) -> str:
        """The volume's Secret."""

    @property
    def meta_conn_id(self) -> str | None:
        """The metadata; None: by the Secret's metaurl."""

    @property
    def juicefs_runner(self) -> Runner:
        """Where juicefs runs."""


class VolumeRuntime:
    """What reaches a volume as it is, made when first used. Every secret value is registered with Airflow's masker."""

    def __init__(self, params: VolumeParams) -> None:
        self._where = params
        self._silent: dict[str, str] = {}

    @cached_property
    def cluster(self) -> KubernetesCluster:
        """The cluster of the CSI driver."""
        from include.juicefs_storage.adapters.kubernetes import KubernetesCluster

        return KubernetesCluster.from_connection(self._where.kubernetes_conn_id, self._where.namespace)

    @cached_property
    def clusters(self) -> Clusters:
        """Every cluster that has the volume mounted. A connection that leads to none counts as one that is away."""
        from include.juicefs_storage.adapters.connections import missing_connections_explained
        from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
        from include.juicefs_storage.volume.clusters import Clusters

        more: dict[str, Cluster] = {}
        for conn_id in self._where.more_kubernetes_conn_ids:
            try:
                with missing_connections_explained():
                    more[conn_id] = KubernetesCluster.from_connection(
                        conn_id, self._where.namespace, partial(is_away, conn_id)
                    )
            except StorageSwitchError as error:
                more[conn_id] = cast("Cluster", _Unusable(error))
        return Clusters(self.cluster, more)

    def juicefs_in(self, cluster: Cluster) -> JuiceFSCommand:
        """Return the juicefs command line in a cluster, with the metaurl of the Secret there."""
        from include.juicefs_storage.adapters.juicefs_command import in_controller_pod
        from include.juicefs_storage.volume.secret import addressing, metaurl_of, metaurl_secrets

        secret = cluster.secret(self._where.secret_name)
        mask(*metaurl_secrets(secret))
        return in_controller_pod(cluster, metaurl_of(secret), addressing(secret))

    @cached_property
    def metaurl(self) -> Metaurl:
        """The metadata URL as the CSI driver knows it."""
        from include.juicefs_storage.volume.secret import metaurl_of, metaurl_secrets

        secret = self.cluster.secret(self._where.secret_name)
        mask(*metaurl_secrets(secret))
        return metaurl_of(secret)

    @cached_property
    def client_environment(self) -> dict[str, str]:
        """The variables of the volume's clients that say how a store is addressed; none where they cannot be read."""
        from include.juicefs_storage.volume.secret import addressing

        try:
            return addressing(self.cluster.secret(self._where.secret_name))
        except StorageSwitchError as error:
            log.warning("The clients' environment is not known: %s", error.problem)
            return {}

    @cached_property
    def metadata(self) -> MySqlMetadata:
        """The metadata database."""
        from include.juicefs_storage.adapters.mysql import MySqlMetadata

        if self._where.meta_conn_id:
            prefix = self.metaurl.table_prefix
            return MySqlMetadata.from_connection(
                self._where.meta_conn_id, partial(is_away, METADATA), table_prefix=prefix
            )
        return MySqlMetadata.from_metaurl(self.metaurl, partial(is_away, METADATA))

    @cached_property
    def juicefs(self) -> JuiceFSCommand:
        """The juicefs command line, where `juicefs_runner` says."""
        from include.juicefs_storage.adapters.juicefs_command import in_controller_pod, on_worker

        if self._where.juicefs_runner == "worker":
            return on_worker(self.metaurl, self.client_environment)
        return in_controller_pod(self.cluster, self.metaurl, self.client_environment)

    @cached_property
    def vault(self) -> FileVault:
        """The backups."""
        return open_vault()

    def setting(self) -> Setting:
        """Read the setting as it is now."""
        return self.metadata.read_setting()

    def volume_pods(self, setting: Setting) -> VolumePods:
        """Return the volume's mount pods."""
        from include.juicefs_storage.volume.mount_pods import VolumePods

        return VolumePods(self.clusters, setting, self._where.secret_name)

    def source(self, setting: Setting) -> StorageConfig:
        """Return what the clients use by a setting."""
        config = setting.config
        mask_keys(config)
        return config

    def store_of(self, config: StorageConfig, conn_id: str | None = None) -> S3Bucket:
        """Return the bucket of a storage, as Airflow reaches it.

        Args:
            config: The storage.
            conn_id: By this connection; None: by the storage's own endpoint and keys.
        """
        from include.juicefs_storage.adapters.s3.bucket import S3Bucket

        if conn_id:
            return S3Bucket.from_connection(conn_id, config.endpoint_and_bucket[1])
        return self._by_setting(config)

    def fence_on(self, setting: Setting, conn_id: str, off_until: datetime | None = None) -> WriteFence:
        """Return what refuses the clients' key on the store that a setting names.

        Args:
            setting: Names the store and the key.
            conn_id: The store's administrator.
            off_until: Refuse the reads as well, until then (UTC); None: the writes alone.
        """
        from include.juicefs_storage.adapters.minio_fence import MinioFence
        from include.juicefs_storage.adapters.s3.store import PROMPT, S3Store

        config = self.source(setting)
        admin = S3Store.from_connection(conn_id, config.endpoint_and_bucket[1], limits=PROMPT)
        return MinioFence(admin, config.access_key, setting.name, off_until)

    def try_storage(self, config: StorageConfig) -> str | None:
        """Try whether a store takes a storage's keys: from Airflow, which takes a moment; else as the clients reach it.

        A store that Airflow cannot use, for whatever reason, may well serve the clients. See `ports.JuiceFS`. One that
        is silent towards both is not asked again by this task.
        """
        mask_keys(config)
        if silent := self._silent.get(config.place[0]):
            return silent
        store = self._by_setting(config)
        try:
            store.ping()
            store.check()
        except UnreachableError:
            problem = self.juicefs.try_storage(config, timeout_s=_SILENT_S)
            if problem and problem.startswith(NO_ANSWER):
                self._silent[config.place[0]] = problem
            return problem
        except StorageSwitchError:
            return self.juicefs.try_storage(config)
        return ""

    def _by_setting(self, config: StorageConfig) -> S3Bucket:
        from include.juicefs_storage.adapters.s3.bucket import S3Bucket

        return S3Bucket.from_storage(config, environment=self.client_environment)


class Runtime(VolumeRuntime):
    """The adapters of one run, made when first used. Every secret value is registered with Airflow's masker."""

    def __init__(self, params: SwitchParams) -> None:
        super().__init__(params)
        self.params = params

    @classmethod
    def of_run(cls) -> Runtime:
        """Build the runtime of the task that is running, from the params that the run's first task validated."""
        return cls.of_params(validated_params())

    @classmethod
    def of_params(cls, params: dict[str, Any]) -> Runtime:
        """Build the runtime of a run with these params, as its first task resolved them."""
        return cls((RevertParams if "backup_id" in params else SwitchParams).model_validate(params))

    @cached_property
    def recorded(self) -> Backup | None:
        """The backup that this run goes back to; None in a switch."""
        if not isinstance(self.params, RevertParams):
            return None
        return read_backup(self.vault, self.params.backup_id)

    def target(self, setting: Setting) -> StorageConfig:
        """Return the storage that the volume's clients will use."""
        from include.juicefs_storage.adapters.s3.store import connection_storage

        params = self.params
        if self.recorded:
            return self.source(self.recorded.setting)
        storage = params.target_storage or setting.storage
        config = connection_storage(params.target_conn_id, storage, params.target_bucket, params.target_endpoint)
        mask_keys(config)
        return config

    @cached_property
    def target_store(self) -> S3Bucket:
        """The new bucket, as Airflow reaches it."""
        from include.juicefs_storage.adapters.s3.bucket import S3Bucket

        if self.recorded and not self.params.target_conn_id:
            return self._by_setting(self.source(self.recorded.setting)).on_side("new store")
        return S3Bucket.from_connection(self.params.target_conn_id, self.params.target_bucket).on_side("new store")

    @cached_property
    def lacks_bucket(self) -> bool:
        """Whether the new bucket does not exist, and the run is asked to make it."""
        return self.params.create_bucket and self.target_store.is_absent(f"{self.setting().name}/")

    def source_store(self, config: StorageConfig) -> S3Bucket:
        """Return the old bucket, as Airflow reaches it."""
        from include.juicefs_storage.adapters.s3.bucket import S3Bucket

        if self.params.source_conn_id:
            bucket = config.endpoint_and_bucket[1]
            return S3Bucket.from_connection(self.params.source_conn_id, bucket).on_side("old store")
        return self._by_setting(config).on_side("old store")

    def clients_store(self, config: StorageConfig) -> S3Bucket:
        """Return the new bucket, as Airflow reaches it, with the keys of a storage."""
        from include.juicefs_storage.adapters.s3.bucket import S3Bucket

        return S3Bucket(
            replace(
                self.target_store.store,
                access_key=config.access_key.get_secret_value(),
                secret_key=config.secret_key.get_secret_value(),
                session_token=config.session_token.get_secret_value(),
            )
        )

    def fence(self, setting: Setting) -> WriteFence | None:
        """Return the write fence on the store that a setting names; None where none is wanted."""
        return self.fence_on(setting, self.params.fence_conn_id) if self.params.fence_conn_id else None


class _Unusable:
    """A cluster whose connection leads nowhere: what is asked of it fails with that reason."""

    def __init__(self, why: StorageSwitchError) -> None:
        self._why = why

    def __getattr__(self, _: str) -> NoReturn:
        raise type(self._why)(self._why.problem, next_step=self._why.next_step)


def open_vault() -> FileVault:
    """Open the backups, which belong to no single volume."""
    from include.juicefs_storage.adapters.vault import FileVault

    return FileVault.from_connection(BACKUP_CONN_ID, mask)
