"""Servers that are given an ini file with ``use = egg:sa_wsgi_session`` in it."""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import PORTS_TO_TRY, SECONDS_TO_START, SECONDS_TO_STOP, free_port
from tests.test_paste import ROOT, WRITER, Folder

SERVED = f"""
    [pipeline:main]
    pipeline = session writer

    [filter:session]
    use = egg:sa_wsgi_session
    sqlalchemy.url = sqlite:///%(here)s/notes.sqlite
    commit_veto = repoze.tm:default_commit_veto

    [app:writer]
    {WRITER}

    [server:main]
    use = egg:waitress#main
    host = 127.0.0.1
    port = PORT

    # waitress tells it to the log alone where it listens.
    [loggers]
    keys = root

    [handlers]
    keys = stderr

    [formatters]
    keys =

    [logger_root]
    level = INFO
    handlers = stderr

    [handler_stderr]
    class = StreamHandler
    args = ()
    """


@contextlib.contextmanager
def serving(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run that command until the block ends."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            # gunicorn leaves a socket there.
            env={**os.environ, "HOME": str(log.parent)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield process
        except BaseException:
            print(log.read_text(errors="replace"))
            raise
        finally:
            process.terminate()
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def ask(port: int, path: str) -> int:
    """The status of the answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request("GET", path)
        response = client.getresponse()
        response.read()
        return response.status


def listens(port: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until it says that it listens there; or else that somebody else does, who took the port before it."""
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        ended = process.poll() is not None
        said = log.read_text(errors="replace")
        if f"http://127.0.0.1:{port}" in said:
            return True
        if "in use" in said:
            return False
        assert not ended, said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


@contextlib.contextmanager
def serving_file(folder: Folder, command: str) -> Iterator[int]:
    """Run that command, given the file, until the block ends; at which port?"""
    log = folder.path / "server.log"
    for _ in range(PORTS_TO_TRY):
        port = free_port()
        file = folder.write(SERVED.replace("PORT", str(port))).removeprefix("config:")
        words = [word.format(port=port, file=file) for word in command.split()]
        with serving(log, *words) as process:
            if listens(port, process, log):
                yield port
                return
    raise RuntimeError(f"no port was free; the last server said:\n{log.read_text(errors='replace')}")


@pytest.mark.parametrize(
    "command",
    [
        "gunicorn --bind 127.0.0.1:{port} --paste {file}",
        "gunicorn --bind 127.0.0.1:{port} --preload --paste {file}",
        "pyramid.scripts.pserve {file}",
    ],
)
def test_a_server_that_is_given_the_file(command, tmp_path):
    folder = Folder(tmp_path)
    folder.database()
    with serving_file(folder, command) as port:
        assert ask(port, "/kept") == 200
        assert folder.notes() == {"kept"}
        assert ask(port, "/dropped?404%20Not%20Found") == 404
        # There is one already: the COMMIT fails, or the flush before it.
        assert ask(port, "/kept") == 500
    assert folder.notes() == {"kept"}
