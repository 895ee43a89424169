"""What the model of ``tests/proof`` has found, each with the smallest episode that shows it.

The package was wrong there once, and the oracle, which knows only the promises, was right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.proof.harness import Harness, SessionHasGone
from tests.proof.oracle import predict
from tests.proof.programs import (
    Add,
    Arm,
    Break,
    Commit,
    Doom,
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
    Start,
    Try,
    Write,
)

OK = Start("200 OK", False)


def exchange(view: Any, chunks: Any = (), last: Any = (), close: Any = None, **server: Any) -> Exchange:
    plan: Any = {"reads": None, "closes": 1, "hops": False, "refuses": False, **server}
    return Exchange(Program(tuple(view), "iterable", tuple(chunks), tuple(last), close), Server(**plan))


def episode(part: Exchange | Job, *, commit_at: str = "start", attempts: int = 1) -> Episode:
    return Episode((part,), (), "thread-local", False, commit_at, attempts)


FOUND = {
    "what a part that has failed leaves behind is not committed by the application either": episode(
        exchange([OK, Add(), Try((Scope("required", (Raise("ValueError"),)),)), Commit()])
    ),
    "nor in a SAVEPOINT": episode(
        exchange([OK, Add(), Scope("nested", (Add(), Try((Scope("required", (Raise("ValueError"),)),)), Commit()))])
    ),
    "a rollback makes up for it": episode(
        exchange([OK, Add(), Try((Scope("required", (Raise("ValueError"),)),)), Rollback(), Add(), Commit()])
    ),
    "a SAVEPOINT that the application has ended is spoilt all the same": episode(
        exchange(
            [OK, Try((Scope("nested", (Rollback(), Add(), Try((Scope("required", (Raise("ValueError"),)),)))),)), Add()]
        )
    ),
    "a status that comes too late, and is swallowed, is an error at the end": episode(
        exchange([OK], [[Try((OK,)), Add()]])
    ),
    "one that is none, too": episode(exchange([OK], [[Try((Start("", True),)), Add()]])),
    "one that the server refuses, too": episode(exchange([OK], [[], [Try((Start("200 OK", True),)), Add()]])),
    "an error page that is written has answered the error": episode(
        exchange([Try((Start(None, False),)), Start("404 Not Found", True), Write()])
    ),
    "a body that nobody closes, and that has raised, is closed when it is dropped": episode(
        exchange([OK], last=[OK], close=(), closes=0)
    ),
    "what cannot be committed is told before the response begins, also where a result is open": episode(
        exchange([OK, Open(1), Inner(exchange([OK, Raise("ValueError")]), True)])
    ),
    "a body without a chunk is committed before its start": episode(
        Exchange(
            Program((OK, Add(), OnCommit("works")), "generator", (), (), None),
            Server(None, 1, hops=False, refuses=False),
        ),
        commit_at="end",
    ),
    "a body that raises spoils the request that it has joined": episode(
        exchange([OK, Add(), Inner(exchange([OK], last=[Raise("ValueError")]), True)])
    ),
    "a close that raises spoils the request that it has joined": episode(
        exchange([OK, Add(), Inner(exchange([OK], close=(Raise("ValueError"),)), True)])
    ),
    "a body that ends well spoils nothing": episode(exchange([OK, Inner(exchange([OK], [[Add()]], close=()), True)])),
    "a callback of the view waits for the commit at the end, which is that of the body": episode(
        exchange([OnCommit("works"), OK], [[Add()]]), commit_at="end"
    ),
    "it is dropped, and one for the rollback is called, where the client does not read to the end": episode(
        exchange([OnCommit("works"), OnRollback("works"), OK], [[Add()], []], reads=1), commit_at="end"
    ),
    "a success that is started once more before the first byte commits what the body does": episode(
        exchange([OK], [[Start("200 OK", True)], [Add()]])
    ),
    "an error that is started before the first byte rolls it back": episode(
        exchange([OK], [[Start("500 Internal Server Error", True)], [Add()]])
    ),
    "what a server has refused is not started once more by a write in close": episode(
        exchange([OK], close=(Write(),), refuses=True)
    ),
    "close finds a session that works, whatever has broken it": episode(
        exchange([OK, Break()], close=(Scope("nested", (Add(),)),))
    ),
    "close finds a connection that works, too": episode(
        exchange([Add()], [[Arm("execute", "disconnect", 1), Raise("ValueError")]], close=(Scope("nested", (Add(),)),))
    ),
    "callbacks run in the order in which they were registered, those of a SAVEPOINT too": episode(
        Job((OnRollback("works"), Scope("nested", (OnRollback("works"), Break()))), decorated=False)
    ),
    "a doomed part that has ended its SAVEPOINT itself keeps nothing of what it did then": episode(
        Job((Add(), Scope("nested", (Commit(), Add(), Doom()))), decorated=False)
    ),
    "nor does one that has failed": episode(
        Job((Add(), Try((Scope("nested", (Rollback(), Add(), Raise("ValueError"))),))), decorated=False)
    ),
    "a commit of a part's own that has failed fails the whole": episode(
        Job((Add(), Arm("commit", "plain", 1), Try((Scope("nested", (Commit(),)),)), Add()), decorated=False)
    ),
    "a connection that was lost in a SAVEPOINT is a lost race, whatever fails because of it": episode(
        exchange([Arm("execute", "disconnect", 1), Try((Scope("nested", (Read(),)),)), Add(), Flush(), OK]), attempts=2
    ),
    "of several errors in parts that have joined, the first one is the cause": episode(
        exchange(
            [
                OK,
                Scope(
                    "nested",
                    (Inner(exchange([Add(), Arm("execute", "race", 1)], close=(Read(),), closes=2), True),),
                ),
            ]
        ),
        attempts=2,
    ),
    "a callback is dropped with the transaction that goes without a word, because its rollback fails": Episode(
        (
            Job(
                (
                    OnCommit("works"),
                    Arm("rollback", "plain", 1),
                    Try((Read(), Remove())),
                ),
                decorated=False,
            ),
        ),
        (),
        "thread-local",
        False,
        "start",
        1,
    ),
    "it is dropped before another transaction begins, too": episode(
        Job(
            (Read(), OnCommit("works"), Arm("rollback", "plain", 1), Try((Remove(),)), Add(), OnCommit("works")),
            decorated=False,
        )
    ),
    "and before another callback is registered": episode(
        Job(
            (Read(), OnCommit("works"), Arm("rollback", "plain", 1), Try((Remove(),)), OnRollback("works")),
            decorated=False,
        )
    ),
    "and at the end of a body": episode(
        exchange([OK, OnCommit("works"), Arm("rollback", "plain", 1)], last=[Try((Read(), Remove()))]), commit_at="end"
    ),
    "and one for the rollback is called before the chunk is handed on": episode(
        exchange([OK], [[Read(), OnRollback("works"), Arm("rollback", "plain", 1), Try((Remove(),))], []])
    ),
    "and before what is written": episode(
        exchange([OK, Read(), OnRollback("works"), Arm("rollback", "plain", 1), Try((Remove(),)), Write()])
    ),
    "a body that nobody closes, and that has lost a race in a request, is closed when it is dropped": episode(
        exchange([OK, Inner(exchange([OK, Write()], [[Add(), Arm("execute", "race", 1)]], close=(), closes=0), False)]),
        attempts=2,
    ),
    "a connection that a part of its own has lost, and swallowed, is a lost race where that part is refused": episode(
        exchange([OK, Arm("execute", "disconnect", 1), Scope("requires_new", (Try((Read(),)),))]), attempts=2
    ),
    "write() within a SAVEPOINT commits nothing of a part that has failed in it": episode(
        exchange([OK, Scope("nested", (Inner(exchange([OK, Add(), Raise("ValueError")]), True), Write()))])
    ),
    "nor where that part had ended the SAVEPOINT": episode(
        exchange([OK, Scope("nested", (Inner(exchange([OK, Commit(), Add(), Raise("ValueError")]), True), Write()))])
    ),
    "with commit_at end, write() does not know yet whether the SAVEPOINT is kept": episode(
        exchange([OK, Scope("nested", (Inner(exchange([OK, Commit(), Add(), Raise("ValueError")]), True), Write()))]),
        commit_at="end",
    ),
    "and whatever else the session has against it comes of that": episode(
        exchange(
            [
                OK,
                Scope(
                    "nested",
                    (Inner(exchange([OK, Commit(), Add(), Arm("execute", "plain", 1), Read()]), True), Write()),
                ),
            ]
        )
    ),
    "what spoils the whole spoils what a part has begun after it had ended its SAVEPOINT": episode(
        exchange([OK, Add()], last=[Scope("nested", (Try((Commit(), OK)),))]), commit_at="end"
    ),
    "a flush that has lost a race in a SAVEPOINT, and was swallowed, is a lost race where that is released": episode(
        exchange([OK, Scope("nested", (Arm("execute", "race", 1), Try((Add(), Flush()))))]), attempts=2
    ),
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    harness = Harness(tmp_path_factory.mktemp("harness"))
    yield harness
    harness.close()


@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND)
def test_what_the_model_has_found(harness: Harness, found: Episode) -> None:
    # Whether the garbage collector is the first to find a body is not up to us; what must hold in any case was checked.
    with suppress(SessionHasGone):
        assert harness.play(found) == predict(found)
