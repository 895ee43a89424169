"""What the servers of the long run serve: ``soak_views.py``, and a way to look behind it.

``$SOAK_FOLDER`` names the folder with the database, ``$SOAK_THREADS`` is how many threads serve. A server is given
``tests.proof.soak_served:application``.

``/-/meet`` is answered when all threads of the server are in it. Each of them has then let go of the request before: a
server's thread remembers one until it has the next. And nothing is served in the meantime.

``/-/state`` answers, in JSON, what this process holds: memory, objects, connections; and what it had to complain of.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import linecache
import logging
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from sa_wsgi_session import session_scope
from tests.proof.soak_views import DATABASE, TALLY, fail_in_a_callback, make_engine, make_stacks

THREADS = int(os.environ["SOAK_THREADS"])
#: A unit of work within another one has a connection of its own.
CONNECTIONS = 2 * THREADS

#: How many of the complaints are kept.
_SHOWN = 5

FOLDER = Path(os.environ["SOAK_FOLDER"])
engine: Any = make_engine(FOLDER / DATABASE, CONNECTIONS)
stacks = make_stacks(engine, FOLDER)


_NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _MallInfo(ctypes.Structure):
    """What glibc's ``mallinfo2()`` returns: see mallinfo(3)."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _NAMES)


def _memory() -> dict[str, int | None]:
    """The resident memory that is the process's own, and what of it is in use (where the C library can tell), in bytes.

    How much of its files (libraries above all) is in memory is up to the kernel. What that has swapped out counts, too.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        # What nobody uses is given back, be it in the midst of what is in use.
        library.malloc_trim(0)
    in_use = None
    if hasattr(library, "mallinfo2"):
        library.mallinfo2.restype = _MallInfo
        told = library.mallinfo2()
        in_use = told.uordblks + told.hblkhd
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
    return {"resident": resident, "in_use": in_use}


class Complaints:
    """What went wrong where nobody could raise it: how often, and the first of each kind in full."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._first: list[str] = []

    def add(self, text: str) -> None:
        with self._lock:
            self._count += 1
            if len(self._first) < _SHOWN:
                self._first.append(text)

    def told(self) -> dict[str, Any]:
        return {"count": self._count, "first": self._first}


resource_warnings = Complaints()
unraisable = Complaints()
unexpected_logs = Complaints()


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, ResourceWarning):
        resource_warnings.add(str(message))


def _is_unraisable(hooked: Any) -> None:
    if isinstance(hooked.exc_value, OSError) and hooked.exc_value.errno == errno.EBADF:
        TALLY.add("writes into a closed socket")
        return
    # The text only: to keep the exception would keep all that it refers to.
    unraisable.add(f"{hooked.err_msg or 'Exception ignored in'}: {hooked.object!r}: {hooked.exc_value!r}")


def _ends_a_thread(hooked: Any) -> None:
    unraisable.add(f"{hooked.thread}: {hooked.exc_value!r}")


class _Log(logging.Handler):
    """Counts the warnings of the package that are made on purpose, and keeps the others."""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if "is replayed in" in said:
            TALLY.add("replays")
        elif "committed with a result still open" in said:
            TALLY.add("warnings of open results")
        elif said.startswith(f"the callback {fail_in_a_callback.__module__}.{fail_in_a_callback.__name__} failed"):
            TALLY.add("warnings of failed callbacks")
        else:
            unexpected_logs.add(said)


# CPython's table of interned strings doubles at once, by a MB, when enough of them have come and gone, which takes
# some ten thousand requests: let it be now.
_interned = [sys.intern(f"soak {number}") for number in range(50_000)]
del _interned
# Tracebacks are shown without the lines of code: else, each time that another module comes up in one, Python keeps its
# source.
vars(linecache).update(getlines=lambda *_: [], lazycache=lambda *_: False)
# Whatever the server does with its own -W or PYTHONWARNINGS.
warnings.simplefilter("always", ResourceWarning)
warnings.showwarning = _show_warning
sys.unraisablehook = _is_unraisable
threading.excepthook = _ends_a_thread
_logger = logging.getLogger("sa_wsgi_session")
_logger.addHandler(_Log(logging.WARNING))
_logger.propagate = False


class _Rest:
    """What to do when all threads are there, so that no request is served."""

    #: How many connections were checked out then.
    checked_out = 0

    def __call__(self) -> None:
        self.checked_out = engine.pool.checkedout()
        if self.checked_out:
            return  # for good, perhaps; another pool would know nothing of it
        # Each connection of Python's sqlite3 keeps up to 200 weak references to cursors that are gone, and SQLite's
        # cache of pages: the connections that are in the pool are closed. A later request makes others.
        engine.dispose()


_rest = _Rest()
_barrier = threading.Barrier(THREADS, _rest, timeout=60)


def _state() -> dict[str, Any]:
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        # Python keeps what it has printed the traceback of, which uWSGI has it do; and with it a whole request.
        sys.__dict__.pop(name, None)
    # It keeps the last 128 URLs, and each of them its page of memory, of which nothing else may be in use.
    cast(Any, urlsplit).cache_clear()
    # Twice: finalizers that ran the first time may have left something.
    gc.collect()
    gc.collect()
    objects = gc.get_objects()
    count = len(objects)
    types = Counter(map(type, objects))
    del objects
    names: Counter[str] = Counter()
    for each, number in types.items():
        names[f"{each.__module__}.{each.__qualname__}"] += number
    return {
        "pid": os.getpid(),
        "go_on": os.environ["GUEST_BOOK_GO_ON"],
        **_memory(),
        "objects": count,
        "types": dict(names),
        "garbage": len(gc.garbage),
        "checked_out": _rest.checked_out,
        "tally": TALLY.counts(),
        "resource_warnings": resource_warnings.told(),
        "unraisable": unraisable.told(),
        "unexpected_logs": unexpected_logs.told(),
    }


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    stack, _, name = environ["PATH_INFO"][1:].partition("/")
    if stack != "-":
        environ["PATH_INFO"] = f"/{name}"
        return _serve(stacks[stack], environ, start_response)
    if name == "meet":
        _barrier.wait()
        # A streamed body leaves an empty frame behind in its thread, until a unit of work has ended there.
        for stack in ("thread-local", "contextual"):
            with session_scope(stacks[stack].session):
                pass
    answer = json.dumps(_state() if name == "state" else None).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
    return [answer]


def _serve(stack: Any, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    try:
        return stack(environ, start_response)
    finally:
        # The thread goes back to the server: whatever it serves next would find this session.
        if stack.session.registry.has():
            TALLY.add("sessions left in their registry")
