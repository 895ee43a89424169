"""Bad configuration is told at construction, by an error that names the argument, what came and what is accepted."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, declarative_base, scoped_session, sessionmaker

from sa_wsgi_session import (
    SessionMiddleware,
    contextual_session,
    current_scope,
    session_scope,
    with_session,
)
from sa_wsgi_session.replicas import ReadReplicas

SQLALCHEMY_14 = sa.__version__.startswith("1.4.")

engine = sa.create_engine("sqlite://")
Maker = sessionmaker(engine)
Scoped = scoped_session(Maker)


def app(environ: Any, start_response: Any) -> Any:
    raise NotImplementedError


def job(*, session: Any) -> None:
    raise NotImplementedError


#: Everything that takes a session, and what it calls that argument.
TAKERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "SessionMiddleware": (lambda session: SessionMiddleware(app, session), "session"),
    "session_scope": (session_scope, "session"),
    "with_session": (with_session, "session"),
    "current_scope": (current_scope, "session"),
    "contextual_session": (contextual_session, "factory"),
}


def refused(error: type[Exception], call: Callable[[], Any], *words: str) -> str:
    """The message of the error that *call* raises, all of whose *words* it has, in that order."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert re.search(".*".join(map(re.escape, words)), message), message
    return message


# -- session ----------------------------------------------------------------------------------------------------------


class Unprintable:
    """What a message must not quote."""

    def __repr__(self) -> str:
        return "postgresql://me:s3cret@server"


@pytest.mark.parametrize("taker", [taker for taker in TAKERS if taker != "contextual_session"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (engine, "sqlalchemy.engine.base.Engine"),
        (Session(), "sqlalchemy.orm.session.Session"),
        (Session, "the class sqlalchemy.orm.session.Session"),
        (scoped_session, "the class sqlalchemy.orm.scoping.scoped_session"),
        (Scoped.registry, "Registry"),
        (lambda: Session(engine), "function"),
        (declarative_base(), "the class"),
        ("sqlite://", "str"),
        (object(), "object"),
        (Unprintable(), "Unprintable"),
        (1, "int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_session_registry_is_refused_by_name(taker: str, value: Any, shown: str) -> None:
    take, argument = TAKERS[taker]
    message = refused(TypeError, lambda: take(value), argument, "scoped_session", "sessionmaker", "not", shown)
    assert "s3cret" not in message


@pytest.mark.parametrize("taker", ["SessionMiddleware", "session_scope", "with_session"])
def test_none_is_no_session_registry(taker: str) -> None:
    take, argument = TAKERS[taker]
    refused(TypeError, lambda: take(None), argument, "scoped_session", "sessionmaker", "not None")


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "None"), (1, "int"), (Scoped, "scoped_session"), (Session(), "Session")]
)
def test_a_contextual_session_is_made_of_a_factory(value: Any, shown: str) -> None:
    refused(TypeError, lambda: contextual_session(value), "factory", "sessionmaker", "callable", "not", shown)


@pytest.mark.parametrize(
    "factory", [Maker, partial(Session, engine), Session], ids=["sessionmaker", "partial", "class"]
)
def test_a_contextual_session_is_made_of_any_factory(factory: Any) -> None:
    assert isinstance(contextual_session(factory), scoped_session)


def async_flavours() -> dict[str, Callable[[], Any]]:
    """What SQLAlchemy's extension for asyncio offers where it offers ``scoped_session`` and ``sessionmaker``."""
    import sqlalchemy.ext.asyncio

    asyncio: Any = sqlalchemy.ext.asyncio
    flavours: dict[str, Callable[[], Any]] = {
        "sessionmaker of AsyncSession": lambda: sessionmaker(class_=asyncio.AsyncSession),
        "scoped_session of AsyncSession": lambda: scoped_session(sessionmaker(class_=asyncio.AsyncSession)),
        "scoped_session of the class": lambda: scoped_session(asyncio.AsyncSession),
        "async_scoped_session": lambda: asyncio.async_scoped_session(
            sessionmaker(class_=asyncio.AsyncSession), scopefunc=lambda: None
        ),
        "AsyncSession": lambda: asyncio.AsyncSession(),
        "the class": lambda: asyncio.AsyncSession,
        "a subclass": lambda: type("Mine", (asyncio.AsyncSession,), {}),
        "sessionmaker of a subclass": lambda: sessionmaker(class_=type("Mine", (asyncio.AsyncSession,), {})),
    }
    if not SQLALCHEMY_14:
        flavours["async_sessionmaker"] = lambda: asyncio.async_sessionmaker()
        flavours["scoped_session of async_sessionmaker"] = lambda: scoped_session(asyncio.async_sessionmaker())
    return flavours


