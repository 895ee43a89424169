"""Hostile ini files: each of them is loaded and serves, or is refused by an error that names the key and keeps secrets.

``PROOF_EXAMPLES`` is the number of the model's examples; each test here has a tenth of it.
"""

from __future__ import annotations

import configparser
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from paste.deploy import loadfilter
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.orm import scoped_session
from sqlalchemy.pool import NullPool

import sa_wsgi_session.paste
from sa_wsgi_session.paste import filter_factory
from tests import paste_fixtures
from tests.proof.conftest import Tell
from tests.proof.hostile_support import ANY_TEXT, PACKAGE, assert_clear, hostile, told
from tests.support import Base, make_sqlite_transactional, note, request

_numbers = count(1)

#: The two halves of each secret, which no error may show. What is between them misleads a parser.
SECRET = ("s3cretive", "hidd3n")
secrets = st.sampled_from(
    ["", "@", ":", "/", "?", "#", "%", "%40", "%3A", "[", "]", " ", "&x=", "\\", "ü", "://", "@@", ",", ";"]
).map(lambda between: between.join(SECRET))

#: What a URL may look like, with the secret where a secret may be.
URLS = [
    "postgresql+psycopg2://me:{}@localhost/notes",
    "postgres://me:{}@localhost/notes",
    "postgresql+fnord://me:{}@localhost/notes",
    "postgres://me@example.org:{}@localhost/notes",
    "postgresql+fnord://@:{}@localhost:5432/notes",
    "mysql+pymysql://me:{}@localhost:3306/notes?charset=utf8mb4",
    "mssql+pyodbc://me:{}@localhost/notes?driver=fnord",
    "oracle://me:{}@localhost",
    "sqlite://me:{}@localhost/notes",
    "postgresql://:{}@/notes",
    "postgresql://me:{}@localhost:port/notes",
    "postgresql://me:{}@[::1]:5432/notes",
    "postgresql+asyncpg://me:{}@localhost/notes",
    "sqlite+aiosqlite:///notes?password={}",
    "postgresql:me:{}@localhost/notes",
    "postgresql//me:{}@localhost/notes",
    "me:{}@localhost",
    "fnord:///notes?passwd={}",
    "postgresql://localhost/notes?user=me&password={}",
    "sqlite:///notes?password={}",
]
#: What is no URL is known by the name of the secret alone.
NO_URLS = ["host=localhost password={}", "PWD={};Server=localhost", "{{'password': '{}'}}", '{{"api_key": "{}"}}']
MISHAPS = [":", "/", "@", "?", "#", "&", "=", "%", " ", "[", "]", "+", "\t", "x", ""]


def _garble(text: str, place: int, mishap: str, secret: str) -> str:
    """Insert *mishap* in *text*, or leave out a character, but not within the secret."""
    before, _, after = text.partition("{}")
    at = place % (len(before) + len(after) + 1)
    if at <= len(before):
        before = before[:at] + mishap + before[at + (not mishap) :]
    else:
        at -= len(before)
        after = after[:at] + mishap + after[at + (not mishap) :]
    return before + secret + after


urls = (
    st.builds(lambda text, secret: text.replace("{}", secret), st.sampled_from(URLS), secrets)
    | st.builds(_garble, st.sampled_from(URLS), st.integers(0, 99), st.sampled_from(MISHAPS), secrets)
    | st.builds(str.format, st.sampled_from(NO_URLS), secrets)
)


def may_be_shown(url: str) -> bool:
    """Whether SQLAlchemy itself reads *url* so that the secret is none: a part of the user's name, the host, the port.

    Whoever writes that has a URL that says so, and an error has to name what is wrong with it.
    """
    try:
        parsed = make_url(url)
    except Exception:
        return False
    shown = (parsed.drivername, parsed.username, parsed.host, str(parsed.port), parsed.database)
    return any(half in (part or "") for half in SECRET for part in shown)


KEYS = [*sa_wsgi_session.paste._KEYS, *sa_wsgi_session.paste._SETTINGS]


