"""What Airflow's CeleryExecutor needs: PostgreSQL for its database, Redis for its queue."""

import os
import pwd
import secrets
import shutil
import socket
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from lab.process import LabUnavailableError, Server, binary, free_ports, run, wait_for

_OWNER = "postgres"


@dataclass(frozen=True)
class PostgreSQL:
    """A running server with the user and the database `airflow`."""

    state: Path
    folder: Path
    port: int
    password: str = field(repr=False)

    @classmethod
    def start(cls, state: Path) -> "PostgreSQL":
        """Make a cluster, start it and create the database (about 3 s).

        PostgreSQL refuses to run as root: its files lie in a folder of their own that its user can reach.

        Raises:
            LabUnavailableError: it is not installed.
        """
        programs = _programs()
        owner = pwd.getpwnam(_OWNER)
        folder = Path(tempfile.mkdtemp(prefix="juicefs-lab-postgres-"))
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        self = cls(state, folder, free_ports(1)[0], secrets.token_hex(24))
        password = folder / "password"
        password.touch(mode=0o600)
        password.write_text(self.password)
        os.chown(password, owner.pw_uid, owner.pw_gid)
        data = folder / "data"
        run(
            [
                *_AS_OWNER, programs / "initdb", f"--pgdata={data}", "--username=airflow", f"--pwfile={password}",
                "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync",
            ],
            cwd=folder,
        )  # fmt: skip
        password.unlink()
        server = Server.start(
            state,
            "postgresql",
            [
                *_AS_OWNER, programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(self.port), "-k", folder,
                # Nothing of a lab outlives the machine.
                "-c", "fsync=off", "-c", "full_page_writes=off", "-c", "max_connections=200",
            ],
            cwd=folder,
        )  # fmt: skip
        wait_for("PostgreSQL answers", lambda: _listens(self.port), deadline_s=60, server=server)
        wait_for("PostgreSQL has its database", self._create_database, deadline_s=60, server=server)
        return self

    def _create_database(self) -> bool:
        import psycopg

        server = f"host=127.0.0.1 port={self.port} dbname=postgres user=airflow"
        try:
            with psycopg.connect(server, password=self.password, autocommit=True) as connection:
                connection.execute("CREATE DATABASE airflow")
        except psycopg.OperationalError:  # it listens before it serves
            return False
        return True

    def remove(self) -> None:
        """Stop the server and remove its files. Idempotent."""
        if server := Server.load(self.state, "postgresql"):
            server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Redis:
    """A running server that asks for a password."""

    state: Path
    port: int
    password: str = field(repr=False)

    @classmethod
    def start(cls, state: Path) -> "Redis":
        """Start the server.

        Raises:
            LabUnavailableError: it is not installed.
        """
        self = cls(state, free_ports(1)[0], secrets.token_hex(24))
        folder = state / "redis"
        folder.mkdir(parents=True, mode=0o700)
        settings = folder / "redis.conf"
        settings.touch(mode=0o600)
        settings.write_text(
            f'bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\ndir {folder}\nsave ""\nappendonly no\n'
            # Its title would overwrite the environment by which tests/support/reaper.py finds it.
            "set-proc-title no\n"
        )
        # Debian's redis-tools has the server too, under its other name; redis-server would start a system service.
        program = folder / "redis-server"
        program.symlink_to(binary("redis-check-rdb").resolve())
        server = Server.start(state, "redis", [program, settings])
        wait_for("Redis answers", lambda: _listens(self.port), deadline_s=30, server=server)
        return self

    def stop(self) -> None:
        """Stop the server. Idempotent."""
        if server := Server.load(self.state, "redis"):
            server.stop()


_AS_OWNER = ("setpriv", f"--reuid={_OWNER}", f"--regid={_OWNER}", "--init-groups")


def _programs() -> Path:
    """Return the folder of PostgreSQL's server programs, which Debian keeps off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise LabUnavailableError("expected the program initdb, found none: apt-get install postgresql")
    return found[-1].parent


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
