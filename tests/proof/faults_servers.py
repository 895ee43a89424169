"""The web servers of the bank: started in processes of their own, and killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.engine import URL

from tests.frameworks.wsgi_servers import run_process, script
from tests.proof.bank import THREADS
from tests.servers import PORTS_TO_TRY, SECONDS_TO_START, free_port, tail

#: Seconds that a server gets to end by itself.
PATIENCE = 10

_FACTORY = "tests.proof.bank:serve"


class WebServer:
    """A server that serves the bank from one or several processes, on a port that it keeps."""

    #: How many processes serve.
    workers: int
    #: Whether it replaces one that has died.
    replaces = False

    def __init__(self, url: URL, folder: Path) -> None:
        self._environment = {
            "BANK_URL": url.render_as_string(hide_password=False),
            # Tells our processes from those of anybody else, who might be given the port.
            "BANK_NAME": folder.name,
            "HOME": str(folder),
            "TMPDIR": str(folder),
        }
        self._folder = folder
        self._starts = 0
        self._life = contextlib.ExitStack()
        self.port = 0

    def command(self) -> list[str]:
        raise NotImplementedError

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._life:
            for attempt in range(1, PORTS_TO_TRY + 1):
                # Somebody else may take the port before the server does: then another one is tried.
                self.port = free_port()
                try:
                    self._start()
                    break
                except RuntimeError:
                    if attempt == PORTS_TO_TRY or "in use" not in self.log().lower():
                        raise
                    self._life.close()
            try:
                yield
            finally:
                # pytest shows it if the test fails.
                print(f"The end of what {type(self).__name__} said:\n{tail(self._logs()[-1])}")

    def kill(self) -> None:
        """Kill one process of it, whichever answers first; it gets a successor."""
        pid = self._status()["pid"]
        os.kill(pid, signal.SIGKILL)
        if not self.replaces:
            self._life.close()
            self._start()

    def log(self) -> str:
        """All that it has said."""
        return "".join(log.read_text(errors="replace") for log in self._logs())

    def _logs(self) -> list[Path]:
        """One for each time that it was started, the last one last."""
        return sorted(self._folder.glob("*.log"))

    def statuses(self) -> list[dict[str, Any]]:
        """What each of its processes tells of itself."""
        found: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + SECONDS_TO_START
        while len(found) < self.workers:
            assert time.monotonic() < deadline, f"of {self.workers} processes, only {list(found)} answered"
            status = self._status()
            found[status["pid"]] = status
        return list(found.values())

    def _start(self) -> None:
        self._starts += 1
        log = self._folder / f"{self._starts:06}.log"
        process = self._life.enter_context(run_process(self.command(), log, self._environment, self._folder, PATIENCE))
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            ended = process.poll() is not None
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                if not ended:
                    self._status()
                    return
            if ended or time.monotonic() > deadline:
                trouble = "ended at once" if ended else f"did not answer within {SECONDS_TO_START} seconds"
                raise RuntimeError(f"the server {trouble}; it said:\n{tail(log)}")
            time.sleep(0.02)

    def _status(self) -> dict[str, Any]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS_TO_START)) as asked:
            asked.request("GET", "/status")
            status: dict[str, Any] = json.loads(asked.getresponse().read())
        if status["name"] != self._folder.name:
            raise ValueError("somebody else answers")
        return status


class Gunicorn(WebServer):
    workers = 2
    replaces = True

    def command(self) -> list[str]:
        return [
            script("gunicorn"),
            f"--bind=127.0.0.1:{self.port}",
            "--no-control-socket",
            "--worker-class=gthread",
            f"--workers={self.workers}",
            f"--threads={THREADS // self.workers}",
            f"{_FACTORY}()",
        ]


class Waitress(WebServer):
    workers = 1

    def command(self) -> list[str]:
        return [
            script("waitress-serve"),
            f"--listen=127.0.0.1:{self.port}",
            f"--threads={THREADS}",
            # How far a stream may run ahead of its client, 16 MB unless told: the whole export.
            "--outbuf-high-watermark=65536",
            "--call",
            _FACTORY,
        ]


WEB_SERVERS: dict[str, type[WebServer]] = {"gunicorn": Gunicorn, "waitress": Waitress}
