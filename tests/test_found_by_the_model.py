"""What the model of ``tests/proof`` has found, each with the smallest episode that shows it.

The package was wrong there once, and the oracle, which knows only the promises, was right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.proof.harness import Harness
from tests.proof.oracle import predict
from tests.proof.programs import (
    Add,
    Arm,
    Break,
    Episode,
    Exchange,
    Inner,
    Job,
    OnCommit,
    OnRollback,
    Program,
    Raise,
    Scope,
    Server,
    Start,
    Write,
)

OK = Start("200 OK", False)


def exchange(view: Any, chunks: Any = (), last: Any = (), close: Any = None, **server: Any) -> Exchange:
    plan: Any = {"reads": None, "closes": 1, "hops": False, "refuses": False, **server}
    return Exchange(Program(tuple(view), "iterable", tuple(chunks), tuple(last), close), Server(**plan))


def episode(part: Exchange | Job, *, commit_at: str = "start") -> Episode:
    return Episode((part,), (), "thread-local", False, commit_at, 1)


FOUND = {
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
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    harness = Harness(tmp_path_factory.mktemp("harness"))
    yield harness
    harness.close()


@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND)
def test_what_the_model_has_found(harness: Harness, found: Episode) -> None:
    assert harness.play(found) == predict(found)
