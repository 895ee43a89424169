"""What a cluster knows, and for how long: on a clock that is put forward by hand, with servers that answer at once.

With a real primary, real standbys and real time, ``test_replicas.py`` and ``test_replicas_load.py`` see that the whole
of it holds; here are the numbers.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import QueuePool

from sa_wsgi_session import _cluster, session_scope
from sa_wsgi_session._binding import here
from sa_wsgi_session._cluster import Cluster, Primary, Replica

START = 1000.0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Server:
    """What answers the questions of all engines: with the next answer, and with the last one again and again."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.asked: list[str] = []

    def __call__(self, engine: sa.Engine, question: str) -> Any:
        self.asked.append(question)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def now_says(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked = []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_cluster, "monotonic", clock)
    return clock


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(_cluster, "ask", server)
    return server


@pytest.fixture
def engine() -> sa.Engine:
    return sa.create_engine("sqlite://")


@pytest.fixture
def replica(engine: sa.Engine, clock: Clock) -> Replica:
    return Replica(engine, "replica 1 of 1", "abc", {}, positions=True)


@pytest.fixture
def primary(engine: sa.Engine, clock: Clock) -> Primary:
    """One that is asked every second: a sixteenth of the lag that is allowed."""
    return Primary(engine, 16, positions=True)


def out_for(replica: Replica, clock: Clock) -> float:
    """For how long *replica* is left alone from now on: in seconds, to a sixteenth of one."""
    asked: list[Replica] = []

    def ask(replica: Replica) -> bool:
        asked.append(replica)
        return False

    with mock.patch.object(Replica, "ask", ask):
        for sixteenths in count():
            assert not replica.is_up(clock.now + sixteenths / 16, 0)
            if asked:
                return sixteenths / 16
    raise AssertionError  # it is never asked again


class TestQuestion:
    @pytest.fixture
    def made(self) -> list[object]:
        return []

    @pytest.fixture
    def asked(self, tmp_path: Path, made: list[object]) -> Iterator[sa.Engine]:
        """Without a fixture ``server``: an engine that is really asked; *made* are its connections."""
        engine = sa.create_engine(f"sqlite:///{tmp_path / 'database'}", poolclass=QueuePool)
        sa.event.listen(engine, "connect", lambda connection, record: made.append(connection))
        yield engine
        engine.dispose()

    def test_it_leaves_nothing_behind(self, asked, made):
        assert _cluster.ask(asked, "SELECT 1, 2") == (1, 2)
        assert _cluster.ask(asked, "SELECT 3") == (3,)
        assert len(made) == 1
        assert asked.pool.checkedout() == 0

    def test_one_that_fails_leaves_no_connection_behind_either(self, asked, made):
        with pytest.raises(sqlite3.OperationalError):
            _cluster.ask(asked, "nonsense")
        assert asked.pool.checkedout() == 0
        assert _cluster.ask(asked, "SELECT 1") == (1,)
        assert len(made) == 2

    def test_the_unit_of_work_that_asks_does_not_hear_of_it(self, asked):
        heard: list[object] = []
        sa.event.listen(asked, "checkout", lambda *_: heard.append(here.get()))
        with session_scope(sessionmaker(asked)) as session:
            _cluster.ask(asked, "SELECT 1")
            session.connection()
        assert heard[0] is None
        assert heard[1] is not None


