"""From the params of a run to the adapters that it works with, and from our errors to Airflow's."""

from __future__ import annotations

import base64
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar, overload
from urllib.parse import quote

from airflow.sdk import get_current_context, task
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException

from include.juicefs_storage.errors import PermanentError, StillAwayError, StorageSwitchError, TransientError
from include.juicefs_storage.ports import WriteFence
from include.juicefs_storage.switch.backup import Backup, read_backup
from include.juicefs_storage.switch.params import RevertParams, SwitchParams
from include.juicefs_storage.volume.setting import Setting, StorageConfig

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.juicefs_command import JuiceFSCommand
    from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
    from include.juicefs_storage.adapters.mysql import MySqlMetadata
    from include.juicefs_storage.adapters.s3.boto_bucket import S3Bucket
    from include.juicefs_storage.adapters.s3.client import S3Store
    from include.juicefs_storage.adapters.vault import FileVault

_Client = TypeVar("_Client", "S3Bucket", "S3Store")

#: Of every task, where the task does not say otherwise.
TASK_DEFAULTS: dict[str, Any] = {
    "owner": "storage-sre",
    "retries": 1,
    "retry_delay": timedelta(seconds=5),
    "execution_timeout": timedelta(hours=8),
}
#: Where backups lie: password = key (base64 of 32 bytes), extra.path = folder.
BACKUP_CONN_ID = "juicefs_backup"
#: The registry of volumes; the environment may name another file, outside of the image.
REGISTRY = Path(os.environ.get("JUICEFS_STORAGE_VOLUMES") or Path(__file__).parents[2] / "volumes.yaml")
#: For bulk copies; made by the lab and by deploy/init.sh. The tasks of the runbook take no slot of it: a volume in
#: mid-move never waits behind a copy.
COPY_POOL = "juicefs_storage"
#: The states in which a task has ended.
ENDED = frozenset({"success", "failed", "upstream_failed", "skipped", "removed"})
#: The XCom by which a task that follows the clients' writes tells that it has begun, and how long that may take.
FOLLOWING = "following"
_FOLLOWER_START_S, _FOLLOWER_POLL_S = 60, 0.3
#: The XCom of a task that waited for the metadata database in vain, and for how long others need not wait again.
_WAITED, _WAITED_LATELY = "waited_for_metadata", timedelta(minutes=3)

log = logging.getLogger(__name__)


