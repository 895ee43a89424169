"""The oracle of the model: what the trace of an :class:`~tests.proof.programs.Episode` has to be.

It is written from the contract (the docs), from PEP 3333, and from how SQLAlchemy 2 works, and not from the package: it
imports neither the package nor SQLAlchemy.  From the bottom to the top:

* :class:`Database`, with its faults, and :class:`Session`: SQLAlchemy's, with its states and its stack of savepoints;
* :class:`Unit`: a unit of work, with its session, its :class:`Part`\\ s and its callbacks;
* :class:`Response`: what the middleware knows of one attempt to answer; :class:`Stream`: the body that it streams;
* :class:`Oracle`: plays the programs, and writes the trace.

Where the contract leaves open what has to happen, it raises :exc:`Unspecified`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from itertools import count

from tests.proof.programs import (
    Add,
    Arm,
    Break,
    Commit,
    Doom,
    Drain,
    Drop,
    Episode,
    Exchange,
    Flush,
    Inner,
    Job,
    OnCommit,
    OnRollback,
    Open,
    Program,
    Raise,
    Read,
    Remove,
    Rollback,
    Scope,
    Server,
    SetCommitAt,
    Start,
    Step,
    Steps,
    Try,
    Write,
)

#: The seeds that a query finds.
SEEDS = 3
#: What ``start_response`` raises where it is called a second time without *exc_info*, as PEP 3333's own examples do.
TWICE = "RuntimeError"
#: What the server is told of an application that never calls it.
NEVER = "RuntimeError"


class Unspecified(Exception):
    """The contract does not say what has to happen here."""


class Thrown(Exception):
    """An exception of the application, of the server or of SQLAlchemy.

    * *label*: as in the trace.
    * *ordinary*: whether ``except Exception`` catches it.
    * *cause*: what it comes of.
    * *race*: the database has lost a race, and the error is safe to replay.
    """

    def __init__(self, label: str, *, ordinary: bool = True, cause: Thrown | None = None, race: bool = False) -> None:
        super().__init__(label)
        self.label = label
        self.ordinary = ordinary
        self.cause = cause
        self.race = race

    def comes_of_a_race(self) -> bool:
        error: Thrown | None = self
        while error is not None:
            if error.race:
                return True
            error = error.cause
        return False


# -- the database -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Connection:
    """A connection, with the transaction that was begun on it."""

    #: What was inserted in the transaction, in the order in which it was.
    inserted: list[int] = field(default_factory=list)
    #: Something was, even if it was rolled back to a ``SAVEPOINT`` since.
    changed: bool = False
    #: Neither committed nor rolled back, and no ``COMMIT`` has failed.
    active: bool = True
    #: The error that told of its loss.
    lost: Thrown | None = None
    #: The error of a ``COMMIT``.
    refused: Thrown | None = None


class Database:
    """What is durable, and what fails next."""

    def __init__(self, attempts: list[Attempt]) -> None:
        self.durable: set[int] = set()
        self._faults: dict[str, str] = {}
        self._attempts = attempts

    def seen(self) -> tuple[str, ...]:
        """What another connection sees."""
        return tuple(f"t{token}" for token in sorted(self.durable))

    def arm(self, what: str, error: str) -> None:
        match what:
            case "rollback" | "connect":
                error = "plain"
            case "committed":
                error = "disconnect"
        self._faults[what] = error

    def connect(self) -> Connection:
        if self._faults.pop("connect", ""):
            raise Thrown("OperationalError")
        return Connection()

    def execute(self, connection: Connection, unit: Unit) -> None:
        """A statement.  It is for the caller to do what it does."""
        self._usable(connection)
        error = self._faults.pop("execute", None)
        if error is None:
            return
        thrown = self._error(error, race=error != "plain")
        if error == "disconnect":
            connection.lost = thrown
        if thrown.race:
            self._met(thrown, unit)
        raise thrown

    def savepoint(self, connection: Connection) -> int:
        """``SAVEPOINT``: a mark to which can be rolled back."""
        self._usable(connection)
        return len(connection.inserted)

    def release(self, connection: Connection) -> None:
        self._usable(connection)

    def rollback_to(self, connection: Connection, mark: int) -> None:
        if connection.lost is None and connection.active:
            del connection.inserted[mark:]

    def commit(self, connection: Connection, unit: Unit) -> None:
        """``COMMIT``, where the transaction is one that can still be committed."""
        if not connection.active:
            raise Thrown("PendingRollbackError", cause=connection.refused or connection.lost)
        connection.active = False
        self._usable(connection)
        error = self._faults.pop("commit", None)
        if error is not None:
            # What is said to be lost, or BUSY, at COMMIT: the first may be durable, the second is not.
            # Where nothing was changed, there is nothing that might be durable.
            unknown = error == "disconnect" and connection.changed
            thrown = connection.refused = self._error(error, race=error != "plain" and not unknown)
            if error == "disconnect":
                connection.lost = thrown
            for attempt in self._attempts:
                attempt.commits(sure=None if thrown.race else unknown)
            if thrown.race:
                self._met(thrown, unit)
            raise thrown
        changed = bool(connection.inserted)
        self.durable.update(connection.inserted)
        answer = self._faults.pop("committed", None)
        for attempt in self._attempts:
            attempt.commits(sure=changed or (answer is not None and connection.changed))
        if answer is not None:
            thrown = connection.refused = connection.lost = self._error(answer, race=not connection.changed)
            if thrown.race:
                self._met(thrown, unit)
            raise thrown

    def rollback(self, connection: Connection) -> None:
        """``ROLLBACK``, where there is something to roll back and somebody to ask."""
        if not connection.active:
            return
        connection.active = False
        if connection.lost is None and self._faults.pop("rollback", ""):
            raise Thrown("OperationalError")

    def _usable(self, connection: Connection) -> None:
        if connection.lost is not None:
            raise Thrown("PendingRollbackError", cause=connection.lost)

    def _error(self, error: str, *, race: bool) -> Thrown:
        return Thrown("ProgrammingError" if error == "disconnect" else "OperationalError", race=race)

    def _met(self, thrown: Thrown, unit: Unit) -> None:
        for attempt in self._attempts:
            attempt.conflicts.append(Conflict(own=attempt.unit is unit))


# -- SQLAlchemy's session ---------------------------------------------------------------------------------------------


class State(Enum):
    """Of a :class:`Level`, as SQLAlchemy's ``SessionTransactionState``."""

    ACTIVE = auto()
    #: ``COMMIT`` (or ``RELEASE``) was sent, and has failed.
    PREPARED = auto()
    #: A flush has failed, and what it was in was rolled back.
    DEACTIVE = auto()
    CLOSED = auto()


