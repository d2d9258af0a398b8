"""The metadata URL of a volume, read as JuiceFS reads it (pkg/meta of JuiceFS 1.4, go-sql-driver/mysql 1.9)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from pydantic import SecretStr

from include.juicefs_storage.errors import PermanentError

_EXAMPLE = "expected mysql://user:password@(host:port)/database, with the password in it or in META_PASSWORD"
_SCHEME = "mysql://"
_MYSQL_PORT = 3306
_TCP = frozenset({"", "tcp", "tcp4", "tcp6"})
#: What Go's net/url takes in the part of a URL before `@`, and as a host (validUserinfo and parseHost of Go 1.25).
_USERINFO = re.compile(r"(?:[A-Za-z0-9\-._:~!$&'()*+,;=@]|%[0-9A-Fa-f]{2})*")
_HOST = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=<>\"]|[^\x00-\x7f])*(?::[0-9]*)?")
_TLS = frozenset({"", "0", "1", "t", "f", "true", "false", "skip-verify", "preferred"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: `db.ns.svc.cluster.local` and `db.ns.svc` are one host: `db.ns`.
_SERVICE = re.compile(r"^(?P<service>[^.]+\.[^.]+)\.svc(?:\.cluster\.local)?$")


class MetadataId(NamedTuple):
    """What tells two volumes apart: where the row `format` of the setting is, without the account that reads it."""

    host: str
    port: int
    database: str
    table_prefix: str


@dataclass(frozen=True, slots=True)
class Metaurl:
    """A metadata URL of MySQL or MariaDB.

    Attributes:
        user: The account, taken as it is.
        password: The account's password, decoded as JuiceFS decodes it; empty where there is none.
        host: Host name or address; empty where `socket` is given.
        port: TCP port.
        socket: Path of a Unix socket; empty where the server is reached over TCP.
        database: The schema.
        options: What follows `?`, decoded; the first value of a name counts.
        argument: The whole URL without its password: what may become an argument of a command.
    """

    user: str
    password: SecretStr
    host: str
    port: int
    socket: str
    database: str
    options: Mapping[str, str]
    argument: str

    @classmethod
    def parse(cls, metaurl: str, environment: Mapping[str, str] | None = None) -> Metaurl:
        """Read a metadata URL.

        Args:
            metaurl: As the volume's Secret holds it.
            environment: Variables of the client, `envs` of the Secret: META_PASSWORD counts where the URL has none.

        Raises:
            PermanentError: JuiceFS or this project cannot use it. The message quotes nothing of it.
        """
        if not metaurl.startswith(_SCHEME):
            raise _refused("it does not begin with mysql://: only MySQL and MariaDB are supported")
        if _CONTROL.search(metaurl):
            raise _refused("it contains a control character, such as a line break")
        base, has_query, query = metaurl.removeprefix(_SCHEME).partition("?")
        before, slash, database = base.rpartition("/")
        if not slash or not database:
            raise _refused("it names no database")
        account, _, address = before.rpartition("@")
        user, _, raw_password = account.partition(":")
        network, has_address, rest = address.partition("(")
        if has_address and not rest.endswith(")"):
            raise _refused("its address is not of the form (host:port)")
        host, port, socket = _address(network, rest[:-1])
        options = _options(query)
        rest_of_url = f"{database}{has_query}{query}"
        # JuiceFS looks for the last @ of the whole URL before it puts META_PASSWORD in.
        argument = f"{_SCHEME}{f'{user}@' if account else ''}{address}/{rest_of_url.replace('@', '%40')}"
        return cls(
            user=user,
            password=_password(raw_password, environment or {}, has_account=bool(account)),
            host=host,
            port=port,
            socket=socket,
            database=_decoded(database),
            options=options,
            argument=argument,
        )

    @property
    def table_prefix(self) -> str:
        """How the names of the tables begin: `jfs_`, or `jfs_<table_prefix>_` (newSQLMeta)."""
        prefix = self.options.get("table_prefix", "")
        return f"jfs_{prefix}_" if prefix else "jfs_"

    @property
    def tls(self) -> str:
        """The driver's option `tls`: `true`, `skip-verify`, `preferred`; empty where it is off."""
        value = self.options.get("tls", "").lower()
        return {"0": "", "f": "", "false": "", "1": "true", "t": "true"}.get(value, value)

    def identity(self, namespace: str) -> MetadataId:
        """Return what tells the metadata of two volumes apart; the account and other options do not.

        Args:
            namespace: Where the clients run: a host name without a dot is a Service there.
        """
        host = self.socket or self.host.lower().rstrip(".")
        if found := _SERVICE.match(host):
            host = found["service"]
        elif "." not in host and ":" not in host and host != "localhost":
            host = f"{host}.{namespace}"
        return MetadataId(host, 0 if self.socket else self.port, self.database, self.table_prefix)


