"""The metadata database of a JuiceFS volume: by its metaurl, or through Airflow's MySqlHook."""

from __future__ import annotations

import json
import ssl
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.errors import PermanentError, StillAwayError, TransientError
from include.juicefs_storage.ports import Session
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.setting import Setting

if TYPE_CHECKING:
    from airflow.providers.mysql.hooks.mysql import MySqlHook

_FETCH_ROWS = 10_000
#: Above every `chunkid`, whether the column is signed or not.
_NO_SLICE = 2**63 - 1
_ASKED_AT_ONCE = 1_000
#: A record of `jfs_chunk.slices` is pos, id, size, off, len; one of `jfs_delslices.slices` is id, size (marshalSlice
#: and encodeDelayedSlice of pkg/meta in JuiceFS 1.4).
_SLICE, _DELAYED_SLICE = struct.Struct(">IQIII"), struct.Struct(">QI")
#: rootInode and TrashInode of pkg/meta.
_ROOT_INODE, _TRASH_INODE = 1, 0x7FFFFFFF10000000
#: Timeouts in seconds: the client's default is none, and the hook sets none. A connection's extra wins.
_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 120, "write_timeout": 30}
#: How long a query that changes nothing is tried again while the server is away, in seconds: a restart of it, or a
#: failover; and where it is known to have been waited for.
_READ_FOR_S, _READ_AGAIN_FOR_S = 60.0, 3.0
#: Extras of a connection that do what the option `tls` of JuiceFS' driver does; `true` verifies by the system's CAs.
_TLS: dict[str, dict[str, Any]] = {
    "": {},
    # MariaDB's client library treats REQUIRED as a preference, and ignores PREFERRED.
    "preferred": {"ssl_mode": "REQUIRED"},
    "skip-verify": {"ssl_mode": "REQUIRED"},
    "true": {"ssl_mode": "VERIFY_IDENTITY", "ssl": {"ca": ssl.get_default_verify_paths().cafile}},
}
#: Errors of the MySQL client that do not go away by themselves: access denied, no such database, table or column.
_PERMANENT_CODES = frozenset({1044, 1045, 1049, 1054, 1142, 1146, 1698})
#: A right is missing for a column, the server or a transaction is read-only. In a failover that passes.
_READ_ONLY_CODES = frozenset({1143, 1290, 1792, 1836})
_SESSIONS = "SELECT sid, expire, info FROM jfs_session2 WHERE "


class _Connects(Protocol):
    """What opens a connection: Airflow's MySqlHook is one."""

    def get_conn(self) -> Any:
        """Open a connection."""


@dataclass(frozen=True)
class _Server:
    """A server by the options of the client, without Airflow."""

    options: Mapping[str, Any] = field(repr=False)

    def get_conn(self) -> Any:
        """Open a connection."""
        import MySQLdb

        return MySQLdb.connect(**self.options)


