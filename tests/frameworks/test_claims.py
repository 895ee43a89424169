"""What the READMEs of the guest books say of each framework in the same words, or nearly: pages, streams, exceptions.

Where the frameworks differ, ``applications.py`` has the fact.
"""

# A generator that raises before its first chunk has a "yield" that nothing reaches.
# mypy: no-warn-unreachable

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.frameworks.applications import FRAMEWORKS, Abandon
from tests.frameworks.support import Log, ask, elsewhere, only, start, status_code
from tests.support import note


def test_a_page_is_committed_before_its_status_leaves_and_removed_at_once_where_it_is_a_list(world, framework):
    def view() -> str:
        world.Session.add(note("hello"))
        world.Session.flush()
        return "page"

    durable: list[list[str]] = []
    left: list[bool] = []

    def on_start(status: str) -> None:
        durable.append(world.durable())
        left.append(world.Session.registry.has())

    exchange = start(framework.serve(world, view), on_start=on_start)
    assert durable == [["hello"]]
    assert world.checked_out == 0
    assert (type(exchange.body) is list) == framework.page_is_a_list
    if framework.page_is_a_list:
        assert left == [False]
    else:
        assert not isinstance(exchange.body, (list, tuple))
    assert str(exchange.environ["sa_wsgi_session.scope"]) == "GET /"
    assert exchange.read() == b"page"


def test_a_stream_begins_after_its_status_unless_the_first_chunk_is_pulled_and_ends_with_the_session_bound(
    world, framework
):
    log = Log(world)
    exchange = start(framework.serve(world, log.chunks), on_start=log.lines.append)
    pulled = framework.pulls_first_chunk
    [status] = [line for line in log.lines if line != "chunk 1"]
    assert status.upper() == "200 OK"
    assert log.lines == (["chunk 1", status] if pulled else [status])
    assert exchange.read() == b"12"
    assert log.lines == [*(["chunk 1", status] if pulled else [status, "chunk 1"]), "chunk 2", "finally"]


def test_what_comes_before_the_first_chunk_belongs_to_the_view_where_it_is_pulled(world, framework):
    def view() -> Iterator[bytes]:
        world.Session.add(note("before the first chunk"))
        yield b"first"
        yield b"second"

    exchange = start(framework.serve(world, view))
    assert (world.durable() == ["before the first chunk"]) == framework.pulls_first_chunk
    assert exchange.read() == b"firstsecond"
    assert world.durable() == ["before the first chunk"]


def test_the_session_is_the_same_one_while_the_body_streams_and_what_it_changes_is_kept(world, framework):
    def view() -> Iterator[bytes]:
        session = world.Session()
        yield b"first"
        assert world.Session() is session
        world.Session.add(note("in the body"))
        yield b"second"

    assert ask(framework.serve(world, view)).content == b"firstsecond"
    assert world.durable() == ["in the body"]


def test_an_error_before_the_first_chunk_is_a_500_or_an_exception_and_is_rolled_back(world, framework):
    def view() -> Iterator[bytes]:
        world.Session.add(note("never"))
        world.Session.flush()
        raise RuntimeError("failed on purpose")
        yield

    app = framework.serve(world, view)
    if framework.catches_before_first_chunk:
        assert status_code(ask(app)) == 500
    else:
        with pytest.raises(RuntimeError, match=r"^failed on purpose$"):
            ask(app)
    assert world.durable() == []


def test_an_error_after_the_first_chunk_breaks_the_transfer_off_and_is_rolled_back(world, framework):
    def view() -> Iterator[bytes]:
        yield b"1"
        world.Session.add(note("half of it"))
        world.Session.flush()
        raise RuntimeError("failed on purpose")

    exchange = start(framework.serve(world, view))
    assert exchange.next() == b"1"
    with closing(exchange), pytest.raises(RuntimeError, match=r"^failed on purpose$"):
        exchange.next()
    assert world.durable() == []


