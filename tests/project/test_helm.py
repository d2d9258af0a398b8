"""The values for Airflow's Helm chart: what the chart does by default and must not do here.

The chart is on no registry of packages. Where AIRFLOW_CHART names its folder or archive (1.22.0) and `helm` is there,
the values are rendered too: `make chart`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.labs import lacking

ROOT = Path(__file__).parents[2]
VALUES = ROOT / "deploy/values.yaml"
ACCOUNT = "juicefs-storage-switch"
COMPONENTS = ("scheduler", "dagProcessor", "apiServer", "triggerer", "statsd")

PODS_OF_TASKS = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.serialization.serialized_objects import DagSerialization

bag = DagBag(sys.argv[1])
def account(task):
    override = task.executor_config.get("pod_override")
    return override and override.spec.service_account_name
for dag in bag.dags.values():
    DagSerialization.to_dict(dag)
print(json.dumps({dag.dag_id: sorted({str(account(task)) for task in dag.tasks}) for dag in bag.dags.values()}))
"""


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(VALUES.read_text())
    return loaded


def test_task_pods_have_the_image_with_this_projects_code(values: dict[str, Any]) -> None:
    """The chart's default is Airflow's own, whatever images.airflow says."""
    assert values["images"]["pod_template"] == values["images"]["airflow"]


def test_nothing_of_airflow_asks_for_a_volume(values: dict[str, Any]) -> None:
    """A volume of the default StorageClass may be the one that is switched."""
    assert values["triggerer"]["persistence"] == {"enabled": False}
    assert values["postgresql"] == {"enabled": False}
    assert not {"logs", "redis"} & values.keys(), "their volumes are off by default"
    assert values["config"]["logging"]["remote_logging"] == "True"


def test_the_installation_makes_an_administrator_whose_password_is_in_a_secret(values: dict[str, Any]) -> None:
    assert values["createUserJob"]["enabled"] is False
    made = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in values["migrateDatabaseJob"]["env"]}
    assert made == {
        "AIRFLOW_ADMIN_USER": {"name": "airflow-admin", "key": "user"},
        "AIRFLOW_ADMIN_PASSWORD": {"name": "airflow-admin", "key": "password"},
    }


def test_every_component_says_what_it_needs(values: dict[str, Any]) -> None:
    asked = [values[name]["resources"] for name in COMPONENTS] + [values["workers"]["kubernetes"]["resources"]]
    assert [found for found in asked if not (found["requests"]["memory"] and found["limits"]["memory"])] == []


def test_the_network_policy_lets_task_pods_and_people_in(values: dict[str, Any]) -> None:
    """With policies on and no rule of its own, the chart closes the API server to everybody."""
    assert values["networkPolicies"] == {"enabled": True}
    allowed = values["apiServer"]["networkPolicy"]["ingress"]["from"]
    assert {"podSelector": {"matchLabels": {"tier": "airflow"}}} in allowed
    assert len(allowed) == 2


def test_the_registry_is_no_part_of_the_image(values: dict[str, Any]) -> None:
    environment = {entry["name"]: entry["value"] for entry in values["env"]}
    folder, _, name = environment["JUICEFS_STORAGE_VOLUMES"].rpartition("/")
    [mount], [volume] = values["volumeMounts"], values["volumes"]
    assert (mount["mountPath"], mount["name"]) == (folder, volume["name"])
    data = yaml.safe_load(values["extraConfigMaps"][volume["configMap"]["name"]]["data"])
    assert isinstance(yaml.safe_load(data[name]), dict)


def test_the_tasks_of_this_project_alone_have_the_rights_in_the_cluster(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/airflow_local_settings.py").write_text(values["airflowLocalSettings"])
    dags = tmp_path / "dags"
    dags.mkdir()
    names = [path.name for path in ROOT.glob("dags/*.py")]
    for name in names:
        (dags / name).symlink_to(ROOT / "dags" / name)
    (dags / "another.py").write_text(
        "from airflow.sdk import dag, task\n@dag\ndef another():\n    task(lambda: None, task_id='t')()\nanother()\n"
    )
    given = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    environment = given | {
        "AIRFLOW_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    command = [sys.executable, "-c", PODS_OF_TASKS, str(dags)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "another": ["None"],
        **{name.removesuffix(".py"): [ACCOUNT] for name in names},
    }
    assert "serviceAccount" not in values["triggerer"], "no trigger of this project asks the cluster"


@pytest.mark.slow
def test_the_chart_renders_what_is_meant() -> None:
    """`make chart CHART=…` runs it."""
    helm, chart = shutil.which("helm"), os.environ.get("AIRFLOW_CHART")
    if not (helm and chart):
        lacking("helm is not installed, or AIRFLOW_CHART names no chart: make chart CHART=...")
    command = [helm, "template", "airflow", chart, "--namespace=airflow", f"--values={VALUES}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    assert [d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"] == []
    assert [d for d in documents if d["kind"] == "StatefulSet" and d["spec"].get("volumeClaimTemplates")] == []
    config = next(
        d["data"] for d in documents if d["metadata"]["name"] == "airflow-config" and d["kind"] == "ConfigMap"
    )
    image = yaml.safe_load(config["pod_template_file.yaml"])["spec"]["containers"][0]["image"]
    assert image.startswith("registry.example.com/juicefs-storage-switch:")
    used = {yaml.safe_load(config["pod_template_file.yaml"])["spec"]["serviceAccountName"]}
    used |= {d["spec"]["template"]["spec"].get("serviceAccountName") for d in documents if d["kind"] == "Deployment"}
    assert ACCOUNT not in used, "airflowLocalSettings gives it to the tasks of this project alone"
