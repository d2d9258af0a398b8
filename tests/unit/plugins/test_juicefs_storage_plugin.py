"""The plugin: which tasks link where, what its pages show, and to whom.

Airflow runs in a process of its own here, so that neither its settings nor its imports leak into other tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from include.juicefs_storage.run_steps import STEPS

ROOT = Path(__file__).parents[3]
SCRIPT = (ROOT / "plugins/juicefs_storage_page.js").read_text()
RUN_ID = "manual__2026-11-23T08:00:00+00:00"
RUN_PATH = "manual__2026-11-23T08%3A00%3A00%2B00%3A00"
PLANNED = (
    "## Switch of volume `myjfs`\n\n| | now | after |\n|---|---|---|\n| bucket | `old` | `new` |\n"
    "\n[plan](juicefs-storage/runs/d/r/plan) [run](dags/d/runs/r)\n"
)
HOSTILE = (
    "<script>alert(1)</script> [x](javascript:alert(2)) ![y](http://elsewhere/y.png) | <img src=x onerror=alert(3)>"
)

# The latest first, as the API server reads them.
EVENTS = [
    {
        "volume": "home", "ready": False, "since": "2026-11-22T00:00:05Z", "rehearsed_at": "2026-11-23T00:00:05Z",
        "blockers": [f"target: No bucket. Remedy: {HOSTILE}"], "backup_id": None, "backup_at": None,
    },
    {
        "volume": "data", "ready": True, "since": "2026-10-01T00:00:05Z", "rehearsed_at": "2026-11-23T00:00:04Z",
        "blockers": [], "backup_id": "data.run-1", "backup_at": "2026-09-30T10:11:12Z",
    },
    {"volume": "home", "ready": True, "since": "2026-10-01T00:00:05Z", "rehearsed_at": "2026-11-21T00:00:05Z"},
    {},
]  # fmt: skip

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
dag_folder, run_id, planned, hostile, events = sys.argv[1:]
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
    "anonymous": {
        path: ask(path)
        for path in [
            "/runs/d/r/run", "/runs/d/r/status", "/runs/d/r/plan", "/runs/d/r/report", "/volumes", "/fleets/r", "/docs",
            "/openapi.json",
        ]
    },
    "views": {view["destination"]: view["href"] for view in plugins_manager._get_ui_plugins()[0]},
    "run": plugin.render_run("<d>", "<r>&"),
    "policy": plugin.headers()["Content-Security-Policy"],
    "steps": {
        dag_id: [task.task_id for task in one.topological_sort()] for dag_id, one in DagBag(dag_folder).dags.items()
    },
    "volumes": plugin.render_volumes([(event, "r 1") for event in json.loads(events)]),
    "no_volumes": plugin.render_volumes([]),
    "planned": plugin.render_page("plan", dag.dag_id, run_id, planned),
    "hostile": plugin.render_page("report", "<d>", "<r>&", hostile),
    "fleet_link": links[-1].get_link(None, ti_key=key("juicefs_storage_fleet", "finalize")),
    "fleet": plugin.render_fleet(
        run_id,
        {"waves": [["small"], ["big", "<b>"]]},
        {
            run_id + ".small": ("success", "by Kim\\n\\n**[Outcome](x)**: switched, volume `small`."),
            run_id + ".big": ("failed", "**[plan](dags/d) failed**: Broken.\\n\\n**[Outcome](x)**: refused."),
        },
    ),
    "no_fleet": [plugin.render_fleet(run_id, planned, {}) for planned in (None, {"waves": []})],
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
    command = [sys.executable, "-c", LOOK, str(ROOT / "dags"), RUN_ID, PLANNED, HOSTILE, json.dumps(EVENTS)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_loads_and_costs_other_processes_no_web_imports(plugin: dict[str, Any]) -> None:
    assert plugin["errors"] == {}
    assert plugin["at_load"] == []


def test_links_to_the_plan_where_it_is_decided_upon_and_to_the_report_at_the_end(plugin: dict[str, Any]) -> None:
    url = f"juicefs-storage/runs/juicefs_storage_switch/{RUN_PATH}"
    plan = {"Plan": f"{url}/plan", "Report": "", "Volumes": ""}
    shown = {task: links for task, links in plugin["links"].items() if any(links.values())}
    assert shown == {
        "plan": plan,
        "choose_path": plan,
        "approve": plan,
        "decide": plan,
        "finalize": {"Plan": f"{url}/plan", "Report": f"{url}/report", "Volumes": ""},
    }


def test_tasks_of_other_dags_have_no_link(plugin: dict[str, Any]) -> None:
    assert plugin["foreign"] == ["", "", ""]


def test_pages_are_closed_to_strangers(plugin: dict[str, Any]) -> None:
    pages = {
        "/runs/d/r/run": 401,
        "/runs/d/r/status": 401,
        "/runs/d/r/plan": 401,
        "/runs/d/r/report": 401,
        "/volumes": 401,
        "/fleets/r": 401,
    }
    assert plugin["anonymous"] == pages | {"/docs": 404, "/openapi.json": 404}


def test_page_shows_the_markdown_and_the_way_back(plugin: dict[str, Any]) -> None:
    page = plugin["planned"]
    assert "<h2>Switch of volume <code>myjfs</code></h2>" in page
    assert "<td><code>new</code></td>" in page
    assert f'href="../../../../dags/juicefs_storage_switch/runs/{RUN_PATH}"' in page
    assert '<a href="run">Run</a><a href="plan" aria-current="page">Plan</a><a href="report">Report</a>' in page


def test_links_of_a_plan_lead_to_the_same_place_on_its_page(plugin: dict[str, Any]) -> None:
    page = plugin["planned"]
    assert '<a href="../../../../juicefs-storage/runs/d/r/plan">plan</a>' in page
    assert '<a href="../../../../dags/d/runs/r">run</a>' in page


def test_nothing_in_a_page_is_executed_or_fetched(plugin: dict[str, Any]) -> None:
    page, _, script = plugin["hostile"].partition("<script>")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert script == f"{SCRIPT}</script>\n</body>\n</html>\n"
    assert "<img" not in page
    assert 'href="javascript:' not in page
    assert "<d>" not in page
    assert "&lt;r&gt;&amp;" in page


def test_page_says_what_is_missing(plugin: dict[str, Any]) -> None:
    assert "No report yet" in plugin["none"]
    assert "<code>finalize</code>" in plugin["none"]


def test_volumes_are_listed_with_what_blocks_them_and_since_when(plugin: dict[str, Any]) -> None:
    page = plugin["volumes"]
    rows = [row.split("</td>") for row in page.split("<tr>")[2:]]
    cells = [[cell.split("<td>")[1] for cell in row[:-1]] for row in rows]
    report = '<a href="runs/juicefs_storage_rehearsal/r%201/report">2026-11-23 00:00 UTC</a>'
    assert cells == [
        ["home", "<strong>not ready</strong>", "2026-11-22 00:00 UTC", "none", report],
        ["data", "ready", "2026-10-01 00:00 UTC", "<code>data.run-1</code>, 2026-09-30 10:11 UTC", report],
    ]
    assert "target: No bucket." in page
    assert page.count("<script") == 1
    assert "<img" not in page


def test_only_the_script_of_the_pages_may_run(plugin: dict[str, Any]) -> None:
    page = plugin["run"]
    assert "&lt;r&gt;&amp;" in page
    assert "<d>" not in page
    assert page.count("<script") == 1
    assert f"<script>{SCRIPT}</script>" in page
    digest = b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in plugin["policy"]
    # What the server sends is never taken as HTML.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", SCRIPT)


def test_every_id_that_the_script_fills_is_in_the_page(plugin: dict[str, Any]) -> None:
    asked = set(re.findall(r'(?:field|row)\("([\w-]+)"', SCRIPT))
    assert asked
    assert asked <= set(re.findall(r'id="([\w-]+)"', plugin["run"]))


def test_the_steps_in_words_are_those_of_the_dags_in_their_order(plugin: dict[str, Any]) -> None:
    assert {dag_id: list(steps) for dag_id, steps in STEPS.items()} == plugin["steps"]


def test_the_page_of_the_volumes_is_in_the_navigation_and_says_when_it_is_empty(plugin: dict[str, Any]) -> None:
    assert plugin["views"] == {
        "nav": "juicefs-storage/volumes",
        "dag_run": "juicefs-storage/runs/{DAG_ID}/{RUN_ID}/run",
    }
    assert "No volume was rehearsed yet" in plugin["no_volumes"]


def test_a_fleet_shows_where_each_volume_is_with_a_link_to_its_run(plugin: dict[str, Any]) -> None:
    page = plugin["fleet"]
    assert plugin["fleet_link"] == f"juicefs-storage/fleets/{RUN_PATH}"
    rows = [row.split("</td>") for row in page.split("<tr>")[2:]]
    cells = [[cell.split("<td>")[1] for cell in row[:-1]] for row in rows]
    run = f"../../dags/juicefs_storage_switch/runs/{RUN_PATH}"
    cause = '<strong><a href="../../dags/d">plan</a> failed</strong>: Broken.'
    assert cells == [
        ["canary", "small", f'<a href="{run}.small">success</a>', "switched, volume <code>small</code>."],
        ["1", "big", f'<a href="{run}.big">failed</a>', f"refused. {cause}"],
        ["1", "&lt;b&gt;", "not started", ""],
    ]
    assert f'href="../../dags/juicefs_storage_fleet/runs/{RUN_PATH}"' in page
    assert "There is no plan yet" in plugin["no_fleet"][0]
    assert "No volume is to be moved" in plugin["no_fleet"][1]
