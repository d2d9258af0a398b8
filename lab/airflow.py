"""A real Airflow: API server, scheduler and DAG processor as processes of their own.

With LocalExecutor and SQLite; or with Celery workers, PostgreSQL and Redis, as docker-compose.yaml has them.
"""

import base64
import configparser
import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx

from include.juicefs_storage.names import BACKUP_CONN_ID, COPY_POOL
from lab.celery import PostgreSQL, Redis
from lab.mariadb import MariaDB
from lab.process import LabError, Server, free_ports, run, wait_for
from lab.seaweed import Store

PROJECT = Path(__file__).resolve().parents[1]
#: Arguments of `airflow`, by the component's name.
COMPONENTS = {name: (name,) for name in ("api-server", "scheduler", "dag-processor")}
POOL_SLOTS = 4
_END_STATES = {"success", "failed"}


@dataclass(frozen=True)
class TaskState:
    """The state of a task instance; `state` is None before it was scheduled. Times are ISO 8601."""

    task_id: str
    map_index: int
    state: str | None
    try_number: int
    start: str | None
    end: str | None
    duration_s: float | None


@dataclass(frozen=True)
class Airflow:
    """A running Airflow with an administrator `admin` and a viewer `viewer`."""

    state: Path
    port: int
    password: str = field(repr=False)
    viewer_password: str = field(repr=False)
    user: str = "admin"

    @classmethod
    def start(
        cls,
        state: Path,
        *,
        settings: Mapping[str, Mapping[str, object]] | None = None,
        components: Mapping[str, Sequence[str]] = COMPONENTS,
    ) -> "Airflow":
        """Write the configuration, make the database and start the components; does not wait for them: see connect.

        Args:
            state: the lab's folder.
            settings: of airflow.cfg, section by section, over those of the lab.
            components: the arguments of `airflow` by the component's name.
        """
        home = state / "airflow"
        home.mkdir(parents=True, mode=0o700)
        self = cls(state, free_ports(1)[0], secrets.token_urlsafe(9), secrets.token_urlsafe(9))
        _write_private(
            home / "passwords.json", json.dumps({self.user: self.password, "viewer": self.viewer_password}) + "\n"
        )
        config = configparser.RawConfigParser()
        config.read_dict(self._config())
        config.read_dict(settings or {})
        with (home / "airflow.cfg").open("w") as file:
            (home / "airflow.cfg").chmod(0o600)
            config.write(file)
        (home / "config").mkdir()
        (home / "config" / "airflow_local_settings.py").write_text(_PRELOAD)
        run([*_AIRFLOW, "db", "migrate"], env=self.environment, deadline_s=180)
        self.restart(components)
        return self

    @classmethod
    def start_with_celery(
        cls,
        state: Path,
        postgresql: PostgreSQL,
        redis: Redis,
        *,
        workers: Sequence[str],
        settings: Mapping[str, Mapping[str, object]],
    ) -> "Airflow":
        """Start one with workers of Celery, named as docker-compose.yaml names database and queue; see start.

        Args:
            state: the lab's folder.
            postgresql: its database.
            redis: its queue.
            workers: a name for each; its process is `airflow-<name>`.
            settings: over those of the lab, as for start.
        """
        database = f"airflow:{postgresql.password}@127.0.0.1:{postgresql.port}/airflow"
        celery = {
            "broker_url": f"redis://:{redis.password}@127.0.0.1:{redis.port}/0",
            "result_backend": f"db+postgresql://{database}",
            "worker_concurrency": 2,
        }
        given: dict[str, dict[str, object]] = {
            "core": {"executor": "CeleryExecutor"},
            "database": {"sql_alchemy_conn": f"postgresql+psycopg2://{database}"},
            "celery": celery,
        }
        for section, values in settings.items():
            given.setdefault(section, {}).update(values)
        worker = ("celery", "worker", "--skip-serve-logs", "--without-gossip", "--without-mingle")
        flags = {name: (*worker, "--celery-hostname", f"{name}@lab", "--pid", f"{name}.pid") for name in workers}
        return cls.start(state, settings=given, components={**COMPONENTS, **flags})

    def restart(self, components: Mapping[str, Sequence[str]] = COMPONENTS) -> None:
        """Start the components on the same database, stopping first those that run."""
        self.stop()
        for name, arguments in components.items():
            Server.start(self.state, f"airflow-{name}", [*_AIRFLOW, *arguments], env=self.environment, cwd=self.home)

    def stop(self) -> None:
        """Stop the components. Idempotent."""
        for server in self.servers():
            server.stop()

    def connect(self, mariadb: MariaDB, old_store: Store, new_store: Store, kubeconfig: Path) -> None:
        """Wait until all components are healthy, then create the connections and the pool that the DAGs use.

        They are made through the REST API, so that the UI lists them and no secret is in an argv or a file.

        Raises:
            LabError: a component did not come up; the message carries its log's last lines.
        """
        for component in COMPONENTS:
            server = Server.load(self.state, f"airflow-{component}")
            wait_for(f"{component} is healthy", partial(self._healthy, component), deadline_s=180, server=server)
        registered = {"myjfs": {"target_conn_id": "minio_new", "target_bucket": new_store.bucket}}
        (self.state / "volumes.yaml").write_text(json.dumps(registered))  # JSON is YAML
        backups = self.state / "backups"
        backups.mkdir(mode=0o700, exist_ok=True)
        connections: dict[str, dict[str, Any]] = {
            "kubernetes_default": {"conn_type": "kubernetes", "extra": {"kube_config_path": str(kubeconfig)}},
            "minio_old": _aws(old_store),
            "minio_new": _aws(new_store),
            "juicefs_meta": {
                "conn_type": "mysql",
                "host": mariadb.host,
                "port": mariadb.port,
                "schema": mariadb.database,
                "login": mariadb.user,
                "password": mariadb.password,
            },
            BACKUP_CONN_ID: {
                "conn_type": "generic",
                "password": base64.b64encode(secrets.token_bytes(32)).decode(),
                "extra": {"path": backups.as_uri()},
            },
        }
        for name, values in connections.items():
            self._add_connection(name, values)
        self.api("POST", "/pools", json={"name": COPY_POOL, "slots": POOL_SLOTS})

    def connect_store(self, conn_id: str, store: Store) -> None:
        """Create one more connection of type `aws`."""
        self._add_connection(conn_id, _aws(store))

    def _add_connection(self, conn_id: str, values: dict[str, Any]) -> None:
        extra = {"extra": json.dumps(values["extra"])} if "extra" in values else {}
        self.api("POST", "/connections", json={"connection_id": conn_id, **values, **extra})

    @property
    def home(self) -> Path:
        """AIRFLOW_HOME."""
        return self.state / "airflow"

    @property
    def url(self) -> str:
        """The UI's address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What an `airflow` command needs to work on this Airflow."""
        # include/ is imported from the project's root by every component.
        return {
            "AIRFLOW_HOME": str(self.home),
            "PYTHONPATH": str(PROJECT),
            # Where the tools that copies may use are: juicefs, and mc as setup.sh unpacks it.
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), str(PROJECT / ".venv/mc/usr/bin"), os.environ["PATH"]]
            ),
            "NO_COLOR": "1",
            # A process that titles itself keeps its environment, by which tests/support/reaper.py finds it.
            "SPT_NOENV": "1",
            "JUICEFS_STORAGE_VOLUMES": str(self.state / "volumes.yaml"),
            "JUICEFS_STORAGE_REHEARSAL_SCHEDULE": "none",
            "JUICEFS_STORAGE_MANIFESTS": (self.state / "manifests").as_uri(),
        }

    def servers(self) -> list[Server]:
        """Return the recorded processes."""
        names = [path.stem for path in (self.state / "run").glob("airflow-*.json")]
        return [server for name in names if (server := Server.load(self.state, name))]

    def healthy(self) -> bool:
        """Return whether every component runs and says that it is well."""
        return all(self._healthy(component) for component in COMPONENTS)

    def _healthy(self, component: str) -> bool:
        key = {"api-server": "metadatabase"}.get(component, component.replace("-", "_"))
        try:
            answer = _http().get(f"{self.url}/api/v2/monitor/health", timeout=10)
            return bool(answer.json()[key]["status"] == "healthy")
        except (httpx.HTTPError, ValueError, KeyError):
            return False

    def api(self, method: str, path: str, *, json: object = None, params: dict[str, Any] | None = None) -> Any:
        """Call REST API v2 as the administrator and return the answer's JSON (None where it has no body).

        Raises:
            LabError: any other status than 2xx, with what the server said.
        """
        answer = self._request(method, path, json, params)
        if not answer.is_success:
            raise LabError(f"expected 2xx from {method} {path}, found {answer.status_code}: {answer.text[:2000]}")
        return answer.json() if answer.content else None

    def page(self, path: str) -> httpx.Response:
        """Return the answer to a GET of a page of the plugin, as the administrator sees it."""
        headers = {"Authorization": f"Bearer {_token(self.url, self.user, self.password)}"}
        return _http().get(f"{self.url}/juicefs-storage/{path}", headers=headers)

    def _request(self, method: str, path: str, body: object, params: dict[str, Any] | None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {_token(self.url, self.user, self.password)}"}
        return _http().request(method, f"{self.url}/api/v2{path}", json=body, params=params, headers=headers)

    def trigger(self, dag_id: str, conf: dict[str, Any], *, deadline_s: float = 90.0) -> str:
        """Start a run with these params and return its id; waits until the DAG's file has been read.

        Raises:
            LabError: the DAG is not there in time (the message has the import errors), or a param was refused.
        """
        try:
            wait_for(
                f"DAG {dag_id} is there",
                lambda: self._request("GET", f"/dags/{dag_id}", None, None).is_success,
                deadline_s=deadline_s,
                poll_s=0.5,
            )
        except LabError as error:
            raise LabError(f"{error}; import errors: {self.import_errors()}") from error
        run_id: str = self.api("POST", f"/dags/{dag_id}/dagRuns", json={"logical_date": None, "conf": conf})[
            "dag_run_id"
        ]
        return run_id

    def answer(self, dag_id: str, run_id: str, task_id: str, option: str, *, deadline_s: float = 180) -> None:
        """Answer a question of a run as a person does in the UI, when it has stood there for two seconds.

        Airflow 3.3 runs a task again, or fails it, if its answer overtakes the executor's report that it waits.

        Raises:
            LabError: The task did not end in time.
        """
        task = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        seen = 0

        def answered() -> bool:
            nonlocal seen
            state = self.api("GET", task)["state"]
            seen = seen + 1 if state == "awaiting_input" else 0
            if seen >= 5:
                seen = 0
                with contextlib.suppress(LabError):  # answered meanwhile
                    body = {"chosen_options": [option], "params_input": {}}
                    self.api("PATCH", f"{task}/-1/hitlDetails", json=body)
            return state in {"success", "failed", "upstream_failed", "skipped"}

        wait_for(f"{task_id} has its answer", answered, deadline_s=deadline_s, poll_s=0.5)

    def clear(self, dag_id: str, run_id: str, task_ids: list[str], *, downstream: bool = False) -> None:
        """Clear tasks of a run, as the UI's Clear does, so that they run again."""
        body = {
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": task_ids,
            "only_failed": False,
            "include_downstream": downstream,
            "reset_dag_runs": True,
        }
        self.api("POST", f"/dags/{dag_id}/clearTaskInstances", json=body)

    def import_errors(self) -> dict[str, str]:
        """Return the DAG files that could not be read: file name to stack trace."""
        errors = self.api("GET", "/importErrors")["import_errors"]
        return {error["filename"]: error["stack_trace"] for error in errors}

    def run_state(self, dag_id: str, run_id: str) -> str:
        """Return the state of a run: queued, running, success or failed."""
        state: str = self.api("GET", f"/dags/{dag_id}/dagRuns/{run_id}")["state"]
        return state

    def wait_run(
        self,
        dag_id: str,
        run_id: str,
        *,
        timeout_s: float,
        on_change: Callable[[TaskState], None] | None = None,
    ) -> str:
        """Wait for the end of a run and return its state: success or failed.

        Args:
            dag_id: of the run.
            run_id: as trigger() returned it.
            timeout_s: how long.
            on_change: called whenever a task instance's state has changed.

        Raises:
            LabError: it did not end in time; the message has the state of each task.
        """
        seen: dict[tuple[str, int], tuple[str | None, int]] = {}
        deadline = time.monotonic() + timeout_s
        while True:
            state = self.run_state(dag_id, run_id)
            if on_change:
                for task in self.task_states(dag_id, run_id):
                    key, now = (task.task_id, task.map_index), (task.state, task.try_number)
                    if task.state and seen.get(key) != now:
                        on_change(task)
                    seen[key] = now
            if state in _END_STATES:
                return state
            if time.monotonic() > deadline:
                tasks = self.task_states(dag_id, run_id)
                states = ", ".join(f"{task.task_id} {task.state}" for task in tasks if task.state)
                raise LabError(f"expected run {run_id} of {dag_id} to end within {timeout_s:.0f} s, found {states}")
            # Each look costs the API server some hundredths of a second of CPU.
            time.sleep(1)

    def task_states(self, dag_id: str, run_id: str) -> list[TaskState]:
        """Return every task instance of a run, in the order of their start."""
        answer = self.api("GET", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances", params={"limit": 1000})
        tasks = [
            TaskState(
                task_id=item["task_id"],
                map_index=item["map_index"],
                state=item["state"],
                try_number=item["try_number"],
                start=item["start_date"],
                end=item["end_date"],
                duration_s=item["duration"],
            )
            for item in answer["task_instances"]
        ]
        return sorted(tasks, key=lambda task: (task.start is None, task.start or ""))

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1) -> Any:
        """Return the value that a task pushed; None where there is none."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}"
        answer = self._request("GET", path, None, {"map_index": map_index})
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        return answer.raise_for_status().json()["value"]

    def task_log(self, dag_id: str, run_id: str, task_id: str, *, try_number: int = 1, map_index: int = -1) -> str:
        """Return the log of one try of a task, a JSON object a line."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        content = self.api("GET", path, params={"map_index": map_index, "full_content": True})["content"]
        return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in content)

    def task_error(self, dag_id: str, run_id: str, task: TaskState) -> str:
        """Return what a failed task raised, as its log has it; empty where there is nothing."""
        log = self.task_log(dag_id, run_id, task.task_id, try_number=task.try_number, map_index=task.map_index)
        events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        errors = [error for event in events for error in event.get("error_detail") or []]
        return "\n".join(f"{error['exc_type']}: {error['exc_value']}" for error in errors[-1:])

    def _config(self) -> dict[str, dict[str, object]]:
        return {
            "core": {
                "executor": "LocalExecutor",
                "parallelism": 6,
                "dags_folder": PROJECT / "dags",
                "plugins_folder": PROJECT / "plugins",
                "load_examples": False,
                "dags_are_paused_at_creation": False,
                "fernet_key": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
                "simple_auth_manager_users": f"{self.user}:admin,viewer:viewer",
                "simple_auth_manager_passwords_file": self.home / "passwords.json",
                # Where the tasks' processes reach the API server: its port is not the default one.
                "execution_api_server_url": f"{self.url}/execution/",
                "mp_start_method": "spawn" if sys.platform == "darwin" else "fork",
            },
            "database": {"sql_alchemy_conn": f"sqlite:///{self.home / 'airflow.db'}"},
            "api": {
                "host": "127.0.0.1",
                "port": self.port,
                "base_url": self.url,
                "workers": 1,
                "secret_key": secrets.token_hex(32),
            },
            "api_auth": {"jwt_secret": secrets.token_hex(32)},
            "logging": {"base_log_folder": self.home / "logs", "logging_level": "INFO"},
            "scheduler": {"scheduler_idle_sleep_time": 0.2, "enable_health_check": False},
            # Nobody edits the DAG files while a lab is up: parsing them again and again would take a tenth of a core.
            "dag_processor": {"min_file_process_interval": 300},
            "usage_data_collection": {"enabled": False},
        }


