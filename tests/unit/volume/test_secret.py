"""What a Secret says about the storage."""

from __future__ import annotations

from include.juicefs_storage.volume.secret import written_by_format


def test_what_a_starting_pod_writes_by_a_secret():
    values = {"storage": "minio", "bucket": "http://h/b", "accesskey": "A", "secret-key": "S"}
    config = written_by_format(values)
    assert config
    assert (config.bucket, config.access_key.get_secret_value(), config.secret_key.get_secret_value()) == (
        "http://h/b",
        "A",
        "S",
    )
    assert written_by_format({"secretkey": "S"}) is None