@pytest.mark.parametrize(
    ("taker", "flavour"),
    [
        (taker, flavour)
        for taker in TAKERS
        for flavour in async_flavours()
        # Of scoped sessions, contextual_session takes none.
        if not (taker == "contextual_session" and flavour.startswith("scoped_session"))
    ],
)
def test_a_session_of_asyncio_is_refused_with_the_reason(taker: str, flavour: str) -> None:
    value = async_flavours()[flavour]()
    take, argument = TAKERS[taker]
    refused(TypeError, lambda: take(value), argument, "synchronous", "WSGI", "AsyncSession", "awaited")


@pytest.mark.parametrize(
    ("taker", "wrap"),
    [(taker, wrap) for taker in TAKERS for wrap in (None, scoped_session) if taker != "contextual_session" or not wrap],
)
def test_the_autocommit_mode_of_old_is_refused(taker: str, wrap: Any) -> None:
    """SQLAlchemy 2 has given it up: there, such a factory could make no session anyway."""
    maker: Any = sessionmaker(engine, autocommit=True)
    take, argument = TAKERS[taker]
    refused(ValueError, lambda: take(wrap(maker) if wrap else maker), argument, "autocommit=True", "leave")


# -- SessionMiddleware ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(None, "NoneType"), ("myapp:application", "str"), (object(), "object")])
def test_an_application_is_a_callable(value: Any, shown: str) -> None:
    refused(TypeError, lambda: SessionMiddleware(value, Scoped), "app", "environ", "start_response", "not", shown)


@pytest.mark.parametrize(("value", "shown"), [(None, "NoneType"), (False, "bool"), ("4", "str")])
def test_a_veto_is_a_callable(value: Any, shown: str) -> None:
    refused(
        TypeError,
        lambda: SessionMiddleware(app, Scoped, commit_veto=value),
        "commit_veto", "environ", "status", "headers", "not", shown,
    )  # fmt: skip


@pytest.mark.parametrize(("value", "shown"), [(True, "bool"), ("/static", "str"), (0, "int")])
def test_a_hook_is_a_callable_or_none(value: Any, shown: str) -> None:
    refused(
        TypeError,
        lambda: SessionMiddleware(app, Scoped, activate_hook=value),
        "activate_hook", "environ", "None", "not", shown,
    )  # fmt: skip


class Answers:
    """What a class that is given by mistake for one of its instances would do: be true, and veto everything."""

    def __init__(self, *args: object) -> None:
        pass


async def answer_in_time(*args: object) -> bool:
    return False


class AnswersInTime:
    async def __call__(self, *args: object) -> bool:
        return False


@pytest.mark.parametrize("argument", ["commit_veto", "activate_hook"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Answers, ["the class", "Answers", "instance"]),
        (answer_in_time, ["coroutine function", "answer_in_time", "synchronous"]),
        (AnswersInTime(), ["coroutine function", "AnswersInTime", "synchronous"]),
    ],
)
def test_what_would_always_be_true_is_no_veto_and_no_hook(argument: str, value: Any, words: list[str]) -> None:
    options: Any = {argument: value}
    refused(TypeError, lambda: SessionMiddleware(app, Scoped, **options), argument, *words)


def test_a_partial_and_an_object_with_a_call_are_vetoes() -> None:
    class Veto:
        def __call__(self, environ: Any, status: str, headers: Any) -> bool:
            return False

    for veto in (Veto(), partial(Veto()), Veto().__call__):
        SessionMiddleware(app, Scoped, commit_veto=veto)


@pytest.mark.parametrize("value", ["", "START", "middle", None, 1, ["start"], Unprintable])
def test_the_moments_to_commit_at_are_two(value: Any) -> None:
    refused(
        ValueError,
        lambda: SessionMiddleware(app, Scoped, commit_at=value),
        "commit_at",
        '"start"',
        '"end"',
        repr(value),
    )


@pytest.mark.parametrize(("value", "shown"), [(None, "NoneType"), (b"key", "bytes"), (1, "int")])
def test_an_environ_key_is_text(value: Any, shown: str) -> None:
    refused(TypeError, lambda: SessionMiddleware(app, Scoped, environ_key=value), "environ_key", "str", "not", shown)


