"""Where a request goes, and what its visitor is told: on a clock that is put forward by hand.

The servers answer as they are told to; ``test_replicas.py`` and ``test_replicas_load.py`` ask real ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy as sa

from sa_wsgi_session import _cluster, _routing
from sa_wsgi_session._cluster import Cluster
from sa_wsgi_session._routing import ReplicaError, Route, Router
from sa_wsgi_session._tokens import Tokens
from sa_wsgi_session._transient import Conflict

SECRET = b"0123456789abcdef0123456789abcdef"
START = 1000.0


class World:
    """A primary and two replicas; each says at what position it is, unless it is down."""

    def __init__(self, *, sticky: float = 5) -> None:
        #: Of the cluster; and, beginning at another number, that of the tokens.
        self.now = START
        self.primary = sa.create_engine("sqlite://")
        engines = [sa.create_engine("sqlite:///1"), sa.create_engine("sqlite:///2")]
        self.cluster = Cluster(self.primary, engines, key=SECRET, max_lag=16, positions=True)
        tokens = Tokens(SECRET, cookie_name="seen", header="Seen", lifetime=160, clock=lambda: self.now + 1e9)
        self.router = Router(self.cluster, tokens, None, sticky)
        self.one, self.two = self.cluster.replicas
        self.positions: dict[Any, int] = {self.primary: 100, self.one.engine: 100, self.two.engine: 100}
        self.incarnation = 1
        self.down: set[Any] = set()
        self.snapshots = 0

    def ask(self, engine: Any, question: str) -> Any:
        if engine in self.down:
            raise OSError
        if question == _cluster._ASK_SNAPSHOT:
            self.snapshots += 1
            return ("5:6:",)
        if "xmax" in question:
            return (False,)
        return (self.positions[engine],) if engine is self.primary else (self.positions[engine], self.incarnation)

    def lag_at(self, position: int) -> None:
        self.positions[self.one.engine] = self.positions[self.two.engine] = position


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(_cluster, "monotonic", lambda: world.now)
    monkeypatch.setattr(_routing, "monotonic", lambda: world.now)
    monkeypatch.setattr(_cluster, "ask", world.ask)
    return world


def connection_to(engine: sa.Engine) -> Any:
    """As far as a route looks at a connection."""
    return SimpleNamespace(dialect=engine.dialect)


class Visit:
    """One request; *headers* are those that the response has had."""

    def __init__(
        self, world: World, method: str = "GET", cookies: str | None = None, header: str | None = None
    ) -> None:
        environ: dict[str, Any] = {"REQUEST_METHOD": method, "wsgi.url_scheme": "http"}
        if cookies is not None:
            environ["HTTP_COOKIE"] = cookies
        if header is not None:
            environ["HTTP_SEEN"] = header
        self.world = world
        self.headers: list[tuple[str, str]] = []
        self.trial = cast(Any, SimpleNamespace(elsewhere=None))
        self.route = Route(world.router, environ, self._forward)
        self.route.attempt(None, self.trial)

    def _forward(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        self.headers, self.exc_info = headers, exc_info
        return "write"

    def query(self) -> str | None:
        """Send a statement; who has been asked."""
        route, world = self.route, self.world
        engine = route.bind(world.primary)
        assert engine is (world.primary if route.replica is None else route.replica.engine)
        if not route.begins(connection_to(engine)):
            route.uses_primary()
        return route.engine

    def use_primary(self) -> None:
        self.route.use_primary(cast(Any, "GET /"))

    def answer(self, *, waits: bool = False) -> Visit:
        self.route.settled(waits=waits)
        assert self.route.start_response("200 OK", [("A", "b")]) == "write"
        assert self.headers[0] == ("A", "b")
        return self

    def end(self) -> Visit:
        self.route.ends()
        return self

    def whole(self) -> Visit:
        self.query()
        return self.answer().end()

    @property
    def cookies(self) -> str:
        """What a browser without any before would send the next time."""
        given = dict(value.partition(";")[0].split("=", 1) for name, value in self.headers if name == "Set-Cookie")
        return "; ".join(f"{name}={value}" for name, value in given.items() if value)

    @property
    def token(self) -> str:
        return dict(self.headers)["Seen"]

    @property
    def told(self) -> list[str]:
        return [name for name, _ in self.headers[1:]]


class TestReader:
    def test_who_is_at_home_somewhere_stays_there_and_is_told_once(self, world):
        first = Visit(world).whole()
        assert (first.route.engine, first.route.reason) == ("replica 1 of 2", "least busy")
        assert first.told == ["Set-Cookie", "Seen"]
        for arguments in ({"cookies": first.cookies}, {"cookies": first.cookies}, {"header": first.token}):
            again = Visit(world, **arguments).whole()
            assert (again.route.engine, again.route.reason) == ("replica 1 of 2", "where this visitor reads")
            assert again.told == []
        assert Visit(world).whole().route.engine == "replica 2 of 2"

    def test_the_token_is_said_anew_before_it_is_too_old(self, world):
        cookies = Visit(world).whole().cookies
        world.now += 81
        again = Visit(world, cookies=cookies).whole()
        assert (again.route.engine, again.told) == ("replica 1 of 2", ["Set-Cookie", "Seen"])

    def test_who_has_sent_nothing_is_told_nothing(self, world):
        visit = Visit(world).answer().end()
        assert (visit.route.engine, visit.told) == (None, [])

    def test_who_has_only_asked_for_the_engine_is_told_nothing(self, world):
        visit = Visit(world)
        assert visit.route.bind(world.primary) is world.one.engine
        assert visit.answer().end().told == []

    def test_another_bind_is_none_of_ours(self, world):
        other = sa.create_engine("sqlite://")
        visit = Visit(world)
        assert visit.route.bind(other) is other
        assert visit.route.engine is None

    def test_a_replica_serves_until_the_attempt_ends(self, world):
        visit = Visit(world)
        visit.query()
        assert world.one.serving == {visit.route}
        visit.answer()
        assert world.one.serving == {visit.route}
        visit.end()
        assert world.one.serving == set()

    def test_a_transaction_on_another_database_is_none_of_the_replica(self, world):
        visit = Visit(world)
        visit.query()
        assert not visit.route.begins(connection_to(world.primary))

    def test_the_header_of_an_exception_goes_on(self, world):
        visit = Visit(world)
        visit.query()
        visit.route.start_response("500 Oops", [], ("a", "b", "c"))
        assert visit.exc_info == ("a", "b", "c")


class TestWriter:
    def test_who_has_written_reads_on_the_primary_until_a_replica_has_it(self, world):
        world.lag_at(100)
        Visit(world).whole()  # so that their positions are known
        world.positions[world.primary] = 150
        written = Visit(world, "POST").whole()
        assert (written.route.engine, written.route.reason) == ("primary", "not a safe request")
        assert written.told == ["Set-Cookie", "Seen"]

        world.now += 0.2
        read = Visit(world, cookies=written.cookies).whole()
        assert (read.route.engine, read.route.reason) == ("primary", "no replica is fresh enough")
        world.lag_at(150)
        world.now += 0.2
        for arguments in ({"cookies": written.cookies}, {"header": written.token}):
            read = Visit(world, **arguments).whole()
            assert read.route.engine != "primary"
            assert read.route.reason == "least busy"

    def test_who_was_at_home_somewhere_is_not_any_more(self, world):
        cookies = Visit(world).whole().cookies
        written = Visit(world, "POST", cookies=cookies).whole()
        forgotten = [value for name, value in written.headers if name == "Set-Cookie" and "Max-Age=0" in value]
        assert [value.partition("=")[0] for value in forgotten] == ["seen_home"]

    def test_if_the_primary_does_not_tell_its_position_it_serves_them_for_a_while(self, world):
        visit = Visit(world, "POST")
        visit.query()
        world.down.add(world.primary)
        cookies = visit.answer().end().cookies
        world.down.clear()
        read = Visit(world, cookies=cookies).whole()
        assert (read.route.engine, read.route.reason) == ("primary", "this visitor has just used the primary")
        world.now += 5.9
        assert Visit(world, cookies=cookies).whole().route.engine == "primary"
        world.now += 0.1
        assert Visit(world, cookies=cookies).whole().route.engine != "primary"

    def test_a_position_from_a_clock_that_is_ahead_pins_nobody(self, world):
        for _ in range(2):
            Visit(world).whole()  # so that their positions are known
        cookies = Visit(world, "POST").whole().cookies
        world.now -= 3
        assert Visit(world, cookies=cookies).whole().route.engine != "primary"

    @pytest.mark.parametrize(("seconds", "pinned"), [(0, 1), (0.2, 2), (1, 2), (2, 3), (2.5, 4), (4, 5)])
    def test_that_while_is_no_shorter_than_it_was_told(self, seconds, pinned):
        assert World(sticky=seconds).router.sticky == pinned

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_a_transaction_on_the_primary_that_goes_on_is_for_all(self, world, method):
        visit = Visit(world, method)
        visit.use_primary()
        if method == "GET":
            assert visit.query() == "primary"
        cookies = visit.answer(waits=True).cookies
        assert Visit(world, cookies=cookies).whole().route.reason == "this visitor has just used the primary"
        world.positions[world.primary] = 170
        visit.end()
        assert world.cluster.primary.floor == 170
        visit.end()

    def test_one_that_has_ended_is_not(self, world):
        Visit(world).whole()
        world.positions[world.primary] = 170
        Visit(world, "POST").whole()
        assert world.cluster.primary.floor == 100

    @pytest.mark.parametrize("uses_replica", [True, False])
    def test_one_that_only_reads_is_not_either(self, world, uses_replica):
        visit = Visit(world)
        if uses_replica:
            visit.query()
        told = visit.answer(waits=True).told
        assert told == (["Set-Cookie", "Seen"] if uses_replica else [])
        world.positions[world.primary] = 170
        visit.end()
        assert world.cluster.primary.floor < 170

    def test_what_is_done_on_the_primary_when_the_headers_have_left_is_for_all(self, world):
        Visit(world).whole()
        visit = Visit(world, "POST").answer()
        assert visit.told == []
        visit.query()
        world.positions[world.primary] = 170
        visit.end()
        assert world.cluster.primary.floor == 170
        world.positions[world.primary] = 180
        visit.end()
        assert world.cluster.primary.floor == 170


class TestElsewhere:
    def test_another_attempt_goes_to_another_replica_and_then_to_the_primary(self, world):
        visit = Visit(world)
        assert visit.query() == "replica 1 of 2"
        for replica, following in ((world.one, "replica 2 of 2"), (world.two, "primary")):
            conflict = Conflict("test")
            visit.route.leaves(replica, conflict)
            assert visit.trial.elsewhere is conflict
            visit.end()
            visit.route.attempt(None, visit.trial)
            assert visit.route.engine is None
            assert visit.query() == following
        visit.answer().end()
        assert world.one.serving == world.two.serving == set()

    def test_who_has_only_asked_for_another_engine_is_not_told_of_the_one_before(self, world):
        visit = Visit(world)
        assert visit.query() == "replica 1 of 2"
        visit.route.leaves(world.one, Conflict("test"))
        visit.end()
        visit.route.attempt(None, visit.trial)
        assert visit.route.bind(world.primary) is world.two.engine
        assert visit.answer().end().told == []

    def test_who_is_at_home_on_one_that_cannot_be_used(self, world):
        cookies = Visit(world).whole().cookies
        world.one.fails("test")
        world.positions[world.primary] = 120
        world.lag_at(119)
        assert Visit(world, cookies=cookies).whole().route.reason == "no replica is fresh enough"
        world.now += 0.2
        world.lag_at(120)
        visit = Visit(world, cookies=cookies).whole()
        assert (visit.route.engine, visit.route.reason) == ("replica 2 of 2", "least busy")
        assert visit.told == ["Set-Cookie", "Seen"]

    def test_and_nobody_knows_how_far_the_primary_is(self, world):
        cookies = Visit(world).whole().cookies
        world.one.fails("test")
        world.down.add(world.primary)
        visit = Visit(world, cookies=cookies)
        visit.query()
        assert visit.route.reason == "the replica where this visitor reads cannot be used"

    def test_who_is_at_home_on_one_that_was_started_anew_and_has_replayed_less(self, world):
        cookies = Visit(world).whole().cookies
        world.incarnation = 2
        world.one.learns(50, 2, world.now)
        visit = Visit(world, cookies=cookies).whole()
        assert (visit.route.engine, visit.route.reason) == ("replica 2 of 2", "least busy")

    @pytest.mark.parametrize(("position", "incarnation"), [(50, 1), (150, 2)])
    def test_one_that_goes_back_between_the_decision_and_the_first_statement(self, world, position, incarnation):
        cookies = Visit(world).whole().cookies
        visit = Visit(world, cookies=cookies)
        engine = visit.route.bind(world.primary)
        assert engine is world.one.engine
        world.one.learns(position, incarnation, world.now)
        with pytest.raises(ReplicaError, match="replica 1 of 2 was started anew"):
            visit.route.begins(connection_to(engine))
        assert visit.trial.elsewhere is not None
        visit.end()
        visit.route.attempt(None, visit.trial)
        assert visit.query() == "replica 2 of 2"
        visit.end()

    def test_who_says_to_be_at_home_in_two_places(self, world):
        one, two = Visit(world).whole().cookies, Visit(world).whole().cookies
        assert one != two
        visit = Visit(world, cookies=f"{one}; {two}").whole()
        assert visit.route.reason == "least busy"
        world.positions[world.primary] = 120
        assert Visit(world, cookies=f"{one}; {two}").whole().route.reason == "no replica is fresh enough"

    def test_a_position_of_another_database_keeps_nobody_on_the_primary(self, world):
        foreign = World()
        foreign.now = world.now
        tokens = foreign.router.tokens
        headers = tokens.position_headers(10_000, 0, secure=False, forget_home=False)
        visit = Visit(world, header=dict(headers)["Seen"]).whole()
        assert visit.route.engine == "replica 1 of 2"

    def test_who_has_a_home_but_may_know_more_of_that_database_reads_what_the_primary_has(self, world):
        cookies = Visit(world).whole().cookies
        header = dict(world.router.tokens.position_headers(10_000, 0, secure=False, forget_home=False))["Seen"]
        world.one.fails("test")
        world.positions[world.primary] = 150
        visit = Visit(world, cookies=cookies, header=header).whole()
        assert (visit.route.engine, visit.route.reason) == ("primary", "no replica is fresh enough")

    def test_where_there_is_no_home_what_a_foreign_position_needs_is_what_anybody_needs(self, world):
        Visit(world).whole()
        world.positions[world.primary] = 150
        header = dict(world.router.tokens.position_headers(10_000, 0, secure=False, forget_home=False))["Seen"]
        assert Visit(world, header=header).whole().route.engine != "primary"

    def test_who_is_at_home_on_one_that_lags_too_much_goes_elsewhere(self, world):
        cookies = Visit(world).whole().cookies
        Visit(world, cookies=cookies).whole()  # so that they are known there
        world.positions[world.primary] = world.positions[world.two.engine] = 120
        world.cluster.primary.raise_floor()
        world.now += 0.2
        visit = Visit(world, cookies=cookies).whole()
        assert (visit.route.engine, visit.route.reason) == ("replica 2 of 2", "least busy")

    def test_who_tells_of_something_newer_in_a_header_does_not_stay_at_home(self, world):
        cookies = Visit(world).whole().cookies
        Visit(world, cookies=cookies).whole()  # so that they are known there
        world.positions[world.primary] = 150
        header = Visit(world, "POST").whole().token
        visit = Visit(world, cookies=cookies, header=header).whole()
        assert (visit.route.engine, visit.route.reason) == ("primary", "no replica is fresh enough")

    @pytest.mark.parametrize("at_home", [True, False])
    def test_when_the_headers_have_left_nobody_can_be_told_where(self, world, at_home):
        cookies = Visit(world).whole().cookies if at_home else None
        visit = Visit(world, cookies=cookies).answer()
        engine = visit.query()
        if at_home:
            assert (engine, visit.route.reason) == ("replica 1 of 2", "where this visitor reads")
        else:
            assert (engine, visit.route.reason) == ("primary", "too late to tell the visitor where")
        visit.end()

    def test_when_they_have_left_and_the_replica_has_failed(self, world):
        cookies = Visit(world).whole().cookies
        visit = Visit(world, cookies=cookies).answer()
        world.one.fails("test")
        assert visit.query() == "primary"
        assert visit.route.reason == "too late to tell the visitor where"
        visit.end()

    def test_a_visitor_who_has_read_from_a_replica_waits_for_the_primary(self, world):
        read = Visit(world).whole()
        for arguments, snapshots in (
            ({}, 0),
            ({"cookies": "a=b"}, 0),
            ({"cookies": read.cookies}, 1),
            ({"header": read.token}, 1),
        ):
            world.snapshots = 0
            Visit(world, "POST", **arguments).whole()
            assert world.snapshots == snapshots

    def test_use_primary_comes_before_the_first_statement(self, world):
        visit = Visit(world)
        visit.use_primary()
        assert (visit.query(), visit.route.reason) == ("primary", "use_primary()")
        visit = Visit(world)
        visit.query()
        with pytest.raises(RuntimeError, match="had been sent to replica 1 of 2"):
            visit.use_primary()
        visit.end()
