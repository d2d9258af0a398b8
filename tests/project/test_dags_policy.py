"""What every DAG file promises: it imports, it parses fast, and its page in the UI says what it does.

Airflow runs in processes of its own here, so that neither its settings nor its imports leak into other tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from include.juicefs_storage.names import SIDE_BY_SIDE

ROOT = Path(__file__).parents[2]
DAG_FILES = sorted((ROOT / "dags").glob("*.py"))
#: Of the CPU time that the import of Airflow takes in the same process, just before.
PARSE_BUDGET = 0.15
HEAVY_MODULES = [
    "MySQLdb",
    "aiobotocore",
    "aiohttp",
    "airflow.providers.amazon",
    "airflow.providers.cncf.kubernetes",
    "airflow.providers.mysql",
    "boto3",
    "botocore",
    "kubernetes",
    "numpy",
    "pandas",
    "pyarrow",
]

#: DAGs whose runs on several volumes go on side by side; a Lease keeps two of them off one volume.
_SIDE_BY_SIDE = {"juicefs_storage_switch", "juicefs_storage_finish"}

# Airflow is imported first, so that what is counted is the DAG file's own. Each file is parsed in a fork of that
# process.
# The least of several runs counts, for noise only ever adds: the first one within the budget settles it.
PARSE_COST = """
import sys, time
begin = time.process_time()
import airflow.sdk, importlib.util, json, multiprocessing, pathlib
took = time.process_time() - begin
before = set(sys.modules)

