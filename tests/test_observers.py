"""The ready-made observers: Python's logging, Prometheus, OpenTelemetry; with the real libraries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry, generate_latest

from sa_wsgi_session import RetryPolicy, current_scope, session_scope
from sa_wsgi_session.observers import FinishedUnit, OpenTelemetryObserver, PrometheusObserver, log_units
from tests.support import Exchange, World, note, request, serve

UNIT = FinishedUnit(
    name="GET /notes",
    method="GET",
    path="/notes",
    status=200,
    outcome="committed",
    reason=None,
    attempts=1,
    commits=1,
    rollbacks=0,
    statements=2,
    database_seconds=0.125,
    commit_seconds=0.0625,
    connection_seconds=0.25,
    streaming_connection_seconds=0,
    started=1_000_000_000,
    seconds=0.5,
    streamed=False,
    complete=True,
)
FAILED = replace(UNIT, status=None, outcome="rolled back", reason="ValueError", attempts=3)
JOB = replace(UNIT, name="app.purge", method=None, path=None, status=None)


class Lines:
    """What was logged, in order."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __iter__(self) -> Iterator[logging.LogRecord]:
        return iter(self._caplog.records)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.DEBUG, "sa_wsgi_session.units")
    return Lines(caplog)


def test_a_line_for_each_unit(lines: Lines) -> None:
    observer = log_units()
    for unit in UNIT, FAILED, JOB:
        observer(unit)
    assert [line.getMessage() for line in lines] == [
        "GET /notes: 200, committed in 0.500 s; statements: 2, attempts: 1, database 0.125 s, connection kept 0.250 s",
        "GET /notes: rolled back (ValueError) in 0.500 s; statements: 2, attempts: 3, database 0.125 s, connection "
        "kept 0.250 s",
        "app.purge: committed in 0.500 s; statements: 2, attempts: 1, database 0.125 s, connection kept 0.250 s",
    ]
    assert {(line.levelno, line.name) for line in lines} == {(logging.INFO, "sa_wsgi_session.units")}
    assert [line.unit for line in lines] == [UNIT, FAILED, JOB]  # type: ignore[attr-defined]