# Tasks are forked from the scheduler's, or Celery's, processes: what these have imported, no task imports again.
_PRELOAD = """
import sys

if {"scheduler", "worker"} & set(sys.argv):
    import lab.preload
"""
_AIRFLOW = (sys.executable, "-m", "airflow")


@cache
def _http() -> httpx.Client:
    """One client for all calls: each new one reads the system's certificates, which costs more than the call.

    It gives connections up before the server does, which closes them after 5 s.
    """
    return httpx.Client(timeout=60, limits=httpx.Limits(keepalive_expiry=2))


@cache
def _token(url: str, user: str, password: str) -> str:
    answer = _http().post(f"{url}/auth/token", json={"username": user, "password": password})
    token: str = answer.raise_for_status().json()["access_token"]
    return token


def _aws(store: Store) -> dict[str, Any]:
    return {
        "conn_type": "aws",
        "login": store.access_key,
        "password": store.secret_key,
        "extra": {
            "endpoint_url": store.endpoint_url,
            "region_name": "us-east-1",
            "config_kwargs": {"s3": {"addressing_style": "path"}},
        },
    }


def _write_private(path: Path, text: str) -> None:
    with contextlib.suppress(FileExistsError):
        path.touch(mode=0o600, exist_ok=False)
    path.write_text(text)
