"""Read replicas: a primary and two real standbys, of which the second one replays 150 milliseconds late."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker

from sa_wsgi_session import (
    NoActiveScope,
    RetryPolicy,
    RollbackOnlyError,
    SessionMiddleware,
    _cluster,
    current_scope,
    session_scope,
)
from tests.replicated import Site, Sites, Visitor, make_sites
from tests.servers import DatabaseServer, Replicated
from tests.support import REGISTRIES, Body, Note, make_session, note

#: Of the standbys of ``replicated``.
FRESH, LATE = 0, 1


@pytest.fixture(scope="module")
def sites(replicated: Replicated) -> Iterator[Sites]:
    with make_sites(replicated) as sites:
        yield sites


@pytest.fixture
def site(sites: Sites) -> Iterator[Site]:
    """Both standbys."""
    with sites.make(FRESH, LATE) as site:
        yield site


@pytest.fixture
def late_site(sites: Sites) -> Iterator[Site]:
    """Only the standby that is always late."""
    with sites.make(LATE) as site:
        yield site


@pytest.fixture
def fresh_site(sites: Sites) -> Iterator[Site]:
    with sites.make(FRESH) as site:
        yield site


def add(site: Site, text: str = "new") -> None:
    site.Session.add(note(text))


def read_or_add(site: Site) -> Any:
    """A view: POST adds a note that is called as the path, GET tells which there are."""

    def app(environ: Any, start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "POST":
            add(site, environ["PATH_INFO"])
            body = [b""]
        else:
            body = site.texts()
        start_response("200 OK", [])
        return body

    return app


# -- where a request goes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_a_safe_request_reads_from_a_replica(site, method):
    assert site.visitor().request(method=method).startswith("replica")
    (unit,) = site.units
    assert unit.engine is not None
    assert unit.engine.startswith("replica")
    assert unit.engine_reason == "least busy"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "get", "MADE-UP"])
def test_any_other_request_goes_to_the_primary(site, method):
    assert site.visitor().request(method=method) == "primary"
    assert (site.units[0].engine, site.units[0].engine_reason) == ("primary", "not a safe request")


def test_a_request_that_asks_nothing_of_the_database_goes_nowhere(site):
    visitor = site.visitor(lambda: [b"hello"])
    assert visitor.request() == "hello"
    assert visitor.set_cookies == []
    assert site.units[0].engine is None
    assert site.units[0].engine_reason is None


def test_what_is_done_on_another_replica_past_the_session_is_none_of_ours(site, caplog):
    calls: list[None] = []

    def view() -> list[bytes]:
        calls.append(None)
        here = site.where()
        _own, other = sorted(site.engines, key=lambda engine: engine.pool.checkedout(), reverse=True)
        with pytest.raises(sa.exc.DBAPIError), other.connect() as connection:
            connection.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return here

    assert site.visitor(view).request().startswith("replica")
    assert len(calls) == 1
    # psycopg2 does not tell the SQLSTATE here.
    assert re.search(r"leaves the rotation \((SQLSTATE 57P01|psycopg2\.OperationalError)\)", caplog.text)


@pytest.mark.parametrize("registry", REGISTRIES)
def test_it_is_the_same_for_each_registry(sites, registry):
    with sites.make(FRESH, registry=registry) as site:
        assert site.visitor().request() == "replica 1 of 1"
        assert site.visitor().request(method="POST") == "primary"


def test_a_transaction_on_a_replica_is_read_only(fresh_site):
    def view() -> list[bytes]:
        return [fresh_site.Session.execute(sa.text("SHOW transaction_read_only")).scalar().encode()]

    assert fresh_site.visitor(view).request() == "on"
    assert fresh_site.visitor(view).request(method="POST") == "off"


def test_a_job_and_an_independent_part_of_a_request_go_to_the_primary(fresh_site):
    site = fresh_site

    def view() -> list[bytes]:
        site.where()
        with session_scope(site.Session, propagation="requires_new"):
            inner = site.where()
        return [*inner, b", ", *site.where()]

    assert site.visitor(view).request() == "primary, replica 1 of 1"
    with session_scope(site.Session):
        assert site.where() == [b"primary"]


def test_a_part_that_joins_a_request_and_a_savepoint_in_it_stay_on_its_replica(fresh_site):
    site = fresh_site

    def view() -> list[bytes]:
        with session_scope(site.Session, propagation="nested"):
            nested = site.where()
        with session_scope(site.Session):
            return [*nested, b", ", *site.where()]

    assert site.visitor(view).request() == "replica 1 of 1, replica 1 of 1"


def test_use_primary_before_the_first_statement(fresh_site):
    site = fresh_site

    def view() -> list[bytes]:
        with session_scope(site.Session, propagation="nested"):
            pass
        return site.where()

    def view_that_asks() -> list[bytes]:
        current_scope().use_primary()
        current_scope().use_primary()
        return site.where()

    def part_that_asks() -> list[bytes]:
        with session_scope(site.Session, propagation="nested"):
            current_scope().use_primary()
        return site.where()

    assert site.visitor(view).request() == "replica 1 of 1"
    assert site.visitor(view_that_asks).request() == "primary"
    assert site.visitor(part_that_asks).request() == "primary"
    assert site.units[-1].engine_reason == "use_primary()"


def test_use_primary_after_a_statement_is_an_error(fresh_site):
    site = fresh_site

    def view() -> list[bytes]:
        site.where()
        current_scope().use_primary()
        return []

    with pytest.raises(RuntimeError, match=r"use_primary\(\) of GET / was called after a statement had been sent to"):
        site.visitor(view).request()


def test_use_primary_is_nothing_where_there_are_no_replicas(fresh_site):
    site = fresh_site

    def view() -> list[bytes]:
        current_scope().use_primary()
        return site.where()

    assert site.visitor(view, replicas=None).request() == "primary"
    with session_scope(site.Session):
        current_scope().use_primary()


def test_a_predicate_knows_better_than_the_method(sites):
    with sites.make(FRESH, read_only=lambda environ: environ["PATH_INFO"] == "/search") as site:
        assert site.visitor().request("/search", "POST") == "replica 1 of 1"
        assert site.visitor().request("/logout", "GET") == "primary"


def test_another_database_of_the_session_stays_what_it_is(fresh_site, sqlite_url):
    site = fresh_site
    other = sa.create_engine(sqlite_url)
    table = sa.Table("other", sa.MetaData(), sa.Column("text", sa.String(9)))
    table.create(other)
    with other.begin() as connection:
        connection.execute(sa.insert(table), [{"text": "3."}])
    site.Session.configure(binds={table: other})

    def view() -> list[bytes]:
        there = site.Session.execute(sa.select(table.c.text)).scalar()
        explicit = site.Session.execute(sa.text("SELECT inet_server_port()"), bind_arguments={"bind": site.primary})
        assert explicit.scalar() == site.primary.url.port
        return [there[:2].encode(), *site.where()]

    assert site.visitor(view).request() == "3.replica 1 of 1"
    other.dispose()


def test_those_who_read_are_spread_over_the_replicas(site):
    app = site.app(site.where)
    assert len(list(readers_of_each(site, app))) == 2
    visitors = [Visitor(app) for _ in range(4)]
    assert sorted(visitor.request() for visitor in visitors) == ["replica 1 of 2"] * 2 + ["replica 2 of 2"] * 2


def test_the_least_busy_replica_serves_whoever_comes_next(site):
    def view() -> Any:
        site.where()
        return iter(site.where())

    app = site.app(view)
    assert len(list(readers_of_each(site, app))) == 2
    first = Visitor(app).exchange()
    busy = next(iter(first.body)).decode()
    # Those who come while it streams go elsewhere, although it would be their turn now and then.
    for _ in range(3):
        assert Visitor(app).request() != busy
    assert sum(site.served) == 1
    first.close()
    assert site.served == [0, 0]


# -- what a visitor has written ---------------------------------------------------------------------------------------


def test_a_visitor_sees_their_own_write_at_once_and_the_replica_comes_later(late_site):
    site = late_site
    app = _middleware(site)
    writer = next(readers_of_each(site, app))
    reader = next(readers_of_each(site, app))
    writer.request("/1", "POST")
    # At once: the standby is 150 milliseconds behind.
    assert writer.request() == "/1"
    assert site.units[-1].engine == "primary"
    assert site.units[-1].engine_reason == "no replica is fresh enough"
    # Whoever has not written may see the past, but sees it from the replica.
    assert reader.request() in ("", "/1")
    assert site.units[-1].engine_reason == "where this visitor reads"


def _middleware(site: Site, **options: Any) -> Any:
    return SessionMiddleware(
        read_or_add(site), site.Session, **{"replicas": site.replicas, "observer": site.units.append, **options}
    )


def test_a_visitor_is_back_on_the_replica_when_it_has_replayed_their_write(sites, late_site):
    visitor = Visitor(_middleware(late_site))
    visitor.request("/1", "POST")
    sites.wait(LATE)
    assert visitor.request() == "/1"
    assert late_site.units[-1].engine == "replica 1 of 1"


def test_the_cookie_of_a_write(fresh_site):
    visitor = Visitor(_middleware(fresh_site))
    visitor.request("/1", "POST")
    (position,) = visitor.set_cookies
    assert position.startswith("replica_position=")
    assert "HttpOnly" in position
    assert "SameSite=Lax" in position
    assert "; secure" not in position.lower()
    assert 0 < int(position.partition("Max-Age=")[2].partition(";")[0]) <= 120
    visitor.request("/2", "POST", **{"wsgi.url_scheme": "https"})
    # It has cookies: the other one is taken back.
    position, home = visitor.set_cookies
    assert "; secure" in position.lower()
    assert home.startswith("replica_position_home=;")


def test_an_api_client_gets_and_sends_a_header(late_site):
    client = Visitor(_middleware(late_site), header="Replica-Position")
    assert client.request() == ""
    client.request("/1", "POST")
    assert client.token is not None
    assert client.request() == "/1"
    assert late_site.units[-1].engine == "primary"


def test_what_an_independent_part_or_a_callback_writes_is_the_visitors_own(late_site):
    site = late_site

    def in_a_part() -> list[bytes]:
        body = site.texts()
        with session_scope(site.Session, propagation="requires_new"):
            add(site, "part")
        return body

    def in_a_callback() -> list[bytes]:
        def callback() -> None:
            with session_scope(site.Session):
                add(site, "callback")

        current_scope().on_commit(callback)
        return site.texts()

    visitor = site.visitor(in_a_part)
    visitor.request()
    visitor.app = site.app(site.texts)
    assert visitor.request() == "part"
    visitor.app = site.app(in_a_callback)
    visitor.request()
    visitor.app = site.app(site.texts)
    assert visitor.request() == "part,callback"


@pytest.mark.parametrize("commit_at", ["start", "end"])
def test_what_a_body_writes_is_seen_by_the_next_request(late_site, commit_at):
    site = late_site

    def view() -> Any:
        def body() -> Any:
            yield b"first"
            add(site)
            yield b"last"

        return body()

    visitor = site.visitor(view, commit_at=commit_at)
    visitor.request(method="POST")
    visitor.app = site.app(site.texts)
    assert visitor.request() == "new"


def test_a_transaction_that_ends_after_its_headers_pins_its_visitor_to_the_primary(sites):
    now = [1e9]
    with sites.make(FRESH, sticky=3, clock=lambda: now[0]) as site:
        visitor = site.visitor(lambda: iter(site.where()), commit_at="end")
        exchange = visitor.exchange(method="POST")
        visitor.app = site.app(site.where)
        assert visitor.request() == "primary"
        assert site.units[-1].engine_reason == "this visitor has just used the primary"
        exchange.read()
        # Meanwhile they have read from the primary, and the replica has replayed that.
        sites.wait(FRESH)
        assert visitor.request() == "replica 1 of 1"


@pytest.mark.parametrize(
    ("commit_at", "first_written", "changes_in", "pinned"),
    [
        ("start", b"", "view", False),
        ("start", b"", "body", False),
        ("end", b"", "view", True),
        ("end", b"", "body", True),
        ("end", b"written", "body", True),
    ],
)
def test_who_is_pinned_is_told_so_with_the_headers(fresh_site, commit_at, first_written, changes_in, pinned):
    site = fresh_site

    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", [])
        if first_written:
            write(first_written)
        if changes_in == "view":
            add(site)
        return body()

    def body() -> Iterator[bytes]:
        if changes_in == "body":
            add(site)
        yield b"chunk"

    visitor = Visitor(SessionMiddleware(app, site.Session, replicas=site.replicas, commit_at=commit_at))
    assert visitor.request(method="POST") == "chunk"
    cookies = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())
    assert site.replicas._router.tokens.seen(cookies, None).pinned is pinned
    # Whoever was not told, sees it all the same.
    visitor.app = site.app(site.texts)
    assert visitor.request() == "new"


# -- what a visitor has read ------------------------------------------------------------------------------------------


def test_a_visitor_stays_where_they_have_read_and_is_told_so_once(site):
    visitors = [site.visitor() for _ in range(4)]
    homes = [visitor.request() for visitor in visitors]
    for visitor in visitors:
        (home,) = visitor.set_cookies
        assert home.startswith("replica_position_home=")
    for _ in range(3):
        assert [visitor.request() for visitor in visitors] == homes
        assert all(visitor.set_cookies == [] for visitor in visitors)
    assert site.units[-1].engine_reason == "where this visitor reads"


def test_a_visitor_who_has_read_from_a_fresh_replica_is_not_sent_to_a_late_one(sites, site):
    app = _middleware(site)
    written: list[str] = []
    for number in range(1, 10):
        reader = next(readers_of_each(site, app))
        began = time.monotonic()
        written.append(f"/{number}")
        Visitor(app).request(written[-1], "POST")
        sites.wait(FRESH)
        assert reader.request() == ",".join(written)
        assert site.units[-1].engine == "replica 1 of 2"
        # Their replica is not there any more; the other one is 150 milliseconds behind.
        with _out_of_rotation(site, 0):
            assert reader.request() == ",".join(written)
        if time.monotonic() - began < 0.15:
            break  # else it may have caught up, on a slow machine: once more
    assert site.units[-1].engine == "primary"


def readers_of_each(site: Site, app: Any) -> Iterator[Visitor]:
    """A visitor who is at home on the first replica, one on the second, and so on."""
    for number in range(1, len(site.engines) + 1):
        reader = Visitor(app)
        reader.request()
        # One that is late, and has just had something to replay, joins in after a while.
        while site.units[-1].engine != f"replica {number} of {len(site.engines)}":
            reader = Visitor(app)
            reader.request()
        yield reader


@contextmanager
def _out_of_rotation(site: Site, number: int) -> Iterator[None]:
    router = site.replicas._router
    assert router is not None
    replica = router.cluster.replicas[number]
    replica.fails("a test")
    until, replica._until = replica._until, float("inf")
    yield
    replica._until = until


def test_a_visitor_who_has_read_from_the_primary_is_not_sent_back(late_site):
    site = late_site
    visitor = Visitor(_middleware(site))
    with session_scope(site.Session):
        add(site)  # somebody else's
    # They change nothing, but have seen it.
    visitor.app = site.app(site.texts)
    assert visitor.request(method="POST") == "new"
    assert visitor.request() == "new"
    assert site.units[-1].engine == "primary"


# -- what is not taken for a token ------------------------------------------------------------------------------------


def _token_of(site: Site, path: str = "/written") -> str:
    writer = Visitor(_middleware(site))
    writer.request(path, "POST")
    return writer.cookies["replica_position"]


def _served_with(site: Site, cookie: str, app: Any = None) -> str | None:
    reader = Visitor(_middleware(site) if app is None else app)
    reader.request(HTTP_COOKIE=cookie)
    return site.units[-1].engine


def test_a_token_is_taken_wherever_it_is_among_the_cookies(late_site):
    for number, cookies in enumerate(
        ("replica_position={}", 'a=b; replica_position="{}"; c=d', "replica_position=forged;replica_position={}")
    ):
        # Each is of a transaction of its own, because the standby will have replayed it soon.
        assert _served_with(late_site, cookies.format(_token_of(late_site, f"/{number}"))) == "primary"
    reader = Visitor(_middleware(late_site), header="Replica-Position")
    reader.token = _token_of(late_site)
    assert "/written" in reader.request()


def test_a_forged_or_foreign_token_is_ignored(sites, late_site):
    token = _token_of(late_site)
    forged = [
        token[:-4] + "AAAA",
        "A" + token[1:],
        token + token,
        "x" * 100_000,
        "",
        "\xe4",
        "not base64: !",
    ]
    with sites.make(LATE, secret="another secret, which is as long as it has to be") as other:
        forged.append(_token_of(other))
    with sites.make(LATE, cookie_name="other_position") as other:
        writer = Visitor(_middleware(other))
        writer.request("/other", "POST")
        forged.append(writer.cookies["other_position"])
    sites.wait(LATE)
    app = _middleware(late_site)
    assert len(list(readers_of_each(late_site, app))) == 1
    add_by_somebody_else(late_site)
    for text in forged:
        assert _served_with(late_site, f"replica_position={text}", app) == "replica 1 of 1"
        reader = Visitor(app)
        reader.request(HTTP_REPLICA_POSITION=text)
        assert late_site.units[-1].engine == "replica 1 of 1"


def add_by_somebody_else(site: Site, text: str = "new") -> None:
    with session_scope(site.Session):
        add(site, text)


def test_a_token_that_is_too_old_or_from_the_future_is_ignored(sites):
    now = [1e9]
    with sites.make(LATE, clock=lambda: now[0]) as site:
        app = _middleware(site)
        assert len(list(readers_of_each(site, app))) == 1
        token = _token_of(site)
        assert _served_with(site, f"replica_position={token}", app) == "primary"
        for later in (1000, -1000):
            now[0] = 1e9 + later
            assert _served_with(site, f"replica_position={token}", app) == "replica 1 of 1"


def test_a_position_that_the_primary_has_not_reached_is_ignored(fresh_site):
    app = _middleware(fresh_site)
    router = fresh_site.replicas._router
    ((_, token), *_rest) = router.tokens.position_headers(1 << 60, 0, secure=False, forget_home=False)
    assert _served_with(fresh_site, token.partition(";")[0], app) == "replica 1 of 1"


def test_the_token_of_a_home_is_sent_again_before_it_is_too_old(sites):
    now = [1e9]
    with sites.make(FRESH, clock=lambda: now[0]) as site:
        visitor = Visitor(_middleware(site))
        visitor.request()
        assert len(visitor.set_cookies) == 1
        lifetime = site.replicas._router.tokens.lifetime
        now[0] += lifetime / 2 - 10
        visitor.request()
        assert visitor.set_cookies == []
        now[0] += 20
        visitor.request()
        assert len(visitor.set_cookies) == 1
        assert site.units[-1].engine_reason == "where this visitor reads"


# -- what a replica refuses -------------------------------------------------------------------------------------------


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The messages of the package's warnings."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("sa_wsgi_session").addHandler(handler)
    yield messages
    logging.getLogger("sa_wsgi_session").removeHandler(handler)


def _adding(site: Site) -> Any:
    def view() -> list[bytes]:
        site.texts()
        add(site)
        return []

    return view


def test_a_change_in_a_safe_request_is_done_on_the_primary_and_told_once(fresh_site, warnings):
    visitor = fresh_site.visitor(_adding(fresh_site))
    attempts = []

    def view() -> list[bytes]:
        attempts.append(current_scope().attempt)
        add(fresh_site, f"{len(attempts)}")
        return []

    visitor.app = fresh_site.app(view)
    visitor.request("/count/1234")
    assert attempts == [1, 2]
    unit = fresh_site.units[-1]
    assert (unit.attempts, unit.engine, unit.engine_reason) == (2, "primary", "a change in a safe request")
    visitor = Visitor(visitor.app)
    visitor.request("/count/5678")
    (warning,) = warnings
    assert warning.startswith("GET /count/*: it changes something, although its method is safe")
    # And they see it.
    visitor.app = fresh_site.app(fresh_site.texts)
    assert visitor.request() == "2,4"


@pytest.mark.parametrize("swallow", ["the error", "the error, and rolls back", "the error, and answers 500"])
def test_it_is_done_there_whatever_the_application_makes_of_the_refusal(fresh_site, swallow):
    site = fresh_site

    def app(environ: Any, start_response: Any) -> Any:
        add(site)
        status = "200 OK"
        try:
            site.Session.flush()
        except sa.exc.DBAPIError:
            if "rolls back" in swallow:
                site.Session.rollback()
            if "500" in swallow:
                status = "500 Internal Server Error"
        start_response(status, [])
        return []

    visitor = Visitor(SessionMiddleware(app, site.Session, replicas=site.replicas))
    assert visitor.exchange("/swallow").status == "200 OK"
    visitor.app = site.app(site.texts)
    assert visitor.request() == "new"


def test_what_a_standby_does_not_support_is_done_on_the_primary_and_told_once(fresh_site, warnings):
    site = fresh_site

    def view() -> list[bytes]:
        site.Session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        return [site.Session.execute(sa.text("SHOW transaction_isolation")).scalar().encode()]

    visitor = site.visitor(view)
    assert [visitor.request("/serializable") for _ in range(2)] == ["serializable"] * 2
    unit = site.units[0]
    assert (unit.attempts, unit.engine, unit.engine_reason) == (2, "primary", "not supported by a replica")
    (warning,) = warnings
    assert warning.startswith("GET /serializable: it asks for something that a replica does not support")


def test_it_is_not_done_again_once_something_else_is_durable(fresh_site):
    site = fresh_site

    def view() -> list[bytes]:
        add_part()
        add(site, "never")
        return []

    def add_part() -> None:
        with session_scope(site.Session, propagation="requires_new"):
            add(site, "part")

    with pytest.raises(sa.exc.DBAPIError, match="read-only"):
        site.visitor(view).request("/durable")
    visitor = site.visitor(site.texts)
    assert visitor.request(method="POST") == "part"


def test_a_change_in_the_body_is_too_late(fresh_site):
    site = fresh_site

    def view() -> Any:
        site.texts()

        def body() -> Any:
            yield b"first"
            add(site)
            site.Session.flush()

        return body()

    exchange = site.visitor(view).exchange()
    with pytest.raises(sa.exc.DBAPIError, match="read-only"):
        exchange.read()
    exchange.close()


def test_with_a_policy_the_move_does_not_count(fresh_site):
    site = fresh_site
    attempts = []

    def view() -> list[bytes]:
        attempts.append(1)
        add(site, str(len(attempts)))
        site.Session.flush()
        if len(attempts) == 2:
            raise LookupError("a race, says is_transient")
        return []

    policy = RetryPolicy(attempts=2, delay=0, is_transient=lambda error: isinstance(error, LookupError))
    site.visitor(view, retry=policy).request("/policy")
    assert len(attempts) == 3
    assert site.units[-1].attempts == 3


# -- what fails -------------------------------------------------------------------------------------------------------


def test_a_replica_that_is_down_is_not_noticed_and_comes_back(sites, site, warnings):
    app = site.app(site.where)
    first, second = readers_of_each(site, app)
    standby = sites.servers.standbys[FRESH]
    standby.stop()
    try:
        for _ in range(5):
            assert first.request() != "replica 1 of 2"
            assert second.request() != "replica 1 of 2"
        assert [unit.status for unit in site.units] == [200] * len(site.units)
        assert max(unit.attempts for unit in site.units) == 2
    finally:
        standby.start()
    while Visitor(app).request() != "replica 1 of 2":
        pass
    assert warnings[0].startswith("replica 1 of 2 leaves the rotation (")
    assert warnings[-1] == "replica 1 of 2 answers again, and is back in the rotation"


def test_where_all_replicas_are_down_the_primary_serves(sites):
    with sites.make(FRESH) as site:
        app = site.app(site.where)
        sites.servers.standbys[FRESH].stop()
        try:
            assert Visitor(app).request() == "primary"
            assert Visitor(app).request() == "primary"
            assert site.units[-1].engine_reason == "no replica is fresh enough"
        finally:
            sites.servers.standbys[FRESH].start()


def test_a_visitor_of_a_replica_that_was_started_anew_sees_nothing_older(sites, fresh_site):
    site = fresh_site
    app = site.app(site.where)
    visitor, other = (next(readers_of_each(site, app)) for _ in range(2))
    sites.servers.standbys[FRESH].restart()
    while visitor.request() == "primary":
        pass
    assert site.units[-1].engine_reason == "least busy"  # it is another one, although it is the same
    assert len(visitor.set_cookies) == 1
    # By now it is known.
    other.request()
    assert site.units[-1].engine_reason in ("least busy", "no replica is fresh enough")


def test_a_replica_that_is_lost_after_the_last_row_of_a_body_has_cost_nothing(fresh_site):
    site = fresh_site

    def view() -> Any:
        current_scope().commit_at = "end"
        process = site.Session.execute(sa.text("SELECT pg_backend_pid()")).scalar()

        def body() -> Any:
            yield b"first, "
            engine = sa.create_engine(site.engines[0].url)
            with engine.connect() as connection:
                assert connection.execute(sa.text(f"SELECT pg_terminate_backend({process}, 60000)")).scalar()
            engine.dispose()
            yield b"last"

        return body()

    exchange = site.visitor(view).exchange()
    assert exchange.read() == b"first, last"
    exchange.close()
    assert site.units[-1].engine == "replica 1 of 1"


def test_a_connection_that_the_pool_has_replaced_is_to_a_server_that_was_started_anew(sites):
    with sites.make(FRESH, pings=True) as site:
        app = site.app(site.where)
        visitor = next(readers_of_each(site, app))
        sites.servers.standbys[FRESH].restart()
        # The pool notices, and nobody else does; but the visitor was told of the one before.
        visitor.request()
        assert site.units[-1].status == 200
        assert site.units[-1].attempts == 2


def test_a_connection_that_the_pool_finds_dead_is_replaced_and_nobody_minds(sites, warnings):
    with sites.make(FRESH, pings=True) as site:
        app = site.app(site.where)
        visitor = next(readers_of_each(site, app))
        with site.engines[0].connect() as connection:
            pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar()
        _terminate(site.engines[0], pid)
        assert visitor.request() == "replica 1 of 1"
        assert site.units[-1].attempts == 1
        assert warnings == []


def _terminate(engine: sa.Engine, pid: Any) -> None:
    """Have the server end that connection, by way of another one."""
    other = sa.create_engine(engine.url)
    with other.connect() as connection:
        assert connection.execute(sa.text(f"SELECT pg_terminate_backend({pid}, 60000)")).scalar()
    other.dispose()


@pytest.mark.parametrize("streams", [True, False])
def test_a_lost_commit_on_the_primary_is_an_error(fresh_site, streams):
    site = fresh_site

    def work() -> list[bytes]:
        add(site)
        site.Session.flush()
        _terminate(site.primary, site.Session.execute(sa.text("SELECT pg_backend_pid()")).scalar())
        return [b"done"]

    def stream() -> Iterator[bytes]:
        yield b"first"
        yield from work()

    visitor = site.visitor(stream if streams else work)
    with pytest.raises(sa.exc.DBAPIError):
        visitor.request(method="POST")
    visitor.app = site.app(site.texts)
    assert visitor.request() == ""


def test_what_can_only_be_rolled_back_is_an_error_on_a_replica_too(fresh_site):
    site = fresh_site

    def view() -> Any:
        site.texts()

        def body() -> Iterator[bytes]:
            yield b"first"
            site.texts()
            with suppress(LookupError), session_scope(site.Session):
                raise LookupError

        return body()

    exchange = site.visitor(view).exchange()
    with pytest.raises(RollbackOnlyError):
        exchange.read()
    exchange.close()


def test_rows_that_stream_from_a_replica_are_there_when_the_headers_have_left(sites, fresh_site):
    site = fresh_site
    with site.primary.begin() as connection:
        connection.execute(sa.insert(Note), [{"text": str(number)} for number in range(9)])
    sites.wait(FRESH)

    def view() -> Any:
        query: Any = sa.select(Note.text).order_by(Note.id)
        texts = site.Session.execute(query, execution_options={"stream_results": True}).scalars()
        return (text.encode() for text in texts)

    assert site.visitor(view).request() == "012345678"
    assert site.units[-1].engine == "replica 1 of 1"


def test_another_session_between_the_chunks_uses_the_primary(fresh_site):
    site = fresh_site

    def view() -> Any:
        site.texts()
        return iter([b"one", b"two"])

    exchange = site.visitor(view).exchange()
    assert exchange.next() == b"one"
    with site.Session.session_factory() as session:
        assert session.execute(sa.text("SELECT inet_server_port()")).scalar() == site.primary.url.port
    assert exchange.read() == b"two"


def test_use_primary_is_too_late_when_the_request_is_over(fresh_site):
    scopes = []

    def view() -> list[bytes]:
        scopes.append(current_scope())
        return [b""]

    fresh_site.visitor(view).request()
    with pytest.raises(NoActiveScope, match=r"use_primary\(\) of GET / was used after"):
        scopes[0].use_primary()


def test_reads_go_on_without_the_primary(sites, fresh_site, warnings):
    site = fresh_site
    app = site.app(site.where)
    visitor = next(readers_of_each(site, app))
    primary = sites.servers.primary
    primary.stop()
    try:
        site.replicas._router.cluster.primary.due = 0.0  # it is time to ask again
        assert visitor.request() == "replica 1 of 1"
        assert warnings == ["the primary does not tell its position: how far replicas lag is not known meanwhile"]
        with pytest.raises(sa.exc.DBAPIError):
            visitor.request(method="POST")
    finally:
        primary.start()
    sites.wait(FRESH, LATE)
    site.primary.dispose()  # the connections that it has lost
    asked = site.replicas._router.cluster.primary
    assert not asked._answers
    asked.due = 0.0
    visitor.request()
    assert asked._answers
    assert len(warnings) == 1


def test_a_replica_that_lags_leaves_the_rotation(sites, warnings):
    with sites.make(LATE, max_lag=0.05) as site:
        app = site.app(site.where)
        while not warnings:
            add_by_somebody_else(site, str(len(site.units)))
            assert Visitor(app).request() in ("primary", "replica 1 of 1")
        assert warnings[0].startswith("replica 1 of 1 leaves the rotation (it lags)")
        assert Visitor(app).request() == "primary"
        while Visitor(app).request() == "primary":
            pass


def test_a_query_that_is_in_the_way_of_the_replay_is_done_elsewhere(sites, fresh_site):
    site = fresh_site
    attempts = []

    def view() -> list[bytes]:
        attempts.append(site.where()[0])
        if len(attempts) == 1:
            # What the standby does to a query that conflicts.
            site.Session.execute(
                sa.text("DO $$ BEGIN RAISE EXCEPTION 'conflict with recovery' USING ERRCODE = '40001'; END $$")
            )
        return []

    site.visitor(view).request()
    assert attempts == [b"replica 1 of 1", b"primary"]
    assert site.visitor().request() == "replica 1 of 1"


def test_an_error_of_the_applications_own_is_raised_as_it_is(fresh_site):
    site = fresh_site

    def view() -> list[bytes]:
        site.Session.execute(sa.text("SELECT * FROM nowhere"))
        return []

    with pytest.raises(sa.exc.ProgrammingError):
        site.visitor(view).request()
    assert site.units[-1].attempts == 1
    assert site.visitor().request() == "replica 1 of 1"


def test_a_replica_that_was_promoted_is_none_any_more(sites, warnings):
    with sites.make() as site:
        app = site.app(site.where)
        Visitor(app).request()
        Visitor(app).request()
        assert [unit.engine for unit in site.units] == ["primary", "primary"]
    assert warnings[0].startswith("replica 1 of 1 leaves the rotation (sa_wsgi_session._cluster.NoStandby)")


# -- what only a certain moment shows ---------------------------------------------------------------------------------


@contextmanager
def commits_that_wait(primary: DatabaseServer) -> Iterator[None]:
    """Each COMMIT waits for a standby that there is not; the others replay it."""
    primary.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    primary.execute("SELECT pg_reload_conf()")
    # The servers' processes learn of it one by one: it is there when one of these waits.
    probes: list[threading.Thread] = []
    try:
        while not primary.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"):
            if not any(probe.is_alive() for probe in probes):
                commit = partial(primary.execute, "SELECT pg_logical_emit_message(true, 'test', 'test')")
                probes.append(threading.Thread(target=commit))
                probes[-1].start()
        yield
    finally:
        primary.execute("ALTER SYSTEM RESET synchronous_standby_names")
        primary.execute("SELECT pg_reload_conf()")
        for probe in probes:
            probe.join()


def test_a_visitor_who_has_seen_a_commit_on_a_replica_before_the_primary_shows_it_waits_for_that(sites, fresh_site):
    site = fresh_site
    app = _middleware(site)
    reader = next(readers_of_each(site, app))
    writer = threading.Thread(target=add_by_somebody_else, args=(site,))
    seen: list[str] = []
    with commits_that_wait(sites.servers.primary):
        writer.start()
        while reader.request() != "new":
            pass
        reader.app = site.app(site.texts)
        poster = threading.Thread(target=lambda: seen.append(reader.request(method="POST")))
        poster.start()
        while not sites.servers.primary.execute(
            "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%snapshot()::text%' AND pid <> pg_backend_pid()"
        ):
            pass
    writer.join()
    poster.join()
    assert seen == ["new"]


def test_a_visitor_does_not_wait_for_ever_until_the_primary_shows_what_they_have_seen(sites, fresh_site, monkeypatch):
    site = fresh_site
    reader = next(readers_of_each(site, _middleware(site)))
    writer = threading.Thread(target=add_by_somebody_else, args=(site,))
    seen: list[str] = []
    with commits_that_wait(sites.servers.primary):
        writer.start()
        while reader.request() != "new":
            pass
        reader.app = site.app(site.texts)
        monkeypatch.setattr(_cluster, "_CATCHES_UP", -1.0)  # which is over as soon as it begins
        poster = threading.Thread(target=lambda: seen.append(reader.request(method="POST")))
        poster.start()
        poster.join(20)  # else it would wait for what comes after this
        assert seen == [""]
    writer.join()


def test_a_standby_that_begins_further_back_when_it_is_started_anew_shows_nobody_the_past(sites, fresh_site):
    site = fresh_site
    app = _middleware(site)
    reader = next(readers_of_each(site, app))
    standby = sites.servers.standbys[FRESH]
    # To here it will not go back.
    sites.servers.primary.execute("CHECKPOINT")
    sites.wait(FRESH)
    standby.execute("CHECKPOINT")
    Visitor(app).request("/1", "POST")
    while reader.request() != "/1":
        pass
    assert site.units[-1].engine == "replica 1 of 1"
    # What it has replayed is not on its disk yet; and it will not replay it again so soon.
    standby.execute("ALTER SYSTEM SET recovery_min_apply_delay = '1h'")
    standby.restart()
    try:
        newcomer = Visitor(app)
        assert standby.execute("SELECT text FROM note", site.primary.url.database) == []
        for _ in range(5):
            assert reader.request() == "/1"
            newcomer.request()
        assert site.units[-1].engine == "primary"
    finally:
        standby.execute("ALTER SYSTEM RESET recovery_min_apply_delay")
        standby.execute("SELECT pg_reload_conf()")


def test_a_position_that_another_process_has_told_is_believed(sites, late_site):
    reader = next(readers_of_each(late_site, _middleware(late_site)))
    with sites.make(LATE) as other:
        reader.app, app = _middleware(other), reader.app
        reader.request("/1", "POST")
        reader.app = app
        assert reader.request() == "/1"
        assert late_site.units[-1].engine_reason == "no replica is fresh enough"


def test_an_error_page_of_a_safe_request_tells_its_visitor_where_they_have_read(fresh_site):
    site = fresh_site

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        site.where()
        try:
            raise LookupError
        except LookupError:
            start_response("404 Not Found", [], sys.exc_info())
        return []

    visitor = Visitor(SessionMiddleware(app, site.Session, replicas=site.replicas))
    assert visitor.exchange().status == "404 Not Found"
    assert len(visitor.set_cookies) == 1


def test_a_change_in_a_part_of_a_safe_request_is_done_on_the_primary(fresh_site):
    site = fresh_site

    def view() -> list[bytes]:
        site.where()
        with session_scope(site.Session, propagation="nested"):
            add(site, "in a SAVEPOINT")
        return site.texts()

    assert site.visitor(view).request("/nested") == "in a SAVEPOINT"


def test_a_session_of_its_own_within_another_units_part(fresh_site, sqlite_url):
    site = fresh_site
    other = sa.create_engine(sqlite_url)
    OtherSession = make_session("thread-local", sessionmaker(other))

    def view() -> list[bytes]:
        with session_scope(OtherSession):
            there = site.where()
            by_hand = site.Session.session_factory()
            assert by_hand.get_bind() is site.primary
            by_hand.close()
        return there

    assert site.visitor(view).request() == "replica 1 of 1"
    by_hand = site.Session.session_factory()
    assert by_hand.get_bind() is site.primary
    by_hand.close()
    other.dispose()


def test_a_callback_that_was_registered_while_the_body_is_closed_may_write(late_site):
    site = late_site

    def view() -> Any:
        site.texts()
        return Body([b"chunk"], lambda: current_scope().on_commit(lambda: add_by_somebody_else(site)))

    visitor = site.visitor(view)
    assert visitor.request() == "chunk"
    visitor.app = site.app(site.texts)
    assert visitor.request() == "new"


def test_a_callback_between_the_chunks_of_a_safe_request_may_write(late_site):
    site = late_site

    def view() -> Any:
        current_scope().on_commit(lambda: add_by_somebody_else(site))
        site.texts()
        return iter([b"chunk"])

    visitor = site.visitor(view)
    visitor.request()
    visitor.app = site.app(site.texts)
    assert visitor.request() == "new"


def test_a_body_that_is_handed_to_write_is_no_use_of_the_primary(fresh_site):
    site = fresh_site

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])(site.where()[0])
        return []

    visitor = Visitor(SessionMiddleware(app, site.Session, replicas=site.replicas))
    for _ in range(2):
        assert visitor.exchange().written == [b"replica 1 of 1"]
    assert visitor.set_cookies == []


def test_a_callback_that_is_not_called_has_written_nothing(fresh_site):
    site = fresh_site

    def view() -> list[bytes]:
        current_scope().on_rollback(lambda: add_by_somebody_else(site))
        return site.where()

    visitor = site.visitor(view)
    for _ in range(2):
        assert visitor.request() == "replica 1 of 1"
    assert visitor.set_cookies == []


@pytest.mark.parametrize("statement", ["SELECT * FROM nowhere", "CREATE TABLE nowhere ()"])
def test_an_error_on_a_replicas_engine_outside_of_requests_is_its_users(fresh_site, statement):
    fresh_site.app(fresh_site.where)
    with fresh_site.engines[0].connect() as connection, pytest.raises(sa.exc.DBAPIError):
        connection.execute(sa.text(statement))
