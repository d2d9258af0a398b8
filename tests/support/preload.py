"""Imported once, by the process that the tasks are forked from: what each of them would otherwise do again."""
# ruff: noqa: F401, TID253

from __future__ import annotations

import kubernetes.stream

import lab.preload
from tests.support.graph import find_dag

for dag_id in ("juicefs_storage_switch", "juicefs_storage_revert"):
    find_dag(dag_id)
