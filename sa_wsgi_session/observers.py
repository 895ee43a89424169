"""Who is told of each unit of work when it has ended: ready-made observers, and what they are told.

An observer is a callable that takes one :class:`FinishedUnit`::

    def observer(unit):
        if unit.outcome == "unknown":
            page_somebody(unit.name)

    application = SessionMiddleware(application, Session, observer=observer)

It is called on the thread that has ended the unit of work, before that goes on to anything else, with no session bound.
An exception that it raises is logged and has no other effect.

:func:`log_units` needs nothing but Python; :class:`PrometheusObserver` needs `prometheus_client
<https://pypi.org/project/prometheus-client/>`_, and :class:`OpenTelemetryObserver` `opentelemetry-api
<https://pypi.org/project/opentelemetry-api/>`_, neither of which this package installs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._errors import shown, type_name, why_unusable

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from prometheus_client import CollectorRegistry

__all__ = ["FinishedUnit", "OpenTelemetryObserver", "PrometheusObserver", "log_units"]


@dataclass(frozen=True)
class FinishedUnit:
    """One unit of work that has ended: a request, or a job.  All times are in seconds.

    A part that has joined another unit of work, or is a ``SAVEPOINT`` in it, belongs to that one.  A part that
    is independent of it (``propagation="requires_new"``) is told to an observer of its own; if it has none, its
    statements are counted in the unit of work around it.
    """

    #: The method and the path of the request, or the name of the job.
    name: str
    #: The method of the request; ``None`` for a job.
    method: str | None
    #: Its path, without the query string, quoted and cut to be safe to log: the client has chosen it.
    path: str | None
    #: The number of the response's status; ``None`` where there was none, or for a job.
    status: int | None
    #: What has become of the last transaction: ``"committed"``, ``"rolled back"``, ``"unknown"`` (the connection was
    #: lost during ``COMMIT``); or ``"nothing"`` where the session has begun none.
    outcome: str
    #: Why it was not committed, or not completed: the type of an exception; ``"commit_veto"``; ``"doomed: "`` and the
    #: reason; ``"the body was not read to its end"``; ``"the body was dropped without close()"``.  ``None`` where there
    #: is no such reason.
    reason: str | None
    #: How many attempts it took.
    attempts: int
    #: How many transactions were committed, the application's own among them.
    commits: int
    #: How many were rolled back, those of lost attempts among them.
    rollbacks: int
    #: How many statements were sent, in all attempts; without those that only begin or end transactions.
    statements: int
    #: How long the database took for them and for the commits.  (Some databases and drivers read rows only when they
    #: are fetched, which is not in here.)
    database_seconds: float
    #: How long it took for the commits alone.
    commit_seconds: float
    #: How long the session has kept a connection.
    connection_seconds: float
    #: How much of that was after the response had begun.
    streaming_connection_seconds: float
    #: When it began, in seconds since the epoch, as :func:`time.time` tells.
    started: float
    #: How long it took.
    seconds: float
    #: Whether the response had a body that streamed.
    streamed: bool
    #: Whether that was read to its end; true where it did not stream.
    complete: bool
    #: Where there are read replicas: ``"primary"``, or which of them has served it, such as ``"replica 1 of 2"``.
    #: ``None`` where there are none, and where nothing was asked of the database.
    engine: str | None = None
    #: Why that one.
    engine_reason: str | None = None


Observer = Callable[[FinishedUnit], object]


def check_observer(value: object) -> None:
    """Raise ``TypeError`` where *value* is neither an observer nor ``None``."""
    unusable = why_unusable(value)
    if value is not None and unusable:
        raise TypeError(f"observer must be a callable that takes a FinishedUnit, or None, not {unusable}")


def log_units(
    *,
    slow: float = 1.0,
    logger: logging.Logger | None = None,
    level: int = logging.INFO,
    slow_level: int = logging.WARNING,
) -> Observer:
    """An observer that writes a line for each unit of work.

    :param slow: the seconds from which on it is slow, and so worth *slow_level*.
    :param logger: where to; ``sa_wsgi_session.units`` where none is given.
    :param level: of the lines for those that are not slow.
    :param slow_level: of the lines for those that are, and for those of which the outcome is unknown.
    :raises TypeError: if *slow* is no number.
    :raises ValueError: if it is negative.

    Each line has the whole :class:`FinishedUnit` as the attribute ``unit`` of its record, for formatters.
    """
    if isinstance(slow, bool) or not isinstance(slow, (int, float)):
        raise TypeError(f"slow must be a number of seconds, 0 or more, not an object of type {type_name(slow)}")
    if not slow >= 0:
        raise ValueError(f"slow must be a number of seconds, 0 or more, not {shown(slow)}")
    to = logging.getLogger("sa_wsgi_session.units") if logger is None else logger

    def observer(unit: FinishedUnit) -> None:
        to.log(
            slow_level if unit.seconds >= slow or unit.outcome == "unknown" else level,
            "%s: %s%s%s in %.3f s; statements: %d, attempts: %d, database %.3f s, connection kept %.3f s",
            unit.name,
            "" if unit.status is None else f"{unit.status}, ",
            unit.outcome,
            "" if unit.reason is None else f" ({unit.reason})",
            unit.seconds,
            unit.statements,
            unit.attempts,
            unit.database_seconds,
            unit.connection_seconds,
            extra={"unit": unit},
        )

    return observer


#: RFC 9110, section 9.3, and RFC 5789. Anything else is a client's invention: it must not make another time series.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})


class PrometheusObserver:
    """An observer that counts and measures for Prometheus.

    ==============================================  ==========  ===============================================
    ``sa_wsgi_session_units_seconds``               histogram   how long units of work take, by ``kind``
                                                                (``request``, ``job``), ``method``, ``status``
                                                                (``2xx``, …) and ``outcome``
    ``sa_wsgi_session_database_seconds``            histogram   how long the database takes, by ``kind``
    ``sa_wsgi_session_connection_seconds``          histogram   how long connections are kept, by ``kind``
    ``sa_wsgi_session_statements_total``            counter     statements, by ``kind``
    ``sa_wsgi_session_replays_total``               counter     attempts but the first ones, by ``kind``
    ``sa_wsgi_session_cut_off_total``               counter     bodies that were not read to their ends
    ==============================================  ==========  ===============================================

    There is no label for the path: a client could make up as many as it likes.

    :param registry: prometheus_client's default one where none is given.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import REGISTRY, Counter, Histogram

        registry = REGISTRY if registry is None else registry
        prefix = "sa_wsgi_session_"
        self._units = Histogram(
            f"{prefix}units_seconds",
            "How long units of work take.",
            ("kind", "method", "status", "outcome"),
            registry=registry,
        )
        self._database = Histogram(
            f"{prefix}database_seconds", "How long the database takes in one unit.", ("kind",), registry=registry
        )
        self._connection = Histogram(
            f"{prefix}connection_seconds", "How long one unit keeps a connection.", ("kind",), registry=registry
        )
        self._statements = Counter(f"{prefix}statements", "Statements that were sent.", ("kind",), registry=registry)
        self._replays = Counter(f"{prefix}replays", "Attempts but the first ones.", ("kind",), registry=registry)
        self._cut_off = Counter(f"{prefix}cut_off", "Bodies that were not read to their ends.", registry=registry)

    def __call__(self, unit: FinishedUnit) -> None:
        kind = "job" if unit.method is None else "request"
        method = "" if unit.method is None else unit.method if unit.method in _METHODS else "other"
        status = "" if unit.status is None else f"{unit.status // 100}xx"
        self._units.labels(kind, method, status, unit.outcome).observe(unit.seconds)
        self._database.labels(kind).observe(unit.database_seconds)
        self._connection.labels(kind).observe(unit.connection_seconds)
        self._statements.labels(kind).inc(unit.statements)
        self._replays.labels(kind).inc(unit.attempts - 1)
        if not unit.complete:
            self._cut_off.inc()