def _refused(why: str) -> PermanentError:
    return PermanentError(
        f"The Secret's metaurl cannot be used: {why}.",
        next_step=f"correct `metaurl` in the volume's Secret: {_EXAMPLE}",
    )


def _address(network: str, address: str) -> tuple[str, int, str]:
    """Return host, port and socket (ParseDSN, normalize and ensureHavePort of the driver)."""
    if network == "unix":
        return "", 0, address or "/tmp/mysql.sock"  # noqa: S108  the driver's default
    if network not in _TCP:
        raise _refused("its address is not in round brackets, or names a network other than tcp and unix")
    if not address:
        return "127.0.0.1", _MYSQL_PORT, ""
    found = re.fullmatch(r"\[(?P<v6>[^\]]+)\](?::(?P<port6>\d+))?|(?P<host>[^:\[\]]+)(?::(?P<port>\d+))?", address)
    if found:
        return found["v6"] or found["host"], int(found["port6"] or found["port"] or _MYSQL_PORT), ""
    if re.fullmatch(r"[0-9A-Fa-f:.]+", address) and address.count(":") > 1:
        return address, _MYSQL_PORT, ""
    raise _refused("its address is not of the form (host:port)")


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    try:
        for name, value in parse_qsl(query, keep_blank_values=True, errors="strict"):
            options.setdefault(name, value)
    except ValueError:
        raise _refused("what follows `?` is not of the form name=value&name=value") from None
    if ";" in query or re.search(r"%(?![0-9A-Fa-f]{2})", query):
        raise _refused("what follows `?` is not of the form name=value&name=value")
    if options.get("tls", "").lower() not in _TLS:
        raise _refused("its option tls is none of true, false, skip-verify and preferred")
    if not re.fullmatch(r"[\w$]*", options.get("table_prefix", ""), re.ASCII):
        raise _refused("table_prefix may hold letters, digits, _ and $ alone")
    return options


def _decoded(text: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise _refused("its database has a % that encodes nothing")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise _refused("its database is not UTF-8") from None


def _password(raw: str, environment: Mapping[str, str], *, has_account: bool) -> SecretStr:
    """Return the password of the URL, else META_PASSWORD (setPasswordFromEnv), which is taken literally."""
    if raw:
        return SecretStr(_as_go_decodes(raw))
    password = environment.get("META_PASSWORD", "")
    if not password and environment.get("META_PASSWORD_FILE"):
        raise _refused("its password is in META_PASSWORD_FILE, a file of the mount pods that cannot be read from here")
    if password and not has_account:
        raise _refused("META_PASSWORD is given, and the URL names no account: an @ is missing")
    if _CONTROL.search(password):
        raise _refused("META_PASSWORD contains a control character, such as a line break")
    return SecretStr(password)


def _as_go_decodes(raw: str) -> str:
    """Return the password that JuiceFS uses: decoded where Go's net/url takes it, else as it is (recoveryMysqlPwd).

    It tries `mysql://root:<password>@127.0.0.1`. A `#` or `/` in the password ends what Go takes for the account.
    """
    authority = re.split("[#/]", f"root:{raw}@127.0.0.1", maxsplit=1)[0]
    account, at, host = authority.rpartition("@")
    if not at or not _USERINFO.fullmatch(account) or not _HOST.fullmatch(host):
        return raw
    try:
        return unquote_to_bytes(account.partition(":")[2]).decode()
    except UnicodeDecodeError:
        raise _refused("its password is not UTF-8") from None


def forms_of(metaurl: str, environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """List every form of the secrets in a metadata URL, for masks: the URL, the password as written and decoded.

    The URL may be one that `Metaurl.parse` refuses: another volume's.
    """
    account = metaurl.partition("?")[0].rpartition("@")[0]
    raw = account.partition("://")[2].partition(":")[2]
    variables = (environment or {}).get("META_PASSWORD", "")
    forms = {metaurl, raw, variables, quote(variables, safe="")}
    if raw:
        forms.add(unquote_to_bytes(raw).decode(errors="replace"))
        with suppress(PermanentError):
            forms.add(_as_go_decodes(raw))
    return tuple(sorted(forms - {""}))