class TestReplicaThatFails:
    def test_it_is_left_alone_for_twice_as_long_each_time_but_for_no_longer_than_ten_seconds(self, replica, clock):
        pauses = []
        for _ in range(8):
            replica.fails("test")
            pauses.append(out_for(replica, clock))
            clock.now += pauses[-1]
        assert pauses == [0.25, 0.5, 1, 2, 4, 8, 10, 10]
        assert replica.failures == 8

    def test_after_thousands_of_times_as_well(self, replica, clock):
        replica.failures = 5000
        replica.fails("test")
        assert out_for(replica, clock) == 10

    def test_those_that_were_under_way_do_not_make_it_longer(self, replica, clock):
        replica.fails("test")
        clock.now += 0.25 - 1 / 1024
        replica.fails("test")
        assert replica.failures == 1
        clock.now += 1 / 1024
        replica.fails("test")
        assert replica.failures == 2
        assert out_for(replica, clock) == 0.5

    def test_the_first_failure_is_a_warning_and_those_that_follow_are_not(self, replica, clock, caplog):
        caplog.set_level(logging.DEBUG, "sa_wsgi_session")
        replica.fails("one thing")
        clock.now += 0.25
        replica.fails("another")
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
            ("WARNING", "replica 1 of 1 leaves the rotation (one thing); it is asked again in 0.25 seconds"),
            ("DEBUG", "replica 1 of 1 stays out of the rotation (another) for 0.50 seconds"),
        ]

    def test_it_comes_back_when_it_has_replayed_what_is_demanded(self, replica, clock, server, caplog):
        server.now_says((9, 1))
        replica.fails("test")
        clock.now += 0.25
        assert not replica.is_up(clock.now, 10)
        assert replica.failures == 2

        server.now_says((10, 1))
        assert not replica.is_up(clock.now, 10)
        assert server.asked == []
        clock.now += 0.5
        assert replica.is_up(clock.now, 10)
        assert replica.failures == 0
        assert len(server.asked) == 1
        assert caplog.messages[-1] == "replica 1 of 1 answers again, and is back in the rotation"
        assert replica.is_up(clock.now, 11)
        assert len(server.asked) == 1

    def test_it_begins_anew_with_short_pauses_then(self, replica, clock, server):
        for _ in range(4):
            replica.fails("test")
            clock.now += 10
        server.now_says((1, 1))
        assert replica.is_up(clock.now, 0)
        replica.fails("test")
        assert out_for(replica, clock) == 0.25

    def test_one_at_a_time_asks_it(self, replica, clock, server):
        server.now_says((1, 1))
        replica.fails("test")
        clock.now += 1
        with replica._asking:
            assert not replica.is_up(clock.now, 0)
        assert server.asked == []
        assert replica.is_up(clock.now, 0)
        assert not replica._asking.locked()

    def test_one_that_does_not_answer_stays_out(self, replica, clock, server, caplog):
        caplog.set_level(logging.DEBUG, "sa_wsgi_session")
        server.now_says(OSError("secret"))
        replica.fails("test")
        clock.now += 0.25
        assert not replica.is_up(clock.now, 0)
        assert not replica._asking.locked()
        assert "(OSError) for 0.50 seconds" in caplog.messages[-1]
        assert "secret" not in caplog.text

    def test_one_that_was_promoted_is_none(self, replica, clock, server, caplog):
        server.now_says(None)
        assert not replica.ask()
        assert replica.failures == 1
        assert "NoStandby)" in caplog.text

    def test_without_positions_any_answer_will_do(self, engine, clock, server):
        replica = Replica(engine, "replica 1 of 1", "abc", {}, positions=False)
        server.now_says((1,))
        assert replica.known.position == 0
        assert replica.ask()
        assert replica.known.position == 0
        assert server.asked == ["SELECT 1"]


class TestWhatIsKnownOfAReplica:
    def test_what_was_asked_earlier_is_not_news(self, replica):
        replica.learns(10, 1, asked=5.0)
        replica.learns(7, 1, asked=4.9)
        assert replica.known[:3] == (10, 1, 5.0)
        replica.learns(8, 1, asked=5.0)
        assert replica.known[:3] == (8, 1, 5.0)

    def test_each_start_of_the_server_has_a_home_of_its_own(self, engine, clock):
        homes: dict[str, Replica] = {}
        replica = Replica(engine, "replica 1 of 1", "abc", homes, positions=True)
        assert homes == {"abc.0": replica}
        assert replica.known.home == "abc.0"
        replica.learns(10, 0x2A, asked=1.0)
        assert homes == {"abc.2a": replica}
        assert replica.known.home == "abc.2a"
        replica.learns(11, 0x2A, asked=2.0)
        assert homes == {"abc.2a": replica}
        assert replica.is_home("abc.0")
        assert replica.is_home("abc.2a")
        assert not replica.is_home("abcd.2a")

    def test_it_is_asked_where_that_is_not_enough_and_not_again_at_once(self, replica, clock, server):
        server.now_says((10, 1), (20, 1))
        assert replica.has(10, clock.now)
        assert replica.has(10, clock.now)
        assert len(server.asked) == 1

        clock.now += 0.004
        assert not replica.has(11, clock.now)
        assert len(server.asked) == 1
        clock.now = START + 0.006
        assert replica.has(11, clock.now)
        assert len(server.asked) == 2

    def test_it_is_asked_at_the_end_of_that_time(self, replica, clock, server):
        server.now_says((10, 1))
        replica.learns(1, 1, asked=START - 0.25)
        assert not replica.has(10, START, fresh=0.5)
        assert replica.has(10, START, fresh=0.25)

    def test_an_answer_that_is_not_enough_either(self, replica, clock, server):
        server.now_says((10, 1))
        assert not replica.has(11, clock.now)
        assert replica.failures == 0
        server.now_says(OSError())
        clock.now += 1
        assert not replica.has(11, clock.now)
        assert replica.failures == 1

    @pytest.mark.parametrize(("answer", "ahead"), [(True, True), (False, False)])
    def test_it_is_ahead_of_a_snapshot(self, replica, server, answer, ahead):
        server.now_says((answer,))
        assert replica.is_ahead("90:100:91,95") is ahead
        assert "xmax > 100 " in server.asked[0]
        assert "ARRAY[91,95]" in server.asked[0]