@overload
def runbook_task(function: Callable[..., Any], /) -> Any: ...
@overload
def runbook_task(**options: Any) -> Callable[[Callable[..., Any]], Any]: ...
def runbook_task(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """`@task` for a step of the runbook.

    The docstring becomes `doc_md`. XCom `timing` gets `applied_at` (UTC) and `took_s` (seconds).
    Our own errors that will not go away by themselves fail the task at once; the others are tried again.
    """
    if function is None:
        return functools.partial(runbook_task, **options)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        start = monotonic()
        with errors_for_airflow():
            result = function(*args, **kwargs)
        push("timing", {"applied_at": datetime.now(UTC).isoformat(), "took_s": round(monotonic() - start, 1)})
        log.info("Done: %s", result)
        return result

    kind = options.pop("kind", None)
    decorator = getattr(task, kind) if kind else task
    return decorator(doc_md=inspect.getdoc(function), **options)(run)


@contextmanager
def errors_for_airflow() -> Iterator[None]:
    """Our own errors that will not go away by themselves fail the task at once; the others are tried again."""
    try:
        with missing_connections_explained():
            yield
    except StillAwayError as error:
        push(_WAITED, datetime.now(UTC).isoformat())
        raise AirflowFailException(str(error)) from error
    except TransientError:
        raise
    except StorageSwitchError as error:
        raise AirflowFailException(str(error)) from error


@contextmanager
def missing_connections_explained() -> Iterator[None]:
    """Turn Airflow's answer for a connection that does not exist into an error of ours."""
    try:
        yield
    except AirflowNotFoundException as error:
        raise PermanentError(
            f"{error}", next_step="make the connection in Airflow (Admin → Connections), or correct the param"
        ) from None


class Runtime:
    """The adapters of one run, made when first used. Every secret value is registered with Airflow's masker."""

    def __init__(self, params: SwitchParams) -> None:
        self.params = params

    @classmethod
    def of_run(cls) -> Runtime:
        """The runtime of the task that is running, from the params that the run's first task validated."""
        params = pull("resolve_params")
        if not params:
            raise PermanentError(
                "The params of this run were not validated.", next_step="clear resolve_params with Downstream"
            )
        model = RevertParams if "backup_id" in params else SwitchParams
        return cls(model.model_validate(params))

    @cached_property
    def cluster(self) -> KubernetesCluster:
        """The cluster of the CSI driver."""
        from include.juicefs_storage.adapters.kubernetes import KubernetesCluster

        return KubernetesCluster.from_connection(self.params.kubernetes_conn_id, self.params.namespace)

    @cached_property
    def metaurl(self) -> str:
        """The metadata URL as the CSI driver knows it."""
        metaurl = self.cluster.secret(self.params.secret_name).data.get("metaurl", "")
        if not metaurl:
            raise PermanentError(
                f"Secret {self.params.namespace}/{self.params.secret_name} has no key `metaurl`.",
                next_step="correct `namespace` and `secret_name`",
            )
        from include.juicefs_storage.volume.metaurl import split_password

        mask(metaurl, split_password(metaurl)[1])
        return metaurl

    @cached_property
    def metadata(self) -> MySqlMetadata:
        """The metadata database."""
        from include.juicefs_storage.adapters.mysql import MySqlMetadata

        if self.params.meta_conn_id:
            return MySqlMetadata.from_connection(self.params.meta_conn_id, _waited_for)
        return MySqlMetadata.from_metaurl(self.metaurl, _waited_for)

    @cached_property
    def juicefs(self) -> JuiceFSCommand:
        """The juicefs command line, where `juicefs_runner` says."""
        from include.juicefs_storage.adapters.juicefs_command import in_controller_pod, on_worker

        if self.params.juicefs_runner == "worker":
            return on_worker(self.metaurl)
        return in_controller_pod(self.cluster, self.metaurl)

    @cached_property
    def vault(self) -> FileVault:
        """The backups."""
        return open_vault()

    def setting(self) -> Setting:
        """The setting as it is now."""
        return self.metadata.read_setting()

    @cached_property
    def recorded(self) -> Backup | None:
        """The backup that this run goes back to; None in a switch."""
        if not isinstance(self.params, RevertParams):
            return None
        return read_backup(self.vault, self.params.backup_id)

    def target(self, setting: Setting) -> StorageConfig:
        """What the volume's clients will be told to use."""
        from include.juicefs_storage.adapters.s3.boto_bucket import connection_storage

        params = self.params
        if self.recorded:
            return self.source(self.recorded.setting)
        config = connection_storage(
            params.target_conn_id, setting.storage, params.target_bucket, params.target_endpoint
        )
        mask_keys(config)
        return config

    def source(self, setting: Setting) -> StorageConfig:
        """What the clients use by a setting."""
        config = setting.config
        mask_keys(config)
        return config

    @cached_property
    def target_store(self) -> S3Bucket:
        """The new bucket, as Airflow reaches it."""
        from include.juicefs_storage.adapters.s3.boto_bucket import S3Bucket

        return self._new(S3Bucket)

    def source_store(self, config: StorageConfig) -> S3Bucket:
        """The old bucket, as Airflow reaches it."""
        from include.juicefs_storage.adapters.s3.boto_bucket import S3Bucket

        return self._old(S3Bucket, config)

    def target_side(self) -> S3Store:
        """The same for the copying engine."""
        from include.juicefs_storage.adapters.s3.client import S3Store

        return self._new(S3Store)

    def source_side(self, config: StorageConfig) -> S3Store:
        """The same for the copying engine."""
        from include.juicefs_storage.adapters.s3.client import S3Store

        return self._old(S3Store, config)

    def _new(self, kind: type[_Client]) -> _Client:
        if self.recorded and not self.params.target_conn_id:
            return kind.from_storage(self.source(self.recorded.setting))
        return kind.from_connection(self.params.target_conn_id, self.params.target_bucket)

    def _old(self, kind: type[_Client], config: StorageConfig) -> _Client:
        if self.params.source_conn_id:
            return kind.from_connection(self.params.source_conn_id, config.endpoint_and_bucket[1])
        return kind.from_storage(config)

    def fence(self, setting: Setting) -> WriteFence | None:
        """The write fence on the store that a setting names; None where none is wanted."""
        from include.juicefs_storage.adapters.minio_fence import MinioFence
        from include.juicefs_storage.adapters.s3.client import S3Store

        if not self.params.fence_conn_id:
            return None
        config = self.source(setting)
        admin = S3Store.from_connection(self.params.fence_conn_id, config.endpoint_and_bucket[1])
        return MinioFence(admin, config.access_key, setting.name)


def read_registry() -> dict[str, dict[str, Any]]:
    """Volume name -> the params that it fills in.

    Raises:
        PermanentError: The file is not there, or is not of that form.
    """
    import yaml

    try:
        registry: dict[str, dict[str, Any]] = yaml.safe_load(REGISTRY.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise PermanentError(
            f"The registry of volumes {REGISTRY} cannot be read ({type(error).__name__}).", next_step="correct the file"
        ) from None
    if not isinstance(registry, dict) or not all(isinstance(entry, dict) for entry in registry.values()):
        raise PermanentError(
            f"The registry of volumes {REGISTRY}: expected a volume's name and below it its params.",
            next_step="correct the file; include/volumes.yaml has an example",
        )
    return registry


def open_vault() -> FileVault:
    """The backups, which belong to no single volume."""
    from include.juicefs_storage.adapters.vault import FileVault

    return FileVault.from_connection(BACKUP_CONN_ID)


def _waited_for() -> bool:
    """Whether another task of this run waited for the metadata database in vain just now.

    Each task would wait anew, and a run whose database is gone take a quarter of an hour to say so.
    """
    since = datetime.now(UTC) - _WAITED_LATELY
    found = (pull(task_id, _WAITED) for task_id in get_current_context()["dag"].task_ids)
    return any(isinstance(at, str) and datetime.fromisoformat(at) > since for at in found)


def pull(task_id: str, key: str = "return_value") -> Any:
    """An XCom of this run; None where there is none."""
    return get_current_context()["ti"].xcom_pull(task_ids=task_id, key=key)


def push(key: str, value: Any) -> None:
    """Set an XCom of the task that is running; it stays when the task fails afterwards."""
    get_current_context()["ti"].xcom_push(key=key, value=value)


def await_follower(task_id: str) -> bool:
    """Wait until a task that follows the clients' writes is at work, for as long as its start may take.

    Returns:
        False where it is not: there is no free worker slot, or it has ended, as after a clear that left it out.
    """
    deadline = monotonic() + _FOLLOWER_START_S
    while (state := task_states(task_id)[task_id]) not in ENDED and monotonic() < deadline:
        if state == "running" and pull(task_id, FOLLOWING):
            return True
        sleep(_FOLLOWER_POLL_S)
    log.warning(
        "Task %s does not follow (%s): what clients write meanwhile is copied when they have moved.", task_id, state
    )
    return False


def run_id() -> str:
    """The id of this run."""
    return str(get_current_context()["run_id"])


def task_states(*task_ids: str) -> dict[str, str]:
    """The states of tasks of this run; `none` where a task has none yet."""
    context = get_current_context()
    states = context["ti"].get_task_states(dag_id=context["dag"].dag_id, task_ids=list(task_ids), run_ids=[run_id()])
    found = states.get(run_id(), {})
    return {task_id: str(found.get(task_id) or "none") for task_id in task_ids}


def mask_keys(config: StorageConfig) -> None:
    """Keep a storage's keys out of the logs."""
    mask(config.access_key.get_secret_value(), config.secret_key.get_secret_value())


def mask(*values: str) -> None:
    """Keep values out of the logs, in the forms that they take elsewhere too: base64 (Secrets) and quoted (URLs)."""
    from airflow.sdk.log import mask_secret

    for value in filter(None, values):
        mask_secret(value)
        mask_secret(base64.b64encode(value.encode()).decode())
        if (quoted := quote(value, safe="")) != value:
            mask_secret(quoted)