class MySqlMetadata:
    """`ports.MetadataStore` on MySQL or MariaDB. Every call opens and closes a connection of its own.

    Args:
        hook: The connection.
        waited_for: Asked when the server is away: whether it was waited for just now, so that it is not again.
        table_prefix: How the names of the volume's tables begin.
        require_tls: Whether a connection that is not encrypted is refused.
    """

    def __init__(
        self,
        hook: _Connects,
        waited_for: Callable[[], bool] = lambda: False,
        *,
        table_prefix: str = "jfs_",
        require_tls: bool = False,
    ) -> None:
        self._hook = hook
        self._waited_for = waited_for
        self._prefix = table_prefix
        self._require_tls = require_tls

    @classmethod
    def from_connection(
        cls, conn_id: str, waited_for: Callable[[], bool] = lambda: False, *, table_prefix: str = ""
    ) -> MySqlMetadata:
        """Use an Airflow connection of type MySQL.

        Args:
            conn_id: Its id.
            waited_for: See the class.
            table_prefix: See the class; empty: the connection's extra `table_prefix`, else `jfs_`.
        """
        hook = _hook(mysql_conn_id=conn_id)
        with missing_connections_explained():
            extra = hook.get_connection(conn_id).extra_dejson
        prefix = table_prefix or extra.get("table_prefix") or "jfs_"
        return cls(hook, waited_for, table_prefix=prefix)

    @classmethod
    def from_metaurl(cls, metaurl: Metaurl, waited_for: Callable[[], bool] = lambda: False) -> MySqlMetadata:
        """Use the `metaurl` of the volume's Secret.

        Args:
            metaurl: With the password that the volume's clients use.
            waited_for: See the class.

        Raises:
            PermanentError: It names a Unix socket, which is in the mount pods.
        """
        if metaurl.socket:
            raise PermanentError(
                "The Secret's metaurl names a Unix socket, which cannot be reached from Airflow.",
                next_step="make an Airflow connection of type MySQL to the metadata and name it in `meta_conn_id`",
            )
        return cls(
            _Server(
                {
                    "host": metaurl.host,
                    "port": metaurl.port,
                    "user": metaurl.user,
                    "passwd": metaurl.password.get_secret_value(),
                    "db": metaurl.database,
                    **_TIMEOUTS,
                    **_TLS[metaurl.tls],
                }
            ),
            waited_for,
            table_prefix=metaurl.table_prefix,
            require_tls=metaurl.tls in {"true", "skip-verify"},
        )

    @contextmanager
    def _cursor(self, *, permanent: Collection[int] = _PERMANENT_CODES) -> Iterator[Any]:
        import MySQLdb

        try:
            with closing(self._hook.get_conn()) as connection, closing(connection.cursor()) as cursor:
                if self._require_tls:
                    _refuse_plain(cursor)
                yield cursor
                connection.commit()
        except MySQLdb.Error as error:
            code, *text = error.args or (0,)
            kind = PermanentError if code in permanent else TransientError
            raise kind(
                f"The metadata database answered: {code} {' '.join(str(part) for part in text)}",
                next_step="test the metadata connection in Airflow (Admin → Connections)",
            ) from None

    def _sql(self, statement: str) -> str:
        """Return a statement of ours with the volume's own prefix in place of `jfs_`; values are no part of it."""
        return statement.replace("jfs_", self._prefix)

    def _query(self, sql: str, *args: object) -> Sequence[Any]:
        """Return the rows of a SELECT. Retry for a while where the server is away.

        Raises:
            StillAwayError: It stayed away.
        """
        from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential

        def fetch() -> Sequence[Any]:
            with self._cursor() as cursor:
                cursor.execute(self._sql(sql), args or None)
                rows: Sequence[Any] = cursor.fetchall()
                return rows

        @cache
        def limit_s() -> float:
            return _READ_AGAIN_FOR_S if self._waited_for() else _READ_FOR_S

        def enough(state: RetryCallState) -> bool:
            return (state.seconds_since_start or 0) >= limit_s()

        tries = Retrying(
            retry=retry_if_exception_type(TransientError), wait=wait_exponential(0.5, max=5), stop=enough, reraise=True
        )
        try:
            return tries(fetch)
        except TransientError as error:
            self._waited_for = lambda: True
            raise StillAwayError(
                error.problem,
                state=f"it was waited for: {_READ_FOR_S:g} s by the first task that missed it",
                next_step=f"{error.next_step}; when it is back, clear this task with Downstream",
            ) from None

    def read_setting(self) -> Setting:
        """Read the row's exact bytes."""
        # CAST: the bytes as stored, whatever the connection's character set is.
        rows = self._query("SELECT CAST(value AS BINARY) FROM jfs_setting WHERE name = 'format'")
        if not rows:
            raise PermanentError(
                "jfs_setting has no row named 'format': this database does not hold a JuiceFS volume.",
                next_step="compare the metadata connection with the Secret's metaurl",
            )
        return Setting(bytes(rows[0][0]))

    def now(self) -> float:
        """Read the server's clock."""
        return float(self._query("SELECT UNIX_TIMESTAMP()")[0][0])

    def replace_setting(self, expected: Setting, new: Setting, *, not_after: float | None = None) -> bool:
        """Compare and set in one UPDATE. The row is never deleted: clients of 1.2 and later exit without it.

        Args:
            expected: The setting that must be there.
            new: The setting to write.
            not_after: Write nothing after this moment by the database's clock, in Unix time; None: no limit.

        Returns:
            Whether the expected setting was there and was replaced.
        """
        update = self._sql("UPDATE jfs_setting SET value = %s WHERE name = 'format' AND CAST(value AS BINARY) = %s")
        with self._cursor() as cursor:
            if not_after is None:
                return bool(cursor.execute(update, (new.raw.decode(), expected.raw)))
            return bool(
                cursor.execute(f"{update} AND UNIX_TIMESTAMP() <= %s", (new.raw.decode(), expected.raw, not_after))
            )

    def confirm_writable(self) -> None:
        """Run the UPDATE of `replace_setting` with the value that is there, in a transaction that is rolled back.

        Raises:
            PermanentError: The account lacks the right, or the server takes no writes.
        """
        try:
            with self._cursor(permanent=_PERMANENT_CODES | _READ_ONLY_CODES) as cursor:
                cursor.execute("SET SESSION innodb_lock_wait_timeout = 5")
                cursor.execute("START TRANSACTION")
                try:
                    cursor.execute(self._sql("UPDATE jfs_setting SET value = value WHERE name = 'format'"))
                finally:
                    cursor.execute("ROLLBACK")
        except PermanentError as error:
            raise PermanentError(
                f"The row `format` of jfs_setting cannot be updated, which a way back needs. {error.problem}",
                next_step="grant the account UPDATE on jfs_setting, or name the primary server in the connection",
            ) from None

    def sessions(self) -> Sequence[Session]:
        """Return the live sessions of `jfs_session2`; `expire` is in Unix seconds."""
        return self._sessions("expire > UNIX_TIMESTAMP()")

    def expired_sessions(self, within_s: float) -> Sequence[Session]:
        """Return the rows of `jfs_session2` that no client has removed yet: others do within a heartbeat or two."""
        return self._sessions("expire <= UNIX_TIMESTAMP() AND expire > UNIX_TIMESTAMP() - %s", int(within_s))

    def _sessions(self, condition: str, *args: object) -> list[Session]:
        found = []
        for sid, expire, info in self._query(_SESSIONS + condition, *args):
            fields = json.loads(info or b"{}")
            found.append(
                Session(
                    sid=int(sid),
                    version=str(fields.get("Version", "")),
                    host=str(fields.get("HostName", "")),
                    mount_point=str(fields.get("MountPoint", "")),
                    expires=datetime.fromtimestamp(int(expire), UTC),
                )
            )
        return found

    def slices_of_files(self, prefix: str) -> set[int]:
        """Look names up in `jfs_edge` by its index, then their chunks."""
        rows = self._query(
            "SELECT c.slices FROM jfs_edge e JOIN jfs_chunk c ON c.inode = e.inode "
            "WHERE e.parent = %s AND e.name >= %s AND e.name < %s",
            _ROOT_INODE,
            prefix.encode(),
            prefix.encode() + b"\xff",
        )
        return {record[1] for row in rows for record in _records(_SLICE, bytes(row[0]))}

    def next_slice(self) -> int:
        """Read the counter that all slice ids come from; clients take them in batches."""
        rows = self._query("SELECT value FROM jfs_counter WHERE name = 'nextChunk'")
        return int(rows[0][0]) if rows else 0

    def slices(self, first_id: int = 0, end_id: int | None = None) -> Iterator[tuple[int, int]]:
        """Read `jfs_chunk_ref` in ranges of its primary key, so that no query holds many rows."""
        while True:
            rows = self._query(
                "SELECT chunkid, size FROM jfs_chunk_ref "
                "WHERE chunkid >= %s AND chunkid < %s AND refs > 0 ORDER BY chunkid LIMIT %s",
                first_id,
                _NO_SLICE if end_id is None else end_id,
                _FETCH_ROWS,
            )
            yield from ((int(chunk_id), int(size)) for chunk_id, size in rows)
            if len(rows) < _FETCH_ROWS:
                return
            first_id = int(rows[-1][0]) + 1

    def still_needed(self, slice_ids: Collection[int]) -> set[int]:
        """Look them up in `jfs_chunk_ref`."""
        ids = sorted(slice_ids)
        return {
            int(row[0])
            for first in range(0, len(ids), _ASKED_AT_ONCE)
            for row in self._query(
                "SELECT chunkid FROM jfs_chunk_ref WHERE refs > 0 AND chunkid IN %s",
                ids[first : first + _ASKED_AT_ONCE],
            )
        }

    def files_of(self, slice_ids: Collection[int]) -> Iterator[tuple[int, str]]:
        """Read `jfs_chunk` in ranges of its primary key, then `jfs_edge` for the files that were found."""
        wanted, found = frozenset(slice_ids), set[tuple[int, int]]()
        if not wanted:
            return
        folders: dict[int, str] = {_ROOT_INODE: "", _TRASH_INODE: "/.trash"}
        for inode, slices in self._ranges("SELECT id, inode, slices FROM jfs_chunk WHERE id > %s ORDER BY id LIMIT %s"):
            for record in _records(_SLICE, slices):
                if record[1] in wanted and (record[1], inode) not in found:
                    found.add((record[1], inode))
                    for path in self._paths(inode, folders):
                        yield record[1], path
        rest = wanted - {slice_id for slice_id, _ in found}
        if rest and self._query("SHOW TABLES LIKE 'jfs_delslices'"):
            sql = "SELECT chunkid, 0, slices FROM jfs_delslices WHERE chunkid > %s ORDER BY chunkid LIMIT %s"
            delayed = {record[0] for _, slices in self._ranges(sql) for record in _records(_DELAYED_SLICE, slices)}
            for slice_id in sorted(rest & delayed):
                yield slice_id, "(replaced by a compaction, kept until the trash is emptied)"
            rest -= delayed
        for slice_id in sorted(rest):
            yield slice_id, "(counted as in use, but no file refers to it)"

    def _ranges(self, sql: str) -> Iterator[tuple[int, bytes]]:
        last = 0
        while rows := self._query(sql, last, _FETCH_ROWS):
            yield from ((int(inode), bytes(slices)) for _, inode, slices in rows)
            last = int(rows[-1][0])

    def _paths(self, inode: int, folders: dict[int, str]) -> list[str]:
        """Return every path of a file; `folders` keeps the paths of folders from one call to the next."""

        def folder(inode: int) -> str:
            if inode not in folders:
                rows = self._query("SELECT parent, name FROM jfs_edge WHERE inode = %s LIMIT 1", inode)
                folders[inode] = f"{folder(int(rows[0][0]))}/{_text(rows[0][1])}" if rows else f"(inode {inode})"
            return folders[inode]

        rows = self._query("SELECT parent, name FROM jfs_edge WHERE inode = %s ORDER BY parent, name", inode)
        return [f"{folder(int(parent))}/{_text(name)}" for parent, name in rows] or [f"(deleted file, inode {inode})"]