def test_an_environ_key_is_not_empty() -> None:
    refused(ValueError, lambda: SessionMiddleware(app, Scoped, environ_key=""), "environ_key", "not ''")


def test_two_sessions_under_one_key_are_refused() -> None:
    other = scoped_session(sessionmaker())
    refused(
        ValueError, lambda: SessionMiddleware(SessionMiddleware(app, other), Scoped), "app", "environ_key", "another"
    )


def test_two_sessions_under_two_keys_and_one_session_twice_are_fine() -> None:
    SessionMiddleware(SessionMiddleware(app, scoped_session(sessionmaker()), environ_key="other"), Scoped)
    SessionMiddleware(SessionMiddleware(app, Scoped), Scoped)
    SessionMiddleware(SessionMiddleware(app, Maker), Maker)


def test_options_are_given_by_name() -> None:
    make: Any = SessionMiddleware
    with pytest.raises(TypeError):
        make(app, Scoped, lambda *asked: False)


def test_what_is_refused_is_refused_at_construction() -> None:
    """Where the traceback shows the line that has to be changed."""
    with pytest.raises(TypeError) as raised:
        SessionMiddleware(app, engine)  # type: ignore[arg-type]
    assert traceback.extract_tb(raised.value.__traceback__)[0].name == "test_what_is_refused_is_refused_at_construction"


@pytest.mark.parametrize(
    ("enough", "short"),
    [(32 * "x", 31 * "x"), (32 * b"x", 31 * b"x"), (16 * "\xe9", 15 * "\xe9")],
    ids=["str", "bytes", "two bytes each"],
)
def test_a_secret_has_32_characters_or_bytes_or_more(enough: Any, short: Any) -> None:
    ReadReplicas([engine], secret=enough)
    refused(ValueError, lambda: ReadReplicas([engine], secret=short), "secret", "32 characters", "or more")


def test_a_replica_is_not_the_primary_by_another_name() -> None:
    replicas = ReadReplicas([engine.execution_options(any_option=1)], secret=32 * "x")
    refused(ValueError, lambda: SessionMiddleware(app, Maker, replicas=replicas), "engine 1 of replicas", "the primary")


# -- session_scope and with_session -----------------------------------------------------------------------------------


@pytest.mark.parametrize("take", [session_scope, with_session])
@pytest.mark.parametrize("value", ["", "mandatory", "REQUIRED", None, 1, ["required"]])
def test_the_ways_of_propagation_are_three(take: Any, value: Any) -> None:
    refused(
        ValueError,
        lambda: take(Scoped, propagation=value),
        "propagation", '"required"', '"nested"', '"requires_new"', "not", repr(value),
    )  # fmt: skip


@pytest.mark.parametrize(("value", "shown"), [(None, "NoneType"), (1, "int"), (b"db", "bytes")])
def test_the_name_of_an_argument_is_text(value: Any, shown: str) -> None:
    refused(TypeError, lambda: with_session(Scoped, argument=value), "argument", "str", "not", shown)


@pytest.mark.parametrize("value", ["", "two words", "1st", "a-b"])
def test_the_name_of_an_argument_is_one_that_can_be_passed(value: str) -> None:
    refused(ValueError, lambda: with_session(Scoped, argument=value), "argument", "not", repr(value))


@pytest.mark.parametrize(("value", "shown"), [(None, "NoneType"), ("job", "str"), (1, "int")])
def test_what_is_decorated_is_a_function(value: Any, shown: str) -> None:
    refused(TypeError, lambda: with_session(Scoped)(value), "with_session", "function", "not", shown)


def test_what_is_decorated_takes_the_session() -> None:
    def without(days: int) -> None: ...

    def positional(session: Any, /) -> None: ...

    for function in (without, positional):
        refused(
            TypeError,
            partial(with_session(Scoped), function),
            "session=",
            function.__name__,
            "argument=",
        )
    refused(TypeError, lambda: with_session(Scoped, argument="db")(job), "db=", "job")


def test_what_would_run_only_after_its_unit_of_work_is_not_decorated() -> None:
    async def coroutine(*, session: Any) -> None: ...

    def generator(*, session: Any) -> Any:
        yield

    async def both(*, session: Any) -> Any:
        yield

    for function in (coroutine, generator, both):
        refused(
            TypeError,
            partial(with_session(Scoped), function),
            function.__name__, "coroutine or generator", "session_scope()",
        )  # fmt: skip