def test_what_is_slow_is_worth_more(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    observer = log_units(slow=0.5, level=logging.DEBUG)
    for unit in UNIT, replace(UNIT, seconds=0.499), replace(UNIT, seconds=0.1, outcome="unknown"):
        observer(unit)
    assert [line.levelno for line in lines] == [logging.WARNING, logging.DEBUG, logging.WARNING]
    caplog.set_level(logging.DEBUG, "of.ones.own")
    log_units(slow=0, logger=logging.getLogger("of.ones.own"), slow_level=logging.ERROR)(UNIT)
    assert (list(lines)[-1].name, list(lines)[-1].levelno) == ("of.ones.own", logging.ERROR)


def test_a_second_is_slow_where_nothing_else_is_said(lines: Lines) -> None:
    observer = log_units()
    for seconds in 0.999, 1.0:
        observer(replace(UNIT, seconds=seconds))
    assert [line.levelno for line in lines] == [logging.INFO, logging.WARNING]


@pytest.mark.parametrize(
    ("value", "error"), [(-1, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)]
)
def test_what_cannot_be_slow(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^slow must be a number of seconds, 0 or more, not"):
        log_units(slow=value)


def test_a_real_request_in_the_log(world: World, lines: Lines) -> None:
    request(serve(world, lambda: [b""], "404 Not Found", observer=log_units()), "/no\nsuch")
    (line,) = lines
    assert line.getMessage().startswith("GET /no%0Asuch: 404, nothing (commit_veto) in 0.")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_what_prometheus_reads(registry: CollectorRegistry) -> None:
    observer = PrometheusObserver(registry)
    for unit in UNIT, UNIT, FAILED, JOB, replace(UNIT, method="FNORD", complete=False):
        observer(unit)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"sa_wsgi_session_{name}", labels)

    get = {"kind": "request", "method": "GET"}
    assert value("units_seconds_count", **get, status="2xx", outcome="committed") == 2
    assert value("units_seconds_sum", **get, status="2xx", outcome="committed") == 1
    assert value("units_seconds_count", **get, status="", outcome="rolled back") == 1
    assert value("units_seconds_count", kind="job", method="", status="", outcome="committed") == 1
    assert value("units_seconds_count", kind="request", method="other", status="2xx", outcome="committed") == 1
    assert value("database_seconds_sum", kind="request") == 0.5
    assert value("connection_seconds_count", kind="job") == 1
    assert value("statements_total", kind="request") == 8
    assert value("replays_total", kind="request") == 2
    assert value("replays_total", kind="job") == 0
    assert value("cut_off_total") == 1
    assert b"/notes" not in generate_latest(registry)


@pytest.mark.parametrize("hundred", range(1, 6))
def test_prometheus_reads_the_class_of_a_status(registry: CollectorRegistry, hundred: int) -> None:
    observer = PrometheusObserver(registry)
    for rest in 0, 99:
        observer(replace(UNIT, status=100 * hundred + rest))
    labels = {"kind": "request", "method": "GET", "status": f"{hundred}xx", "outcome": "committed"}
    assert registry.get_sample_value("sa_wsgi_session_units_seconds_count", labels) == 2


def test_prometheus_has_a_registry_of_its_own_too() -> None:
    from prometheus_client import REGISTRY

    observer = PrometheusObserver()
    try:
        observer(JOB)
        assert REGISTRY.get_sample_value("sa_wsgi_session_statements_total", {"kind": "job"}) == 2
    finally:
        for metric in vars(observer).values():
            REGISTRY.unregister(metric)


def test_real_requests_in_prometheus(world: World, registry: CollectorRegistry) -> None:
    def view() -> Iterator[bytes]:
        world.Session.execute(sa.text("SELECT 1"))
        if current_scope().attempt == 1:
            raise LookupError
        return (chunk for chunk in [b"one", b"two"])

    policy = RetryPolicy(delay=0, is_transient=lambda error: True)
    exchange = Exchange(serve(world, view, observer=PrometheusObserver(registry), retry=policy))
    exchange.next()
    exchange.close()
    assert registry.get_sample_value("sa_wsgi_session_replays_total", {"kind": "request"}) == 1
    assert registry.get_sample_value("sa_wsgi_session_cut_off_total") == 1
    assert registry.get_sample_value("sa_wsgi_session_statements_total", {"kind": "request"}) == 2


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(spans: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider


def test_a_span_for_each_unit(spans: InMemorySpanExporter, provider: TracerProvider) -> None:
    observer = OpenTelemetryObserver(provider)
    for unit in UNIT, FAILED, JOB, replace(UNIT, outcome="unknown", seconds=86_400.0):
        observer(unit)
    first, second, job, unknown = spans.get_finished_spans()
    assert (first.name, job.name) == ("unit of work", "app.purge")
    assert (first.start_time, first.end_time) == (10**18, 10**18 + 500_000_000)
    assert (unknown.start_time, unknown.end_time) == (10**18, 10**18 + 86_400 * 10**9)
    assert dict(first.attributes or {}) == {
        "http.request.method": "GET",
        "url.path": "/notes",
        "http.response.status_code": 200,
        "sa_wsgi_session.outcome": "committed",
        "sa_wsgi_session.attempts": 1,
        "sa_wsgi_session.commits": 1,
        "sa_wsgi_session.rollbacks": 0,
        "sa_wsgi_session.statements": 2,
        "sa_wsgi_session.database_seconds": 0.125,
        "sa_wsgi_session.commit_seconds": 0.0625,
        "sa_wsgi_session.connection_seconds": 0.25,
        "sa_wsgi_session.streaming_connection_seconds": 0,
        "sa_wsgi_session.streamed": False,
        "sa_wsgi_session.complete": True,
    }
    assert [span.status.status_code for span in (first, second, job, unknown)] == [
        StatusCode.UNSET,
        StatusCode.ERROR,
        StatusCode.UNSET,
        StatusCode.ERROR,
    ]
    assert second.attributes is not None
    assert second.attributes["sa_wsgi_session.reason"] == "ValueError"


def test_a_span_has_its_place_in_the_trace(world: World, spans: InMemorySpanExporter, provider: TracerProvider) -> None:
    observer, tracer = OpenTelemetryObserver(provider), provider.get_tracer("a job queue")
    with tracer.start_as_current_span("job") as around, session_scope(world.Session, observer=observer) as session:
        session.add(note("one"))
    unit, job = spans.get_finished_spans()
    assert (unit.name, job.name) == ("session_scope()", "job")
    assert unit.parent == around.get_span_context()
    assert unit.start_time is not None
    assert unit.end_time is not None
    assert unit.start_time < unit.end_time


def test_without_a_provider_the_global_one_is_asked() -> None:
    OpenTelemetryObserver()(UNIT)  # which nobody has set up: nothing comes of it
