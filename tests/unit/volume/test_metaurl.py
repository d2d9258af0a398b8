"""Metadata URLs as people have them, read as JuiceFS reads them."""

from __future__ import annotations

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.volume.metaurl import Metaurl, forms_of

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("plain", "plain"),
        ("p%40ss%2Fword", "p@ss/word"),
        ("p@ss", "p@ss"),
        ("p@ss:w@rd", "p@ss:w@rd"),
        ("p@ss%40", "p@ss@"),
        ("a+b", "a+b"),
        ("a%2Bb", "a+b"),
        ("100%zz", "100%zz"),  # no encoding at all: taken as it is
        ("a|b%40c", "a|b%40c"),  # one character that Go does not take in a URL: nothing is decoded
        ("x[1]%20y", "x[1]%20y"),
        ("ü%40", "ü%40"),
        ("a/b", "a/b"),  # Go takes b@127.0.0.1 for a path, and `root:a` for a host with a port
        ("a#b%40", "a#b%40"),
        ("a@b/c", "a"),  # Go takes b for the host
        ("(x)", "(x)"),
        ("%C3%BC", "ü"),
    ],
)
def test_a_password_is_decoded_where_juicefs_decodes_it(written: str, read: str) -> None:
    metaurl = Metaurl.parse(f"mysql://jfs:{written}@(db:3306)/jfs")
    assert (metaurl.user, metaurl.password.get_secret_value()) == ("jfs", read)
    assert metaurl.argument == "mysql://jfs@(db:3306)/jfs"


@pytest.mark.parametrize(
    ("url", "user", "argument"),
    [
        ("mysql://svc@corp:s3cr3t@(db:3306)/jfs", "svc@corp", "mysql://svc@corp@(db:3306)/jfs"),
        ("mysql://svc%40corp:s3cr3t@tcp(db)/jfs", "svc%40corp", "mysql://svc%40corp@tcp(db)/jfs"),
        ("mysql://a:s3cr3t@(db)/jfs?tls=true&x=a@b", "a", "mysql://a@(db)/jfs?tls=true&x=a%40b"),
        ("mysql://a:s3cr3t@unix(/run/my.sock)/jfs", "a", "mysql://a@unix(/run/my.sock)/jfs"),
    ],
)
def test_no_argument_of_a_command_holds_the_password(url: str, user: str, argument: str) -> None:
    metaurl = Metaurl.parse(url)
    assert (metaurl.user, metaurl.argument, metaurl.password.get_secret_value()) == (user, argument, SECRET)
    assert SECRET not in repr(metaurl)


@pytest.mark.parametrize(
    ("address", "host", "port", "socket"),
    [
        ("(db:3307)", "db", 3307, ""),
        ("(db)", "db", 3306, ""),
        ("tcp(db.example.com)", "db.example.com", 3306, ""),
        ("tcp", "127.0.0.1", 3306, ""),
        ("", "127.0.0.1", 3306, ""),
        ("([::1]:3307)", "::1", 3307, ""),
        ("([fe80::2])", "fe80::2", 3306, ""),
        ("(fe80::2)", "fe80::2", 3306, ""),
        ("unix(/run/mysqld/mysqld.sock)", "", 0, "/run/mysqld/mysqld.sock"),
    ],
)
def test_addresses_with_and_without_a_port(address: str, host: str, port: int, socket: str) -> None:
    metaurl = Metaurl.parse(f"mysql://u:p@{address}/jfs")
    assert (metaurl.host, metaurl.port, metaurl.socket, metaurl.database) == (host, port, socket, "jfs")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cr3t@db:6379/1",
        "db:6379/1",
        "mysql://u:s3cr3t@db:3306/jfs",  # JuiceFS: default addr for network 'db:3306' unknown
        "mysql://u:s3cr3t@(db:3306/jfs",
        "mysql://u:s3cr3t@(db:port)/jfs",
        "mysql://u:s3cr3t@(db:3306)",
        "mysql://u:s3cr3t@(db:3306)/",
        "mysql://u:s3cr3t@(db:3306)/jfs\n",
        "mysql://u:s3cr\nt@(db:3306)/jfs",
        "mysql://u:s3cr3t?x@(db:3306)/jfs",  # JuiceFS takes what follows for options
        "mysql://u:s3cr3t@(db)/jfs?tls=custom",
        "mysql://u:s3cr3t@(db)/jfs?table_prefix=a`b",
        "mysql://u:s3cr3t@(db)/jfs?a=%zz",
        "mysql://u:s3cr3t%FF@(db)/jfs",
    ],
)
def test_what_juicefs_cannot_use_is_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(PermanentError) as refused:
        Metaurl.parse(url)
    assert "s3cr" not in str(refused.value)
    assert "metaurl" in refused.value.next_step


