"""The WSGI servers of test_guest_books.py: how each is started, and in what it differs from the others.

Each is started by the command that its users type, on a free loopback port, with one process and (but for those that
serve one request at a time) eight threads. What it says goes into a log file; a server that does not start is shown
with the end of it. It does not outlive the tests, even where these are killed: a guard, at the other end of a pipe,
stops it when they are gone.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.servers import NotInstalled, find_program, free_port, tail

SECONDS_TO_START = 60
SECONDS_TO_STOP = 10
PORTS_TO_TRY = 3

ROOT = Path(__file__).parents[2]
MODULE = "tests.frameworks.served"
APPLICATION = f"{MODULE}:application"
THREADS = "8"

# A line says that the tests have stopped the server, the end of the pipe without one that they are gone.
_GUARD = """
server=$1 patience=$2 folder=$3
read -r _ && exit
kill -s TERM "$server"
sleep "$patience"
kill -s KILL -- "-$server"
rm -rf "$folder"
"""


@dataclass(frozen=True, kw_only=True)
class WSGIServer:
    """A kind of server: how it is started, and what is peculiar to it."""

    name: str
    #: What has to be installed, the server first; the versions of these are reported.
    distributions: tuple[str, ...]
    #: The command, given the port and a folder of its own.
    command: Callable[[int, Path], list[str]]
    #: It serves one request at a time.
    serial: bool = False
    #: It does not notice that the client of a stream without an end has gone, and goes on with it for ever.
    streams_on: bool = False
    #: It cannot pass an answer on whose body is empty, as that of a redirect may be: the client sees a 500 of its own.
    needs_a_chunk: bool = False
    #: An exception of the application closes the connection, without an answer or in the middle of it.
    breaks_off_errors: bool = False
    #: The versions of what is no distribution.
    other_versions: Callable[[], dict[str, str]] = dict
    #: Regular expressions: what else it may log.
    logs: tuple[str, ...] = ()

    def versions(self) -> dict[str, str]:
        """The versions of what it consists of.

        :raises NotInstalled: where one of these is not installed.
        """
        try:
            return {**{name: version(name) for name in self.distributions}, **self.other_versions()}
        except PackageNotFoundError as error:
            raise NotInstalled(f"{error.name} is not installed") from None


class AnotherAnswers(Exception):
    """The port is that of another server, or a worker has died and got a successor."""


class Running:
    """A server that runs, and what it says of itself."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path, go_on: Path) -> None:
        self.port = port
        self.log = log
        #: A stream of events waits for this file after the first.
        self.go_on = go_on
        self._process = process
        self._pid: int | None = None

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def state(self) -> dict[str, Any]:
        """What ``/-/state`` answers.

        :raises AnotherAnswers: where that is another process than at first.
        """
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request("GET", "/-/state")
            state: dict[str, Any] = json.loads(connection.getresponse().read())
        # Somebody else's has another file; of ours, one that was started again has forgotten what went wrong before.
        if state["go_on"] != str(self.go_on) or self._pid not in (None, state["pid"]):
            raise AnotherAnswers(f"{state['pid']} answers, not {self._pid or 'ours'}")
        self._pid = state["pid"]
        return state