@dataclass(eq=False)
class Level:
    """A transaction of a session, or a ``SAVEPOINT`` in it: SQLAlchemy's ``SessionTransaction``."""

    parent: Level | None
    state: State = State.ACTIVE
    connection: Connection | None = None
    #: Where its ``SAVEPOINT`` was set; ``None`` where it has none, or none any more.
    mark: int | None = None
    #: Why it is deactive.
    cause: Thrown | None = None
    #: Of the whole transaction: statements other than reads were sent.
    changed: bool = False
    #: Of the whole transaction: its results that may still be open.
    results: list[Result] = field(default_factory=list)

    def root(self) -> Level:
        level = self
        while level.parent is not None:
            level = level.parent
        return level

    def over(self) -> bool:
        """Of the whole transaction: nothing can be read in it any more."""
        return self.state is not State.ACTIVE or (self.connection is not None and self.connection.lost is not None)


@dataclass(eq=False)
class Result:
    """A result that was left open."""

    left: int
    level: Level
    kept: bool = True
    #: By an exception that has escaped from a joined request: the unit notes it as the cause of what it refuses.
    may_be_kept: bool = False

    def lost(self) -> bool:
        return self.level.over()


class Session:
    """SQLAlchemy's, of one unit of work."""

    def __init__(self, database: Database, unit: Unit) -> None:
        self._database = database
        self._unit = unit
        #: The tokens to be inserted; ``None`` is a row that will be refused.
        self.pending: list[int | None] = []
        self.level: Level | None = None

    def add(self, row: int | None) -> None:
        self._begin()
        self.pending.append(row)

    def flush(self) -> None:
        if not self.pending:
            return
        level = self._begin()
        self._demand(level)
        try:
            connection = self._connect(level)
            level.root().changed = True
            connection.changed = True
            self._database.execute(connection, self._unit)
            if None in self.pending:
                raise Thrown("IntegrityError")
        except Thrown as error:
            level.cause = error
            try:
                self._undo(level)
            except Thrown as second:
                second.cause = error
                raise second from None
            raise
        connection.inserted += [row for row in self.pending if row is not None]
        self.pending.clear()
        self._unit.changes()

    def present(self) -> Level:
        """The transaction that there is, begun now if there is none."""
        return self._begin().root()

    def query(self) -> Level:
        """A ``SELECT``, in the transaction that is returned."""
        self.flush()
        level = self._begin()
        self._demand(level)
        self._database.execute(self._connect(level), self._unit)
        return level.root()

    def begin_nested(self) -> Level:
        parent = self._begin()
        self._demand(parent)
        self.flush()
        self.level = Level(parent)
        return self.level

    def commit(self) -> None:
        level: Level | None = self._begin()
        while level is not None:
            self.commit_level(level)
            level = level.parent

    def commit_level(self, level: Level) -> None:
        """Commit the innermost level: ``COMMIT``, or ``RELEASE SAVEPOINT``."""
        if level.state is not State.PREPARED:
            self._demand(level)
            self._unit.check(level)
            self.flush()
            level.state = State.PREPARED
        if level.connection is not None:
            if level.parent is None:
                self._database.commit(level.connection, self._unit)
            elif level.mark is None:
                # Its RELEASE has failed before, which only happens on a lost connection.
                raise Thrown("PendingRollbackError", cause=level.connection.lost)
            else:
                level.mark = None
                self._database.release(level.connection)
        self._unit.ends(level, committed=True)
        self._leave(level)

    def rollback(self) -> None:
        level = self.level
        while level is not None:
            self.rollback_level(level)
            level = level.parent

    def rollback_level(self, level: Level) -> None:
        """Roll the innermost level back: ``ROLLBACK``, or ``ROLLBACK TO SAVEPOINT``."""
        try:
            if level.state is not State.DEACTIVE:
                self._undo(level)
        finally:
            self.pending.clear()
            self._unit.ends(level, committed=False)
            self._leave(level)

    def close(self) -> None:
        self.pending.clear()
        while self.level is not None:
            level = self.level
            self._unit.ends(level, committed=False)
            self._leave(level)
            if level.connection is None:
                continue
            if level.parent is None:
                self._database.rollback(level.connection)
            elif level.mark is not None:
                self._database.rollback_to(level.connection, level.mark)

    def holds(self, level: Level) -> bool:
        """Whether this level is still one of those of the present transaction."""
        present = self.level
        while present is not None and present is not level:
            present = present.parent
        return present is level

    def has_open_result(self) -> bool:
        if self.level is None:
            return False
        root = self.level.root()
        if root.over():
            return False
        if any(result.kept for result in root.results):
            return True
        if any(result.may_be_kept for result in root.results):
            raise Unspecified("a result that an exception keeps, if anything does")
        return False

    def has_changes(self) -> bool:
        return bool(self.pending) or (self.level is not None and self.level.root().changed)

    def _begin(self) -> Level:
        if self.level is None:
            self.level = Level(None)
            self._unit.begins(self.level)
        return self.level

    def _demand(self, level: Level) -> None:
        """That it is active."""
        match level.state:
            case State.DEACTIVE:
                raise Thrown("PendingRollbackError", cause=level.cause)
            case State.PREPARED:
                connection = level.connection
                cause = None if connection is None else connection.refused or connection.lost
                raise Thrown("InvalidRequestError", cause=cause)

    def _connect(self, level: Level) -> Connection:
        if level.connection is None:
            if level.parent is None:
                level.connection = self._database.connect()
            else:
                connection = self._connect(level.parent)
                level.mark = self._database.savepoint(connection)
                level.connection = connection
        return level.connection

    def _undo(self, level: Level) -> None:
        """Roll back what was done in the level, of which then nothing but its end is left."""
        level.state = State.DEACTIVE
        self.pending.clear()
        if level.connection is None:
            return
        if level.parent is None:
            self._database.rollback(level.connection)
        elif level.mark is not None:
            self._database.rollback_to(level.connection, level.mark)
            level.mark = None

    def _leave(self, level: Level) -> None:
        level.state = State.CLOSED
        self.level = level.parent