def _misspell(key: str, place: int, how: str) -> str:
    at = place % len(key)
    return {
        "left out": key[:at] + key[at + 1 :],
        "doubled": key[: at + 1] + key[at:],
        "upper case": key.upper(),
        "capital": key.capitalize(),
        "another one": key[:at] + "_" + key[at + 1 :],
        "longer": f"{key}.{key}",
        "prefixed": f"sqlalchemy.{key}",
    }[how]


misspelled = st.builds(
    _misspell,
    st.sampled_from(KEYS),
    st.integers(0, 99),
    st.sampled_from(["left out", "doubled", "upper case", "capital", "another one", "longer", "prefixed"]),
)
keys = (
    st.sampled_from(KEYS)
    | misspelled
    | st.sampled_from(
        ["", " ", "sqlalchemy.", "retry.", "sqlalchemy", "session ", "self", "global_conf", "section", "password"]
    )
    | st.sampled_from(["sqlalchemy._coerce_config", "sqlalchemy.module", "sqlalchemy.dialect", "sqlalchemy.pool"])
    | st.sampled_from(
        ["sqlalchemy.connect_args.password", "sqlalchemy.events", "sqlalchemy.strategy", "sqlalchemy.encoding"]
    )
    | ANY_TEXT
)
NAMES = [
    *[
        "tests.paste_fixtures:Scoped",
        "tests.paste_fixtures:Other",
        "tests.paste_fixtures:Maker",
        "tests.paste_fixtures.Scoped",
    ],
    *["tests.paste_fixtures:number", "tests.paste_fixtures:Missing", "tests.paste_fixtures", "tests.missing:Session"],
    *["tests.paste_fixtures:Homemade", "tests.paste_fixtures:veto_everything", "tests.paste_fixtures:is_not_static"],
    *[
        "tests.paste_fixtures:Pool",
        "sqlalchemy.pool:NullPool",
        "sqlalchemy:create_engine",
        "builtins:print",
        "builtins:None",
    ],
    *[
        "a b",
        ":",
        "::",
        ".",
        "a:",
        ":b",
        "a..b",
        "a:b:c",
        "1",
        "tests.paste_fixtures:Scoped.registry",
        "\ud800:\udfff",
        "é.è:ê",
    ],
]
#: All that a value may be.
values = (
    st.sampled_from(NAMES)
    | st.sampled_from(
        ["", " ", "\n", "0", "1", "3", "-1", "1.5", "1e400", "nan", "inf", "-inf", "9" * 5000, "\u0663", "1_0", "0x1"]
    )
    | st.sampled_from(
        [
            "true",
            "no",
            "TRUE",
            "none",
            "None",
            "debug",
            "start",
            "end",
            "START",
            "rollback",
            "[]",
            "{}",
            "()",
            "%(here)s",
        ]
    )
    | ANY_TEXT
)
objects: Any = st.sampled_from(
    [None, True, 5, -1, 1.5, float("nan"), b"bytes", [], {}, {"a": 1}, object(), len, NullPool]
)

#: What is accepted, as far as it goes with the rest.
FINE = {
    "commit_veto": ["builtins:print", "no.such:veto"],
    "commit_at": ["start", "end", "End"],
    "activate_hook": ["tests.paste_fixtures:is_not_static", "tests.paste_fixtures.is_not_static"],
    "environ_key": ["mine", "\ud800", "a b"],
    "retry.attempts": ["1", "3", "9" * 5000, "3.0", "1e2", " 4 "],
    "retry.delay": ["0", "0.1", "1e300", "1e309", "-0.0"],
    "retry.deadline": ["none", " None ", "0", "9" * 400],
    "retry.max_body": ["0", "9" * 50, "-1"],
    "sqlalchemy.pool_size": ["1", "0", "-1", "9" * 30, "5.5"],
    "sqlalchemy.max_overflow": ["0", "-1", "3"],
    "sqlalchemy.pool_timeout": ["0", "5", "-1"],
    "sqlalchemy.pool_recycle": ["-1", "0", "3600"],
    "sqlalchemy.pool_pre_ping": ["true", "off", "2"],
    "sqlalchemy.poolclass": ["sqlalchemy.pool:NullPool", "tests.paste_fixtures:Pool", "sqlalchemy.pool:QueuePool"],
    "sqlalchemy.pool_reset_on_return": ["rollback", "commit", "none", "maybe"],
    "sqlalchemy.paramstyle": ["qmark", "named", "question mark", "pyformat"],
    "sqlalchemy.echo": ["true", "false", "debug", "loud"],
    "sqlalchemy.echo_pool": ["true", "false", "debug", "loud"],
    "sqlalchemy.query_cache_size": ["0", "1", "-1"],
    "sqlalchemy.logging_name": ["mine", "\ud800", "%s"],
    "sqlalchemy.dialect": ["sqlite"],
    "sqlalchemy.hide_parameters": ["yes"],
    "sqlalchemy.connect_args": ["{}"],
    "sqlalchemy.json_serializer": ["json:dumps", "json.fnord"],
}
fine = st.sampled_from([(key, value) for key, found in FINE.items() for value in found])


