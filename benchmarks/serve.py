"""Serves contenders, each in a process of its own, with a database of its own::

    python -m benchmarks.serve "by hand" --url sqlite:// --server waitress --port 8080

The measuring modules use :func:`serving`, which serves several at once, and ends them whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from benchmarks.contenders import Application, Contender, Database
from tests.frameworks.wsgi_servers import run_process
from tests.servers import SECONDS_TO_START, tail

SERVERS = ("waitress", "gunicorn")
SECONDS_TO_STOP = 5
#: So many errors are logged with their traceback.  Where thousands are expected, the log is not what is measured.
ERRORS_TO_LOG = 20
#: With so many bytes that its client has not taken, a response waits for it.  Waitress's own setting.
READ_AHEAD = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a contender is served."""

    server: str
    #: What waitress has unless it is told otherwise; gunicorn has one worker, with as many.
    threads: int = 4
    pool_size: int = 5
    isolation_level: str | None = None
    #: How far waitress lets a response run ahead of its client.  (gunicorn does not.)
    read_ahead: int = READ_AHEAD

    @property
    def arguments(self) -> list[str]:
        given = [f"--server={self.server}", f"--threads={self.threads}", f"--pool-size={self.pool_size}"]
        given.append(f"--read-ahead={self.read_ahead}")
        return [*given, f"--isolation-level={self.isolation_level}"] if self.isolation_level else given


@dataclass(frozen=True)
class Served:
    """A contender that is served."""

    contender: Contender
    port: int
    #: Of its database.
    url: sa.URL
    log: Path
    host: str = field(default="127.0.0.1")

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.port}"

    def execute(self, statement: str) -> list[Any]:
        """What that statement returns, on a connection besides those of the contender."""
        return execute(self.url, statement)

    def said(self, lines: int = 5) -> str:
        """The end of its log."""
        return tail(self.log, lines)


def execute(url: sa.URL, statement: str) -> list[Any]:
    engine = sa.create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        result = connection.execute(sa.text(statement))
        return list(result) if result.returns_rows else []


@contextlib.contextmanager
def serving(
    contenders: Sequence[Contender], database_url: str, setup: Setup, module: str = "benchmarks.contenders"
) -> Iterator[list[Served]]:
    """Serve these until the block ends.

    :param database_url: of a database on a server on which each of them gets one for itself.
    :param module: where their list is, as ``CONTENDERS``.
    :raises RuntimeError: if one does not start; with the end of its log.
    """
    with contextlib.ExitStack() as life:
        folder = Path(life.enter_context(tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)))
        begun = []
        for number, contender in enumerate(contenders):
            url = life.enter_context(_database(sa.make_url(database_url), f"bench_{number}"))
            own = folder / str(number)
            own.mkdir()
            command = [sys.executable, "-m", "benchmarks.serve", contender.name, f"--module={module}"]
            command += [f"--url={url.render_as_string(hide_password=False)}", f"--port-file={own / 'port'}"]
            process = life.enter_context(
                run_process([*command, *setup.arguments], own / "log", {"HOME": str(own)}, own, SECONDS_TO_STOP)
            )
            begun.append((contender, process, url, own))
        try:
            yield [_answering(*each) for each in begun]
        finally:
            # All at once; then each is waited for.
            for _, process, *_ in begun:
                process.terminate()


@contextlib.contextmanager
def _database(url: sa.URL, name: str) -> Iterator[sa.URL]:
    execute(url, f"CREATE DATABASE {name}")
    try:
        yield url.set(database=name)
    finally:
        execute(url, f"DROP DATABASE {name} WITH (FORCE)")


def _answering(contender: Contender, process: Any, url: sa.URL, folder: Path) -> Served:
    """Wait until it does."""
    log, port_file = folder / "log", folder / "port"
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        ended = process.poll() is not None
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            port = int(port_file.read_text())
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
                connection.request("GET", "/none")
                if connection.getresponse().status == 200:
                    return Served(contender, port, url, log)
        if ended or time.monotonic() > deadline:
            trouble = "ended at once" if ended else f"did not answer within {SECONDS_TO_START} seconds"
            raise RuntimeError(f"the server of {contender.name!r} {trouble}; it said:\n{tail(log)}")
        time.sleep(0.05)


def turns(items: Sequence[Any], rounds: int) -> Iterator[list[Any]]:
    """All of them, for each round: each goes first as often as any other."""
    for number in range(rounds):
        shift = number % len(items)
        yield [*islice(items, shift, None), *islice(items, shift)]


# In the process of the contender


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description="Serves a contender on loopback.")
    parser.add_argument("name", help="of the contender")
    parser.add_argument("--module", default="benchmarks.contenders", help="where it is in the list CONTENDERS")
    parser.add_argument("--url", required=True, help="of its database")
    parser.add_argument("--server", choices=SERVERS, default=SERVERS[0])
    parser.add_argument("--threads", type=int, default=Setup.threads)
    parser.add_argument("--pool-size", type=int, default=Setup.pool_size)
    parser.add_argument("--isolation-level")
    parser.add_argument("--read-ahead", type=int, default=READ_AHEAD, help="bytes; of waitress")
    parser.add_argument("--port", type=int, default=0, help="default: one that is free")
    parser.add_argument("--port-file", type=Path, help="where to write the port, once it is open")
    given = parser.parse_args()
    found = {each.name: each for each in importlib.import_module(given.module).CONTENDERS}
    if given.name not in found:
        parser.error(f"{given.module} has no contender {given.name!r}; it has {', '.join(found)}")
    _log_errors()
    database = Database(given.url, given.pool_size, given.isolation_level)
    serve = {"waitress": _serve_by_waitress, "gunicorn": _serve_by_gunicorn}[given.server]
    serve(found[given.name], database, given)


def _log_errors() -> None:
    handler = logging.StreamHandler()
    logged = iter(range(ERRORS_TO_LOG))
    handler.addFilter(lambda record: next(logged, None) is not None)
    logging.basicConfig(level=logging.ERROR, handlers=[handler], format="%(name)s: %(message)s")


def _tell_port(port: int, file: Path | None) -> None:
    if file is None:
        print(f"http://127.0.0.1:{port}", flush=True)
    else:
        file.write_text(str(port))


def _serve_by_waitress(contender: Contender, database: Database, given: argparse.Namespace) -> None:
    import waitress

    server = waitress.create_server(
        contender.make(database),
        host="127.0.0.1",
        port=given.port,
        threads=given.threads,
        outbuf_high_watermark=given.read_ahead,
    )
    _tell_port(server.effective_port, given.port_file)
    server.run()


def _serve_by_gunicorn(contender: Contender, database: Database, given: argparse.Namespace) -> None:
    from gunicorn.app.base import BaseApplication

    def when_ready(arbiter: Any) -> None:
        _tell_port(arbiter.LISTENERS[0].sock.getsockname()[1], given.port_file)

    class Gunicorn(BaseApplication):
        def load_config(self) -> None:
            settings = {
                "bind": f"127.0.0.1:{given.port}",
                "workers": 1,
                "worker_class": "gthread",
                "threads": given.threads,
                "graceful_timeout": 1,
                "loglevel": "error",
                "control_socket_disable": True,
                "when_ready": when_ready,
            }
            for name, value in settings.items():
                self.cfg.set(name, value)

        def load(self) -> Application:
            # In the worker, whose engine must not have the connections of another process.
            return contender.make(database)

    Gunicorn().run()


if __name__ == "__main__":
    main()