class Driver:
    """A connection of the driver, and its cursor, to a server that answers with *row*."""

    def __init__(self, row: Any) -> None:
        self.row = row
        self.did: list[str] = []

    def cursor(self) -> Driver:
        return self

    def execute(self, question: str) -> None:
        self.did.append("execute")

    def fetchone(self) -> Any:
        return self.row

    def close(self) -> None:
        self.did.append("close the cursor")

    def rollback(self) -> None:
        self.did.append("roll back")


class TestConnection:
    """A new one, to a replica."""

    @pytest.fixture
    def connect(self, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
        def connect(row: Any) -> list[str]:
            driver = Driver(row)

            def set_readonly(connection: object, value: bool) -> None:
                assert connection is driver
                driver.did.append(f"read only: {value}")

            monkeypatch.setattr(replica.dialect, "set_readonly", set_readonly, raising=False)
            replica.connected(driver, None)
            return driver.did

        return connect

    def test_it_asks_once_and_changes_nothing(self, replica, connect):
        assert connect((10, 2)) == ["execute", "close the cursor", "roll back", "read only: True"]
        assert replica.known == (10, 2, START, "abc.2")
        assert replica.failures == 0

    def test_one_to_a_server_that_is_no_standby_is_read_only_too_but_what_it_has_replayed_is_worth_nothing(
        self, replica, connect, caplog
    ):
        connect((10, 2))
        assert connect(None)[-1] == "read only: True"
        assert replica.known == (-1, 0, START, "abc.0")
        assert replica.failures == 1
        assert "NoStandby" in caplog.text


class TestPrimary:
    def test_the_floor_is_what_it_had_done_a_while_ago(self, primary, clock, server):
        assert (primary.floor, primary.latest) == (0, 0)
        for seconds, position, floor in [
            (0, 10, 10),
            (0.5, 15, 10),  # too soon to be remembered
            (1, 20, 10),
            (1.5, 25, 10),  # too soon again
            (16, 160, 10),
            (17, 170, 10),  # the lag that is allowed, and a sixteenth more
            (17.25, 180, 20),
            (18, 185, 20),
            (18.25, 190, 160),
        ]:
            clock.now = START + seconds
            server.now_says((position,))
            assert primary.ask() == position
            assert (primary.floor, primary.latest) == (floor, position), seconds

    def test_nothing_has_been_done_yet(self, primary, server):
        server.now_says((0,))
        primary.ask()
        assert primary.floor == 0

    def test_after_a_while_without_requests_it_is_what_it_has_done_by_now(self, primary, clock, server):
        server.now_says((10,), (99,))
        primary.ask()
        clock.now += 60
        primary.ask()
        assert primary.floor == 99

    def test_its_position_goes_back_where_another_server_has_taken_its_place(self, primary, server):
        server.now_says((10,), (5,))
        primary.ask()
        primary.ask()
        assert primary.latest == 5

    def test_the_floor_can_be_raised_for_as_long(self, primary, clock, server):
        server.now_says((10,))
        primary.ask()
        clock.now += 1
        server.now_says((50,))
        primary.raise_floor()
        assert primary.floor == 50
        for seconds, floor in [(2, 50), (18, 50), (18.5, 40)]:
            clock.now = START + seconds
            server.now_says((40,))
            primary.ask()
            assert primary.floor == floor, seconds

    def test_raising_it_does_not_lower_it(self, primary, clock, server):
        server.now_says((10,))
        primary.ask()
        server.now_says((5,))
        primary.raise_floor()
        assert primary.floor == 10

    def test_it_stays_where_it_is_if_the_primary_does_not_answer(self, primary, server):
        server.now_says(OSError())
        primary.raise_floor()
        assert primary.floor == 0

    def test_who_lags(self, primary, clock, server):
        assert not primary.lags(0, START)
        server.now_says((10,))
        primary.ask()
        assert not primary.lags(9, START + 15.9)
        assert primary.lags(9, START + 16)
        assert not primary.lags(10, START + 16)
        clock.now += 15
        server.now_says((50,))
        primary.ask()
        assert not primary.lags(10, START + 16)

    def test_it_is_asked_now_and_then(self, primary, clock, server):
        server.now_says((10,))
        primary.check(START)
        assert len(server.asked) == 1
        primary.check(START + 0.9)
        assert len(server.asked) == 1
        primary.check(START + 1)
        assert len(server.asked) == 2
        assert not primary._asking.locked()

    def test_one_at_a_time_asks_it(self, primary, clock, server):
        server.now_says((10,))
        with primary._asking:
            primary.check(START)
        assert server.asked == []
        primary.check(START)
        assert len(server.asked) == 1

    def test_one_that_does_not_answer_is_a_warning_and_told_once(self, primary, clock, server, caplog):
        caplog.set_level(logging.DEBUG, "sa_wsgi_session")
        server.now_says(OSError("secret"), OSError("secret"), (10,), OSError("secret"))
        for second in range(4):
            primary.check(START + second)
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert warnings == ["the primary does not tell its position: how far replicas lag is not known meanwhile"] * 2
        assert "(OSError)" in caplog.text
        assert "secret" not in caplog.text

    def test_one_without_positions_is_not_asked(self, engine, clock, server):
        primary = Primary(engine, 16, positions=False)
        primary.check(START)
        primary.raise_floor()
        assert primary.ask_or_none() is None
        assert server.asked == []
        assert primary.floor == 0


Make = Callable[..., Cluster]


class TestCluster:
    @pytest.fixture
    def make(self, engine: sa.Engine, clock: Clock) -> Make:
        def make(*urls: str, key: bytes = b"key", positions: bool = True) -> Cluster:
            engines = [sa.create_engine(url) for url in urls or ("sqlite:///a", "sqlite:///b", "sqlite:///c")]
            return Cluster(engine, engines, key=key, max_lag=16, positions=positions)

        return make

    def test_each_replica_has_a_name_for_people(self, make):
        assert [replica.name for replica in make().replicas] == ["replica 1 of 3", "replica 2 of 3", "replica 3 of 3"]

    def test_tokens_mean_the_same_in_each_process_with_that_configuration(self, make):
        one, another = make(), make()
        assert list(one.homes) == list(another.homes)
        assert one.homes.keys().isdisjoint(make(key=b"another").homes)
        assert all(len(home) == len("0123456789ab.0") for home in one.homes)
        assert make(key=bytes(64)).homes.keys() == make(key=bytes(100)).homes.keys()
        assert make(key=bytes(64)).homes.keys().isdisjoint(make(key=bytes(63) + b"a").homes)

    def test_engines_that_cannot_be_told_apart_can(self, make):
        cluster = make("sqlite://", "sqlite://", "sqlite://")
        homes = [replica.known.home for replica in cluster.replicas]
        identity = homes[0].removesuffix(".0")
        assert homes == [f"{identity}.0", f"{identity}-2.0", f"{identity}-3.0"]
        assert [cluster.find(home) for home in homes] == cluster.replicas
        assert cluster.find("elsewhere.0") is None

    def test_the_least_busy_one_and_of_several_each_in_its_turn(self, make):
        cluster = make()
        a, b, c = cluster.replicas
        assert [cluster.least_busy([a, b, c]) for _ in range(4)] == [a, b, c, a]
        a.serving.add("one")
        b.serving |= {"one", "another"}
        assert [cluster.least_busy([a, b]) for _ in range(3)] == [a, a, a]
        assert cluster.least_busy([b]) is b
        c.serving.add("one")
        assert {cluster.least_busy([a, b, c]) for _ in range(4)} == {a, c}

    def test_a_password_may_change(self, make):
        one, another = (make(f"postgresql+psycopg2://app:{password}@db1/shop") for password in ("old", "new"))
        assert one.homes.keys() == another.homes.keys()

    def test_one_that_was_never_asked_is_asked_first(self, make, server):
        cluster = make("sqlite:///a")
        server.now_says((0, 1))
        assert cluster.choose(0, frozenset(), START) is cluster.replicas[0]
        assert len(server.asked) == 1

    def test_those_are_chosen_that_are_known_to_have_it(self, make, clock, server):
        cluster = make()
        a, b, c = cluster.replicas
        for replica, position in ((a, 5), (b, 10), (c, 10)):
            replica.learns(position, 1, asked=START - 0.09)
        chosen = {cluster.choose(10, frozenset(), START) for _ in range(3)}
        assert chosen == {b, c}
        assert cluster.choose(10, frozenset({b}), START) is c
        b.fails("test")
        assert cluster.choose(10, frozenset(), START) is c
        assert server.asked == []

    def test_the_one_that_is_nearest_to_it_is_asked_first(self, make, clock, server):
        cluster = make()
        a, b, c = cluster.replicas
        for replica, position in ((a, 5), (b, 9), (c, 7)):
            replica.learns(position, 1, asked=START - 0.09)
        server.now_says((10, 1))
        assert cluster.choose(10, frozenset(), START) is b
        assert len(server.asked) == 1

    def test_all_are_asked_whose_position_is_old(self, make, clock, server):
        cluster = make()
        for replica in cluster.replicas:
            replica.learns(5, 1, asked=START - 0.11)
        server.now_says((10, 1))
        assert cluster.choose(10, frozenset(), START) is cluster.replicas[0]
        assert len(server.asked) == 3

    def test_none_where_none_has_it(self, make, clock, server):
        cluster = make()
        server.now_says((9, 1))
        assert cluster.choose(10, frozenset(), START) is None
        assert all(replica.failures == 0 for replica in cluster.replicas)

    def test_one_that_lags_leaves_the_rotation_then(self, make, clock, server, caplog):
        cluster = make("sqlite:///a")
        [replica] = cluster.replicas
        server.now_says((20,))
        cluster.primary.ask()
        clock.now += 16
        server.now_says((19, 1))
        assert cluster.choose(30, frozenset(), clock.now) is None
        assert replica.failures == 1
        assert "(it lags)" in caplog.text

    def test_listening_is_for_positions(self, make):
        for positions in (True, False):
            cluster = make(positions=positions)
            cluster.listen()
            heard = {sa.event.contains(it.engine, "connect", it.connected) for it in cluster.replicas}
            assert heard == {positions}

    def test_what_is_open_already_was_made_without_a_question(self, make, tmp_path):
        cluster = make(f"sqlite:///{tmp_path / 'replica'}")
        engine = cluster.replicas[0].engine = sa.create_engine(f"sqlite:///{tmp_path / 'replica'}", poolclass=QueuePool)
        engine.raw_connection().close()
        assert isinstance(engine.pool, QueuePool)
        assert engine.pool.checkedin() == 1
        cluster.listen()
        assert isinstance(engine.pool, QueuePool)
        assert engine.pool.checkedin() == 0

    def test_the_primary_catches_up(self, make, clock, server, monkeypatch):
        cluster = make()
        slept: list[float] = []
        monkeypatch.setattr(time, "sleep", slept.append)
        a, b, c = cluster.replicas
        b.fails("test")
        # A snapshot; one replica is ahead of it, the other one is not; another snapshot, and nobody is.
        server.now_says(("5:6:",), (True,), (False,), ("7:8:",), (False,))
        cluster.catch_up([a.known.home, b.known.home, c.known.home, "elsewhere.0"])
        assert len(server.asked) == 5
        assert slept == [0.001, 0]

    def test_it_is_waited_for_a_second_and_no_longer(self, make, clock, server, monkeypatch):
        cluster = make("sqlite:///a")
        monkeypatch.setattr(time, "sleep", lambda seconds: setattr(clock, "now", clock.now + 0.25))
        server.now_says(*[("5:6:",), (True,)] * 20)
        cluster.catch_up([cluster.replicas[0].known.home])
        assert clock.now - START == 1.25
        assert len(server.asked) == 12

    def test_what_cannot_be_asked_is_not_waited_for(self, make, clock, server, caplog):
        caplog.set_level(logging.DEBUG, "sa_wsgi_session")
        cluster = make("sqlite:///a")
        server.now_says(OSError("secret"))
        cluster.catch_up([cluster.replicas[0].known.home])
        assert "(OSError)" in caplog.text
        assert "secret" not in caplog.text
        server.now_says(("5:6:",))
        cluster.catch_up([])
        assert server.asked == []
