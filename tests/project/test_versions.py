"""One place for each version: what repeats it is held equal."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMAGE = re.compile(r"juicefs-storage-switch:([\w.-]+)")
AIRFLOW = re.compile(r"(?:airflow:(?:slim-)?|airflowVersion: |Airflow |apache-airflow==)(\d+\.\d+\.\d+)")
AIRFLOW_FILES = ["requirements.in", "deploy/Dockerfile", "deploy/values.yaml", "docker-compose.yaml", "docs/deploy.md"]


def test_the_image_has_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    named = {
        path: set(IMAGE.findall((ROOT / path).read_text()))
        for path in ("docker-compose.yaml", "deploy/Dockerfile", "docs/deploy.md")
    }
    tag = re.search(r"^    tag: &tag (\S+)$", (ROOT / "deploy/values.yaml").read_text(), re.MULTILINE)
    assert tag
    assert named | {"deploy/values.yaml": {tag[1]}} == {key: {version} for key in [*named, "deploy/values.yaml"]}


def test_every_file_names_one_version_of_airflow() -> None:
    named = {path: set(AIRFLOW.findall((ROOT / path).read_text())) for path in AIRFLOW_FILES}
    assert set().union(*named.values()) == set(AIRFLOW.findall((ROOT / "requirements.in").read_text())), named
    assert all(named.values()), "a file no longer names it: take it out of the list"