def _records(layout: struct.Struct, slices: bytes) -> Iterator[tuple[Any, ...]]:
    """Yield the records of a row. A damaged row may end within a record: the complete ones are yielded all the same."""
    return layout.iter_unpack(slices[: len(slices) // layout.size * layout.size])


def _text(name: bytes | str) -> str:
    """Return a file's name, which need not be UTF-8."""
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else name


def _refuse_plain(cursor: Any) -> None:
    cursor.execute("SHOW SESSION STATUS LIKE 'Ssl_cipher'")
    if not (rows := cursor.fetchall()) or not rows[0][1]:
        raise PermanentError(
            "The connection to the metadata database is not encrypted, though option tls of the metaurl asks for it.",
            next_step="switch TLS on in the server, or make a connection for `meta_conn_id`",
        )


def _hook(**options: Any) -> MySqlHook:
    """Return a MySqlHook whose connections have timeouts."""
    from airflow.providers.mysql.hooks.mysql import MySqlHook

    class TimedMySqlHook(MySqlHook):
        def _get_conn_config_mysql_client(self, conn: Any) -> dict[str, Any]:
            extra = {name: int(conn.extra_dejson.get(name, default)) for name, default in _TIMEOUTS.items()}
            return extra | dict(super()._get_conn_config_mysql_client(conn))

    return TimedMySqlHook(**options)