# -- the unit of work -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Callback:
    """What was given to ``on_commit()`` or ``on_rollback()``."""

    name: str
    #: For ``on_commit()``.
    commit: bool
    what: str
    #: The transaction to which it belongs; ``None`` where that is still to begin.
    level: Level | None
    #: It waits for the next time that no session is bound.
    due: bool = False


@dataclass(eq=False)
class Part:
    """The whole of a unit of work, or a ``"nested"`` part of it."""

    level: Level | None = None
    doomed: bool = False
    #: What has escaped from a part that had joined, and what must not be committed because of that.
    spoilt: tuple[Thrown, Level] | None = None


class Unit:
    """A unit of work: of a request, of a job, of a ``"requires_new"`` part."""

    def __init__(self, database: Database, *, commit_at: str = "start") -> None:
        self._database = database
        self.commit_at = commit_at
        #: The status was handed on: ``commit_at`` has been read.
        self.begun = False
        #: The response has failed before that.
        self.failed = False
        self.session = Session(database, self)
        self.parts = [Part()]
        self.callbacks: list[Callback] = []
        #: ``SessionScope.attempt``.
        self.number = 1
        #: The attempt to do it, as long as it may be replayed.
        self.attempt: Attempt | None = None

    @property
    def doomed(self) -> bool:
        return self.parts[0].doomed

    def spoil(self, part: Part, error: Thrown) -> None:
        """What the part has done may be half of what it should be."""
        held = part.level is not None and self.session.holds(part.level)
        # Where it is no part of the whole, or the application has ended its SAVEPOINT: all, or what was done since.
        level = part.level if held and part.level is not None else self.session.present()
        if part.spoilt is None or part.spoilt[1] is not level:
            part.spoilt = error, level

    def check(self, level: Level) -> None:
        """That nothing forbids to commit it."""
        for part in self.parts:
            if part.spoilt is not None and part.spoilt[1] is level:
                raise Thrown("RollbackOnlyError", cause=part.spoilt[0])

    # What the session tells

    def begins(self, level: Level) -> None:
        for callback in self.callbacks:
            if callback.level is None and not callback.due:
                callback.level = level

    def changes(self) -> None:
        """Something was changed in the database."""
        if self.attempt is not None:
            for conflict in self.attempt.conflicts:
                if conflict.undone:
                    conflict.settled = True

    def ends(self, level: Level, *, committed: bool) -> None:
        refused = level.connection.refused if level.connection is not None and level.parent is None else None
        for callback in list(self.callbacks):
            if callback.level is not level or callback.due:
                continue
            if committed and level.parent is not None:
                callback.level = level.parent
            elif not committed and not callback.commit and refused is not None and refused.label == "ProgrammingError":
                raise Unspecified("on_rollback() of a transaction of which nobody knows whether it was committed")
            else:
                self._decide(callback, committed=committed)

    def _decide(self, callback: Callback, *, committed: bool) -> None:
        if callback.commit is committed:
            callback.due = True
        else:
            self.callbacks.remove(callback)

    def _decide_early_ones(self, *, committed: bool) -> None:
        """The callbacks that have waited for a transaction, and none has come."""
        for callback in list(self.callbacks):
            if callback.level is None and not callback.due:
                self._decide(callback, committed=committed)

    # What the application does with its session, beyond using it

    def roll_back(self) -> None:
        """The application's own ``rollback()``."""
        try:
            self.session.rollback()
        finally:
            self._begins_anew()

    def remove(self) -> None:
        """The application's own ``remove()``."""
        try:
            self.session.close()
        finally:
            self._begins_anew()
        self.session = Session(self._database, self)

    def _begins_anew(self) -> None:
        for part in self.parts:
            part.spoilt = None
        if self.attempt is not None:
            for conflict in self.attempt.conflicts:
                conflict.undone = conflict.undone or conflict.own

    # What is done with it at its end

    def commit(self) -> None:
        """Commit it, or roll it back and tell why."""
        try:
            if self.session.level is not None:
                self.check(self.session.level.root())
                self.session.commit()
        except Thrown:
            self.abort()
            raise
        self._decide_early_ones(committed=True)

    def cannot_commit(self) -> bool:
        """It will raise where it is committed, unless the application rolls back."""
        level = self.session.level
        if level is None:
            return False
        spoilt = self.parts[0].spoilt
        return level.state is not State.ACTIVE or (spoilt is not None and spoilt[1] is level.root())

    def abort(self) -> None:
        """Roll it back.  What fails meanwhile is logged, no more."""
        with suppress(Thrown):
            self.session.rollback()
        self.parts[0].spoilt = None
        self._decide_early_ones(committed=False)

    def end(self) -> None:
        """What is left is rolled back, and the session removed."""
        self.abort()
        self.session.close()


