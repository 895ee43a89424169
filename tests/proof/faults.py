"""Faults on real databases: what they are, and what must be true when they are over.

One run (:func:`run`) is a bank behind a web server, with its clients, on a database. Meanwhile one :class:`Fault` comes
after the other; after each of them somebody has to be served again. Then the clients leave, and the :class:`Audit`
compares what they were told with what is in the database:

======================================  ==================================================================
What the client got                     How often the transfer, or the receipt of the export, may be there
======================================  ==================================================================
a complete 200                          once
any other complete answer               never; but after a 500 for a COMMIT of which the server has logged
                                        that its outcome is unknown, once or never
a cut connection, or it hung up itself  once or never
a stream that it left at the beginning  never
no connection                           never
======================================  ==================================================================

and rehearsals, blunders and half orders are never there, whatever came of them. A transfer that the view commits itself
may be there after a 500 as well; but once, for it must not be replayed.

**How a COMMIT gets lost.** A database that is told to wait for a replica commits, and then waits; whoever is cut off
while it waits has committed and is not told so. There is no replica, so it waits as long as the fault takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from tests.proof.bank import PAGES, PATIENCE, Account, Base, Page
from tests.proof.faults_clients import ACCOUNTS, BALANCE, CLIENTS, GUARD, Client, Request
from tests.proof.faults_servers import WebServer
from tests.servers import DatabaseServer, MariaDBServer, PostgreSQLServer

#: Seconds in which each kind of fault comes, once or twice.
CYCLE = 12

#: Seconds that something is stopped: longer than anybody is patient.
STALL = PATIENCE + 1


def wait_until(what: str, is_so: Callable[[], Any]) -> Any:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + GUARD
    while not (answer := is_so()):
        assert time.monotonic() < deadline, f"{what}: not within {GUARD} seconds"
        time.sleep(0.05)
    return answer


# -- the faults -------------------------------------------------------------------------------------------------------


class Database:
    """What can be done to the connections of a database, and to its server."""

    def __init__(self, server: Any, url: URL) -> None:
        self.server = server
        assert url.database is not None
        self.name: str = url.database

    def connections(self) -> list[int]:
        """All that the bank has."""
        raise NotImplementedError

    def at_work(self) -> list[int]:
        """Those of them that are in a transaction."""
        raise NotImplementedError

    def committing(self) -> list[int]:
        """Those of them that have committed, and wait for the replica."""
        raise NotImplementedError

    def end(self, connection: int) -> None:
        raise NotImplementedError

    def waiting_for_a_replica(self) -> contextlib.AbstractContextManager[None]:
        """Meanwhile, no COMMIT comes back."""
        raise NotImplementedError

    def process_to_stall(self) -> int:
        raise NotImplementedError

    def activity(self) -> list[Any]:
        """What all its connections do, for who has to find out why something has failed."""
        raise NotImplementedError


class PostgreSQL(Database):
    server: PostgreSQLServer

    def connections(self) -> list[int]:
        return self._activity("TRUE")

    def at_work(self) -> list[int]:
        return self._activity("xact_start IS NOT NULL")

    def committing(self) -> list[int]:
        return self._activity("wait_event = 'SyncRep'")

    def _activity(self, condition: str) -> list[int]:
        rows = self.server.execute(
            f"SELECT pid FROM pg_stat_activity WHERE datname = '{self.name}' AND backend_type = 'client backend' "
            f"AND {condition}"
        )
        return [pid for (pid,) in rows]

    def end(self, connection: int) -> None:
        self.server.execute(f"SELECT pg_terminate_backend({connection})")

    @contextlib.contextmanager
    def waiting_for_a_replica(self) -> Iterator[None]:
        self.server.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        self.server.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            self.server.execute("ALTER SYSTEM RESET synchronous_standby_names")
            self.server.execute("SELECT pg_reload_conf()")

    def process_to_stall(self) -> int:
        # Each connection has a process of its own.
        pids: list[int] = wait_until("a transaction", self.at_work)
        return pids[0]

    def activity(self) -> list[Any]:
        return self.server.execute(
            "SELECT pid, datname, state, wait_event, xact_start, state_change, query FROM pg_stat_activity"
        )


class MariaDB(Database):
    server: MariaDBServer

    def connections(self) -> list[int]:
        return self._processes("TRUE")

    def at_work(self) -> list[int]:
        # Whatever else runs on this server has a database of its own, and does nothing meanwhile.
        return [
            thread for (thread,) in self.server.execute("SELECT trx_mysql_thread_id FROM information_schema.innodb_trx")
        ]

    def committing(self) -> list[int]:
        return self._processes("state = 'Waiting for semi-sync ACK from slave'")

    def _processes(self, condition: str) -> list[int]:
        rows = self.server.execute(
            f"SELECT id FROM information_schema.processlist WHERE db = '{self.name}' AND {condition}"
        )
        return [connection for (connection,) in rows]

    def end(self, connection: int) -> None:
        try:
            self.server.execute(f"KILL {connection}")
        except DBAPIError as error:
            if error.orig is None or error.orig.args[0] != 1094:  # it has gone by itself in the meantime
                raise

    @contextlib.contextmanager
    def waiting_for_a_replica(self) -> Iterator[None]:
        self.server.execute("SET GLOBAL rpl_semi_sync_master_enabled = ON")
        try:
            yield
        finally:
            self.server.execute("SET GLOBAL rpl_semi_sync_master_enabled = OFF")

    def process_to_stall(self) -> int:
        # There is one process for all of them.
        return self.server.pid

    def activity(self) -> list[Any]:
        return self.server.execute(
            "SELECT id, db, command, state, time_ms, trx_id, trx_state, trx_started, info "
            "FROM information_schema.processlist LEFT JOIN information_schema.innodb_trx ON trx_mysql_thread_id = id "
            "UNION ALL SELECT trx_mysql_thread_id, NULL, NULL, NULL, NULL, trx_id, trx_state, trx_started, trx_query "
            "FROM information_schema.innodb_trx"
        )


#: What a MariaDB has to be started with, so that it may wait for a replica, and for how many milliseconds.
MARIADB_OPTIONS = ("--log-bin=log", "--server-id=1", "--binlog-format=ROW", "--rpl-semi-sync-master-timeout=60000")


class Faults:
    """All of them, in turn."""

    def __init__(self, database: Database, web: WebServer) -> None:
        self._database = database
        self._web = web
        #: How often each of them came.
        self.faults: Counter[str] = Counter()
        self.connections_ended = 0
        self.ended_last: set[int] = set()

    def cycle(self) -> list[Callable[[], None]]:
        return [
            self.end_connections,
            self.kill_worker,
            self.stall,
            self.lose_commits,
            self.restart_database,
            self.kill_worker,
            self.end_connections,
        ]

    def end_connections(self) -> None:
        """End all those at work, and as many others of the bank's, until a request is replayed because of that."""
        known = replays(self._web.log())[LOST]

        def is_replayed() -> bool:
            at_work = wait_until("a transaction", self._database.at_work)
            self.ended_last = {*at_work, *self._database.connections()[: len(at_work)]}
            for connection in self.ended_last:
                self._database.end(connection)
                self.connections_ended += 1
            time.sleep(0.1)
            return replays(self._web.log())[LOST] > known

        wait_until("a replay", is_replayed)
        self.faults["connections ended"] += 1

    def kill_worker(self) -> None:
        self._web.kill()
        self.faults["workers killed"] += 1

    def stall(self) -> None:
        pid: int = wait_until("a process to stall", self._stop_one)
        try:
            time.sleep(STALL)
        finally:
            # Of PostgreSQL's, nobody else but ourselves ends it while it is stopped.
            os.kill(pid, signal.SIGCONT)
        self.faults["stalls"] += 1

    def _stop_one(self) -> int | None:
        pid = self._database.process_to_stall()
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:  # its connection has ended in the meantime
            return None
        return pid

    def lose_commits(self) -> None:
        """End connections that have committed, until one of them was that of a request that can tell."""
        known = len(unknown_outcomes(self._web.log()))

        def is_told() -> bool:
            with self._database.waiting_for_a_replica():
                for connection in wait_until("a COMMIT", self._database.committing):
                    self._database.end(connection)
                    self.connections_ended += 1
            return len(unknown_outcomes(self._web.log())) > known

        wait_until("an unknown outcome", is_told)
        self.faults["commits lost"] += 1

    def restart_database(self) -> None:
        self._database.server.restart()
        self.faults["databases restarted"] += 1


