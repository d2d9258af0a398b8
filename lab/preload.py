"""Imported by the process that tasks are forked from: what each would otherwise do again, a third of its CPU."""
# ruff: noqa: F401, TID253

import importlib
import inspect
import pkgutil

import airflow.providers.amazon.aws.hooks.s3
import airflow.providers.cncf.kubernetes.hooks.kubernetes
import airflow.providers.mysql.hooks.mysql
import airflow.sdk.execution_time.supervisor
import boto3
import MySQLdb.cursors
import pyarrow.parquet

import include.juicefs_storage

# The amazon provider looks through the stack for the operator that asks, which reads the source of every module once.
inspect.stack()
boto3.client("s3", region_name="us-east-1")

for module in pkgutil.walk_packages(include.juicefs_storage.__path__, "include.juicefs_storage."):
    importlib.import_module(module.name)