@pytest.mark.parametrize(
    ("url", "variables", "password"),
    [
        ("mysql://u@(db)/jfs", {"META_PASSWORD": "p%40:@/"}, "p%40:@/"),  # taken literally
        ("mysql://u:@(db)/jfs", {"META_PASSWORD": "x"}, "x"),
        ("mysql://u:own@(db)/jfs", {"META_PASSWORD": "x"}, "own"),
        ("mysql://svc@corp@(db)/jfs", {"META_PASSWORD": "x"}, "x"),
        ("mysql://u@(db)/jfs", {}, ""),
    ],
)
def test_a_password_from_the_environment_counts_where_the_url_has_none(
    url: str, variables: dict[str, str], password: str
) -> None:
    assert Metaurl.parse(url, variables).password.get_secret_value() == password


@pytest.mark.parametrize(
    ("url", "variables", "words"),
    [
        ("mysql://u@(db)/jfs", {"META_PASSWORD_FILE": "/etc/s3cr3t"}, "META_PASSWORD_FILE"),
        ("mysql://(db)/jfs", {"META_PASSWORD": "s3cr3t"}, "names no account"),
        ("mysql://u@(db)/jfs", {"META_PASSWORD": "s3cr3t\n"}, "control character"),
    ],
)
def test_a_password_that_cannot_be_used_is_refused(url: str, variables: dict[str, str], words: str) -> None:
    with pytest.raises(PermanentError, match=words) as refused:
        Metaurl.parse(url, variables)
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("mysql://u:p@(db:3306)/jfs", True),
        ("mysql://v:p@ss@tcp(db:3306)/jfs?charset=utf8", True),
        ("mysql://u:p@(DB)/jfs", True),
        ("mysql://u:p@(db.juicefs.svc)/jfs", True),
        ("mysql://u:p@(db.juicefs)/jfs", True),
        ("mysql://u:p@(db.juicefs.svc.cluster.local:3306)/jfs", True),
        ("mysql://u:p@(db.other.svc)/jfs", False),
        ("mysql://u:p@(db:3307)/jfs", False),
        ("mysql://u:p@(db:3306)/other", False),
        ("mysql://u:p@(db:3306)/jfs?table_prefix=stag", False),
        ("mysql://u:p@(db:3306)/jfs?table_prefix=", True),
        ("mysql://u:p@unix(/run/db)/jfs", False),
    ],
)
def test_what_tells_the_metadata_of_two_volumes_apart(other: str, same: bool) -> None:
    one = Metaurl.parse("mysql://u:p@(db:3306)/jfs").identity("juicefs")
    assert (one == Metaurl.parse(other).identity("juicefs")) is same


def test_options_for_the_connection() -> None:
    metaurl = Metaurl.parse("mysql://u@(db)/jfs?table_prefix=stag&tls=Skip-Verify&tls=true")
    assert (metaurl.table_prefix, metaurl.tls) == ("jfs_stag_", "skip-verify")
    assert [Metaurl.parse(f"mysql://u@(db)/jfs?tls={value}").tls for value in ("1", "False", "preferred")] == [
        "true", "", "preferred",
    ]  # fmt: skip
    assert Metaurl.parse("mysql://u@(db)/jfs").table_prefix == "jfs_"


def test_every_form_of_a_password_is_known_to_the_masks() -> None:
    assert {"p%40ss", "p@ss"} <= set(forms_of("mysql://u:p%40ss@(db)/jfs"))
    assert {"a b", "a%20b"} <= set(forms_of("mysql://u@(db)/jfs", {"META_PASSWORD": "a b"}))
    assert {"s3:cr3t"} <= set(forms_of("redis://:s3:cr3t@db/1"))
    assert forms_of("") == ()


def test_the_forms_of_a_url_that_cannot_be_used_are_known_all_the_same() -> None:
    """Another volume's Secret, read for the masks of a rollback's diagnostics."""
    assert "p%FF%40" in forms_of("mysql://u:p%FF%40@(db)/jfs")
