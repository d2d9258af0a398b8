"""The params of the copy: what is refused, and by which name."""

from __future__ import annotations

from typing import Any

import pytest

from include.juicefs_storage.copy.params import SyncParams, check_places
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.model import KeyRange

GIVEN = {"source_conn_id": "old", "source_bucket": "data", "target_conn_id": "new", "target_bucket": "data"}


def test_defaults_are_safe() -> None:
    params = SyncParams.validated(GIVEN)
    assert (params.dry_run, params.overwrite, params.mode, params.compare) == (True, False, "copy+verify", "etag")
    assert params.keys == KeyRange()


def test_a_prefix_is_a_folder() -> None:
    assert SyncParams.validated({**GIVEN, "source_prefix": "myjfs"}).source_prefix == "myjfs/"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"source_bucket": "http://host/data"}, "`source_bucket`"),
        ({"target_prefix": "/x"}, "`target_prefix`"),
        ({"mode": "move"}, "`mode`"),
        ({"delete": True}, "`delete` is not a param"),
        ({"after": "b", "until": "a"}, "`after` and `until`"),
        ({"include": [""]}, "`include`"),
        ({"partitions": 0}, "`partitions`"),
        ({"bandwidth_mib_s": -1}, "`bandwidth_mib_s`"),
        ({"engine": "mc", "after": "a"}, "mc mirrors everything below a prefix"),
        ({"engine": "mc", "partitions": 2}, "mc mirrors everything below a prefix"),
        ({"target_conn_id": "old"}, "expected two places"),
        ({"target_conn_id": "old", "target_prefix": "copy"}, "expected two places"),
        ({"source_bucket": None}, "`source_bucket`"),
    ],
)
def test_what_is_refused_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(PermanentError) as refused:
        SyncParams.validated({**GIVEN, **change})
    assert named in str(refused.value)


def test_one_store_behind_two_connections_is_one_place() -> None:
    params = SyncParams.validated(GIVEN)
    check_places(params, "http://old:9000", "http://new:9000")
    with pytest.raises(PermanentError, match="expected two places"):
        check_places(params, "https://Store/", "https://store:443")
    beside = SyncParams.validated({**GIVEN, "source_prefix": "a", "target_prefix": "ab"})
    check_places(beside, "http://store", "http://store")


def test_a_refusal_of_params_together_says_what_it_expects_and_repeats_no_params() -> None:
    with pytest.raises(PermanentError) as refused:
        SyncParams.validated(GIVEN | {"plan": "metadata"})
    assert refused.value.problem == (
        "Params refused:\n- `plan`: metadata needs `meta_conn_id`, or a `volume` of the registry"
    )


@pytest.mark.parametrize(
    "params",
    [
        {"plan": "metadata"},
        {"since_id": 5},
        {"meta_conn_id": "m"},
        {"plan": "metadata", "meta_conn_id": "m", "engine": "juicefs"},
        {"plan": "metadata", "meta_conn_id": "m", "recut_from": "run"},
        {"plan": "metadata", "meta_conn_id": "m", "planners": 4},
        {"recut_from": "run", "planners": 4},
        {"mode": "verify", "accept_deleted": True},
    ],
)
def test_params_that_do_not_go_together(params: dict[str, object]) -> None:
    with pytest.raises(PermanentError, match=r"plan|accept_deleted"):
        SyncParams.validated({**GIVEN, **params})


OPTIONAL = [name for name, field in SyncParams.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize("name", OPTIONAL)
def test_empty_text_is_not_given(name: str) -> None:
    assert SyncParams.validated({**GIVEN, name: ""}) == SyncParams.validated(GIVEN)
