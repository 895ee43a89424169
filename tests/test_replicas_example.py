"""The ledger on a primary and two replicas, ``examples/replicas``: as whoever has read its README starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import unavailable
from tests.servers import NotInstalled
from tests.test_ledger import POSTED_CASES, Visitor, wait_until

ROOT = Path(__file__).parents[1]


class Example:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text()

    def find(self, pattern: str) -> str | None:
        found = re.search(pattern, self.said)
        return found and found[1]

    def visitor(self) -> Visitor:
        address = urlsplit(self.find(r"open at (\S+)") or "")
        assert address.hostname is not None
        assert address.port is not None
        return Visitor(address.hostname, address.port)


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Example]:
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.replicas", "--port=0", "--delay=100"],
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )
    try:
        example = Example(process, log)
        wait_until(lambda: "open at" in example.said or process.poll() is not None)
        if process.poll() == 2:
            unavailable(NotInstalled(example.said))
        yield example
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, example.said
    finally:
        process.kill()
        process.wait()


def engine(timing: str) -> str:
    found = re.search(r'engine;desc="([^:"]+)', timing)
    return found[1] if found else ""


def test_the_ledger_reads_from_replicas_that_come_and_go(example: Example) -> None:
    visitor = example.visitor()
    for path in POSTED_CASES:
        if path == "/cases/download":
            continue  # which takes six seconds
        visitor.open()
        answer = visitor.send(path)
        assert engine(answer.headers.get("server-timing", 'engine;desc="primary"')) == "primary"
        # What it has done is there, wherever that is read.
        assert ("Transferred £10.00" in visitor.open().text) == (answer.status == 303)
    timings = [visitor.open().headers["server-timing"] for _ in range(20)]
    assert engine(timings[-1]).startswith("replica")
    assert '"sound": true' in visitor.ask("GET", "/panel.json").text
    # The other one lags; who comes next is served all the same.
    os.kill(int(example.find(r"replica 1 has the process (\d+)") or ""), signal.SIGQUIT)
    for each in (visitor, example.visitor()):
        for _ in range(5):
            assert each.open().status == 200
    wait_until(lambda: engine(visitor.open().headers["server-timing"]) == "replica 2 of 2")
    assert "replica 1 of 2 leaves the rotation" in example.said
