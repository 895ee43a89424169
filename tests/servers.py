"""Real servers for the tests: a PostgreSQL, with replicas too, a MariaDB, a Chromium and a waitress of one's own.

Each is started by the fixtures of ``conftest.py`` on a free loopback port in a temporary folder, and needs nothing but
the programs: no service that runs already, no account, no configuration. A database server does not outlive the tests,
even where these are killed: it has a guard, at the other end of a pipe, that stops it when they are gone.
"""

from __future__ import annotations

import contextlib
import getpass
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

SECONDS_TO_START = 60
SECONDS_TO_STOP = 20
PORTS_TO_TRY = 3

# The server runs in the background, so that the guard can wait for whatever comes first: the end of the server, or word
# from the tests. A line says that they are done. The end of the pipe without one says that they are gone: then nobody
# but the guard is left to clean up.
_GUARD = """
folder=$1 signal=$2
shift 2
exec 3<&0
"$@" 3<&- &
server=$!
{
    read -r _ <&3 && done=yes || done=no
    kill -s "$signal" $server
    # One that was stopped would not hear of it.
    kill -s CONT $server
    if [ $done = no ]; then
        while kill -0 $server; do sleep 0.1; done
        cd / && rm -rf "$folder"
    fi
} >/dev/null 2>&1 &
wait $server
"""


class NotInstalled(Exception):
    """A program that a test needs is not on this machine."""


def find_program(*names: str, folders: Sequence[str] = ()) -> str:
    """Return the path of the first of these programs that there is, on the ``PATH`` or in one of these folders.

    :param folders: patterns in the manner of the shell; of several versions, the newest is taken.
    :raises NotInstalled: where there is none of them.
    """
    found = [folder for pattern in folders for folder in sorted(glob.glob(pattern), key=_version, reverse=True)]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *found])
    for name in names:
        if program := shutil.which(name, path=path):
            return program
    raise NotInstalled(f"{' or '.join(names)} is not installed")


def _version(folder: str) -> list[int]:
    return [int(part) for part in folder.split("/") if part.isdigit()]


