"""How Hypothesis makes the episodes of ``programs.py``."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.proof.programs import (
    KINDS,
    NO_STATUS,
    STATUSES,
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
    Try,
    Write,
)

#: What goes wrong with which fault.
FAULTS = (
    ("connect", "plain"),
    ("execute", "plain"),
    ("execute", "race"),
    ("execute", "disconnect"),
    ("commit", "plain"),
    ("commit", "race"),
    ("commit", "disconnect"),
    ("committed", "disconnect"),
    ("rollback", "plain"),
)


@st.composite
def _weighted(draw: st.DrawFn, *choices: tuple[int, st.SearchStrategy[Any]]) -> Any:
    """One of these, each as likely as its weight says.  (To ``one_of()``, what is given twice is given once.)"""
    which = draw(st.sampled_from([number for number, (weight, _) in enumerate(choices) for _ in range(weight)]))
    return draw(choices[which][1])


_FAULTS: st.SearchStrategy[Any] = st.builds(
    lambda fault, until: Arm(fault[0], fault[1], until), st.sampled_from(FAULTS), st.sampled_from((1, 1, 1, 2, 3))
)
_RACES: st.SearchStrategy[Any] = st.builds(
    lambda kind, until: Arm("execute", kind, until),
    st.sampled_from(("race", "race", "disconnect")),
    st.sampled_from((1, 2)),
)
#: How the application itself may have ended its transaction by then.
_OWN: st.SearchStrategy[Any] = st.sampled_from(((), (), (Commit(),), (Flush(), Commit()), (Rollback(),), (Remove(),)))
_CALLBACKS = st.sampled_from(("works", "raises", "writes"))

#: What may stand anywhere, and is done most.
_COMMON: st.SearchStrategy[Any] = st.sampled_from((Add(), Add(), Add(), Read(), Flush(), Open(0), Open(1)))
_OTHER: st.SearchStrategy[Any] = st.one_of(
    st.just(Drain()),
    st.just(Drop()),
    st.just(Commit()),
    st.just(Rollback()),
    st.just(Remove()),
    st.just(Doom()),
    st.builds(OnCommit, _CALLBACKS),
    st.builds(OnRollback, _CALLBACKS),
    st.builds(SetCommitAt, st.sampled_from(("start", "end"))),
)
#: What ends everything else, more often than not.
_RAISES: st.SearchStrategy[Any] = st.builds(Raise, st.sampled_from(KINDS))
_ENDING: st.SearchStrategy[Any] = _weighted((1, st.just(Break())), (1, _FAULTS), (2, _RAISES))
_START: st.SearchStrategy[Any] = st.builds(Start, st.sampled_from((*STATUSES, *STATUSES, *NO_STATUS)), st.booleans())


def _steps(depth: int, *, in_exchange: bool, least: int = 0, most: int = 4) -> st.SearchStrategy[Any]:
    """A few steps; those that hold other steps hold less deep ones."""
    choices = [(12, _COMMON), (7, _OTHER), (2, _ENDING)]
    if in_exchange:
        choices += [(1, st.just(Write())), (1, _START)]
    if depth:
        inside = _steps(depth - 1, in_exchange=in_exchange, least=1, most=3)
        inner = st.builds(Inner, _exchanges(depth - 1, inner=True), st.booleans() if in_exchange else st.just(False))
        scope = st.builds(Scope, st.sampled_from(("required", "nested", "requires_new")), inside)
        choices += [(2, scope), (1, st.builds(Try, inside)), (1, inner)]
    return st.lists(_weighted(*choices), min_size=least, max_size=most).map(tuple)


def _with_start(view: tuple[Any, ...], where: int, status: str, exc_info: bool = False) -> tuple[Any, ...]:
    return _with(Start(status, exc_info), view, where)


def _with(step: Any, steps: tuple[Any, ...], where: int) -> tuple[Any, ...]:
    where %= len(steps) + 1
    return (*steps[:where], step, *steps[where:])


def _view(depth: int, *, in_exchange: bool) -> st.SearchStrategy[Any]:
    """Steps that do something; some of them with a change and a fault for sure."""
    steps = _steps(depth, in_exchange=in_exchange, least=1, most=5)
    late = st.builds(
        lambda steps, fault, where: (*_with(Add(), steps, where), fault), steps, _FAULTS, st.integers(0, 4)
    )
    early = st.builds(lambda fault, steps: (fault, *steps), _FAULTS, steps)
    # A race that is lost after some work: may it be done again?
    race = st.builds(lambda steps, own, fault: (*steps, Add(), *own, fault, Read()), steps, _OWN, _RACES)
    return _weighted((8, steps), (1, late), (1, early), (2, race))


def _programs(depth: int) -> st.SearchStrategy[Program]:
    steps = _view(depth, in_exchange=True)
    few = _steps(depth, in_exchange=True, most=2)
    # Some chunks with a change and an exception for sure: what is left of a response whose body fails?
    failing = st.builds(lambda steps, error: (*steps, Add(), error), few, _RAISES)
    # Nearly every application starts a response properly: somewhere in its view.
    started = st.builds(
        _with_start,
        steps,
        st.integers(0, 4),
        st.sampled_from(("200 OK", "200 OK", "200 OK", *STATUSES)),
        st.sampled_from((False, False, False, True)),
    )
    chunks = st.lists(_weighted((4, few), (1, failing)), max_size=3).map(tuple)
    close = _weighted((1, st.none()), (2, few))
    shapes = ("list", "tuple", "file", "iterable", "iterable", "iterable", "generator", "generator")
    wild = st.builds(Program, _weighted((9, started), (1, steps)), st.sampled_from(shapes), chunks, few, close)
    # A view that fails has no body. In some programs what happens is left to the body.
    calm = st.builds(_with_start, st.lists(_COMMON, max_size=2).map(tuple), st.integers(0, 2), st.just("200 OK"))
    late = st.builds(Program, calm, st.sampled_from(("iterable", "generator")), chunks, few, close)
    return _weighted((2, wild), (1, late))


def _servers(*, inner: bool) -> st.SearchStrategy[Server]:
    return st.builds(
        Server,
        st.sampled_from((None, None, None, 0, 1, 2)),
        st.sampled_from((1, 1, 1, 1, 0, 2)),
        # The thread around an inner request waits for it in any case.
        st.just(False) if inner else st.sampled_from((False, False, True)),
        st.sampled_from((False,) * 9 + (True,)),
    )


def _exchanges(depth: int, *, inner: bool = False) -> st.SearchStrategy[Exchange]:
    return st.builds(Exchange, _programs(depth), _servers(inner=inner))


def episodes(registry: str, commit_at: str, attempts: tuple[int, ...], *, depth: int = 2) -> st.SearchStrategy[Episode]:
    """Episodes with that setting, and with steps that hold others up to that depth."""
    exchange = _exchanges(depth)
    job = st.builds(Job, _view(depth, in_exchange=False), st.booleans())
    one: st.SearchStrategy[Any] = _weighted((3, exchange), (1, job))
    return st.builds(
        Episode,
        st.one_of(one.map(lambda part: (part,)), st.lists(one, min_size=2, max_size=3).map(tuple)),
        st.lists(st.integers(0, 2), max_size=8).map(tuple),
        st.just(registry),
        st.sampled_from((False, False, True)) if registry == "thread-local" else st.just(False),
        st.just(commit_at),
        st.sampled_from(attempts),
    )
