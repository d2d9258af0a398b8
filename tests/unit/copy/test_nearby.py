"""A prefix that holds nothing is refused, and what was meant is named."""

from __future__ import annotations

import pytest

from include.juicefs_storage.copy.nearby import refuse_empty
from include.juicefs_storage.errors import PermanentError
from tests.support.copy_fakes import ListingBucket

KEYS = ["a.txt", "data/myjfs/chunks/0", "data/other/x", "logs/x", "myjfs/chunks/0", "myjfs/juicefs_uuid", "z.txt"]


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("myjsf/", "did you mean `myjfs/`?"),
        ("MyJFS/", "did you mean `myjfs/`?"),
        ("data/myjf/", "did you mean `data/myjfs/`?"),
        ("data/qqqqqqqqqqqqqqqqqqqq/", "did you mean `data/myjfs/` or `data/other/`?"),
        ("nowhere/myjfs/", "did you mean `myjfs/`?"),
    ],
)
def test_what_lies_nearby_is_named(prefix: str, said: str) -> None:
    whole = ListingBucket(dict.fromkeys(KEYS, 1))
    with pytest.raises(PermanentError) as error:
        refuse_empty(ListingBucket({}), whole, prefix)
    assert said in str(error.value)


def test_where_nothing_is_at_all_nothing_is_named() -> None:
    with pytest.raises(PermanentError, match="correct `source_prefix`"):
        refuse_empty(ListingBucket({}), ListingBucket({}), "myjfs/")


def test_one_object_is_enough_and_an_empty_bucket_without_a_prefix_is_one() -> None:
    refuse_empty(ListingBucket({"k": 1}), ListingBucket({"myjfs/k": 1}), "myjfs/")
    refuse_empty(ListingBucket({}), ListingBucket({}), "")