class DatabaseServer:
    """A database server that runs, and the way to databases of one's own on it."""

    #: How it is made to end at once, in the midst of everything, and to leave the clearing up to the next start.
    crash: signal.Signals = signal.SIGKILL

    def __init__(self, url: URL, pid_file: Path) -> None:
        #: Where its maintenance database is.
        self.url = url
        #: Lets it crash, and starts it again with what it has kept, on the same port.  What was committed is there only
        #: where it was started with ``keeps_commits``.
        self.restart: Callable[[], None]
        #: The first half of that, and the second one.
        self.stop: Callable[[], None]
        self.start: Callable[[], None]
        self._pid_file = pid_file
        self._numbers = count(1)

    @property
    def pid(self) -> int:
        """The process that all connections end with."""
        return int(self._pid_file.read_text().split()[0])

    @contextlib.contextmanager
    def database(self) -> Iterator[URL]:
        """Create an empty database, yield its URL, and drop it, whoever may still be connected to it."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield self.url.set(database=name)
        finally:
            self._drop(name)

    def execute(self, statement: str, database: str | None = None) -> list[Any]:
        """Execute a statement in a connection of its own, outside of a transaction, and return its rows."""
        url = self.url if database is None else self.url.set(database=database)
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            result = connection.execute(text(statement))
            return list(result) if result.returns_rows else []

    def _drop(self, name: str) -> None:
        raise NotImplementedError


class PostgreSQLServer(DatabaseServer):
    # The "immediate shutdown".  After a SIGKILL, its backends would go on for a while.
    crash = signal.SIGQUIT

    def _drop(self, name: str) -> None:
        # Even by force it drops no database that a prepared transaction still uses.
        for (gid,) in self.execute(f"SELECT gid FROM pg_prepared_xacts WHERE database = '{name}'"):
            quoted = gid.replace("'", "''")
            self.execute(f"ROLLBACK PREPARED '{quoted}'", name)
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")


class MariaDBServer(DatabaseServer):
    def _drop(self, name: str) -> None:
        # It would wait for the transactions that have read something there, for ever if need be.
        for (connection,) in self.execute(f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"):
            with contextlib.suppress(DBAPIError):  # it has gone by itself in the meantime
                self.execute(f"KILL {connection}")
        self.execute(f"DROP DATABASE {name}")


@contextlib.contextmanager
def run_postgresql(*, max_prepared_transactions: int = 20, keeps_commits: bool = False) -> Iterator[DatabaseServer]:
    """Run a PostgreSQL server that trusts everybody and keeps nothing.

    The URL's driver is psycopg2, which all the supported versions of SQLAlchemy know.

    :param keeps_commits: what was committed outlives a crash of the server, though not one of the machine.
    """
    folders = ["/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin"]
    initdb = find_program("initdb", folders=folders)
    postgres = find_program("postgres", folders=folders)
    user = _server_user("postgres")
    with _server_folder("postgresql", user) as folder:
        data = folder / "data"
        _run(
            [initdb, "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", f"-D{data}"],
            folder / "initdb.log",
            user,
        )

        def command(port: int) -> list[str]:
            settings = {
                "listen_addresses": "127.0.0.1",
                "port": port,
                "unix_socket_directories": "",
                "max_prepared_transactions": max_prepared_transactions,
                "fsync": "off",
                # The kernel has what was written, unless a process was killed in the middle of that.
                "full_page_writes": "on" if keeps_commits else "off",
                "synchronous_commit": "on" if keeps_commits else "off",
                "shared_buffers": "16MB",
                "autovacuum": "off",
            }
            return [postgres, f"-D{data}", *(f"-c{name}={value}" for name, value in settings.items())]

        def server(port: int) -> DatabaseServer:
            return PostgreSQLServer(
                URL.create(
                    "postgresql+psycopg2", username="postgres", host="127.0.0.1", port=port, database="postgres"
                ),
                data / "postmaster.pid",
            )

        # SIGQUIT, the "immediate shutdown": nothing in there is wanted any more.
        with _running(command, server, "QUIT", folder / "server.log", user) as running:
            yield running


class Replicated:
    """A PostgreSQL primary, and its standbys, which stream from it."""

    def __init__(self, primary: DatabaseServer, standbys: list[DatabaseServer]) -> None:
        self.primary = primary
        self.standbys = standbys

    def wait_until_replayed(self) -> None:
        """Wait until all standbys have replayed what the primary has done by now."""
        ((position,),) = self.primary.execute("SELECT pg_current_wal_insert_lsn()")
        deadline = time.monotonic() + SECONDS_TO_START
        for standby in self.standbys:
            nudge = time.monotonic() + 2
            while not standby.execute(f"SELECT pg_last_wal_replay_lsn() >= '{position}'")[0][0]:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"a standby has not replayed {position}")
                if time.monotonic() > nudge:
                    # A position can be behind a page's header, where no record ends yet.
                    self.primary.execute("SELECT pg_logical_emit_message(true, 'test', 'test')")
                time.sleep(0.02)


@contextlib.contextmanager
def run_replicated(*, delays: Sequence[int] = (0, 150)) -> Iterator[Replicated]:
    """Run a PostgreSQL primary, and a standby for each of these delays.

    :param delays: the standby's ``recovery_min_apply_delay``, in milliseconds.
    """
    folders = ["/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin"]
    initdb = find_program("initdb", folders=folders)
    basebackup = find_program("pg_basebackup", folders=folders)
    postgres = find_program("postgres", folders=folders)
    user = _server_user("postgres")

    def running(folder: Path, **more: object) -> contextlib.AbstractContextManager[DatabaseServer]:
        data = folder / "data"

        def command(port: int) -> list[str]:
            settings = {
                "listen_addresses": "127.0.0.1",
                "port": port,
                "unix_socket_directories": "",
                "fsync": "off",
                "wal_level": "replica",
                "hot_standby": "on",
                "max_wal_senders": 10,
                "max_connections": 200,
                "max_prepared_transactions": 0,
                # A standby that was down finds what it has missed.
                "wal_keep_size": "1GB",
                "wal_receiver_status_interval": "1s",
                # How long a standby that has lost its primary waits until it looks for it again.
                "wal_retrieve_retry_interval": "200ms",
                "shared_buffers": "16MB",
                "autovacuum": "off",
                **more,
            }
            return [postgres, f"-D{data}", *(f"-c{name}={value}" for name, value in settings.items())]

        def server(port: int) -> DatabaseServer:
            return PostgreSQLServer(
                URL.create(
                    "postgresql+psycopg2", username="postgres", host="127.0.0.1", port=port, database="postgres"
                ),
                data / "postmaster.pid",
            )

        return _running(command, server, "QUIT", folder / "server.log", user)

    with contextlib.ExitStack() as life:
        folder = life.enter_context(_server_folder("postgresql", user))
        _run(
            [
                *(initdb, "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C"),
                f"-D{folder / 'data'}",
            ],
            folder / "initdb.log",
            user,
        )
        primary = life.enter_context(running(folder))
        standbys = []
        for delay in delays:
            folder = life.enter_context(_server_folder("standby", user))
            _run(
                [
                    *(basebackup, "--no-sync", "--checkpoint=fast", "--write-recovery-conf", "--username=postgres"),
                    *(f"--host={primary.url.host}", f"--port={primary.url.port}", f"--pgdata={folder / 'data'}"),
                ],
                folder / "basebackup.log",
                user,
            )
            settings = {"recovery_min_apply_delay": f"{delay}ms"} if delay else {}
            standbys.append(life.enter_context(running(folder, **settings)))
        yield Replicated(primary, standbys)


@contextlib.contextmanager
def run_mariadb(*, keeps_commits: bool = False, options: Sequence[str] = ()) -> Iterator[DatabaseServer]:
    """Run a MariaDB server that trusts everybody and keeps nothing. The URL's driver is PyMySQL.

    :param keeps_commits: what was committed outlives a crash of the server, though not one of the machine.
    :param options: of the server, in addition.
    """
    folders = ["/usr/sbin", "/usr/local/sbin", "/usr/libexec"]
    install = find_program("mariadb-install-db", "mysql_install_db", folders=folders)
    mariadbd = find_program("mariadbd", "mysqld", folders=folders)
    user = _server_user("mysql")
    with _server_folder("mariadb", user) as folder:
        data = folder / "data"
        _run(
            [
                install,
                "--no-defaults",
                f"--datadir={data}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                "--skip-name-resolve",
                "--innodb-flush-log-at-trx-commit=0",
                "--innodb-log-file-size=8M",
                *([f"--user={user}"] if user else []),
            ],
            folder / "install.log",
            # As root: it changes to the user itself, and has files to read that only root may.
            None,
        )

        def command(port: int) -> list[str]:
            return [
                mariadbd,
                "--no-defaults",
                f"--datadir={data}",
                f"--socket={folder / 'socket'}",
                f"--pid-file={folder / 'pid'}",
                f"--port={port}",
                "--bind-address=127.0.0.1",
                # No accounts, so no names of hosts to look up either.
                "--skip-grant-tables",
                "--skip-name-resolve",
                "--character-set-server=utf8mb4",
                "--innodb-buffer-pool-size=16M",
                "--innodb-log-file-size=8M",
                # The kernel has what was written, unless the server was killed in the middle of that.
                f"--innodb-flush-log-at-trx-commit={2 if keeps_commits else 0}",
                f"--innodb-doublewrite={int(keeps_commits)}",
                "--innodb-use-native-aio=0",
                "--innodb-fast-shutdown=2",
                "--performance-schema=off",
                *options,
            ]

        def server(port: int) -> DatabaseServer:
            return MariaDBServer(
                URL.create("mysql+pymysql", username="root", host="127.0.0.1", port=port, database="mysql"),
                folder / "pid",
            )

        with _running(command, server, "TERM", folder / "server.log", user) as running:
            yield running


@contextlib.contextmanager
def _running(
    command: Callable[[int], list[str]],
    server: Callable[[int], DatabaseServer],
    signal_name: str,
    log: Path,
    user: str | None,
) -> Iterator[DatabaseServer]:
    for attempt in range(1, PORTS_TO_TRY + 1):
        # Somebody else may take the port before the server does: then another one is tried.
        port = free_port()
        running = server(port)
        with contextlib.ExitStack() as life:
            start = partial(_start, running, life, command(port), signal_name, log, user)
            try:
                start()
            except RuntimeError:
                if attempt == PORTS_TO_TRY or "in use" not in log.read_text(errors="replace"):
                    raise
                continue
            running.start = start
            running.stop = partial(_stop, running, life)
            running.restart = partial(_restart, running)
            yield running
            return


def _start(
    server: DatabaseServer,
    life: contextlib.ExitStack,
    command: list[str],
    signal_name: str,
    log: Path,
    user: str | None,
) -> None:
    guard = life.enter_context(_guarded(command, signal_name, log, user))
    _wait_until_it_answers(server, guard, log)


def _restart(server: DatabaseServer) -> None:
    server.stop()
    server.start()


def _stop(server: DatabaseServer, life: contextlib.ExitStack) -> None:
    os.kill(server.pid, server.crash)
    # Waits until it is gone.
    life.close()


@contextlib.contextmanager
def _guarded(command: list[str], signal_name: str, log: Path, user: str | None) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", str(log.parent), signal_name, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=_environment(log.parent),
            # Out of reach of the Ctrl-C that is meant for the tests: they stop it themselves.
            start_new_session=True,
            **_as_user(user),
        )
    assert guard.stdin is not None
    try:
        yield guard
    finally:
        guard.stdin.write(b"\n")
        guard.stdin.close()
        try:
            guard.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            # The guard is the leader of a process group in which there is nothing but it and the server.
            os.killpg(guard.pid, signal.SIGKILL)
            guard.wait()


def _wait_until_it_answers(server: DatabaseServer, guard: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        ended = guard.poll() is not None
        try:
            if not ended:
                server.execute("SELECT 1")
                return
        except DBAPIError:
            pass
        if ended or time.monotonic() > deadline:
            trouble = "ended at once" if ended else f"did not answer within {SECONDS_TO_START} seconds"
            raise RuntimeError(f"{server.url.get_backend_name()} {trouble}; it said:\n{tail(log)}")
        time.sleep(0.05)


def _run(command: list[str], log: Path, user: str | None) -> None:
    with log.open("wb") as output:
        status = subprocess.call(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=_environment(log.parent),
            **_as_user(user),
        )
    if status:
        raise RuntimeError(f"{command[0]} ended with status {status}; it said:\n{tail(log)}")


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _environment(folder: Path) -> dict[str, str]:
    # PGDATA, PGPORT, MYSQL_HOME and the like are about somebody's own server.
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "MYSQL", "MARIADB"))}
    return {**ours, "TMPDIR": str(folder)}


def _server_user(name: str) -> str | None:
    """Return whom the server has to run as; None: as ourselves. The servers refuse to run as root."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(name)
    except KeyError:
        raise NotInstalled(f"there is no user {name!r}, and {getpass.getuser()!r} cannot run the server") from None
    return name


