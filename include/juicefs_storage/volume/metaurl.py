"""The metadata URL: which database, and how it is named without its password."""

from __future__ import annotations

import re

_METAURL = re.compile(r"^mysql://(?:.*@)?(?:tcp)?\(?(?P<host>[^:)/]+)(?::(?P<port>\d+))?\)?/(?P<database>[^?]*)")


_MYSQL_PORT = "3306"


def same_metadata(one: str, other: str) -> bool:
    """Whether two metaurls name the same database: user, password and options may differ."""
    first, second = _METAURL.match(one), _METAURL.match(other)
    return bool(first and second and first.groupdict(_MYSQL_PORT) == second.groupdict(_MYSQL_PORT))


def split_password(metaurl: str) -> tuple[str, str]:
    """A metaurl without its password, and the password: the first may stand in argv, the second may not."""
    found = re.match(r"^(?P<scheme>[a-z0-9+]+://)(?P<user>[^:@/]*):(?P<password>.*)@(?P<rest>[^@]*)$", metaurl)
    if not found:
        return metaurl, ""
    return f"{found['scheme']}{found['user']}@{found['rest']}", found["password"]