# -- attempts ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Conflict:
    """A race that was lost in an attempt."""

    #: In the session of the attempt's own unit of work.
    own: bool
    #: The application has rolled back all.
    undone: bool = False
    #: And then has changed something else.
    settled: bool = False


@dataclass(eq=False)
class Attempt:
    """An attempt to answer a request, or to do a job."""

    unit: Unit
    last: bool
    conflicts: list[Conflict] = field(default_factory=list)
    #: Something of it is durable, or may be.
    kept: bool = False
    #: Something was committed, of which the contract does not say whether it counts.
    perhaps_kept: bool = False
    #: Other threads do something for it, of which it does not hear.
    hidden: int = 0

    def commits(self, *, sure: bool | None) -> None:
        """A ``COMMIT``: something is durable (or may be), nothing was changed (or has failed), or surely not done."""
        if sure is None:
            return
        if sure and not self.hidden:
            self.kept = True
        else:
            self.perhaps_kept = True

    def failed_by(self, error: Thrown | None) -> str | None:
        """Why it is to be replayed; ``None`` where it is not.  Without *error*, it has answered with a 5xx.

        Whether it is open is told by a reason that begins with a question mark.
        """
        if error is not None and error.comes_of_a_race():
            return "lost"
        unsettled = [conflict for conflict in self.conflicts if not conflict.settled]
        if not unsettled:
            return None
        if error is not None:
            return "?another exception, after a lost race that was swallowed"
        own = [conflict for conflict in unsettled if conflict.own]
        if not own:
            return "?a 5xx, after a lost race of another unit of work that was swallowed"
        if own[-1].undone and self.unit.session.pending:
            return "?a 5xx, after a lost race that was rolled back, with a new change that is not flushed"
        return "lost"

    def replayed(self, reason: str | None) -> bool:
        """Whether it is, given that reason."""
        if reason is None or self.last or self.unit.begun or self.kept:
            return False
        if reason.startswith("?"):
            raise Unspecified(reason[1:])
        if self.perhaps_kept:
            raise Unspecified("a replay after a COMMIT of nothing, or one that has failed, or on another thread")
        return True


class Replay(Exception):
    """This attempt was undone."""


# -- requests ---------------------------------------------------------------------------------------------------------


class Front:
    """The side of the server that an application, or the middleware, sees."""

    def __init__(self, oracle: Oracle, who: str, plan: Server) -> None:
        self._oracle = oracle
        self._who = who
        self._plan = plan
        #: A chunk, or something written, has come.
        self.begun = False

    def start(self, status: object, error: Thrown | None) -> None:
        self._oracle.tell("start", self._who, status, self._oracle.database.seen())
        if self._plan.refuses:
            raise Thrown("Refusal")
        if error is not None and self.begun:
            raise error

    def write(self, data: bytes) -> None:
        self.begun = True
        self._oracle.tell("written", self._who, data, self._oracle.database.seen())


@dataclass(eq=False)
class Player:
    """Whoever runs a program: an exchange or a job."""

    who: str
    #: The number of the present attempt.
    attempt: int = 1
    #: The results that the program keeps.
    results: list[Result] = field(default_factory=list)
    #: ``start_response``, where there is one.
    start: Callable[[object, Thrown | None], None] | None = None
    #: ``write``, of the present attempt.
    write: Callable[[bytes], None] | None = None
    #: ``start_response`` has returned in the present attempt.
    started: bool = False
    #: The unit of work that the environ tells of.
    unit: Unit | None = None
    #: What is no ``Exception``, and has reached its server.
    fatal: Thrown | None = None