# -- what the server has said -----------------------------------------------------------------------------------------


#: What the package names the lost races: of the databases', and of none.
CONFLICTS = {"SQLSTATE 40001", "SQLSTATE 40P01", "MySQL 1213"}
LOST = "connection lost"


def unknown_outcomes(log: str) -> set[str]:
    """The requests of which the package says that nobody knows whether they are committed."""
    return set(re.findall(r"SA_WSGI_SESSION WARNING \S+ /\w+/\w+/(\S+): the connection was lost during COMMIT", log))


def replays(log: str) -> Counter[str]:
    """How often which kind of lost race was replayed."""
    return Counter(re.findall(r"SA_WSGI_SESSION WARNING .*? lost a race \((.*?)\) and is replayed in ", log))


def notices(log: str) -> Counter[str]:
    """The transfers of which a callback was told that they are durable."""
    return Counter(re.findall(r"^DONE (\S+)$", log, re.MULTILINE))


# -- what must be true ------------------------------------------------------------------------------------------------


#: After these the transfer may be there, for the view has committed it before it failed.
COMMITTED_BY_ITSELF = {("early transfer", "500"), ("abandoned transfer", "500")}


@dataclass
class Audit:
    """What the clients were told, what the servers have logged, and what is in the database."""

    requests: list[Request]
    log: str
    balances: dict[int, int]
    #: The id, and the order.
    transfers: list[tuple[Any, ...]]
    receipts: list[str]
    faults: Faults

    def __post_init__(self) -> None:
        self._there = Counter([id for id, *_ in self.transfers] + self.receipts)
        self._unknown = unknown_outcomes(self.log)
        self._notices = notices(self.log)

    def may_be_there(self, request: Request) -> set[int]:
        """How often it may be."""
        if request.kind in ("rehearsal", "blunder", "half an order", "cut export"):
            return {0}
        if request.answer == "200":
            return {1}
        if request.answer in ("cut", "hung up") or request.id in self._unknown:
            return {0, 1}
        return {0, 1} if (request.kind, request.answer) in COMMITTED_BY_ITSELF else {0}

    def check_what_is_there(self) -> None:
        requests = {request.id: request for request in self.requests}
        assert self._there.keys() <= requests.keys()
        wrong = [
            (request, self._there[request.id])
            for request in self.requests
            if self._there[request.id] not in self.may_be_there(request)
        ]
        assert not wrong, f"not as often there as they should be: {wrong}"
        altered = [transfer for transfer in self.transfers if transfer[1:] != requests[transfer[0]].order]
        assert not altered, f"not what was ordered: {altered}"

    def check_callbacks(self) -> None:
        untrue = self._notices.keys() - {id for id, *_ in self.transfers}
        assert not untrue, f"a callback was told of transfers that are not durable: {untrue}"
        told = [
            (request, self._notices[request.id])
            for request in self.requests
            if request.kind in ("transfer", "early transfer", "abandoned transfer", "late transfer")
            and self._notices[request.id] not in ({1} if request.answer == "200" else {0, 1})
        ]
        assert not told, f"callbacks did not run exactly once: {told}"

    def check_sums(self) -> None:
        balances = dict.fromkeys(range(1, ACCOUNTS + 1), BALANCE)
        for _id, source, target, amount in self.transfers:
            balances[source] -= amount
            balances[target] += amount
        assert self.balances == balances
        assert sum(self.balances.values()) == ACCOUNTS * BALANCE
        assert min(self.balances.values()) >= 0
        # Whoever has read them all in one transaction has seen them so at any time.
        assert {request.total for request in self.requests if request.total is not None} == {ACCOUNTS * BALANCE}

    def check_answers(self) -> None:
        unanswered = [request for request in self.requests if request.answer in ("", "unanswered")]
        assert not unanswered, f"neither an answer nor a cut connection: {unanswered}"
        answers = {request.answer for request in self.requests}
        assert answers <= {"200", "409", "500", "cut", "hung up", "not connected"}

    def check_log(self) -> None:
        # Each thread has at most one connection, and there are as many connections as threads.
        assert "QueuePool limit" not in self.log
        assert "the body was dropped without a call to its close()" not in self.log
        assert "NoActiveScope" not in self.log

    def check_that_something_has_happened(self) -> None:
        assert {(request.kind, request.answer) for request in self.requests} >= TO_BE_SEEN
        assert any(request.answer == "cut" for request in self.requests)
        assert len(self.faults.faults) == len(set(self.faults.cycle()))
        codes = replays(self.log).keys()
        assert codes & CONFLICTS
        assert LOST in codes
        # Those of the lost COMMITs at the least.
        assert any(self._there[id] for id in self._unknown)

    def check(self) -> None:
        self.check_answers()
        self.check_what_is_there()
        self.check_sums()
        self.check_callbacks()
        self.check_log()
        self.check_that_something_has_happened()

    def figures(self) -> dict[str, object]:
        answers = Counter(request.answer for request in self.requests)
        return {
            "requests": len(self.requests),
            "answers": dict(sorted(answers.items())),
            "transfers": len(self.transfers),
            "receipts": len(self.receipts),
            "faults": dict(self.faults.faults),
            "connections ended": self.faults.connections_ended,
            "replays": dict(sorted(replays(self.log).items())),
            "unknown outcomes": len(self._unknown),
            "of these committed": sum(self._there[id] for id in self._unknown),
        }