_CONVENTIONS = {"method": "http.request.method", "path": "url.path", "status": "http.response.status_code"}


class OpenTelemetryObserver:
    """An observer that makes a span of each unit of work.

    The span is a child of the one that is current when the unit of work ends, and has the times of the unit of work.
    The statements themselves are what SQLAlchemy's own instrumentation tells of, beside it.

    :param tracer_provider: OpenTelemetry's global one where none is given.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        from opentelemetry import trace

        self._tracer: Any = trace.get_tracer("sa_wsgi_session", tracer_provider=tracer_provider)
        self._error = trace.Status(trace.StatusCode.ERROR)

    def __call__(self, unit: FinishedUnit) -> None:
        began = int(unit.started * 1e9)
        attributes = {
            # Of OpenTelemetry's semantic conventions where they have such an attribute.
            _CONVENTIONS.get(name, f"sa_wsgi_session.{name}"): value
            for name, value in vars(unit).items()
            if value is not None and name not in ("name", "started", "seconds")
        }
        # Not the path: the name of a span is for grouping.
        span = self._tracer.start_span(
            "unit of work" if unit.method else unit.name, start_time=began, attributes=attributes
        )
        if unit.outcome in ("rolled back", "unknown"):
            span.set_status(self._error)
        span.end(end_time=began + int(unit.seconds * 1e9))
