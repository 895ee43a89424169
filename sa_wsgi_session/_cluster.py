"""A primary and its replicas: what is known of each, and how it is asked.

* A **replica** is *in the rotation* until it fails: it cannot be reached, loses a connection, or lags.  Then it is left
  alone, for longer each time, and asked again by one of the requests that come after that: by one at a time, and by no
  thread of ours.
* What is **known** of it is a position that it has replayed.  It only advances, as long as the server runs, so that
  old knowledge is good as long as it is enough.  A server that was restarted may begin further back.  Hence each new
  connection asks, before it is used: whoever has one that works knows that what was found out since that was made is
  still true.
* The **primary** tells its position now and then.  That gives the *floor*, the position that a replica must have
  replayed to lag by no more than ``max_lag``.

A database without positions has the same, with all of them 0.

All of it is shared by the threads.  What a request reads on its way is one attribute each time, which is replaced as a
whole; locks are for those that ask, and nobody waits for one who asks.

This file knows engines.  It does not know HTTP, or sessions.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from contextlib import suppress
from contextvars import copy_context
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import event

from ._binding import here
from ._errors import log, type_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.engine import Engine

monotonic = time.monotonic

# PostgreSQL's manual, "System Administration Functions".  A position is a number of bytes.
_ASK_PRIMARY = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"
_ASK_REPLICA = (
    "SELECT coalesce(pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0'), 0)::bigint, "
    "(extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint "
    "WHERE pg_is_in_recovery()"
)
_ASK_ANY = "SELECT 1"
# Whether a standby shows a transaction that a snapshot of the primary, "xmin:xmax:running,running", does not.  (The
# functions of before PostgreSQL 13, which are in all versions.)
_ASK_SNAPSHOT = "SELECT txid_current_snapshot()::text"
_ASK_AHEAD = (
    "SELECT xmax > {xmax} OR EXISTS (SELECT 1 FROM unnest(ARRAY[{running}]::bigint[]) x "
    "WHERE CASE WHEN x < xmax THEN txid_status(x) = 'committed' ELSE false END) "
    "FROM txid_snapshot_xmax(txid_current_snapshot()) xmax"
)

#: A replica is not asked for its position more often than that, in seconds: where no other one would do; and else.
_FRESH, _NEVERTHELESS = 0.005, 0.1
#: How long to wait until the primary shows what a replica has shown, in seconds.
_CATCHES_UP = 1.0
#: How long a replica is left alone that has failed, in seconds: the first time, and at most.
_SHORTEST, _LONGEST = 0.25, 10.0


class NoStandby(Exception):
    """A replica is none: it is not in recovery, because it was promoted, perhaps."""


def ask(engine: Engine, question: str) -> Any:
    """The answer's first row.  The unit of work that runs here knows nothing of it."""
    return copy_context().run(_ask, engine, question)


def _ask(engine: Engine, question: str) -> Any:
    here.set(None)
    pooled: Any = engine.raw_connection()
    try:
        driver = pooled.dbapi_connection
        # No transaction: one round trip.  (SQLAlchemy's isolation_level does the same, but 1.4 loses a place in a pool
        # when it takes that back from a connection that is broken.)
        before = driver.autocommit if engine.dialect.name == "postgresql" else None
        if before is not None:
            driver.autocommit = True
        cursor = driver.cursor()
        cursor.execute(question)
        row = cursor.fetchone()
        cursor.close()
        if before is not None:
            driver.autocommit = before
    except BaseException:
        pooled.invalidate()
        raise
    pooled.close()
    return row


class Known(NamedTuple):
    """What is known of a replica."""

    #: What it has replayed, at least; -1: it was never asked.
    position: int
    #: Changes when the server is started anew.
    incarnation: int
    #: When the question was sent, as :func:`time.monotonic` tells.
    asked: float
    #: What the token of a visitor says who is served here, by this incarnation.
    home: str


