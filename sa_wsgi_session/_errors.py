"""The package's exceptions, and how any exception is named in a log line."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from functools import partial
from inspect import iscoroutinefunction

#: Everything that the package logs goes here: DEBUG for each outcome, WARNING for what an
#: operator should look into, nothing else.
log = logging.getLogger("sa_wsgi_session")


class NoActiveScope(RuntimeError):
    """No unit of work is active here.

    Raised by :func:`current_scope`, by a session of :func:`contextual_session`, and by a
    :class:`SessionScope` that has ended or is bound elsewhere.
    """


class RollbackOnlyError(RuntimeError):
    """A unit of work that can only be rolled back was asked to commit.

    Either an exception escaped from a part that had joined the unit of work and was then
    swallowed (that exception is the ``__cause__``), or PostgreSQL has aborted the transaction
    after an error that was swallowed, so that its ``COMMIT`` would silently roll back, or the
    database has rolled it back by itself, as MySQL does after a deadlock, so that its ``COMMIT``
    would keep what came later (that error is the ``__cause__``).
    """


def type_name(value: object) -> str:
    """The dotted name of the type of *value*, the way tracebacks write it."""
    cls = type(value)
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"


def shown(value: object) -> str:
    """The ``repr`` of *value*, or the name of its type where it has none (Python writes no integer of 4,301 digits)."""
    try:
        return repr(value)
    except Exception:
        return f"an object of type {type_name(value)}"


def warn_of_error(error: BaseException, message: str, *args: object) -> None:
    """Log a WARNING with the type of *error* and the lines of code it passed through.

    Never with its text: SQLAlchemy's contains the statement and its parameters, a driver's
    may quote the row, and either may hold what a client sent.
    """
    origin = getattr(error, "orig", None)
    name = type_name(error) + (f" from {type_name(origin)}" if origin is not None else "")
    where = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    log.warning(message + ": %s\n%s", *args, name, where)


def callable_name(function: Callable[..., object]) -> str:
    """The dotted name under which a reader finds *function* in the code."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    module = getattr(function, "__module__", None)
    if not isinstance(name, str):  # an object with __call__
        return type_name(function)
    return f"{module}.{name}" if isinstance(module, str) else name


def why_unusable(hook: object) -> str:
    """What *hook* is, if it is nothing that answers with true or false when it is called; else nothing."""
    if not callable(hook):
        return f"an object of type {type_name(hook)}"
    if isinstance(hook, type):
        return f"the class {hook.__module__}.{hook.__qualname__}, whose instances are true: give one of them"
    if iscoroutinefunction(hook) or iscoroutinefunction(type(hook).__call__):
        return f"the coroutine function {callable_name(hook)}, whose coroutines are true: WSGI is synchronous"
    return ""