@st.composite
def sections(draw: Any, good: str) -> tuple[dict[str, Any], str]:
    """The keys of a section; and that of what has the secret in it, if any."""
    section: dict[str, Any] = {}
    secret = ""
    if draw(st.booleans()):
        section["session"] = draw(st.sampled_from(NAMES[:4] * 9 + NAMES))
    kind = draw(st.sampled_from(["good", "good", "good", "secret", "secret", "any", "none"]))
    if kind == "good":
        section["sqlalchemy.url"] = good
    elif kind == "secret":
        # Who confuses two keys may confuse any of them with the URL.
        key = draw(
            st.sampled_from(["sqlalchemy.url", "sqlalchemy.url", "sqlalchemy.ulr", "sqlalchemy_url", "session"]) | keys
        )
        section[key] = draw(urls)
        secret = key
    elif kind == "any":
        section["sqlalchemy.url"] = draw(values)
    more = draw(st.lists(fine | fine | fine | st.tuples(keys, values | objects), max_size=2))
    return {**dict(more), **section}, secret


class Loader:
    """Loads files and sections, one after the other, into one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Databases that are there, but for this one, are not asked.
        self.url = f"sqlite:///{folder / 'notes.sqlite'}"
        self._engine = sa.create_engine(self.url, poolclass=NullPool)
        make_sqlite_transactional(self._engine)
        Base.metadata.create_all(self._engine)

    def bound(self) -> list[Any]:
        return [factory.kw["bind"] for factory in paste_fixtures.FACTORIES]

    def unbind(self) -> None:
        for factory in paste_fixtures.FACTORIES:
            bind = factory.kw["bind"]
            factory.configure(bind=None)
            if isinstance(bind, Engine):
                bind.dispose()

    def assert_serves(self, wrap: Callable[[Any], Any], session: Any) -> None:
        """A request by way of that filter is served, and what it has written is durable."""
        text = f"note {next(_numbers)}"

        def app(environ: Any, start_response: Any) -> Any:
            session.add(note(text))
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b"written"]

        middleware = wrap(app)
        session = session or middleware.session
        assert request(middleware).content == b"written"
        with self._engine.begin() as connection:
            found = connection.exec_driver_sql("DELETE FROM note RETURNING text").scalars().all()
        assert found == [text]

    def assert_serves_the_next(self) -> None:
        """A good section is loaded as if nothing had been before."""
        wrap = filter_factory({}, session="tests.paste_fixtures:Scoped", **{"sqlalchemy.url": self.url})
        middleware = wrap(lambda environ, start_response: [b""])
        assert isinstance(middleware.session, scoped_session)
        assert self.bound()[0].url == make_url(self.url)
        self.unbind()

    def close(self) -> None:
        self.unbind()
        self._engine.dispose()


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[Loader]:
    with contextlib.closing(Loader(tmp_path)) as loader:
        yield loader


@contextlib.contextmanager
def overheard() -> Iterator[Callable[[], str]]:
    """All that is logged, printed or warned of in the block."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    root = logging.getLogger()
    root.addHandler(handler)
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(heard):
        warnings.simplefilter("always")
        with contextlib.redirect_stderr(heard):
            try:
                yield lambda: heard.getvalue() + "".join(str(warning.message) for warning in warned)
            finally:
                root.removeHandler(handler)