class Replica:
    """One of them."""

    def __init__(self, engine: Engine, name: str, identity: str, homes: dict[str, Replica], *, positions: bool) -> None:
        self.engine = engine
        self.dialect = engine.dialect
        #: For people.
        self.name = name
        #: For tokens: the same in each process that has the same configuration.
        self._identity = identity
        #: Who is served by it.  (A set: to add, to discard and to count are atomic, and to discard twice does no harm.)
        self.serving: set[object] = set()
        #: Where it can be found by its home.
        self._homes = homes
        self.known = Known(-1 if positions else 0, 0, float("-inf"), self._home(0))
        self._positions = positions
        self._lock, self._asking = Lock(), Lock()
        #: How often in a row; 0: it is in the rotation.
        self.failures = 0
        self._until = 0.0

    def _home(self, incarnation: int) -> str:
        home = f"{self._identity}.{incarnation:x}"
        self._homes[home] = self
        return home

    def is_home(self, home: str) -> bool:
        """Whether *home* means this replica, in this incarnation or an earlier one."""
        return home.partition(".")[0] == self._identity

    # Knowledge

    def learns(self, position: int, incarnation: int, asked: float) -> None:
        with self._lock:
            known = self.known
            if asked < known.asked:
                return
            home = known.home
            if incarnation != known.incarnation:
                self._homes.pop(home, None)
                home = self._home(incarnation)
            self.known = Known(position, incarnation, asked, home)

    def _learns_from(self, row: Any, asked: float) -> None:
        if row is None:
            raise NoStandby(f"{self.name} is not in recovery")
        self.learns(row[0], row[1], asked)

    def connected(self, driver_connection: Any, _record: object) -> None:
        """A new connection was made to it; perhaps it was started anew."""
        asked = monotonic()
        cursor = driver_connection.cursor()
        try:
            cursor.execute(_ASK_REPLICA)
            row = cursor.fetchone()
        finally:
            cursor.close()
        driver_connection.rollback()
        dialect: Any = self.dialect
        # Of some drivers SQLAlchemy does not know how; the server refuses to change anything anyway.
        with suppress(NotImplementedError):
            dialect.set_readonly(driver_connection, True)
        try:
            self._learns_from(row, asked)
        except NoStandby as error:
            # Its transactions are read-only, but what is in there may be anything.
            self.learns(-1, 0, asked)
            self.fails(type_name(error))

    def ask(self) -> bool:
        """Ask it for its position; false if it does not answer."""
        asked = monotonic()
        try:
            row = ask(self.engine, _ASK_REPLICA if self._positions else _ASK_ANY)
            if self._positions:
                self._learns_from(row, asked)
        except Exception as error:
            self.fails(type_name(error))
            return False
        return True

    def has(self, position: int, now: float, *, fresh: float = _FRESH) -> bool:
        """Whether it has replayed *position*; asked only where that is not known, and was not asked just now."""
        known = self.known
        if known.position >= position:
            return True
        return now - known.asked >= fresh and self.ask() and self.known.position >= position

    def is_ahead(self, snapshot: str) -> bool:
        """Whether it shows more than that snapshot of the primary."""
        _xmin, xmax, running = snapshot.split(":")
        return bool(ask(self.engine, _ASK_AHEAD.format(xmax=int(xmax), running=running))[0])

    # The rotation

    def is_up(self, now: float, floor: int) -> bool:
        """Whether it is in the rotation; the first request after a while finds out whether it may come back."""
        if not self.failures:
            return True
        if now < self._until or not self._asking.acquire(blocking=False):
            return False
        try:
            if not self.ask():
                return False
            if self.known.position < floor:
                self.fails("it lags")
                return False
            self.failures = 0
        finally:
            self._asking.release()
        log.warning("%s answers again, and is back in the rotation", self.name)
        return True

    def fails(self, why: str) -> None:
        """It leaves the rotation.

        :param why: for the log; nothing that a client or the database has said.
        """
        now = monotonic()
        with self._lock:
            if now < self._until:
                return  # that was known: those that were under way meet the same
            self.failures += 1
            pause = min(_LONGEST, _SHORTEST * 2.0 ** min(self.failures - 1, 64))
            self._until = now + pause
            first = self.failures == 1
        if first:
            log.warning("%s leaves the rotation (%s); it is asked again in %.2f seconds", self.name, why, pause)
        else:
            log.debug("%s stays out of the rotation (%s) for %.2f seconds", self.name, why, pause)