# -- a run ------------------------------------------------------------------------------------------------------------


#: What clients have asked for, and what came of it, before a run is over.
TO_BE_SEEN = {
    ("transfer", "200"),
    ("transfer", "409"),
    ("early transfer", "200"),
    ("abandoned transfer", "500"),
    ("late transfer", "200"),
    ("rehearsal", "200"),
    ("blunder", "500"),
    ("export", "200"),
    ("cut export", "hung up"),
}


@dataclass
class Progress:
    """What the clients have seen so far."""

    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def see(self, request: Request) -> None:
        with self._lock:
            self.seen[request.kind, request.answer] += 1

    @property
    def served(self) -> int:
        """How many transfers the database has decided on."""
        return self.seen["transfer", "200"] + self.seen["transfer", "409"]


def open_accounts(url: URL) -> None:
    engine = sa.create_engine(url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(Account(id=number, balance=BALANCE) for number in range(1, ACCOUNTS + 1))
        session.add_all(Page(id=number, text="." * 1024) for number in range(1, PAGES + 1))
        session.commit()
    engine.dispose()


def run(server: DatabaseServer, url: URL, make_web: type[WebServer], folder: Path, seconds: float) -> Audit:
    """Serve the bank for so many seconds, with all its faults; then see what is left.

    :param url: an empty database on *server*.
    :param folder: an empty one, for what the web server says.
    """
    open_accounts(url)
    web = make_web(url, folder)
    database = (PostgreSQL if url.get_backend_name() == "postgresql" else MariaDB)(server, url)
    faults = Faults(database, web)
    progress = Progress()
    stop = threading.Event()
    with web.running():
        clients = [Client(number, web.port, progress.see) for number in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as threads:
            running = [threads.submit(client.run, stop) for client in clients]
            try:
                make_faults(faults, progress, seconds)
                wait_until("all that clients do", lambda: progress.seen.keys() >= TO_BE_SEEN)
                wait_until("a conflict", lambda: replays(web.log()).keys() & CONFLICTS)
            except BaseException:
                # pytest shows it.
                print("Connections ended last:", faults.ended_last, "\nWhat the database does:")
                print(*database.activity(), sep="\n")
                raise
            finally:
                stop.set()
                # If one has failed, that tells more.
                for each in running:
                    each.result()
        check_that_nothing_is_left(database, web)
    return Audit(
        requests=[request for client in clients for request in client.requests],
        log=web.log(),
        balances=dict(map(tuple, server.execute("SELECT id, balance FROM account", url.database))),
        transfers=[
            tuple(row) for row in server.execute("SELECT id, source, target, amount FROM transfer", url.database)
        ],
        receipts=[id for (id,) in server.execute("SELECT id FROM receipt", url.database)],
        faults=faults,
    )


def make_faults(faults: Faults, progress: Progress, seconds: float) -> None:
    """A cycle of them for every :data:`CYCLE` seconds, and at least one; after each fault, somebody is served again."""

    def be_served() -> None:
        before = progress.served
        wait_until("an answer from the database after the fault", lambda: progress.served > before)

    schedule = faults.cycle() * max(1, round(seconds / CYCLE))
    begin = time.monotonic()
    be_served()
    for number, fault in enumerate(schedule):
        time.sleep(max(0, begin + seconds * (number + 0.5) / len(schedule) - time.monotonic()))
        fault()
        be_served()
    time.sleep(max(0, begin + seconds - time.monotonic()))


def check_that_nothing_is_left(database: Database, web: WebServer) -> None:
    """The clients have gone. What they left behind ends by itself, in the web server and in the database."""

    def is_idle() -> bool:
        return all(status["checked_out"] == 0 for status in web.statuses())

    wait_until("all connections are back in their pools", is_idle)
    assert [status["left_in_registry"] for status in web.statuses()] == [0] * web.workers
    wait_until("no transaction is open", lambda: not database.at_work())
