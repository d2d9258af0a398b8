"""Imported by the process that tasks are forked from: what each would otherwise do again, a third of its CPU."""
# ruff: noqa: F401, TID253

import inspect

import airflow.providers.amazon.aws.hooks.s3
import airflow.providers.cncf.kubernetes.hooks.kubernetes
import airflow.providers.mysql.hooks.mysql
import boto3
import pyarrow.parquet

# The amazon provider looks through the stack for the operator that asks, which reads the source of every module once.
inspect.stack()
boto3.client("s3", region_name="us-east-1")