def assert_refused_well(error: Exception, section: dict[str, Any], secret: str) -> None:
    """It names the key, says what is accepted, and shows no secret."""
    assert type(error) is ValueError
    assert_clear(error)
    message = str(error)
    assert "; accepted: " in message
    assert message.startswith(("session, sqlalchemy.url: ", *(f"{key} = " for key in section))), message
    if secret and not may_be_shown(section[secret]):
        assert_secret(told(error))


def assert_secret(text: str) -> None:
    assert not any(half in text for half in SECRET), text


@pytest.mark.parametrize("url", ["postgres://me@example.org:{}@localhost/notes", "fnord://@:{}@localhost:5432/notes"])
@pytest.mark.parametrize("secret", SECRET)
def test_a_password_is_not_shown_where_the_name_of_the_user_has_an_at_sign(url: str, secret: str) -> None:
    """SQLAlchemy takes all up to the first colon for the name; Azure has such names."""
    section = {"session": "tests.paste_fixtures:Scoped", "sqlalchemy.url": url.format(secret)}
    with pytest.raises(ValueError, match="has no dialect") as raised:
        filter_factory({}, **section)
    assert_secret(told(raised.value))


#: What these names stand for is found out when it is called, or by the database.
CALLED_LATER = (
    *("commit_veto", "activate_hook", "retry.is_transient", "server_timing"),
    *("sqlalchemy.connect_args", "sqlalchemy.creator", "sqlalchemy.isolation_level", "sqlalchemy.paramstyle"),
)
GOOD_HOOKS = {
    "commit_veto": ["builtins:print", "builtins.print"],
    "activate_hook": ["tests.paste_fixtures:is_not_static", "tests.paste_fixtures.is_not_static"],
    "server_timing": ["true", "false", "1", "0", "tests.paste_fixtures:is_not_static"],
    "sqlalchemy.paramstyle": ["qmark", "named"],
}
STYLES = ("qmark", "numeric", "named", "format", "pyformat", "numeric_dollar")


def may_serve(section: dict[str, Any]) -> bool:
    """Whether nothing in the section can be wrong that is not wrong at once."""
    return all(key not in section or section[key] in GOOD_HOOKS.get(key, []) for key in CALLED_LATER)


def test_a_section_is_refused_or_serves(loader: Loader, tell: Tell) -> None:
    outcomes: Counter[str] = Counter()

    @hostile()
    @given(sections(loader.url))
    def check(drawn: tuple[dict[str, Any], str]) -> None:
        section, secret = drawn
        with overheard() as heard:
            try:
                wrap = filter_factory({}, **section)
            except Exception as error:
                assert_refused_well(error, section, secret)
                assert loader.bound() == [None] * 4
                outcomes["refused"] += 1
            else:
                # One of several, or none: the one of "session = ...".
                middleware = wrap(lambda environ, start_response: [b""])
                # Of a factory of the application's own, nobody knows what it is bound to.
                engine = getattr(middleware.session.session_factory, "kw", {"bind": None})["bind"]
                assert (engine is None) == ("sqlalchemy.url" not in section)
                outcomes["loaded"] += 1
                assert all(value.strip() for value in section.values() if isinstance(value, str))
                assert all(key in KEYS or key.startswith("sqlalchemy.") for key in section)
                # No driver has any other one.
                assert section.get("sqlalchemy.paramstyle", "qmark") in STYLES
                if section.get("sqlalchemy.url") == loader.url and may_serve(section):
                    loader.assert_serves(wrap, middleware.session)
                    outcomes["served"] += 1
            finally:
                loader.unbind()
            if secret:
                assert_secret(heard())
        loader.assert_serves_the_next()

    check()
    tell("sections", outcomes)


# -- files ------------------------------------------------------------------------------------------------------------

#: With this key the section is that of another filter, of which PasteDeploy makes what it can.
ANOTHER_FILTER = b"paste.filter_factory"