class Primary:
    """The primary, and how its position grows.

    :param max_lag: in seconds.
    """

    def __init__(self, engine: Engine, max_lag: float, *, positions: bool) -> None:
        self.engine = engine
        self.positions = positions
        #: What a replica in the rotation has replayed.
        self.floor = 0
        #: The newest that is known.
        self.latest = 0
        self._max_lag = max_lag
        self._interval = max_lag / 16
        self._keep = max_lag + self._interval
        self._samples: deque[tuple[float, int]] = deque()
        self._raised = (float("-inf"), 0)
        self.due = float("-inf") if positions else float("inf")
        self._lock, self._asking = Lock(), Lock()
        self._answers = True

    def ask(self) -> int:
        """Its position now: whatever was seen until now, there or on a replica, is not newer."""
        now = monotonic()
        position: int = ask(self.engine, _ASK_PRIMARY)[0]
        with self._lock:
            # Also where it goes back: another server has taken its place.
            self.latest = position
            samples = self._samples
            if not samples or now - samples[-1][0] >= self._interval:
                samples.append((now, position))
            # The oldest one decides.  After a while without requests that is a new one: who has replayed that lags by
            # less than max_lag, and of the others nobody knows.
            while samples[0][0] < now - self._keep:
                samples.popleft()
            raised = self._raised[1] if self._raised[0] >= now - self._keep else 0
            self.floor = max(samples[0][1], raised)
        return position

    def ask_or_none(self) -> int | None:
        """The same, or nothing where it cannot be had."""
        if not self.positions:
            return None
        try:
            return self.ask()
        except Exception as error:
            log.debug("the primary could not be asked for its position (%s)", type_name(error))
            return None

    def snapshot(self) -> str:
        """What it shows now."""
        return str(ask(self.engine, _ASK_SNAPSHOT)[0])

    def check(self, now: float) -> None:
        """Ask it now and then."""
        if now < self.due or not self._asking.acquire(blocking=False):
            return
        try:
            self.due = now + self._interval
            answers = self.ask_or_none() is not None
            if answers is not self._answers:
                self._answers = answers
                if not answers:
                    log.warning("the primary does not tell its position: how far replicas lag is not known meanwhile")
        finally:
            self._asking.release()

    def lags(self, position: int, now: float) -> bool:
        """Whether a replica with that position lags by more than ``max_lag``."""
        with self._lock:
            samples = self._samples
            return bool(samples) and samples[0][0] <= now - self._max_lag and position < samples[0][1]

    def raise_floor(self) -> None:
        """From now on replicas must have replayed what the primary has done by now."""
        position = self.ask_or_none()
        if position is not None:
            with self._lock:
                self._raised = (monotonic(), position)
                self.floor = max(self.floor, position)


class Cluster:
    """A primary and its replicas."""

    def __init__(
        self, primary: Engine, replicas: Iterable[Engine], *, key: bytes, max_lag: float, positions: bool
    ) -> None:
        self.positions = positions
        self.primary = Primary(primary, max_lag, positions=positions)
        engines = list(replicas)
        #: Each of them by what the token of a visitor says who is served there.
        self.homes: dict[str, Replica] = {}
        identities: set[str] = set()
        self.replicas: list[Replica] = []
        for number, engine in enumerate(engines, 1):
            url = engine.url.render_as_string(hide_password=True)
            identity = hashlib.blake2b(url.encode(), key=key[:64], digest_size=6).hexdigest()
            if identity in identities:
                identity += f"-{number}"  # engines with a creator do not tell to where it connects
            identities.add(identity)
            name = f"replica {number} of {len(engines)}"
            self.replicas.append(Replica(engine, name, identity, self.homes, positions=positions))
        self._turns = count()

    def listen(self) -> None:
        """Have each new connection to a replica ask for its position."""
        if self.positions:
            for replica in self.replicas:
                event.listen(replica.engine, "connect", replica.connected)
                # What it has open was made without that.
                replica.engine.dispose()

    def find(self, home: str) -> Replica | None:
        """The replica that was *home*, in this incarnation or an earlier one."""
        return next((replica for replica in self.replicas if replica.is_home(home)), None)

    def least_busy(self, replicas: list[Replica]) -> Replica:
        if len(replicas) == 1:
            return replicas[0]
        # Of several, each in its turn.
        turn = next(self._turns) % len(replicas)
        return min(replicas[turn:] + replicas[:turn], key=_busy)

    def choose(self, needed: int, excluded: frozenset[Replica], now: float) -> Replica | None:
        """The least busy one of those that have replayed that position."""
        primary = self.primary
        up = [replica for replica in self.replicas if replica not in excluded and replica.is_up(now, primary.floor)]
        fit = [replica for replica in up if replica.has(needed, now, fresh=_NEVERTHELESS)]
        if fit:
            return self.least_busy(fit)
        for replica in sorted(up, key=_position, reverse=True):
            if replica.has(needed, now):
                return replica
            if primary.lags(replica.known.position, now):
                replica.fails("it lags")
        return None

    def catch_up(self, homes: Iterable[str]) -> None:
        """Wait until the primary shows what these replicas have shown.

        It writes a COMMIT to its log, waits until that is on its disk, and perhaps on that of a standby, and only then
        shows what the transaction has done.  A replica may have replayed it by then.
        """
        found = [self.find(home) for home in homes]
        replicas = [replica for replica in found if replica is not None and not replica.failures]
        deadline = monotonic() + _CATCHES_UP
        try:
            while replicas:
                snapshot = self.primary.snapshot()
                replicas = [replica for replica in replicas if replica.is_ahead(snapshot)]
                if monotonic() > deadline:
                    break
                time.sleep(0.001 if replicas else 0)
        except Exception as error:
            # The request is about to meet it, too; or the replica has failed, and the window is a narrow one.
            log.debug("whether the primary shows what a replica has shown could not be asked (%s)", type_name(error))


def _busy(replica: Replica) -> int:
    return len(replica.serving)


def _position(replica: Replica) -> int:
    return replica.known.position
