"""What runs on a host of Git and before a commit: the project's own commands, and nothing that could change unseen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in load(workflow)["jobs"].values() for step in job["steps"]]


def test_ci_runs_the_test_command() -> None:
    commands = [step["run"] for step in steps(ROOT / ".github/workflows/ci.yml") if "run" in step]
    assert commands[-1] == ".ci/run"
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "exec make test"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit(workflow: Path) -> None:
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name)] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read(workflow: Path) -> None:
    assert load(workflow)["permissions"] == {"contents": "read"}
    assert "secrets." not in workflow.read_text()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_make_what_there_is(workflow: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    commands = "\n".join(step.get("run", "") for step in steps(workflow))
    made = re.findall(r"(?m)\bmake ((?:[a-z-]+ ?)+)$", commands)
    assert {target for words in made for target in words.split()} <= targets


def test_a_push_runs_the_compose_stack() -> None:
    steps_of = load(ROOT / ".github/workflows/image.yml")["jobs"]["compose"]["steps"]
    assert steps_of[-1]["run"].endswith("make compose-test")


def test_no_workflow_names_a_registry() -> None:
    assert [workflow.name for workflow in WORKFLOWS if re.search(r"\b\w+\.io\b", workflow.read_text())] == []


def test_only_a_tag_publishes() -> None:
    jobs = load(ROOT / ".github/workflows/image.yml")["jobs"]
    writing = {name: job for name, job in jobs.items() if "permissions" in job}
    assert writing.keys() == {"publish"}
    assert writing["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v') && vars.IMAGE != ''"
    assert writing["publish"]["needs"] == [name for name in jobs if name != "publish"]


def test_hooks_before_a_commit_run_the_pinned_tools() -> None:
    repositories = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    assert {hook["language"] for hook in repositories[0]["hooks"]} == {"system"}


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_no_form_asks_for_a_secret(form: Path) -> None:
    asked = [field for field in load(form)["body"] if field["type"] != "markdown"]
    assert asked
    for field in asked:
        text = " ".join(map(str, field["attributes"].values()))
        assert not re.search(r"(?i)(?<!no )\b(keys?|passwords?|secrets?|backup|connection)\b", text), text


def test_the_form_for_a_run_asks_for_its_report() -> None:
    fields = {field.get("id"): field for field in load(ROOT / ".github/ISSUE_TEMPLATE/run.yml")["body"]}
    assert fields["report"]["validations"]["required"] is True
    dags = {path.stem for path in (ROOT / "dags").glob("juicefs_storage_*.py")}
    assert set(fields["dag"]["attributes"]["options"]) == dags