lines = (
    st.builds(
        lambda key, between, value: f"{key}{between}{value}",
        keys | st.sampled_from(["use", "set session", "get sqlalchemy.url", "filter-with", ANOTHER_FILTER.decode()]),
        st.sampled_from([" = ", " = ", "=", ": ", " ", "\n  ", " =\n"]),
        values
        | st.sampled_from(["egg:sa_wsgi_session", "egg:sa_wsgi_session#fnord", "egg:fnord", "config:no.ini", "here"]),
    )
    | fine.map(" = ".join)
    | st.sampled_from(
        ["[filter:main]", "[filter:other]", "[DEFAULT]", "[", "]", "# comment", "; comment", "\tx", "=", "%", "%%"]
    )
    | st.sampled_from(["\ufeff", "\x00", "session = ", "session", "[app:main]", "[filter-app:main]\nnext = main"])
    | ANY_TEXT
)


@st.composite
def files(draw: Any, good: str) -> tuple[bytes, str]:
    """What stands in a file, and of what kind it is: whether the secret is in the URL, percent signs doubled."""
    found = ["[filter:main]", "use = egg:sa_wsgi_session"]
    if draw(st.booleans()):
        found.append("session = tests.paste_fixtures:Scoped")
    kind = draw(st.sampled_from(["good", "good", "secret", "secret", "none"]))
    if kind == "good":
        found.append(f"sqlalchemy.url = {good}")
    elif kind == "secret":
        url = draw(urls.filter(lambda url: not may_be_shown(url))).replace("%", "%%")
        found.append(f"sqlalchemy.url = {url}")
    strange = draw(st.lists(lines, max_size=2))
    for line in strange:
        found.insert(draw(st.integers(0, len(found))), line)
    text = draw(st.sampled_from(["\n", "\n", "\n", "\r\n"])).join(found)
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8", "utf-16", "latin-1"]))
    if kind == "good" and (strange or encoding == "utf-16"):
        kind = "anything"
    return text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass"), kind


def test_a_file_is_refused_or_serves(loader: Loader, tell: Tell) -> None:
    outcomes: Counter[str] = Counter()
    path = loader.folder / "hostile.ini"

    @hostile()
    @given(files(loader.url))
    def check(drawn: tuple[bytes, str]) -> None:
        text, kind = drawn
        path.write_bytes(text)
        with overheard() as heard:
            try:
                wrap = loadfilter(f"config:{path}")
            except Exception as error:
                assert kind != "good"
                if is_ours(error) or ANOTHER_FILTER not in text:
                    outcomes[assert_refused(error, has_secret=kind == "secret")] += 1
                assert loader.bound() == [None] * 4
            else:
                if ANOTHER_FILTER in text and not getattr(wrap, "__module__", "").startswith("sa_wsgi_session"):
                    return  # whatever that is
                middleware = wrap(lambda environ, start_response: [b""])
                assert hasattr(middleware, "session")
                outcomes["loaded"] += 1
                if kind == "good":
                    loader.assert_serves(wrap, middleware.session)
                    outcomes["served"] += 1
            finally:
                loader.unbind()
            if kind == "secret":
                assert_secret(heard())
        loader.assert_serves_the_next()

    check()
    tell("files", outcomes)


def assert_refused(error: Exception, *, has_secret: bool) -> str:
    """It is one of ours, and as it should be, or one of those that had the file before. Which of these is told."""
    if not is_ours(error):
        # The parser's, PasteDeploy's, or that of another name in the file.
        assert isinstance(error, (configparser.Error, LookupError, ValueError, ImportError, OSError, TypeError))
        return "refused by PasteDeploy"
    assert type(error) is ValueError
    assert_clear(error)
    message = str(error)
    assert " = " in message or message.startswith("session, sqlalchemy.url: ")
    assert "; accepted: " in message
    if has_secret:
        assert_secret(told(error))
    return "refused"


def is_ours(error: BaseException) -> bool:
    """Whether the file has come as far as to the package."""
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
            return True
        trace = trace.tb_next
    return False
