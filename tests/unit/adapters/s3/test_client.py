"""What a client shows of its store, and what it says of failed tries."""

from __future__ import annotations

from include.juicefs_storage.adapters.s3.client import S3Client, Tries
from include.juicefs_storage.adapters.s3.store import S3Store


def test_secrets_are_not_shown() -> None:
    store = S3Store("http://h:1", "b", access_key="AKID-x", secret_key="SECRET-x", session_token="TOKEN-x")
    client = S3Client(store)
    for shown in (repr(store), str(store), repr(client), repr(client.signer), store.name):
        assert "-x" not in shown


def test_each_answer_that_throttles_is_told_and_of_other_failures_the_first() -> None:
    client = S3Client(S3Store("http://h:1", "b"))
    told: list[float] = []
    client.on_failure = told.append
    tries = Tries(client)
    for problem, retry_after in (
        ("status 500", None),
        ("no answer in time", None),
        ("status 503 SlowDown", None),
        ("status 500", "3"),
        ("status 500", "3600"),
    ):
        tries.delay("GET", problem, retry_after)
    assert told == [0, 0, 3, client.limits.max_delay_s]