class Body:
    """What an application has returned."""

    #: ``close()`` can be called.
    closeable = True

    def next(self) -> bytes | None:
        """The next chunk, or ``None`` at the end."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing, by default."""

    def drop(self) -> None:
        """Nothing, by default."""


class Plain(Body):
    """A list, a tuple, or a file."""

    def __init__(self, chunks: int, *, closeable: bool) -> None:
        self._chunks = iter(range(1, chunks + 1))
        self.closeable = closeable

    def next(self) -> bytes | None:
        chunk = next(self._chunks, None)
        return None if chunk is None else b"%d" % chunk


class Own(Body):
    """An iterable, or a generator, of the application."""

    def __init__(self, oracle: Oracle, player: Player, program: Program) -> None:
        self._oracle = oracle
        self._player = player
        self._program = program
        self._place = 0
        self._generator = program.body == "generator"
        self._over = False
        self.closeable = self._generator or program.close is not None

    def next(self) -> bytes | None:
        if self._over:
            return None
        program, place = self._program, self._place
        try:
            if self._generator and place == 0:
                self._oracle.run(program.view, self._player)
            self._place = place + 1
            if place < len(program.chunks):
                self._oracle.run(program.chunks[place], self._player)
                return b"%d" % self._place
            self._oracle.run(program.last, self._player)
        except Thrown:
            if self._generator:
                self._end()
            raise
        self._end()
        return None

    def close(self) -> None:
        if self._generator:
            self._end()
        elif self._program.close is not None:
            self._oracle.tell("closing", self._player.who)
            self._oracle.run(self._program.close, self._player)

    def drop(self) -> None:
        if self._generator:
            self._end()

    def _end(self) -> None:
        """It is at its end.  What a generator has kept goes with it."""
        self._over = True
        if self._generator:
            for result in self._player.results:
                result.kept = False
            self._player.results = []


class Joined(Body):
    """The body of a request that has joined the one around it: untouched, but an exception spoils the whole."""

    def __init__(self, unit: Unit, body: Body) -> None:
        self._unit = unit
        self._body = body
        # What is no list, tuple or file is wrapped.
        self.closeable = body.closeable or isinstance(body, Own)

    def next(self) -> bytes | None:
        with joined(self._unit):
            return self._body.next()

    def close(self) -> None:
        with joined(self._unit):
            self._body.close()

    def drop(self) -> None:
        self._body.drop()


class Response:
    """What the middleware knows of an attempt to answer."""

    def __init__(self, oracle: Oracle, unit: Unit, front: Front) -> None:
        self._oracle = oracle
        self._unit = unit
        self._front = front
        self.status: str | None = None
        #: It is vetoed.
        self.refused = False
        #: The server has refused the response: nothing can be written.
        self.refused_by_server = False
        #: What write() could not do, and has told the application.
        self.unwritten: Thrown | None = None
        #: What the application did wrong: where it has swallowed that, the server is told all the same, unless an error
        #: page has answered it.
        self.misuse: Thrown | None = None
        self.answered = False
        #: The attempt has failed: nothing is handed on any more.
        self.failed = False

    def start(self, status: object, error: Thrown | None) -> None:
        """``start_response``, as the application has it."""
        if self._unit.begun:
            self._start_late(status, error)
            return
        if self.failed and self.misuse is not None:
            raise Unspecified("start_response(), after its error has been told to the server")
        try:
            if error is None and (self.status is not None or self.misuse is not None):
                raise Thrown(TWICE)
            self._record(status)
        except Thrown as misuse:
            self.misuse = misuse
            raise
        self.answered = self.misuse is not None

    def write(self, data: bytes) -> None:
        """``write``, as the application has it."""
        if self._unit.begun:
            self._oracle.call_back(self._unit)
            if self.refused_by_server:
                raise Thrown("RuntimeError")
        else:
            if self.failed or self.unwritten is not None:
                raise Unspecified("write() after the response has failed")
            self._settle_early()
        self._front.write(data)

    def check(self) -> None:
        """Step 3, as far as it can fail."""
        if self.misuse is not None and not (self.answered and self.refused):
            raise self.misuse
        if self.status is None:
            raise Thrown(NEVER)

    def keeps(self) -> bool:
        """Whether what was done is to be committed."""
        return not (self.refused or self._unit.doomed)

    def settle(self, *, streamed: bool) -> None:
        """Step 4."""
        unit = self._unit
        reads_on = unit.session.has_open_result() and not unit.session.has_changes()
        if streamed and (reads_on or (self.keeps() and unit.commit_at == "end")):
            # What cannot be committed at the end is told while an error is still an error page.
            if self.keeps() and unit.cannot_commit():
                unit.commit()
            return
        self.decide()

    def decide(self) -> None:
        """Commit or roll back what there is."""
        if self.keeps():
            self._unit.commit()
        else:
            self._unit.abort()

    def forward(self) -> None:
        self._unit.begun = True
        try:
            self._front.start(self.status, None)
        except Thrown:
            self.refused_by_server = True
            raise

    def _record(self, status: object) -> None:
        self.status = self._checked(status)
        self.refused = self.status[0] not in "123"

    @staticmethod
    def _checked(status: object) -> str:
        if not isinstance(status, str):
            raise Thrown("TypeError")
        if status in ("", "20 OK"):
            raise Thrown("ValueError")
        return status

    def _start_late(self, status: object, error: Thrown | None) -> None:
        """After the response has begun.  What goes wrong may be swallowed: then there is still an error at the end."""
        if self.failed:
            raise Unspecified("start_response() after the server has refused the response")
        try:
            if error is None:
                raise Thrown(TWICE)
            checked = self._checked(status)
            self._front.start(status, error)
        except Thrown as misuse:
            self._unit.spoil(self._unit.parts[0], misuse)
            raise
        if self.refused and checked[0] in "123":
            raise Unspecified("a success, after an error has rolled back the first half")
        self._record(status)

    def _settle_early(self) -> None:
        try:
            self.check()
            self.settle(streamed=True)
        except Thrown as error:
            if self._oracle.innermost() is not self._unit:
                raise Unspecified("a write() that fails within a requires_new part") from error
            self.unwritten = error
            raise
        self._oracle.call_back(self._unit)
        try:
            self.forward()
        except Thrown as error:
            self.unwritten = error
            raise