def _as_user(user: str | None) -> dict[str, Any]:
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


@contextlib.contextmanager
def _server_folder(name: str, user: str | None) -> Iterator[Path]:
    # Not in pytest's own folder for temporary files: that one is closed to other users, and its path may be too long
    # for the name of a socket.
    with tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True) as name_of_folder:
        if user is not None:
            shutil.chown(name_of_folder, user)
        yield Path(name_of_folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class WaitressServer:
    """A waitress that serves an application on a free loopback port, in threads of this process."""

    def __init__(self, app: Any, **options: Any) -> None:
        import waitress

        self._server = waitress.create_server(app, **{"host": "127.0.0.1", "port": 0, **options})
        self.host: str = self._server.effective_host
        self.port: int = self._server.effective_port
        self.url = f"http://{self.host}:{self.port}"
        self._loop = threading.Thread(target=self._server.run, name=f"waitress-loop-{self.port}", daemon=True)
        self._loop.start()

    def stop(self) -> None:
        """Hang up on all clients, wait for the requests that run, and close everything."""
        if not self._loop.is_alive():
            return
        # First the clients, so that no request goes on waiting for one of them; the loop still runs, for the workers
        # need it to finish. Its map belongs to the loop's thread.
        self._server.trigger.pull_trigger(self._hang_up)
        dispatcher = self._server.task_dispatcher
        dispatcher.shutdown(timeout=SECONDS_TO_STOP)
        # waitress queues the function before it writes to the pipe, so the loop may have closed the pipe by then.
        with contextlib.suppress(OSError):
            self._server.trigger.pull_trigger(self._close)
        self._loop.join(SECONDS_TO_STOP)
        if dispatcher.threads or self._loop.is_alive():
            raise RuntimeError(f"a request to {self.url} is still running")

    def _hang_up(self) -> None:
        for channel in list(self._server.active_channels.values()):
            channel.handle_close()

    def _close(self) -> None:
        self._hang_up()
        self._server.close()