@contextlib.contextmanager
def run_wsgi_server(server: WSGIServer, environment: Mapping[str, str], log: Path) -> Iterator[Running]:
    """Run that server until the block ends.

    :param environment: what the application needs in its environment.
    :param log: where to write what the server says.
    :raises NotInstalled: where something is missing on this machine.
    :raises RuntimeError: if it does not start.
    """
    server.versions()
    with tempfile.TemporaryDirectory(prefix=f"{server.name}-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for attempt in range(1, PORTS_TO_TRY + 1):
            # Somebody else may take the port before the server does: then another one is tried.
            port = free_port()
            go_on = folder / "go_on"
            ours = {**environment, "HOME": name, "TMPDIR": name, "GUEST_BOOK_GO_ON": str(go_on)}
            # One that streams on for ever does not end by itself either.
            patience = 1 if server.streams_on else SECONDS_TO_STOP
            with run_process(server.command(port, folder), log, ours, folder, patience) as process:
                running = Running(port, process, log, go_on)
                try:
                    _wait_until_it_answers(server, running)
                except RuntimeError:
                    if attempt == PORTS_TO_TRY or "in use" not in log.read_text(errors="replace").lower():
                        raise
                    continue
                yield running
                return


@contextlib.contextmanager
def run_process(
    command: list[str], log: Path, environment: Mapping[str, str], folder: Path, patience: float
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
            # A process group of its own: it is stopped with all that it has started.
            start_new_session=True,
        )
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", str(process.pid), str(patience), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        guard.communicate(b"\n")


def _wait_until_it_answers(server: WSGIServer, running: Running) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        ended = running.ended
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError, AnotherAnswers):
            if not ended:
                running.state()
                return
        if ended or time.monotonic() > deadline:
            trouble = "ended at once" if ended else f"did not answer within {SECONDS_TO_START} seconds"
            raise RuntimeError(f"{server.name} {trouble}; it said:\n{tail(running.log)}")
        time.sleep(0.02)


def script(name: str) -> str:
    """The path of a script that was installed with one of the distributions."""
    # Not from the PATH first: that may be of another environment.
    return shutil.which(name, path=sysconfig.get_path("scripts")) or find_program(name)


def _waitress(port: int, folder: Path) -> list[str]:
    return [
        script("waitress-serve"),
        f"--listen=127.0.0.1:{port}",
        f"--threads={THREADS}",
        # How far a stream may run ahead of its client, 16 MB unless told: the whole export, and no stream would ever
        # wait for its client.
        "--outbuf-high-watermark=65536",
        APPLICATION,
    ]


def _gunicorn(*options: str) -> Callable[[int, Path], list[str]]:
    def command(port: int, folder: Path) -> list[str]:
        address = f"--bind=127.0.0.1:{port}"
        return [script("gunicorn"), address, "--no-control-socket", *options, APPLICATION]

    return command


def _uwsgi(port: int, folder: Path) -> list[str]:
    return [
        script("uwsgi"),
        f"--http-socket=127.0.0.1:{port}",
        f"--module={APPLICATION}",
        f"--threads={THREADS}",
        "--master",
        "--need-app",
        "--die-on-term",
        "--disable-logging",
    ]


def _apache_version() -> dict[str, str]:
    apache = find_program("apache2", "httpd", folders=["/usr/sbin"])
    said = subprocess.run([apache, "-v"], check=True, capture_output=True, text=True).stdout
    return {"Apache": said.partition("Apache/")[2].split()[0]}


