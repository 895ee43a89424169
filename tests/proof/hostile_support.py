"""What the tests with hostile input share: how many examples, which errors are clear, what may be in a log line."""

from __future__ import annotations

import ast
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from webob.request import DisconnectionError

import sa_wsgi_session

EXAMPLES_IN_CI = 5000
EXAMPLES = int(os.environ.get("PROOF_EXAMPLES", EXAMPLES_IN_CI))

PACKAGE = Path(sa_wsgi_session.__file__).parent
TESTS = Path(__file__).parents[1]

#: What a client has sent where it is nobody's business to log it.
PRIVATE = "pr1vate"

#: Any code points, lone surrogates too.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)


def hostile(parts: int = 1) -> Callable[[Any], Any]:
    """Run a test with a tenth of the examples that the model has, or with one of so many *parts* of that."""
    return settings(
        max_examples=max(EXAMPLES // 10, 100) // parts,
        derandomize=EXAMPLES <= EXAMPLES_IN_CI,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


# -- errors -----------------------------------------------------------------------------------------------------------


def assert_clear(error: BaseException) -> None:
    """*error* was raised on purpose: by a ``raise`` of the package's, or by what a test has put around it.

    Or by WebOb, whose ``DisconnectionError`` says that a client has sent less than it has announced.
    """
    where = traceback.extract_tb(error.__traceback__)[-1]
    if Path(where.filename).is_relative_to(TESTS) or isinstance(error, DisconnectionError):
        return
    complaint = f"{type(error).__name__} ({error}) from {where.filename}:{where.lineno}: {where.line}"
    assert Path(where.filename).is_relative_to(PACKAGE), complaint
    assert any(where.lineno in lines for lines in _raises(where.filename)), complaint


@cache
def _raises(file: str) -> list[range]:
    """The lines of each ``raise`` in that file."""
    return [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(ast.parse(Path(file).read_text("utf-8")))
        if isinstance(node, ast.Raise) and node.exc is not None
    ]


def told(error: BaseException) -> str:
    """All that a traceback would print of *error* and of those that it comes from."""
    return "".join(traceback.format_exception(error))


# -- log lines --------------------------------------------------------------------------------------------------------


class Log(logging.Handler):
    """All that the package logs; checked as it comes."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        #: What is wrong with some of them.
        self.forged: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.lines.append(message)
        args = record.args if isinstance(record.args, tuple) else (record.args,)
        if isinstance(record.msg, str) and record.msg.endswith("\n%s"):
            # The code that an error has passed through: lines that nobody but a programmer has written.
            args = args[:-1]
        # What is made of client input stays on its line, and is no longer than a line may be.
        whole = [str(arg) for arg in args]
        if PRIVATE in message or record.exc_info or not all(map(_is_harmless, whole)):
            self.forged.append(repr(message[:2000]))


def _is_harmless(text: str) -> bool:
    return text.isascii() and (text.isprintable() or not text) and len(text) < 1500


@contextmanager
def logged() -> Iterator[Log]:
    """What the package logs in this block, DEBUG included."""
    logger = logging.getLogger("sa_wsgi_session")
    log, level, propagate = Log(), logger.level, logger.propagate
    logger.addHandler(log)
    logger.setLevel(logging.DEBUG)
    # pytest would keep all of it.
    logger.propagate = False
    try:
        yield log
    finally:
        logger.removeHandler(log)
        logger.setLevel(level)
        logger.propagate = propagate
