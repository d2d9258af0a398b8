"""What a Secret says about the storage, and whose it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.ports import SecretObject
from include.juicefs_storage.volume.secret import (
    environment,
    holds_volume,
    metaurl_of,
    metaurl_secrets,
    written_by_format,
)

MAIN = SecretObject("juicefs", "main", "1", data={"name": "myjfs", "metaurl": "mysql://jfs:pw@(db:3306)/jfs"})


def other(**data: str) -> SecretObject:
    return replace(MAIN, name="other", data={**MAIN.data, **data})


def test_what_a_starting_pod_writes_by_a_secret() -> None:
    values = {"storage": "minio", "bucket": "http://h/b", "accesskey": "A", "secret-key": "S"}
    config = written_by_format(values)
    assert config
    assert (config.bucket, config.access_key.get_secret_value(), config.secret_key.get_secret_value()) == (
        "http://h/b",
        "A",
        "S",
    )
    assert written_by_format({"secretkey": "S"}) is None


@pytest.mark.parametrize(
    ("secret", "same"),
    [
        (other(), True),
        (other(metaurl="mysql://v:x@tcp(db.juicefs.svc)/jfs?charset=utf8"), True),
        (replace(MAIN, data={"metaurl": MAIN.data["metaurl"]}), True),
        (other(name="another"), False),
        (other(metaurl="mysql://jfs:pw@(db:3306)/jfs?table_prefix=stag"), False),
        (other(metaurl="mysql://jfs:pw@(db2:3306)/jfs"), False),
        (other(metaurl="redis://db:6379/1"), False),
        (other(metaurl=""), False),
    ],
)
def test_whose_secret_it_is(secret: SecretObject, same: bool) -> None:
    assert holds_volume(secret, MAIN) is same


def test_of_a_volume_whose_metaurl_cannot_be_read_only_the_same_letters_count() -> None:
    main = other(metaurl="redis://db:6379/1")
    assert holds_volume(main, main)
    assert not holds_volume(other(metaurl="redis://db:6379/2"), main)


@pytest.mark.parametrize("envs", ['{"META_PASSWORD": "s3cr3t"}', "META_PASSWORD: s3cr3t\nPORT: 1\n"])
def test_the_password_may_be_among_the_variables_of_the_clients(envs: str) -> None:
    secret = other(metaurl="mysql://jfs@(db)/jfs", envs=envs)
    assert metaurl_of(secret).password.get_secret_value() == "s3cr3t"
    assert "s3cr3t" in metaurl_secrets(secret)


@pytest.mark.parametrize("envs", ["{", "- a", "s3cr3t"])
def test_variables_that_the_driver_cannot_read_either(envs: str) -> None:
    with pytest.raises(PermanentError, match="neither a JSON object nor a YAML mapping") as refused:
        environment(other(envs=envs))
    assert "s3cr3t" not in str(refused.value)
    assert metaurl_secrets(other(envs=envs))


def test_a_secret_without_metaurl_is_refused_by_name() -> None:
    with pytest.raises(PermanentError, match="juicefs/other has no key `metaurl`"):
        metaurl_of(replace(MAIN, name="other", data={}))
