"""MariaDB on its own data directory: the metadata engine of the lab's volume."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lab.keys import new_secret
from lab.process import LabError, Server, binary, free_ports, run, wait_for

DATABASE = "jfs"
USER = "jfs"
_MUTATING = ("INSERT", "UPDATE", "DELETE", "REPLACE", "CREATE", "ALTER", "DROP", "TRUNCATE", "RENAME", "GRANT", "LOAD")


@dataclass(frozen=True)
class MariaDB:
    """A running server with the database `jfs`; the administrator is reached only over its socket."""

    state: Path
    port: int
    password: str = field(repr=False)
    host: str = "127.0.0.1"
    user: str = USER
    database: str = DATABASE

    @classmethod
    def start(cls, state: Path) -> "MariaDB":
        """Install into `<state>/mariadb`, start, and create the database and its user (about 2 s)."""
        folder = state / "mariadb"
        folder.mkdir(parents=True, mode=0o700)
        run(
            [
                binary("mariadb-install-db"),
                "--no-defaults",
                f"--user={getuser()}",
                f"--datadir={folder / 'data'}",
                f"--auth-root-socket-user={getuser()}",
                "--skip-test-db",
            ],
        )
        self = cls(state, free_ports(1)[0], new_secret())
        self.restart()
        # SHUTDOWN or a changed password are not the clients' business: rights on the one database only.
        self._admin(f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb4")
        self._admin(f"CREATE USER '{USER}'@'127.0.0.1' IDENTIFIED BY %s", (self.password,))
        self._admin(f"GRANT ALL ON {DATABASE}.* TO '{USER}'@'127.0.0.1'")
        return self

    @property
    def _socket(self) -> Path:
        return self.state / "mariadb" / "sock"

    def restart(self) -> None:
        """Start the server again on the same data and port, stopping it first where it runs."""
        self.stop()
        folder = self.state / "mariadb"
        if len(str(self._socket)) > 100:
            raise LabError(f"expected a state folder that leaves room for a socket's name (100), found {folder}")
        server = Server.start(
            self.state,
            "mariadb",
            [
                binary("mariadbd"),
                "--no-defaults",
                f"--user={getuser()}",
                f"--datadir={folder / 'data'}",
                f"--bind-address={self.host}",
                f"--port={self.port}",
                f"--socket={self._socket}",
                f"--pid-file={folder / 'pid'}",
                "--skip-name-resolve",
                "--innodb-buffer-pool-size=64M",
            ],
        )
        wait_for("MariaDB answers", self._answers, deadline_s=60, server=server)

    def stop(self) -> None:
        """Stop the server; its data stays. Idempotent."""
        if server := Server.load(self.state, "mariadb"):
            server.stop()

    def server(self) -> Server | None:
        """Return the recorded process."""
        return Server.load(self.state, "mariadb")

    @property
    def meta_url(self) -> str:
        """The metadata URL as JuiceFS takes it, without the password (META_PASSWORD carries that)."""
        return f"mysql://{self.user}@({self.host}:{self.port})/{self.database}"

    @property
    def meta_url_with_password(self) -> str:
        """The same with the password in it, percent-encoded, as the driver's Secret holds it."""
        return f"mysql://{self.user}:{quote(self.password, safe='')}@({self.host}:{self.port})/{self.database}"

    def query(self, sql: str, args: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run one statement as the volume's user and return its rows."""
        import MySQLdb

        with closing(
            MySQLdb.connect(
                host=self.host, port=self.port, user=self.user, password=self.password, database=self.database
            )
        ) as connection:
            return _execute(connection, sql, args)

    def setting(self) -> dict[str, Any]:
        """Return the volume's setting: the JSON of `jfs_setting`'s row `format`."""
        value = self.query("SELECT value FROM jfs_setting WHERE name = 'format'")[0][0]
        setting: dict[str, Any] = json.loads(value)
        return setting

    def add_database(self, name: str) -> "MariaDB":
        """Create another database for the same user, for another volume; returns the same server seen from it."""
        self._admin(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        self._admin(f"GRANT ALL ON {name}.* TO '{self.user}'@'127.0.0.1'")
        return dataclasses.replace(self, database=name)

    def start_general_log(self) -> None:
        """Record every statement from now on, from whichever client; forgets what was recorded before."""
        self._admin("SET GLOBAL log_output = 'TABLE'")
        self._admin("SET GLOBAL general_log = OFF")
        self._admin("TRUNCATE mysql.general_log")
        self._admin("SET GLOBAL general_log = ON")

    def stop_general_log(self) -> None:
        """Record no more; what was recorded can still be read."""
        self._admin("SET GLOBAL general_log = OFF")

    def add_reader(self, user: str) -> str:
        """Add a user who may SELECT in the metadata and nothing else; returns its password."""
        password = new_secret()
        self.add_user(user, password, "SELECT")
        return password

    def add_user(self, user: str, password: str, rights: str = "ALL") -> None:
        """Add a user with these rights in the metadata and nowhere else."""
        self._admin("CREATE USER %s@'127.0.0.1' IDENTIFIED BY %s", (user, password))
        self._admin(f"GRANT {rights} ON {self.database}.* TO %s@'127.0.0.1'", (user,))

    def set_read_only(self, *, on: bool) -> None:
        """Have the server refuse the writes of everybody but administrators, as a replica does."""
        self._admin(f"SET GLOBAL read_only = {'ON' if on else 'OFF'}")

    def general_log_statements(self, user: str = "%") -> list[str]:
        """Return what was executed since the general log was switched on, in order: by all but root, or by one user."""
        rows = self._admin(
            "SELECT argument FROM mysql.general_log WHERE command_type IN ('Query', 'Execute') "
            "AND user_host NOT LIKE %s AND user_host LIKE %s ORDER BY event_time",
            ("%[root] @ localhost%", f"{user}[{user}] @ %"),
        )
        return [row[0].decode(errors="replace") if isinstance(row[0], bytes) else str(row[0]) for row in rows]

    def _admin(self, sql: str, args: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        import MySQLdb

        with closing(MySQLdb.connect(unix_socket=str(self._socket), user="root")) as connection:
            return _execute(connection, sql, args)

    def _answers(self) -> bool:
        import MySQLdb

        try:
            self._admin("SELECT 1")
        except MySQLdb.OperationalError:
            return False
        return True


def mutating(statements: Sequence[str]) -> list[str]:
    """Return the statements that change data, schema or rights."""
    return [statement for statement in statements if statement.lstrip("( \n\t").upper().startswith(_MUTATING)]


def _execute(connection: Any, sql: str, args: Sequence[object]) -> list[tuple[Any, ...]]:
    with closing(connection.cursor()) as cursor:
        cursor.execute(sql, args or None)
        rows = list(cursor.fetchall())
    connection.commit()
    return rows
