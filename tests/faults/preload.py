"""Imported once, by the process that the tasks are forked from: what each of them would otherwise do again."""
# ruff: noqa: F401, TID253

from __future__ import annotations

import inspect

import airflow.providers.cncf.kubernetes.hooks.kubernetes
import airflow.providers.mysql.hooks.mysql
import airflow.sdk.execution_time.context
import boto3
import kubernetes.stream
import MySQLdb
from airflow.providers.amazon.aws.hooks.s3 import S3Hook

from tests.faults.worker import find_dag

for dag_id in ("juicefs_storage_switch", "juicefs_storage_revert"):
    find_dag(dag_id)
# The amazon provider looks through the stack for the operator that asks, which reads the source of every module once.
inspect.stack()
boto3.client("s3", region_name="us-east-1")