def _mod_wsgi(port: int, folder: Path) -> list[str]:
    command = [
        script("mod_wsgi-express"),
        "start-server",
        "--application-type=module",
        MODULE,
        "--host=127.0.0.1",
        f"--port={port}",
        f"--server-root={folder / 'apache'}",
        "--log-to-terminal",
        "--processes=1",
        f"--threads={THREADS}",
        "--locale=C.UTF-8",
    ]
    if os.geteuid() != 0:
        return command
    # Apache serves as nobody it can be, which as root is www-data: that may not read what lies in root's home, where
    # the interpreter may be. So it is www-data from the start, with the one capability to read.
    become = ["--reuid=www-data", "--regid=www-data", "--clear-groups"]
    may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    # But mod_wsgi asks access(), which knows of no capabilities, for the environment that it runs in, and that of tox
    # may be closed to others. So that is one of its own, which has all that ours has.
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    [packages] = environment.glob("lib/python*/site-packages")
    ours = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (packages / "ours.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in ours))
    shutil.chown(folder, "www-data")
    return [find_program("setpriv"), *become, *may_read, str(environment / "bin" / "python"), *command]


def _cheroot(port: int, folder: Path) -> list[str]:
    return [script("cheroot"), f"--bind=127.0.0.1:{port}", f"--threads={THREADS}", APPLICATION]


def _granian(port: int, folder: Path) -> list[str]:
    options = ["--interface=wsgi", "--host=127.0.0.1", f"--port={port}", f"--blocking-threads={THREADS}"]
    return [script("granian"), *options, APPLICATION]


def _uvicorn(port: int, folder: Path) -> list[str]:
    options = ["--host=127.0.0.1", f"--port={port}", "--factory"]
    return [script("uvicorn"), *options, f"{MODULE}:asgi_application"]


def _hypercorn(port: int, folder: Path) -> list[str]:
    return [script("hypercorn"), f"--bind=127.0.0.1:{port}", f"wsgi:{APPLICATION}"]


def _werkzeug(port: int, folder: Path) -> list[str]:
    program = "run_simple('127.0.0.1', int(argv[1]), application, threaded=True)"
    imports = f"from sys import argv; from werkzeug.serving import run_simple; from {MODULE} import application"
    return [sys.executable, "-c", f"{imports}; {program}", str(port)]


def _wsgiref(port: int, folder: Path) -> list[str]:
    program = "make_server('127.0.0.1', int(argv[1]), application).serve_forever()"
    imports = f"from sys import argv; from wsgiref.simple_server import make_server; from {MODULE} import application"
    return [sys.executable, "-c", f"{imports}; {program}", str(port)]


WSGI_SERVERS = (
    WSGIServer(name="waitress", distributions=("waitress",), command=_waitress),
    WSGIServer(name="gunicorn-sync", distributions=("gunicorn",), command=_gunicorn(), serial=True),
    WSGIServer(
        name="gunicorn-gthread",
        distributions=("gunicorn",),
        command=_gunicorn("--worker-class=gthread", f"--threads={THREADS}"),
    ),
    WSGIServer(
        name="gunicorn-gevent",
        distributions=("gunicorn", "gevent"),
        command=_gunicorn("--worker-class=gevent"),
    ),
    # uWSGI and mod_wsgi raise an exception where the client has left in the middle of what is to be read from
    # wsgi.input. uWSGI 2.0.30 has no page for an exception, and its start_response (uwsgi_spit) fails when it is given
    # exc_info, after it has prepared the head, which the client then gets alone.
    WSGIServer(
        name="uwsgi",
        distributions=("pyuwsgi",),
        command=_uwsgi,
        breaks_off_errors=True,
        logs=(r"[\w.]+: error during read\(", "SystemError: <built-in function uwsgi_spit>"),
    ),
    WSGIServer(
        name="mod_wsgi",
        distributions=("mod_wsgi",),
        other_versions=_apache_version,
        command=_mod_wsgi,
        logs=(r"[\w.]+: mod_wsgi request data read error",),
    ),
    # cheroot leaves the file of a client that has gone to Python, whose finalizer tries to write the rest of it into
    # the closed socket; from Python 3.13 on that is shown (cherrypy/cheroot#734).
    WSGIServer(
        name="cheroot",
        distributions=("cheroot",),
        command=_cheroot,
        logs=(r"OSError: \[Errno 9\] Bad file descriptor$",),
    ),
    WSGIServer(name="granian", distributions=("granian",), command=_granian),
    # a2wsgi 1.10 iterates the body in a thread and queues the chunks (WSGIResponder.wsgi); once the client has gone,
    # uvicorn 0.54 drops them without a word (RequestResponseCycle.send), so that the thread never learns of it.
    WSGIServer(name="uvicorn", distributions=("uvicorn", "a2wsgi"), command=_uvicorn, streams_on=True),
    # hypercorn 0.18 does the same (WSGIWrapper.run_app, HTTPStream.app_send); and it sends the status with the first
    # chunk, so never where there is none.
    WSGIServer(
        name="hypercorn",
        distributions=("hypercorn",),
        command=_hypercorn,
        streams_on=True,
        needs_a_chunk=True,
        logs=(r"hypercorn\.utils\.UnexpectedMessageError: .* ASGIHTTPState\.REQUEST$",),
    ),
    WSGIServer(name="werkzeug", distributions=("werkzeug",), command=_werkzeug),
    WSGIServer(name="wsgiref", distributions=(), command=_wsgiref, serial=True),
)
