"""What the proofs have found out in figures is printed at the end, and kept where ``PROOF_REPORT`` names a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

Tell = Callable[[str, Mapping[str, object]], None]


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """Call it with a title and with figures, by their names, for the end of the run."""
    return lambda title, figures: record_property("figures", {"title": title, **figures})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    # Of each test, in whichever process it ran.
    told = dict(_figures(terminalreporter))
    for test, figures in told.items():
        terminalreporter.section(f"figures of {test}")
        for each in figures:
            counts = ", ".join(f"{name} {value}" for name, value in each.items() if name != "title")
            terminalreporter.write_line(f"{each['title']}: {counts}")
    if told and "PROOF_REPORT" in os.environ:
        folder = Path(os.environ["PROOF_REPORT"])
        folder.mkdir(parents=True, exist_ok=True)
        for test, figures in told.items():
            (folder / f"{test}.json").write_text(json.dumps(figures, indent=2) + "\n")


def _figures(reporter: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for outcome in ("passed", "failed"):
        for report in reporter.stats.get(outcome, ()):
            for name, value in report.user_properties:
                if name == "figures" and report.when == "call":
                    found.setdefault(Path(report.fspath).stem.removeprefix("test_"), []).append(value)
    yield from found.items()