class Stream(Body):
    """The body that the middleware hands on."""

    def __init__(self, oracle: Oracle, unit: Unit, response: Response, body: Body, first: list[bytes | None]) -> None:
        self._oracle = oracle
        self._unit = unit
        self._response = response
        self._body = body
        #: The chunk that was pulled already, if one was; ``None`` is the end.
        self._first = first
        self._well = False
        self._closed = False

    def next(self) -> bytes | None:
        error: Thrown | None = None
        chunk: bytes | None = None
        with self._oracle.bound(self._unit):
            try:
                chunk = self._first.pop() if self._first else self._body.next()
                if chunk is None:
                    self._response.decide()
                    self._well = True
            except Thrown as thrown:
                error = thrown
                self._unit.abort()
        self._oracle.call_back(self._unit)
        if error is not None:
            raise error
        return chunk

    def close(self) -> None:
        self._close(committed=self._well)

    def drop(self) -> None:
        with suppress(Thrown):
            self._close(committed=self._well)

    def _close(self, *, committed: bool) -> None:
        if self._closed:
            return
        self._closed = True
        error: Thrown | None = None
        with self._oracle.bound(self._unit):
            try:
                self._body.close()
                if committed:
                    self._response.decide()
            except Thrown as thrown:
                error = thrown
            self._unit.end()
        self._oracle.call_back(self._unit)
        if error is not None:
            raise error


@contextmanager
def joined(unit: Unit) -> Iterator[None]:
    """A part that has joined."""
    try:
        yield
    except Thrown as error:
        unit.spoil(unit.parts[-1], error)
        raise


# -- the whole --------------------------------------------------------------------------------------------------------