def test_hanging_up_closes_a_generator_with_its_session_bound_or_leaves_it_to_the_garbage_collector(world, framework):
    log = Log(world)
    exchange = start(framework.serve(world, log.chunks))
    exchange.next()
    exchange.close()
    # The session is removed by now in any case.
    assert not world.Session.registry.has()
    assert log.lines == (["chunk 1", "finally"] if framework.closes else ["chunk 1"])
    del exchange
    gc.collect()
    assert log.lines == ["chunk 1", "finally" if framework.closes else "finally, unbound"]


@only(*(name for name, framework in FRAMEWORKS.items() if framework.closes_on_another_thread))
def test_a_generator_may_be_closed_on_another_thread(world, framework):
    log = Log(world)
    exchange = start(framework.serve(world, log.chunks))
    exchange.next()
    elsewhere(exchange.close)
    assert log.lines == ["chunk 1", "finally"]


def test_what_a_generator_has_changed_before_the_visitor_hung_up_is_rolled_back(world, framework):
    def view() -> Iterator[bytes]:
        world.Session.add(note("before"))
        world.Session.flush()
        yield b"1"
        world.Session.add(note("between"))
        world.Session.flush()
        yield b"2"
        yield b"3"

    app = framework.serve(world, view)
    exchange = start(app)
    assert [exchange.next(), exchange.next()] == [b"1", b"2"]
    exchange.close()
    # Where the first chunk is pulled, what comes before it is still work of the view.
    assert world.durable() == (["before"] if framework.pulls_first_chunk else [])


def test_a_generator_that_is_read_to_its_end_has_changed_it_all(world, framework):
    def view() -> Iterator[bytes]:
        world.Session.add(note("half of it"))
        world.Session.flush()
        yield b"1"
        yield b"2"

    assert ask(framework.serve(world, view)).content == b"12"
    assert world.durable() == ["half of it"]


class Chunks:
    """Two chunks, that note what is done with them."""

    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._seen.count("read") == 2:
            raise StopIteration
        self._seen.append("read")
        return b"chunk"

    def close(self) -> None:
        self._seen.append("closed")


@only(*(name for name, framework in FRAMEWORKS.items() if framework.head_of_iterator is not None))
@pytest.mark.parametrize("is_generator", [False, True], ids=["iterator", "generator"])
def test_for_a_head_a_stream_is_read_closed_or_dropped(world, framework, is_generator):
    seen: list[str] = []

    def view() -> Iterator[bytes]:
        chunks = Chunks(seen)
        # Whether a generator is closed that has not begun, it cannot tell.
        return (chunk for chunk in chunks) if is_generator else chunks

    exchange = ask(framework.serve(world, view), method="HEAD")
    assert status_code(exchange) == 200
    assert exchange.content == (b"chunkchunk" if framework.head_has_body else b"")
    expected = [what for what in framework.head_of_iterator if what == "read" or not is_generator]
    assert seen == expected


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, SystemExit, KeyboardInterrupt, Abandon])
def test_an_exception_of_a_view_is_a_500_or_goes_on_and_is_rolled_back(world, framework, kind):
    def view() -> str:
        world.Session.add(note("never"))
        world.Session.flush()
        raise kind("failed on purpose")

    app = framework.serve(world, view)
    # Elsewhere, for TurboGears leaves its request behind where what is raised is no Exception.
    if issubclass(kind, framework.lets_through):
        with pytest.raises(kind, match=r"^failed on purpose$"):
            elsewhere(ask, app)
    else:
        exchange = elsewhere(ask, app)
        assert status_code(exchange) == 500
        assert b"failed on purpose" not in exchange.content
        assert b"Traceback" not in exchange.content
    assert world.durable() == []


def test_a_commit_that_fails_is_an_exception_before_any_status_has_left(world, framework):
    world.insert("taken")

    def view() -> str:
        world.Session.add(note("taken"))
        return "page"

    statuses: list[str] = []
    with pytest.raises(Exception, match="UNIQUE"):
        start(framework.serve(world, view), on_start=statuses.append)
    assert statuses == []
