"""Params are validated once, and a refusal names the field, what was expected and what was found."""

from __future__ import annotations

from typing import Any

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.switch.params import RevertForm, SwitchParams, resolve_revert_params, resolve_switch_params

GOOD = {"target_conn_id": "minio_new", "target_bucket": "data"}


def test_defaults_are_the_safe_ones() -> None:
    params = resolve_switch_params(GOOD, {})
    assert (params.dry_run, params.require_approval, params.on_failure, params.catch_up) == (
        True,
        True,
        "rollback",
        True,
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dryrun": False}, ["`dryrun`", "not a param", "dry_run"]),
        ({"target_bucket": "http://h/data"}, ["`target_bucket`", "bucket's name alone", "http://h/data"]),
        ({"target_bucket": ""}, ["`target_bucket`", "found nothing", "juicefs-data"]),
        ({"target_endpoint": "http://h:9000/data"}, ["`target_endpoint`", "without bucket"]),
        ({"target_endpoint": "http://key:secret@h:9000"}, ["`target_endpoint`", "//***@h:9000"]),
        ({"target_storage": "oss"}, ["`target_storage`", "own protocol", "S3 endpoint", '"oss"']),
        ({"target_storage": "Wasabi"}, ["`target_storage`", "host's name", "`s3`"]),
        ({"target_storage": "ceph"}, ["`target_storage`", "no store that speaks S3", "`minio`"]),
        ({"on_failure": "panic"}, ["`on_failure`", "'rollback' or 'hold'", "panic"]),
        ({"accept_clients": ["vm-7"]}, ["`accept_clients`", "'vm-7'", "session id"]),
        ({"accept_clients": ["*:*"]}, ["`accept_clients`", "more than `*`"]),
        ({"more_kubernetes_conn_ids": ["kubernetes_default"]}, ["`more_kubernetes_conn_ids`", "once"]),
        ({"more_kubernetes_conn_ids": ["east", "east"]}, ["`more_kubernetes_conn_ids`", "found east"]),
        ({"settle_s": -1}, ["`settle_s`", "greater than or equal to 0"]),
        ({"client_timeout_s": "soon"}, ["`client_timeout_s`", "soon"]),
    ],
)
def test_a_bad_param_is_refused_by_name(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PermanentError) as refused:
        resolve_switch_params(GOOD | given, {})
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_kind_of_storage_is_read_as_juicefs_reads_it() -> None:
    assert resolve_switch_params(GOOD | {"target_storage": "S3"}, {}).target_storage == "s3"
    assert resolve_switch_params(GOOD, {"home": GOOD}).target_storage is None
    assert resolve_switch_params({"volume": "home"}, {"home": GOOD | {"target_storage": "s3"}}).target_storage == "s3"


@pytest.mark.parametrize("left", ["", None, (), []])
def test_further_clusters_come_from_the_registry_where_a_run_gives_none(left: Any) -> None:
    """A form sends its default, an empty list, for a field that nobody has filled in."""
    registry = {"home": GOOD | {"more_kubernetes_conn_ids": ["east"]}}

    def clusters(given: Any) -> tuple[str, ...]:
        params = {"volume": "home", "more_kubernetes_conn_ids": given}
        return resolve_switch_params(params, registry).more_kubernetes_conn_ids

    assert clusters(left) == ("east",)
    assert clusters(["west", ""]) == ("west",)


def test_a_revert_looks_at_the_clusters_of_the_run_unless_it_is_told_otherwise() -> None:
    recorded = {"more_kubernetes_conn_ids": ["east"]}

    def clusters(**given: Any) -> tuple[str, ...]:
        form = RevertForm.validated(given)
        return resolve_revert_params(form, "b", recorded, "data", still_there=False).more_kubernetes_conn_ids

    assert clusters() == clusters(more_kubernetes_conn_ids="") == ("east",)
    assert clusters(more_kubernetes_conn_ids=[]) == ()


def test_all_bad_params_are_reported_together_with_an_example() -> None:
    with pytest.raises(PermanentError) as refused:
        resolve_switch_params({"settle_s": -1}, {})
    assert "`target_conn_id`" in str(refused.value)
    assert '"minio_new"' in str(refused.value)
    assert "`settle_s`" in str(refused.value)


def test_the_registry_fills_in_what_is_left_at_its_default() -> None:
    registry = {"home": {"namespace": "fs", "target_conn_id": "minio_new", "target_bucket": "data"}}
    params = resolve_switch_params({"volume": "home", "namespace": "juicefs", "target_bucket": "other"}, registry)
    assert (params.namespace, params.target_conn_id, params.target_bucket) == ("fs", "minio_new", "other")


def test_the_registry_cannot_switch_safety_off() -> None:
    with pytest.raises(PermanentError, match="dry_run cannot be set there"):
        resolve_switch_params({"volume": "home"}, {"home": GOOD | {"dry_run": False}})


def test_an_unknown_volume_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PermanentError, match="registered: home, work"):
        resolve_switch_params({"volume": "hoem"}, {"home": {}, "work": {}})


OPTIONAL = [name for name, field in SwitchParams.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize("empty", ["", "  ", None])
@pytest.mark.parametrize("name", OPTIONAL)
def test_empty_text_is_not_given(name: str, empty: str | None) -> None:
    assert resolve_switch_params(GOOD | {name: empty}, {}) == resolve_switch_params(GOOD, {})


def test_empty_text_is_not_given_in_the_registry_either() -> None:
    entry = GOOD | {"namespace": "", "meta_conn_id": None}
    assert resolve_switch_params({"volume": "home"}, {"home": entry}).namespace == "juicefs"


def test_empty_text_in_a_revert_is_taken_from_the_backup() -> None:
    recorded = {"namespace": "fs", "settle_s": 50, "secret_name": "", "target_conn_id": "c"}
    form = RevertForm.validated(dict.fromkeys(RevertForm.model_fields, ""))
    params = resolve_revert_params(form, "home.run", recorded, "data", still_there=True)
    assert (params.namespace, params.settle_s, params.secret_name) == ("fs", 50, "juicefs-sc-secret")
    assert (params.source_conn_id, params.target_conn_id, params.dry_run) == ("c", "", True)