class Oracle:
    """Plays an episode."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode
        self._attempts: list[Attempt] = []
        self.database = Database(self._attempts)
        self.trace: list[tuple[object, ...]] = []
        #: The units of work that are bound, the innermost one last.
        self._units: list[Unit] = []
        self._tokens = count(1)
        self._exceptions = count(1)
        self._players = count(1)
        self._callbacks = count(1)

    def innermost(self) -> Unit:
        """The unit of work at whose session the code is."""
        return self._units[-1]

    def tell(self, *event: object) -> None:
        self.trace.append(event)

    def play(self) -> list[tuple[object, ...]]:
        going = [self._part(part) for part in self._episode.parts]
        for index in self._episode.order:
            if not going:
                break
            turn = going[index % len(going)]
            if next(turn, _OVER) is _OVER:
                going.remove(turn)
        for turn in going:
            for _ in turn:
                pass
        return self.trace

    def _part(self, part: Exchange | Job) -> Iterator[None]:
        """What each ``next`` of it does is a turn."""
        player = Player(f"x{next(self._players)}")
        if isinstance(part, Job):
            self._job(part, player)
        else:
            yield from self._exchange(part, player, None)

    # The server

    def _exchange(self, exchange: Exchange, player: Player, outer: Unit | None) -> Iterator[None]:
        """A request, in the turns of its server; within *outer*, where it has joined that."""
        server, who = exchange.server, player.who
        front = Front(self, who, server)

        spoils = False

        def raised(where: str, error: Thrown) -> None:
            nonlocal spoils
            spoils = outer is not None
            self.tell("raised", who, where, error.label)
            if not error.ordinary:
                player.fatal = player.fatal or error

        try:
            if outer is None:
                body = self._request(exchange.program, player, front)
            else:
                body = self._joined_request(exchange.program, player, front, outer)
        except Thrown as error:
            raised("call", error)
        else:
            reads = 0
            while server.reads is None or reads < server.reads:
                yield
                try:
                    chunk = body.next()
                except Thrown as error:
                    raised("next", error)
                    break
                if chunk is None:
                    self.tell("end", who, self.database.seen())
                    break
                reads += 1
                front.begun = True
                self.tell("chunk", who, chunk, self.database.seen())
            for _ in range(server.closes if body.closeable else 0):
                yield
                try:
                    body.close()
                except Thrown as error:
                    raised("close", error)
                else:
                    self.tell("closed", who, self.database.seen())
            yield
            player.unit = None  # with its environ
            body.drop()
            self.tell("dropped", who, self.database.seen())
        for result in player.results:
            result.kept, result.may_be_kept = False, spoils

    def _inner(self, step: Inner, outer: Player) -> None:
        shares = step.shares and outer.unit is not None
        hops = step.exchange.server.hops
        if shares and hops:
            raise Unspecified("a request that joins from another thread")
        if shares and self._units[-1] is not outer.unit:
            raise Unspecified("a request that joins, from within a requires_new part")
        player = Player(f"x{next(self._players)}")
        hidden = list(self._attempts) if hops else []
        for attempt in hidden:
            attempt.hidden += 1
        for _ in self._exchange(step.exchange, player, outer.unit if shares else None):
            pass
        for attempt in hidden:
            attempt.hidden -= 1
        if player.fatal is not None:
            raise player.fatal

    # The middleware

    def _request(self, program: Program, player: Player, front: Front) -> Body:
        for number in count(1):
            unit = Unit(self.database, commit_at=self._episode.commit_at)
            self._next_attempt(player, number, unit)
            with suppress(Replay):
                return self._attempt(program, player, front, unit, last=number >= self._episode.attempts)
        raise AssertionError("the last attempt is not replayed")

    def _joined_request(self, program: Program, player: Player, front: Front, unit: Unit) -> Body:
        """It is the business of the request around it: nothing is recorded, settled, or wrapped."""
        player.unit = unit
        player.attempt = unit.number
        player.start, player.write = front.start, front.write
        with joined(unit):
            body = self._call(program, player)
        return Joined(unit, body)

    def _attempt(self, program: Program, player: Player, front: Front, unit: Unit, *, last: bool) -> Body:
        response = Response(self, unit, front)
        player.unit = unit
        player.start, player.write = response.start, response.write
        attempt = unit.attempt = Attempt(unit, last)
        self._attempts.append(attempt)
        streamed = program.body in ("iterable", "generator")
        body: Body | None = None
        first: list[bytes | None] = []
        failure: Thrown | None = None
        replay = False
        with self.bound(unit):
            try:
                body = self._call(program, player)
                if response.status is None and streamed:
                    first.append(body.next())
                if response.unwritten is not None:
                    raise Unspecified("what write() has told the application was swallowed")
                response.check()
                assert response.status is not None
                if response.status.startswith("5") and attempt.replayed(attempt.failed_by(None)):
                    replay = True
                elif not unit.begun:
                    # What has turned out to have no chunk needs nothing that outlives the start.
                    response.settle(streamed=streamed and first != [None])
                elif not streamed:
                    response.decide()
            except Thrown as error:
                failure = error
            if failure is not None or replay:
                reason = attempt.failed_by(failure)
                self._fail(response, unit, body)
                if failure is not None:
                    replay = attempt.replayed(reason)
                elif attempt.kept:
                    raise Unspecified("the close() of an error page that is to be replayed has committed something")
            if failure is not None or replay or not streamed:
                unit.end()
        self._attempts.pop()
        unit.attempt = None
        if replay:
            self._replay()
        self.call_back(unit)
        if failure is not None:
            raise failure
        assert body is not None
        if not unit.begun:
            try:
                response.forward()
            except Thrown:
                if streamed:
                    with self.bound(unit):
                        self._fail(response, unit, body)
                        unit.end()
                    self.call_back(unit)
                raise
        return Stream(self, unit, response, body, first) if streamed else body

    def _fail(self, response: Response, unit: Unit, body: Body | None) -> None:
        """Roll back what the attempt has done, and close its body."""
        response.failed = unit.failed = True
        unit.abort()
        if body is not None and isinstance(body, Own):
            # The first exception stays the one that is raised.
            with suppress(Thrown):
                body.close()

    def _call(self, program: Program, player: Player) -> Body:
        """Call the application."""
        self.tell("attempt", player.who, player.attempt)
        match program.body:
            case "list" | "tuple":
                self.run(program.view, player)
                return Plain(len(program.chunks), closeable=False)
            case "file":
                self.run(program.view, player)
                return Plain(1, closeable=True)
            case "iterable":
                self.run(program.view, player)
        return Own(self, player, program)

    # Units of work

    @contextmanager
    def bound(self, unit: Unit) -> Iterator[None]:
        self._units.append(unit)
        try:
            yield
        finally:
            self._units.pop()

    def _replay(self) -> None:
        if any(around.session.pending for around in self._units):
            raise Unspecified("a replay within a unit of work that has changed something and not flushed it")
        raise Replay

    def _next_attempt(self, player: Player, number: int, unit: Unit) -> None:
        player.attempt = unit.number = number
        player.started = False
        for result in player.results:
            result.kept = False
        player.results = []

    def _job(self, job: Job, player: Player) -> None:
        attempts = self._episode.attempts if job.decorated else 1
        for number in count(1):
            unit = Unit(self.database)
            self._next_attempt(player, number, unit)
            attempt = Attempt(unit, last=number >= attempts)

            def steps() -> None:
                self.tell("attempt", player.who, player.attempt)
                self.run(job.steps, player)

            try:
                self._work(unit, steps, attempt)
            except Replay:
                continue
            except Thrown as error:
                self.tell("raised", player.who, "job", error.label)
            else:
                self.tell("done", player.who, self.database.seen())
            return

    def _work(self, unit: Unit, steps: Callable[[], None], attempt: Attempt | None = None) -> None:
        """Do it in a unit of work of its own, from its begin to its end."""
        failure: Thrown | None = None
        if attempt is not None:
            unit.attempt = attempt
            self._attempts.append(attempt)
        with self.bound(unit):
            try:
                steps()
                if unit.doomed:
                    unit.abort()
                else:
                    unit.commit()
            except Thrown as error:
                failure = error
            unit.end()
        if attempt is not None:
            self._attempts.pop()
            if failure is not None and attempt.replayed(attempt.failed_by(failure)):
                self._replay()
        self.call_back(unit)
        if failure is not None:
            raise failure

    def _nested(self, unit: Unit, steps: Steps, player: Player) -> None:
        """A ``"nested"`` part."""
        session = unit.session
        level = session.begin_nested()
        part = Part(level)
        unit.parts.append(part)
        try:
            self.run(steps, player)
            if part.doomed:
                self._roll_back_part(unit, session, level)
            elif session.holds(level):
                unit.check(level)
                session.commit_level(level)
            elif unit.session.level is not None and unit.session.level.root() is not level.root():
                unit.check(unit.session.level.root())
        except Thrown:
            self._roll_back_part(unit, session, level)
            raise
        finally:
            unit.parts.pop()

    @staticmethod
    def _roll_back_part(unit: Unit, session: Session, level: Level) -> None:
        """To its ``SAVEPOINT``; where the application has ended that, all that it has begun since."""
        if session.holds(level):
            session.rollback_level(level)
        elif unit.session.level is not None and unit.session.level.root() is not level.root():
            with suppress(Thrown):
                unit.session.rollback()

    def call_back(self, unit: Unit) -> None:
        """Run the callbacks whose time has come.  What they raise is logged."""
        due = [callback for callback in unit.callbacks if callback.due]
        unit.callbacks = [callback for callback in unit.callbacks if not callback.due]
        for callback in due:
            self.tell("callback", callback.name, self.database.seen())
            if callback.what == "writes":
                own = Unit(self.database)
                with suppress(Thrown):
                    self._work(own, partial(self._add, own))

    def _add(self, unit: Unit) -> None:
        unit.session.add(next(self._tokens))

    # Steps

    def run(self, steps: Steps, player: Player) -> None:
        for step in steps:
            outcome: object = "ok"
            try:
                result = self._do(step, player)
            except Thrown as error:
                self.tell("step", type(step).__name__, error.label)
                raise
            if result is not None:
                outcome = result
            self.tell("step", type(step).__name__, outcome)

    def _do(self, step: Step, player: Player) -> object:
        """Its outcome, where that is not ``"ok"``."""
        unit = self._units[-1]
        match step:
            case Read():
                unit.session.query()
            case Open(rows):
                level = unit.session.query()
                result = Result(SEEDS - rows, level)
                level.results.append(result)
                player.results.append(result)
            case Drain():
                return self._drain(player)
            case Drop():
                if player.results:
                    player.results.pop(0).kept = False
            case Add():
                unit.session.add(next(self._tokens))
            case Flush():
                unit.session.flush()
            case Break():
                unit.session.add(None)
                unit.session.flush()
            case Commit():
                unit.session.commit()
            case Rollback():
                unit.roll_back()
            case Remove():
                unit.remove()
            case Doom():
                unit.parts[-1].doomed = True
            case OnCommit(what) | OnRollback(what):
                name = f"c{next(self._callbacks)}"
                unit.callbacks.append(Callback(name, isinstance(step, OnCommit), what, unit.session.level))
            case SetCommitAt(value):
                if value not in ("start", "end"):
                    raise Thrown("ValueError")
                if unit.begun:
                    raise Thrown("RuntimeError")
                if unit.failed:
                    raise Unspecified("commit_at, after the response has failed")
                unit.commit_at = value
            case Scope(propagation, steps):
                self._scope(propagation, steps, unit, player)
            case Arm(what, error, until):
                if self._episode.attempts == 1 or player.attempt <= until:
                    self.database.arm(what, error)
            case Raise(kind):
                label = f"{kind}#{next(self._exceptions)}"
                raise Thrown(label, ordinary=kind == "ValueError")
            case Try(steps):
                try:
                    self.run(steps, player)
                except Thrown as error:
                    if not error.ordinary:
                        raise
            case Start(status, exc_info):
                self._start(status, player, exc_info=exc_info)
            case Write():
                if player.started and player.write is not None:
                    player.write(b"w")
            case Inner():
                self._inner(step, player)
        return None

    @staticmethod
    def _drain(player: Player) -> object:
        if not player.results:
            return 0
        result = player.results.pop(0)
        result.kept = False
        return "lost" if result.lost() else result.left

    def _scope(self, propagation: str, steps: Steps, unit: Unit, player: Player) -> None:
        match propagation:
            case "required":
                with joined(unit):
                    self.run(steps, player)
            case "nested":
                self._nested(unit, steps, player)
            case "requires_new":
                self._work(Unit(self.database), lambda: self.run(steps, player))

    def _start(self, status: object, player: Player, *, exc_info: bool) -> None:
        if player.start is None:
            return
        error = Thrown(f"ValueError#{next(self._exceptions)}") if exc_info else None
        player.start(status, error)
        player.started = True


_OVER = object()


def predict(episode: Episode) -> list[tuple[object, ...]]:
    """What the trace of the episode has to be.

    :raises Unspecified: where the contract is silent.
    """
    return Oracle(episode).play()
