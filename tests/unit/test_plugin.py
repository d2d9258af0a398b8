"""The plugin: which tasks link where, what its pages show, and to whom.

Airflow runs in a process of its own here, so that neither its settings nor its imports leak into other tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUN_ID = "manual__2026-11-23T08:00:00+00:00"
RUN_PATH = "manual__2026-11-23T08%3A00%3A00%2B00%3A00"
PLANNED = "## Switch of volume `myjfs`\n\n| | now | after |\n|---|---|---|\n| bucket | `old` | `new` |\n"
HOSTILE = (
    "<script>alert(1)</script> [x](javascript:alert(2)) ![y](http://elsewhere/y.png) | <img src=x onerror=alert(3)>"
)

# As the API server does it: plugins from their folder, DAGs as they come back from the database.
LOOK = """
import json, sys
from types import SimpleNamespace
from airflow import plugins_manager
plugins, errors = plugins_manager._get_plugins()
links = plugins_manager.get_global_operator_extra_links()
at_load = sorted({"fastapi", "markdown_it", "airflow.models.xcom"} & set(sys.modules))

from airflow.dag_processing.dagbag import DagBag
from airflow.models.taskinstancekey import TaskInstanceKey
from airflow.serialization.serialized_objects import DagSerialization
dag_folder, run_id, planned, hostile = sys.argv[1:]
dag = DagBag(dag_folder).dags["juicefs_storage_switch"]
dag = DagSerialization.from_dict(DagSerialization.to_dict(dag))
key = lambda dag_id, task_id: TaskInstanceKey(dag_id, task_id, run_id)
found = {
    task.task_id: {
        name: task.get_extra_links(SimpleNamespace(key=key(dag.dag_id, task.task_id)), name)
        for name in task.extra_links
    }
    for task in dag.tasks
}

app = next(app for app in plugins_manager.get_fastapi_plugins()[0] if app["name"] == "JuiceFS storage")
from fastapi import FastAPI
from fastapi.testclient import TestClient
root = FastAPI()
root.mount(app["url_prefix"], app["app"])
client = TestClient(root, raise_server_exceptions=False)
ask = lambda path: client.get(f"{app['url_prefix']}{path}").status_code
plugin = sys.modules[next(p for p in plugins if p.name == "juicefs_storage").__module__]
print(json.dumps({
    "errors": errors,
    "at_load": at_load,
    "links": found,
    "foreign": [link.get_link(None, ti_key=key("another_dag", "plan")) for link in links],
    "anonymous": {path: ask(path) for path in ["/runs/d/r/plan", "/runs/d/r/report", "/docs", "/openapi.json"]},
    "planned": plugin.render_page("plan", dag.dag_id, run_id, planned),
    "hostile": plugin.render_page("report", "<d>", "<r>&", hostile),
    "none": plugin.render_page("report", dag.dag_id, run_id, None),
}))
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Airflow makes of the plugin."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    environment = kept | {
        "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", LOOK, str(ROOT / "dags"), RUN_ID, PLANNED, HOSTILE]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_loads_and_costs_other_processes_no_web_imports(plugin: dict[str, Any]) -> None:
    assert plugin["errors"] == {}
    assert plugin["at_load"] == []


def test_links_to_the_plan_where_it_is_decided_upon_and_to_the_report_at_the_end(plugin: dict[str, Any]) -> None:
    url = f"juicefs-storage/runs/juicefs_storage_switch/{RUN_PATH}"
    plan = {"Plan": f"{url}/plan", "Report": ""}
    shown = {task: links for task, links in plugin["links"].items() if any(links.values())}
    assert shown == {
        "plan": plan,
        "choose_path": plan,
        "approve": plan,
        "decide": plan,
        "finalize": {"Plan": f"{url}/plan", "Report": f"{url}/report"},
    }


def test_tasks_of_other_dags_have_no_link(plugin: dict[str, Any]) -> None:
    assert plugin["foreign"] == ["", ""]


def test_pages_are_closed_to_strangers(plugin: dict[str, Any]) -> None:
    assert plugin["anonymous"] == {"/runs/d/r/plan": 401, "/runs/d/r/report": 401, "/docs": 404, "/openapi.json": 404}


def test_page_shows_the_markdown_and_the_way_back(plugin: dict[str, Any]) -> None:
    page = plugin["planned"]
    assert "<h2>Switch of volume <code>myjfs</code></h2>" in page
    assert "<td><code>new</code></td>" in page
    assert f'href="../../../../dags/juicefs_storage_switch/runs/{RUN_PATH}"' in page
    assert '<a href="plan" aria-current="page">Plan</a><a href="report">Report</a>' in page


def test_nothing_in_a_page_is_executed_or_fetched(plugin: dict[str, Any]) -> None:
    page = plugin["hostile"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<img" not in page
    assert 'href="javascript:' not in page
    assert "<d>" not in page
    assert "&lt;r&gt;&amp;" in page


def test_page_says_what_is_missing(plugin: dict[str, Any]) -> None:
    assert "No report yet" in plugin["none"]
    assert "<code>finalize</code>" in plugin["none"]
