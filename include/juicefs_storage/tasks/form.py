"""The trigger form of a DAG."""

from __future__ import annotations

from airflow.sdk import Param

from include.juicefs_storage.params import Params, describe, without_links


def form(model: type[Params]) -> dict[str, Param]:
    """Make the fields of a trigger form from the model that validates them.

    Add them to a DAG after its tasks, with `dag.params.update(form(…))`. Airflow makes a deep copy of a DAG's params
    for every class in the hierarchy of every task: for this many params that takes longer than all the rest of a DAG
    file. A task does not need the copy, since a run reads the DAG's params as well.
    """
    fields = describe(model)
    for schema in fields.values():
        # The docs' relative links lead nowhere in the UI.
        schema["description_md"] = without_links(schema["description_md"])
        schema.pop("as_recorded", None)
    return {name: Param(**schema) for name, schema in fields.items()}
