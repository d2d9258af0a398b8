"""Airflow connections that are missing, as errors of ours: whatever handles the errors of a run knows no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from include.juicefs_storage.errors import PermanentError


@contextmanager
def missing_connections_explained() -> Iterator[None]:
    """Turn Airflow's answer for a connection that does not exist into an error of ours.

    Raises:
        PermanentError: There is no such connection.
    """
    from airflow.sdk.exceptions import AirflowNotFoundException

    try:
        yield
    except AirflowNotFoundException as error:
        raise PermanentError(
            f"{error}", next_step="make the connection in Airflow (Admin → Connections), or correct the param"
        ) from None
