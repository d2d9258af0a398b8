"""What the repository itself promises: pinned, hash-checked, deployable, and nothing secret in it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.executors.executor_loader import ExecutorLoader

from include.juicefs_storage.ports import Right
from include.juicefs_storage.switch.checks import needed_rights

ROOT = Path(__file__).parents[2]
LOCKS = ["requirements.txt", "requirements-dev.txt"]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_nothing_is_tracked_that_is_ignored() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert listed.stdout == ""


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    return loaded


def lock_entries(lock: str) -> dict[str, str]:
    """Requirement line -> the rest of its entry, where the hashes stand."""
    text = re.sub(r"^#.*\n", "", (ROOT / lock).read_text(), flags=re.MULTILINE)
    return {entry.split("\n", 1)[0].rstrip(" \\"): entry for entry in re.split(r"\n(?=\S)", text.strip())}


def env_names(part: int = 0) -> set[str]:
    """The keys, which are demanded, or (part 1) the settings below them, which have a default."""
    text = (ROOT / ".env.example").read_text().split("\n# Settings.")[part]
    return set(re.findall(r"^([A-Z_]+)=", text, re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_is_pinned_with_hashes(lock: str) -> None:
    entries = lock_entries(lock)
    assert len(entries) > 10
    loose = [line for line, entry in entries.items() if "==" not in line or "--hash=sha256:" not in entry]
    assert loose == []


@pytest.mark.parametrize(
    "pin",
    [
        "apache-airflow==3.3.2",
        "apache-airflow-providers-amazon==9.39.0",
        "apache-airflow-providers-cncf-kubernetes==10.25.0",
        "apache-airflow-providers-mysql==6.7.1",
        "apache-airflow-providers-standard==1.21.0",
    ],
)
def test_requirements_hold_what_the_dags_are_written_for(pin: str) -> None:
    assert pin in lock_entries("requirements.txt")


def test_both_locks_agree_on_what_they_share() -> None:
    production, development = ({line.split("==")[0]: line for line in lock_entries(lock)} for lock in LOCKS)
    shared = production.keys() & development.keys()
    assert {name: production[name].split(" ;")[0] for name in shared} == {
        name: development[name].split(" ;")[0] for name in shared
    }


def test_no_registry_is_named() -> None:
    """Where packages come from is the machine's configuration, not the project's."""
    # Brackets, so that the pattern does not find itself.
    hosts = re.compile("pypi[.]org|python[h]osted|deb[.]debian[.]org|registry[.]npmjs")
    assert [str(path) for path in tracked_files() if hosts.search(path.read_text(errors="replace"))] == []


def test_no_secret_is_tracked() -> None:
    tracked = tracked_files()
    assert [path for path in tracked if path.name == ".env" or path.suffix in {".key", ".pem", ".kubeconfig"}] == []
    private_key = "-----BEGIN [A-Z ]*PRIVATE[ ]KEY-----"
    assert [path for path in tracked if re.search(private_key, path.read_text(errors="replace"))] == []
    assert subprocess.run(["git", "check-ignore", "-q", ".env"], cwd=ROOT, check=False).returncode == 0


def test_the_example_environment_holds_names_and_no_values() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    assert [
        line for line in lines if line and not line.startswith("#") and not re.fullmatch(r"[A-Z_]+=('')?", line)
    ] == []


def test_compose_has_the_services_of_airflows_own_file() -> None:
    assert set(compose()["services"]) == {
        "postgres",
        "redis",
        "airflow-init",
        "airflow-apiserver",
        "airflow-scheduler",
        "airflow-dag-processor",
        "airflow-worker",
        "airflow-triggerer",
        "airflow-cli",
        "flower",
    }


def test_every_long_running_service_has_a_healthcheck() -> None:
    without = {name for name, service in compose()["services"].items() if "test" not in service.get("healthcheck", {})}
    assert without == {"airflow-init", "airflow-cli"}


def deployed_classes() -> list[str]:
    """The executors and auth managers that the deployment files name, by their paths of import."""
    airflow = compose()["x-airflow"]["environment"]
    values: dict[str, Any] = yaml.safe_load((ROOT / "deploy/values.yaml").read_text())
    executors = [*airflow["AIRFLOW__CORE__EXECUTOR"].split(","), *values["executor"].split(",")]
    managers = [airflow["AIRFLOW__CORE__AUTH_MANAGER"], values["config"]["core"]["auth_manager"]]
    return sorted({*(ExecutorLoader.executors.get(name, name) for name in executors), *managers})


@pytest.mark.parametrize("path", deployed_classes())
def test_the_locked_packages_can_import_what_the_deployments_name(path: str) -> None:
    # In a process of its own: an executor registers itself with Airflow when it is imported.
    module, _, name = path.rpartition(".")
    code = f"import {module} as module; assert isinstance(module.{name}, type)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compose_pins_its_images() -> None:
    images = {service["image"] for service in compose()["services"].values()}
    assert [image for image in images if ":" not in image or image.endswith(":latest")] == []
    base = re.search(r"^ARG AIRFLOW_IMAGE=(.+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert base is not None
    assert base[1] == "apache/airflow:slim-3.3.2-python3.11"


def test_compose_demands_every_key_and_has_no_default() -> None:
    text = (ROOT / "docker-compose.yaml").read_text()
    demanded = re.findall(r"(?<!\$)\$\{([A-Z_]+):\?\1 is missing", text)
    settings = re.findall(r"(?<!\$)\$\{([A-Z_]+):-", text)
    assert (set(demanded), set(settings)) == (env_names(), env_names(1))
    assert len(demanded + settings) == len(re.findall(r"(?<!\$)\$\{?[A-Za-z_]", text)), "a value without :? or :-"
    for name, service in compose()["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|FERNET|KEY", variable):
                assert re.fullmatch(r"\$\{[A-Z_]+:\?.+\}", value), f"{name}: {variable} has a value of its own"


def compose_config(names: set[str], env_file: Path, more: str = "") -> subprocess.CompletedProcess[str]:
    env_file.write_text("".join(f"{name}=x\n" for name in sorted(names)) + more)
    environment = {name: value for name, value in os.environ.items() if name not in env_names()}
    command = ["./setup.sh", "compose", "--env-file", str(env_file), "config"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


def test_compose_is_content_with_the_names_of_the_example(tmp_path: Path) -> None:
    assert compose_config(env_names(), tmp_path / "env").returncode == 0


def test_compose_keeps_a_value_in_quotes_as_it_is(tmp_path: Path) -> None:
    awkward = "pa$word $x #1"
    rendered = compose_config(
        env_names() - {"AIRFLOW_ADMIN_PASSWORD"}, tmp_path / "env", f"AIRFLOW_ADMIN_PASSWORD='{awkward}'\n"
    )
    environment = yaml.safe_load(rendered.stdout)["services"]["airflow-init"]["environment"]
    # In what `config` prints, $$ stands for a $.
    assert environment["AIRFLOW_ADMIN_PASSWORD"].replace("$$", "$") == awkward
    assert "AIRFLOW_ADMIN_PASSWORD=''" in (ROOT / ".env.example").read_text()


def test_compose_passes_the_settings_on(tmp_path: Path) -> None:
    given = {
        "AIRFLOW_URL": "https://airflow.example.com",
        "JUICEFS_STORAGE_FOUR_EYES": "true",
        "JUICEFS_STORAGE_REHEARSAL_SCHEDULE": "@weekly",
        "JUICEFS_STORAGE_SYNC_TASKS": "3",
        "REGISTRY_FOLDER": str(tmp_path),
        "WORKER_CONCURRENCY": "5",
    }
    assert given.keys() == env_names(1)
    more = "".join(f"{name}={value}\n" for name, value in given.items())
    rendered = yaml.safe_load(compose_config(env_names(), tmp_path / "env", more).stdout)
    text = json.dumps(rendered["services"]["airflow-worker"])
    assert [value for value in given.values() if f'"{value}' not in text] == []


def test_every_service_of_airflow_has_one_image_that_is_built_once() -> None:
    services = {name: service for name, service in compose()["services"].items() if name not in {"postgres", "redis"}}
    assert len({service["image"] for service in services.values()}) == 1
    assert [name for name, service in services.items() if "build" in service] == ["airflow-init"]


def test_every_service_has_a_limit_of_memory() -> None:
    assert [name for name, service in compose()["services"].items() if "mem_limit" not in service] == []


def test_no_dag_waits_for_somebody_to_unpause_it() -> None:
    values = yaml.safe_load((ROOT / "deploy/values.yaml").read_text())
    assert compose()["x-airflow"]["environment"]["AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION"] == "false"
    assert values["config"]["core"]["dags_are_paused_at_creation"] == "False"


def test_a_dead_worker_is_noticed_in_a_minute() -> None:
    values = yaml.safe_load((ROOT / "deploy/values.yaml").read_text())
    assert compose()["x-airflow"]["environment"]["AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT"] == "60"
    assert values["config"]["scheduler"]["task_instance_heartbeat_timeout"] == "60"


@pytest.mark.parametrize("missing", sorted(env_names()))
def test_compose_names_the_key_that_is_missing(missing: str, tmp_path: Path) -> None:
    refused = compose_config(env_names() - {missing}, tmp_path / "env")
    assert refused.returncode != 0
    assert f"{missing} is missing in .env" in refused.stderr


def test_compose_hands_over_a_backup_connection_that_works(tmp_path: Path) -> None:
    key = base64.b64encode(bytes(range(222, 254))).decode()
    env_file = tmp_path / "env"
    rendered = compose_config(env_names() - {"JUICEFS_BACKUP_KEY"}, env_file, f"JUICEFS_BACKUP_KEY={key}\n")
    environment = yaml.safe_load(rendered.stdout)["services"]["airflow-worker"]["environment"]
    connection = json.loads(environment["AIRFLOW_CONN_JUICEFS_BACKUP"])
    assert connection["password"] == key
    assert "openssl rand -base64 32\nJUICEFS_BACKUP_KEY=" in (ROOT / ".env.example").read_text()
    folder = connection["extra"]["path"].removeprefix("file://")
    manifests = environment["JUICEFS_STORAGE_MANIFESTS"].removeprefix("file://")
    assert {f"juicefs-backups:{folder}", f"juicefs-manifests:{manifests}"} <= set(
        compose()["services"]["airflow-worker"]["volumes"]
    ), "must outlive the container"


def roles() -> Iterator[tuple[str, str, str, str]]:
    """Kind of role, API group, resource, verb."""
    for document in yaml.safe_load_all((ROOT / "deploy/rbac.yaml").read_text()):
        for rule in document.get("rules", []):
            for group, resource, verb in itertools.product(rule["apiGroups"], rule["resources"], rule["verbs"]):
                yield document["kind"], group, resource, verb


def test_the_roles_grant_every_right_that_a_run_checks_and_nothing_else() -> None:
    def row(right: Right) -> tuple[str, str, str, str]:
        resource = "/".join(part for part in (right.resource, right.subresource) if part)
        return ("Role" if right.namespace else "ClusterRole", right.group, resource, right.verb)

    assert set(roles()) == {row(right) for right in needed_rights("juicefs")}


#: Asked for where they are granted, and not missed otherwise: docs/rights.md.
OPTIONAL = {("ClusterRole", "secrets", "list"), ("ClusterRole", "deployments", "list")}
VERBS = {"read": {"get"}, "list": {"list"}, "patch": {"patch"}, "create": {"create"}, "replace": {"update"}}


def called_rights() -> set[tuple[str, str, str]]:
    """Kind of role, resource and verb of every method of the Kubernetes client that the adapters name."""
    source = "".join(path.read_text() for path in (ROOT / "include/juicefs_storage/adapters/kubernetes").glob("*.py"))
    # An exec over WebSocket is a GET, and newer API servers ask for `create` as well.
    found = {("Role", "pods/exec", verb) for verb in ("get", "create") if "connect_get_namespaced_pod_exec" in source}
    method = rf"\.({'|'.join(VERBS)})_(namespaced_)?(?!stdout|stderr|self_)([a-z_]+?)(_for_all_namespaces)?\b"
    for verb, namespaced, name, _ in re.findall(method, source):
        kind, _, subresource = name.replace("pod_log", "pod/log").partition("/")
        plural = (
            kind.replace("_", "") + ("es" if kind.endswith("s") else "s") + (f"/{subresource}" if subresource else "")
        )
        found |= {("Role" if namespaced else "ClusterRole", plural, needed) for needed in VERBS[verb]}
    return found


def test_every_verb_that_is_granted_is_called_and_every_call_is_granted() -> None:
    granted = {(kind, resource, verb) for kind, _, resource, verb in roles()}
    # The volume's users are listed namespace by namespace, whichever these are.
    assert called_rights() - OPTIONAL | {("ClusterRole", "pods", "list")} == granted


def test_every_binding_binds_the_service_account_that_helm_uses() -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy/rbac.yaml").read_text()))
    named = {(document["kind"], document["metadata"]["name"]) for document in documents}
    account = next(document["metadata"] for document in documents if document["kind"] == "ServiceAccount")
    for binding in (document for document in documents if document["kind"].endswith("Binding")):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in named
        assert binding["subjects"] == [{"kind": "ServiceAccount", **account}]
    # What gives it to the tasks' pods: tests/project/test_helm.py.
    assert f'service_account_name="{account["name"]}"' in (ROOT / "deploy/values.yaml").read_text()


def test_helm_values_carry_no_secret() -> None:
    values = yaml.safe_load((ROOT / "deploy/values.yaml").read_text())
    assert all(values[name] for name in ("fernetKeySecretName", "jwtSecretName", "apiSecretKeySecretName"))
    assert all(set(entry) == {"envName", "secretName", "secretKey"} for entry in values["secret"])
    assert not {"fernetKey", "jwtSecret", "apiSecretKey"} & values.keys()
    assert "metadataConnection" not in values["data"]
    assert values["createUserJob"]["enabled"] is False
    assert {"name": "PYTHONPATH", "value": "/opt/airflow/project"} in values["env"]


def test_the_image_takes_in_what_the_dockerfile_names() -> None:
    """The build context is closed but for these: what the Dockerfile copies must be let in, and .env must not be."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert "*" in ignored
    assert {source for copy in copies for source in copy.split()} == allowed
    assert [source for source in allowed if not (ROOT / source).exists()] == []