def parse(path):
    start = time.process_time()
    spec = importlib.util.spec_from_file_location("dag_file", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return (time.process_time() - start) / took, sorted(set(sys.modules) - before)

folder, budget = sys.argv[1:]
found = {}
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    for path in sorted(pathlib.Path(folder).glob("*.py")):
        costs = []
        while not costs or (min(costs) > float(budget) and len(costs) < 4):
            cost, modules = pool.apply(parse, (path,))
            costs.append(cost)
        found[path.stem] = {"cost": min(costs), "modules": modules}
print(json.dumps(found))
"""

DESCRIBE_DAGS = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(sys.argv[1])
print(json.dumps({
    dag.dag_id: {
        "file": dag.fileloc,
        "tags": sorted(dag.tags),
        "owners": sorted({task.owner for task in dag.tasks}),
        "doc_md": dag.doc_md,
        "max_active_runs": dag.max_active_runs,
        "dry_run": dag.params["dry_run"] if "dry_run" in dag.params else None,
        "undocumented": sorted(task.task_id for task in dag.tasks if not task.doc_md),
        "tasks": len(dag.tasks),
        "changes_nothing": "rehearsal" in dag.tags,
        "pools": sorted({task.pool for task in dag.tasks}),
        "graph": {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks},
        "rules": {task.task_id: task.trigger_rule for task in dag.tasks if task.trigger_rule != "all_success"},
    }
    for dag in bag.dags.values()
}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of an Airflow component that has this checkout and nothing else. It keeps its bytecode."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    kept = {name: value for name, value in given.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {
        "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONPATH": str(ROOT),
    }


def run_python(script: str, *arguments: object, environment: dict[str, str]) -> Any:
    """Run a script in a process of its own; returns the JSON that it printed last."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def dags(environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = run_python(DESCRIBE_DAGS, ROOT / "dags", environment=environment)
    return described


@pytest.fixture(scope="module")
def parsed(environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = run_python(PARSE_COST, ROOT / "dags", PARSE_BUDGET, environment=environment)
    return found


def test_there_are_dag_files() -> None:
    """Without one, the tests below would be skipped, and pass."""
    assert DAG_FILES


def test_no_import_errors(environment: dict[str, str]) -> None:
    airflow = str(Path(sys.executable).with_name("airflow"))
    # --local reads no table, and yet the command refuses a database without its tables.
    for arguments in (["db", "migrate"], ["dags", "list-import-errors", "--local"]):
        done = subprocess.run([airflow, *arguments], env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dag_id", [path.stem for path in DAG_FILES])
def test_parsing_is_cheap(dag_id: str, parsed: dict[str, dict[str, Any]]) -> None:
    assert parsed[dag_id]["cost"] <= PARSE_BUDGET
    heavy = tuple(f"{name}." for name in HEAVY_MODULES)
    assert [name for name in parsed[dag_id]["modules"] if f"{name}.".startswith(heavy)] == []


@pytest.mark.parametrize("path", DAG_FILES, ids=lambda path: path.stem)
class TestEveryDag:
    @pytest.fixture
    def dag(self, path: Path, dags: dict[str, dict[str, Any]]) -> dict[str, Any]:
        found = {dag_id: dag for dag_id, dag in dags.items() if Path(dag["file"]) == path}
        assert list(found) == [path.stem], "one DAG a file, named as the file"
        return found[path.stem]

    def test_is_found_by_tag_and_owner(self, dag: dict[str, Any]) -> None:
        assert "juicefs" in dag["tags"]
        assert "airflow" not in dag["owners"]

    def test_says_when_to_use_it(self, dag: dict[str, Any]) -> None:
        assert re.search(r"\buse (this|it) when\b", dag["doc_md"] or "", re.IGNORECASE)

    def test_documents_every_task(self, dag: dict[str, Any]) -> None:
        assert dag["tasks"] > 0
        assert dag["undocumented"] == []

    def test_runs_one_at_a_time_and_rehearses_by_default(self, path: Path, dag: dict[str, Any]) -> None:
        # The volumes of a wave move side by side; a Lease keeps two runs on one volume apart.
        assert dag["max_active_runs"] == (SIDE_BY_SIDE if path.stem in _SIDE_BY_SIDE else 1)
        assert dag["dry_run"] is (None if dag["changes_nothing"] else True)


def test_a_revert_is_a_switch_whose_goal_is_chosen_among_the_backups(dags: dict[str, dict[str, Any]]) -> None:
    revert = dict(dags["juicefs_storage_revert"]["graph"])
    assert revert.pop("choose_backup") == ["resolve_params"]
    assert revert == dags["juicefs_storage_switch"]["graph"]


SCHEDULES = """
import json, os, runpy, sys
found = []
for value in sys.argv[2:]:
    os.environ["JUICEFS_STORAGE_REHEARSAL_SCHEDULE"] = value
    found.append(runpy.run_path(sys.argv[1])["juicefs_storage_rehearsal"]().schedule)
del os.environ["JUICEFS_STORAGE_REHEARSAL_SCHEDULE"]
found.append(runpy.run_path(sys.argv[1])["juicefs_storage_rehearsal"]().schedule)
print(json.dumps(found))
"""


def test_the_schedule_of_the_rehearsal_is_set_without_editing_it(environment: dict[str, str]) -> None:
    file = ROOT / "dags/juicefs_storage_rehearsal.py"
    found = run_python(SCHEDULES, file, "0 5 * * 1", "none", environment=environment)
    assert found == ["0 5 * * 1", None, "@daily"]


@pytest.mark.parametrize("dag_id", [path.stem for path in DAG_FILES if "sync" not in path.stem])
def test_a_volume_in_mid_move_waits_behind_no_copy(dag_id: str, dags: dict[str, dict[str, Any]]) -> None:
    """Its Lease lapses after an hour, and bulk copies fill the pool for longer."""
    assert dags[dag_id]["pools"] == ["default_pool"]


def test_the_graph_of_the_copy(dags: dict[str, dict[str, Any]]) -> None:
    tasks = ["check", "list_source", "plan_partitions", "copy", "list_to_verify", "verify", "reconcile", "finalize"]
    copying = dags["juicefs_storage_sync"]
    assert copying["graph"] == {task: [following] for task, following in pairwise(tasks)} | {"finalize": []}
    assert copying["rules"] == {
        "plan_partitions": "none_failed",  # a source that is small is listed by the check alone
        "list_to_verify": "none_failed",  # nothing is copied where the mode is verify
        "reconcile": "all_done",  # what never ran is in the report
        "finalize": "all_done",
    }


def test_the_graph_of_the_switch(dags: dict[str, dict[str, Any]]) -> None:
    checks = [
        "check_consistency", "check_csi", "check_rights", "check_secrets", "check_target_bucket", "check_vault",
        "check_volume",
    ]  # fmt: skip
    undo = [
        "restart_csi_again", "wait_for_rollouts_again", "prove_clients_on_old", "copy_back_again",
        "prove_blocks_on_old",
    ]  # fmt: skip
    switch = dags["juicefs_storage_switch"]
    assert switch["graph"] == {
        "resolve_params": checks,
        **{check: ["plan"] for check in checks},
        "plan": ["choose_path"],
        "choose_path": ["approve", "backup", "finalize"],
        "approve": ["backup"],
        "backup": ["copy_ahead"],
        "copy_ahead": ["follow_writes", "write_setting"],
        "follow_writes": ["decide"],
        "write_setting": ["patch_secret"],
        "patch_secret": ["restart_csi", "settle"],
        # A rollback must not begin while settle still guards the new setting, or a copy still runs.
        "settle": ["decide", "prove_fresh_mount"],
        "restart_csi": ["wait_for_rollouts"],
        "wait_for_rollouts": ["prove_clients"],
        "prove_clients": ["catch_up"],
        "catch_up": ["prove_blocks"],
        "prove_blocks": ["decide", "prove_fresh_mount"],
        "prove_fresh_mount": ["prove_no_restarts"],
        "prove_no_restarts": ["catch_up_late"],
        "catch_up_late": ["decide"],
        "decide": ["collect_diagnostics", "finalize"],
        "collect_diagnostics": ["copy_back"],
        # The Secrets first: no pod starts with the new values once the setting is back.
        "copy_back": ["follow_writes_back", "restore_secret"],
        "follow_writes_back": ["copy_back_late"],
        "restore_secret": ["restore_setting"],
        "restore_setting": ["restart_csi_again", "settle_again"],
        "settle_again": ["prove_blocks_on_old"],
        **{task: [following] for task, following in pairwise(undo)},
        "prove_blocks_on_old": ["copy_back_late"],
        "copy_back_late": ["finalize"],
        "finalize": [],
    }
    assert switch["rules"] == {
        "plan": "all_done",  # reports all refusals together
        "backup": "none_failed_min_one_success",  # approved, or no approval required
        "decide": "all_done",
        # The rollback continues after a failed undo, and is skipped with its group.
        **dict.fromkeys(
            [
                "collect_diagnostics",
                "copy_back",
                "follow_writes_back",
                "restore_secret",
                "restore_setting",
                "settle_again",
                *undo,
                "copy_back_late",
            ],
            "none_skipped",
        ),
        "finalize": "all_done",
    }


def test_the_graph_of_the_fleet(dags: dict[str, dict[str, Any]]) -> None:
    fleet = dags["juicefs_storage_fleet"]
    assert fleet["graph"] == {
        "resolve_params": ["find_volumes"],
        "find_volumes": ["start_dry_run", "wait_for_dry_run"],
        "start_dry_run": ["wait_for_dry_run"],
        "wait_for_dry_run": ["plan"],
        "plan": ["choose_path", "finalize"],
        "choose_path": ["approve", "finalize", "start_canary"],
        "approve": ["start_canary"],
        "start_canary": ["watch_canary"],
        "watch_canary": ["approve_rest", "finalize"],
        "approve_rest": ["later_volumes"],
        "later_volumes": ["start", "watch"],
        "start": ["watch"],
        # Not by way of others alone, which may not be cleared: the report is written when every volume has ended.
        "watch": ["finalize", "restart_csi"],
        "restart_csi": ["wait_for_rollouts"],
        "wait_for_rollouts": ["finalize"],
        "finalize": [],
    }
    assert fleet["rules"] == {
        "plan": "all_done",  # a dry run that could not be made is a volume that is blocked
        "start_canary": "none_failed_min_one_success",  # approved, or no approval required
        "restart_csi": "all_done",  # for those that were moved, whatever became of others
        "finalize": "all_done",
    }


def test_the_graph_of_finishing(dags: dict[str, dict[str, Any]]) -> None:
    finishing = dags["juicefs_storage_finish"]
    assert finishing["graph"] == {
        "resolve_params": ["plan"],
        "plan": ["choose_path"],
        "choose_path": ["approve", "certify", "finalize", "refresh_mount_pods"],
        "approve": ["refresh_mount_pods"],
        "refresh_mount_pods": ["close_door"],
        "close_door": ["rehearse_off"],
        "rehearse_off": ["watch"],
        "watch": ["certify"],
        "certify": ["finalize"],
        "finalize": [],
    }
    assert finishing["rules"] == {
        "refresh_mount_pods": "none_failed_min_one_success",  # approved, or no approval required
        "close_door": "none_failed_min_one_success",
        "rehearse_off": "none_failed_min_one_success",
        "watch": "none_failed_min_one_success",
        "certify": "none_failed_min_one_success",
        "finalize": "all_done",
    }
