"""The middleware as a PasteDeploy filter: for applications that an ini file puts together.

With an application that has a session, ``guests.Session``, this is all it takes:

.. code-block:: ini

    [pipeline:main]
    pipeline = session guests

    [filter:session]
    use = egg:sa_wsgi_session
    session = guests:Session
    sqlalchemy.url = sqlite:///%(here)s/guests.sqlite

    [app:guests]
    paste.app_factory = guests:main

The keys of the section.  One of ``session`` and ``sqlalchemy.url`` is needed:

``session``
    The dotted name of a ``scoped_session`` or a ``sessionmaker``.  Where it is left out: :data:`Session`.
``sqlalchemy.url``
    The URL of the database.  An engine is made of it, and the session is bound to that engine: the file wins over the
    ``bind`` of the code, but not over its ``binds``, which are for certain tables.  Where it is left out, the session
    is taken as it is, and the application binds it.
``sqlalchemy.*``
    More settings for that engine, such as ``sqlalchemy.pool_size``: the parameters of :func:`sqlalchemy.create_engine`,
    by way of :func:`sqlalchemy.engine_from_config`.  Integers, and booleans such as ``true`` and ``off``, are read
    as such; ``creator``, ``json_deserializer``, ``json_serializer`` and ``poolclass`` are dotted names.
``commit_veto``
    The dotted name of a callable that takes ``environ``, ``status`` and ``headers``; true means: roll back.
    ``repoze.tm:default_commit_veto`` will do, as it is.
``commit_at``
    ``start`` or ``end``.
``activate_hook``
    The dotted name of a callable that takes ``environ``; false means: the request passes untouched.
``environ_key``
    The prefix of the two keys in the environ.
``retry.*``
    The parameters of a :class:`~sa_wsgi_session.RetryPolicy`, as in ``retry.attempts = 5``; any one of them asks for
    replays.  They are numbers, but ``retry.deadline`` may be ``none``, and ``retry.is_transient`` is a dotted name.
``replicas``
    The dotted name of a :class:`~sa_wsgi_session.replicas.ReadReplicas`.
``observer``
    The dotted name of a callable that takes a :class:`~sa_wsgi_session.observers.FinishedUnit`.
``server_timing``
    ``true`` or ``false``; or the dotted name of a callable that takes ``environ``.
``warn_after``
    A number of seconds; or ``none``.

All but the first three are what :class:`~sa_wsgi_session.SessionMiddleware` makes of them.  A dotted name is
``package.module:name`` or ``package.module.name``.  Code that calls these functions itself may give the objects instead
of their names.

Names are resolved, values read and the engine made when the file is loaded; the database is not asked.  What is wrong
is a :exc:`ValueError` that names the key, the value and what is accepted.  Neither it nor the exception that caused
it shows a password: the URL is masked, and a cause that quotes it is left out.

Two sections with the same ``sqlalchemy.*`` settings and the same session share one engine, and with it one pool.
"""

# PasteDeploy finds these functions by their entry points.  Nothing of it is imported here: whoever has a session to
# bind from a dictionary of settings can call them without it.

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from itertools import accumulate
from pkgutil import resolve_name
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import unquote
from weakref import WeakKeyDictionary

from sqlalchemy import dialects, engine_from_config
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.pool import Pool
from sqlalchemy.util import asbool

from ._binding import as_scoped_session, contextual_session
from ._errors import type_name, why_unusable
from ._middleware import SessionMiddleware, check_warn_after
from ._retry import RetryPolicy
from ._scope import COMMIT_AT

if TYPE_CHECKING:
    from ._middleware import Application

__all__ = ["Session", "filter_app_factory", "filter_factory"]

#: The session of a section that names none: a :func:`~sa_wsgi_session.contextual_session`, unbound until such a section
#: is loaded.  ``session_scope(Session)`` gives it to the jobs of that process too.
Session: scoped_session[Any] = contextual_session(sessionmaker())


def filter_factory(global_conf: Any, /, **local_conf: Any) -> Callable[[Application], SessionMiddleware]:
    """Make the filter that a section describes; PasteDeploy's entry point ``paste.filter_factory``.

    :param global_conf: is ignored.  It holds ``here``, ``__file__`` and the ``[DEFAULT]`` section, which all the
        applications and filters of the file share.
    :param local_conf: the keys of the section, see above.
    :return: what wraps an application in a :class:`~sa_wsgi_session.SessionMiddleware`.
    :raises ValueError: if a key does not exist, a name does not resolve, a value cannot be read, or the session cannot
        be bound.
    """
    section = _Section(local_conf)
    section.check_keys()
    options = {key: section.read(key) for key in local_conf if key in _KEYS}
    session = options.pop("session", Session)
    policy = {key[len(_RETRY) :]: options.pop(key) for key in _KEYS if key.startswith(_RETRY) and key in options}
    if policy:
        options["retry"] = RetryPolicy(**policy)
    settings = {key: section.read(key) for key in local_conf if key not in _KEYS}
    # At last, when nothing else can be wrong: a section that is refused leaves no trace.
    factory = session.session_factory
    before = factory.kw.get("bind") if isinstance(factory, sessionmaker) else None
    if settings:
        _bind(section, factory, settings)
    if "replicas" in options:
        error = _try(options["replicas"]._attach, factory)[1]
        if error is not None:
            if settings:
                factory.configure(bind=before)
            section.refuse("replicas", "the session cannot have them", cause=error)

    def session_filter(app: Application) -> SessionMiddleware:
        return SessionMiddleware(app, session, **options)

    return session_filter


def filter_app_factory(app: Application, global_conf: Any, /, **local_conf: Any) -> SessionMiddleware:
    """Wrap *app* as a section describes; PasteDeploy's entry point ``paste.filter_app_factory``.

    :param app: the WSGI application.
    :param global_conf: is ignored, as by :func:`filter_factory`.
    :param local_conf: the keys of the section, see above.
    :return: the application with its :class:`~sa_wsgi_session.SessionMiddleware`.
    :raises ValueError: as :func:`filter_factory` does.
    """
    return filter_factory(global_conf, **local_conf)(app)


# The engine

#: What the engines were made of; they, and so their sessionmakers, know no more than the URL.
_settings_of: WeakKeyDictionary[Engine, Mapping[str, Any]] = WeakKeyDictionary()
# Two threads of a server may load two files into one process.
_lock = Lock()


def _bind(section: _Section, factory: Any, settings: Mapping[str, Any]) -> None:
    """Bind what *factory* will make to an engine with these settings: the one that it is bound to, if it has them."""
    if not isinstance(factory, sessionmaker):
        section.refuse(
            "session",
            f"it makes its sessions by an object of type {type_name(factory)}, which cannot be bound to {_URL}",
            accepted="a scoped_session of a sessionmaker; or this one, without any sqlalchemy.* key",
        )
    given = section.values_of(settings)
    with _lock:
        bind = factory.kw.get("bind")
        present = _settings_of.get(bind) if isinstance(bind, Engine) else None
        if present == given:
            return
        if present is not None:
            name = section.entry("session") if "session" in section else "sa_wsgi_session.paste.Session"
            others = sorted(key for key in {*present, *given} if present.get(key) != given.get(key))
            section.refuse(
                _URL,
                f"the session ({name}) is bound to {_Section(present).shown(_URL)} already, by a section in which "
                f"{', '.join(others)} differs",
                accepted="a session of its own for each, by session = package.module:Session; or, in a test suite "
                "that loads one after the other, Session.configure(bind=None) in between",
            )
        engine = _make_engine(section, settings)
        _settings_of[engine] = given
        factory.configure(bind=engine)


def _make_engine(section: _Section, settings: Mapping[str, Any]) -> Engine:
    engine, error = _try(engine_from_config, settings)
    if error is not None:
        _blame(section, settings, error)
    assert isinstance(engine, Engine)
    if engine.dialect.is_async:
        section.refuse(_URL, f"{engine.url.drivername} is for asyncio, and WSGI is synchronous")
    return engine


def _blame(section: _Section, settings: Mapping[str, Any], error: Exception) -> NoReturn:
    """Say which of the settings it is that SQLAlchemy has refused: its own errors seldom do."""
    url = {_URL: settings[_URL]}
    of_url = _try(engine_from_config, url)[1]
    if of_url is not None:
        section.refuse(_URL, *_why_no_engine(make_url(settings[_URL]), of_url), cause=of_url)
    options = [key for key in settings if key != _URL]
    for key in options:
        of_key = _try(engine_from_config, {**url, key: settings[key]})[1]
        if of_key is not None:
            guess = "" if key in _SETTINGS else _closest(key)
            section.refuse(key, f"create_engine() refuses it for this database{guess}", cause=of_key)
    raise section.error(
        ", ".join(map(section.entry, options)),
        "create_engine() takes each of them for this database, but not all together",
        "settings that go together",
        error,
    )


def _why_no_engine(url: URL, error: Exception) -> tuple[str, str]:
    """What is wrong with the URL, and what is accepted."""
    if isinstance(error, NoSuchModuleError) and "sqlalchemy.dialects" in str(error):
        return (
            f"SQLAlchemy has no dialect {url.drivername!r}{_closest(url.drivername, dialects.__all__)}",
            f"{', '.join(dialects.__all__)}, and what other packages add; with a driver, as in postgresql+psycopg",
        )
    if isinstance(error, ImportError):
        return (
            f"the driver of {url.drivername} cannot be imported",
            "the URL of a database whose driver is installed, and named where there are several: postgresql+psycopg",
        )
    return "create_engine() refuses it", _accepted(_URL)


# The keys, and how their values are read


class _Key(NamedTuple):
    #: Called with the section, the key and the value, which is no text where it comes from Python code.
    read: Callable[[_Section, str, Any], Any]
    accepted: str


def _as_it_is(section: _Section, key: str, value: Any) -> Any:
    return value


def _read_prefix(section: _Section, key: str, value: Any) -> Any:
    if not isinstance(value, str):
        section.refuse(key, "it is no text")
    return value


def _read_moment(section: _Section, key: str, value: Any) -> Any:
    if not isinstance(value, str) or value not in COMMIT_AT:
        section.refuse(key, "there is no such moment to commit at")
    return value


def _read_style(section: _Section, key: str, value: Any) -> Any:
    if value not in _STYLES:
        section.refuse(key, "there is no such style")
    return value


def _read_pool(section: _Section, key: str, value: Any) -> Any:
    # SQLAlchemy takes anything, and misses the methods of a pool at the first statement.
    if not isinstance(value, Pool):
        section.refuse(key, "it is the class of a pool" if isinstance(value, type) else "it is no pool")
    return value


def _refuse_any(section: _Section, key: str, value: Any) -> NoReturn:
    section.refuse(key, f"it is {_URL} that says so")


def _read_boolean(section: _Section, key: str, value: Any) -> Any:
    # SQLAlchemy itself reads a few of them, and takes "false" for true in the others.
    return _read_text(asbool, section, key, value, "it cannot be read")


def _read_integer(section: _Section, key: str, value: Any) -> Any:
    # Likewise: in the others it finds out that something is no number when it first needs one.
    found = _read_text(int, section, key, value, "it cannot be read")
    if found is not None and not isinstance(found, (int, float)):
        section.refuse(key, f"it is an object of type {type_name(found)}")
    return found


def _read_count(section: _Section, key: str, value: Any) -> Any:
    # Where others may be None, SQLAlchemy calculates with it.
    if value is None:
        section.refuse(key, "it is no number")
    return _read_integer(section, key, value)


def _read_amount(section: _Section, key: str, value: Any) -> Any:
    # SQLAlchemy takes it, and waits in vain at the first statement, or where the pool is exhausted.
    found = _read_integer(section, key, value)
    if found is not None and found < 0:
        section.refuse(key, "it is negative")
    return found


def _read_size(section: _Section, key: str, value: Any) -> Any:
    _read_count(section, key, value)
    return _read_amount(section, key, value)


def _read_text(read: Callable[[str], Any], section: _Section, key: str, value: Any, problem: str) -> Any:
    found, error = _try(read, value) if isinstance(value, str) else (value, None)
    if error is not None:
        section.refuse(key, problem, cause=error)
    return found


def _read_callable(section: _Section, key: str, value: Any) -> Any:
    found = _read_text(_resolve, section, key, value, "the name cannot be resolved")
    if not callable(found):
        section.refuse(key, f"it is an object of type {type_name(found)}, which cannot be called")
    return found


def _read_hook(section: _Section, key: str, value: Any) -> Any:
    found = _read_text(_resolve, section, key, value, "the name cannot be resolved")
    unusable = why_unusable(found)
    if unusable:
        section.refuse(key, f"it is {unusable}")
    return found


def _read_replicas(section: _Section, key: str, value: Any) -> Any:
    from .replicas import check_replicas

    found = _read_text(_resolve, section, key, value, "the name cannot be resolved")
    error = _try(check_replicas, found)[1]
    if error is not None:
        section.refuse(key, f"it is an object of type {type_name(found)}")
    return found


def _read_limit(section: _Section, key: str, value: Any) -> Any:
    found = _read_text(_number, section, key, value, "it cannot be read")
    error = _try(lambda: RetryPolicy(**{key[len(_RETRY) :]: found}))[1]
    if error is not None:
        section.refuse(key, "no policy can have that", cause=error)
    return found


def _read_timing(section: _Section, key: str, value: Any) -> Any:
    found, error = _try(asbool, value)
    return _read_hook(section, key, value) if error is not None else found


def _read_seconds(section: _Section, key: str, value: Any) -> Any:
    found = _read_text(_number, section, key, value, "it cannot be read")
    error = _try(check_warn_after, found)[1]
    if error is not None:
        section.refuse(key, "nobody can wait for that", cause=error)
    return found


def _number(text: str) -> float | None:
    if text.strip().lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)


def _read_session(section: _Section, key: str, value: Any) -> Any:
    found = _read_text(_resolve, section, key, value, "the name cannot be resolved")
    scoped, error = _try(as_scoped_session, found)
    if error is not None:
        section.refuse(key, "it cannot be the session of a request", cause=error)
    return scoped


def _resolve(name: str) -> Any:
    found, error = _try(resolve_name, name)
    if isinstance(error, AttributeError) and ":" not in name:
        # resolve_name() goes on where a module cannot be imported, and then misses it as an attribute.
        modules = accumulate(name.split("."), "{}.{}".format)
        error = next((hidden for module in modules if (hidden := _import_error(module))), error)
    if error is not None:
        raise error
    return found


def _import_error(module: str) -> Exception | None:
    """Why that module cannot be imported, unless it is that there is none of that name."""
    error = _try(import_module, module)[1]
    is_missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
    return None if is_missing else error


def _read_url(section: _Section, key: str, value: Any) -> Any:
    if not isinstance(value, (str, URL)):
        section.refuse(key, "it is no text")
    if _try(make_url, value)[1] is not None:
        # The cause stays untold: what SQLAlchemy took for the port may be the end of the password.
        section.refuse(key, "it cannot be read as a URL")
    return value


_URL = "sqlalchemy.url"
_PREFIX = "sqlalchemy."
_RETRY = "retry."

_KEYS = {
    "session": _Key(
        _read_session, "the dotted name of a scoped_session or a sessionmaker, such as package.module:Session"
    ),
    "commit_veto": _Key(
        _read_hook,
        "the dotted name of a callable that takes environ, status and headers, such as repoze.tm:default_commit_veto",
    ),
    "commit_at": _Key(_read_moment, " or ".join(COMMIT_AT)),
    "activate_hook": _Key(_read_hook, "the dotted name of a callable that takes environ, such as package.module:hook"),
    "environ_key": _Key(_read_prefix, "the beginning of two keys in the environ, such as sa_wsgi_session"),
    "retry.attempts": _Key(_read_limit, "how many attempts there may be, 1 or more"),
    "retry.delay": _Key(_read_limit, "a number of seconds, 0 or more"),
    "retry.max_delay": _Key(_read_limit, "a number of seconds, 0 or more"),
    "retry.deadline": _Key(_read_limit, "a number of seconds, 0 or more, or none"),
    "retry.max_body": _Key(_read_limit, "a whole number of bytes, 0 or more"),
    "retry.is_transient": _Key(
        _read_hook, "the dotted name of a callable that takes an exception, such as package.module:is_transient"
    ),
    "replicas": _Key(_read_replicas, "the dotted name of a ReadReplicas, such as package.module:replicas"),
    "observer": _Key(
        _read_hook, "the dotted name of a callable that takes a FinishedUnit, such as package.module:observer"
    ),
    "server_timing": _Key(
        _read_timing, "true, false, or the dotted name of a callable that takes environ, such as package.module:asks"
    ),
    "warn_after": _Key(_read_seconds, "a number of seconds, 0 or more, or none"),
}

#: Of PEP 249, and one of SQLAlchemy's own.
_STYLES = ("qmark", "numeric", "named", "format", "pyformat", "numeric_dollar")

#: The settings of an engine of which more can be said than that SQLAlchemy takes them or not.
_SETTINGS = {
    _PREFIX + name: key
    for names, key in (
        (
            "url",
            _Key(
                _read_url,
                "a URL such as postgresql://user:password@host/database or sqlite:///file, with the special "
                "characters of the password encoded (@ as %40, in an ini file as %%40)",
            ),
        ),
        (
            "auto_convert_lobs case_sensitive coerce_to_decimal enable_from_linting enable_offset_fetch "
            "fast_executemany future hide_parameters ignore_no_transaction_on_rollback implicit_returning is_mariadb "
            "native_datetime native_inet_types optimize_limits pool_pre_ping pool_use_lifo server_side_cursors "
            "skip_autocommit_rollback use_ansi use_insertmanyvalues use_native_hstore use_nchar_for_unicode "
            "use_scope_identity use_setinputsizes",
            _Key(_read_boolean, "true or false"),
        ),
        (
            "arraysize executemany_batch_page_size executemany_values_page_size insertmanyvalues_page_size "
            "label_length max_identifier_length",
            _Key(_read_integer, "an integer"),
        ),
        ("max_overflow pool_recycle query_cache_size", _Key(_read_count, "an integer")),
        ("pool_size", _Key(_read_size, "an integer: how many connections are kept, where 0 sets no limit")),
        ("pool_timeout", _Key(_read_amount, "an integer: how many seconds to wait for a connection, 0 or more")),
        (
            "creator json_deserializer json_serializer poolclass",
            _Key(_read_callable, "the dotted name of a class or a function, such as sqlalchemy.pool:NullPool"),
        ),
        (
            "pool",
            _Key(_read_pool, "a pool that is made already, which a text cannot give; for its class there is poolclass"),
        ),
        ("echo echo_pool", _Key(_as_it_is, "true, false or debug")),
        ("pool_reset_on_return", _Key(_as_it_is, "rollback, commit or none")),
        ("isolation_level logging_name pool_logging_name", _Key(_as_it_is, "a name")),
        # SQLAlchemy takes what is none of them, and fails at the first statement.
        ("paramstyle", _Key(_read_style, " or ".join(_STYLES))),
        # For SQLAlchemy an argument of the pool.
        ("dialect module", _Key(_refuse_any, "no such key: the dialect, and its driver, are the beginning of the URL")),
        (
            "connect_args execution_options plugins",
            _Key(_as_it_is, "an object, which a text cannot give; most drivers take their arguments in the URL, too"),
        ),
    )
    for name in names.split()
}

_OTHER_SETTING = _Key(
    _as_it_is, "the parameters of sqlalchemy.create_engine() that fit this database, so far as a text can give them"
)


def _key(key: str) -> _Key:
    return _KEYS.get(key) or _SETTINGS.get(key) or _OTHER_SETTING


def _accepted(key: str) -> str:
    return _key(key).accepted


def _closest(word: str, words: Iterable[str] = (*_KEYS, *_SETTINGS)) -> str:
    # All settings begin alike, which is not close enough.
    matches = get_close_matches(word, words, 1, cutoff=0.85)
    return f" (is {matches[0]} meant?)" if matches else ""


def _try(function: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
    """What *function* returns, or what it raises.

    An error that is raised in an ``except`` takes the first one with it, for every tool that looks for it.
    """
    try:
        return function(*args), None
    except Exception as error:
        return None, error


# The section, and what an error may show of it

_SECRET = r"passw|passphrase|pwd|secret|token|credential|api_?key"
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
#: As in a connection string of libpq, or in a dictionary.
_SECRET_INSIDE = re.compile(rf"(?:{_SECRET})\w*(?:\s*=|['\"]\s*:)", re.IGNORECASE)
#: Before the password of a URL, and of what cannot be read as one, where nobody can tell it from the user.
_BEFORE_PASSWORD = re.compile(r"://[^:@]*:")
#: Of a URL that has one: the name of its user may be an address.
_BEFORE_KNOWN_PASSWORD = re.compile(r"://[^:]*:")
_BEFORE_USER = re.compile(r"(?:.*?(?:://|//|:))?", re.DOTALL)


def _mask_url(text: str) -> tuple[str, list[str]]:
    """*text* without what may be a password in it, should it be a URL; and what was left out.

    Characters that should have been encoded are a part of the password, as far as one may believe that they are.
    """
    url = _try(make_url, text)[0]
    is_url = url is not None
    # Many drivers take a password in the query too.
    shown, mark, query = text.partition("?")
    hidden = [query]
    if not is_url:
        before_password = _BEFORE_USER
    elif url.password is None:
        before_password = _BEFORE_PASSWORD
    else:
        before_password = _BEFORE_KNOWN_PASSWORD
    start = before_password.search(shown)
    if start is not None and ("@" in text or (not is_url and "://" in text)):
        before = start.end()
        at = -1 if "@" in query else shown.rfind("@", before)
        after = len(shown) if at < 0 else at
        hidden.append(shown[before:after])
        shown = f"{shown[:before]}***{shown[after:]}"
    return shown + (mark and "?***"), hidden


class _Section:
    """One section of the file, which refuses what is wrong in it without giving a secret away."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        #: What is masked, by the keys of the values that it is in.
        self._hidden: dict[str, set[str]] = {key: set() for key in values}
        self._shown = {key: self._mask(key, value) for key, value in values.items()}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def values_of(self, keys: Iterable[str]) -> dict[str, Any]:
        """What stands in the section for these keys."""
        return {key: self._values[key] for key in keys}

    def check_keys(self) -> None:
        """Refuse a key that does not exist, one that is empty, and the lack of one."""
        for key, value in self._values.items():
            if key not in _KEYS and not key.startswith(_PREFIX):
                accepted = f"{', '.join(_KEYS)}, {_URL} and other {_PREFIX}* keys"
                self.refuse(key, f"there is no such key{_closest(key)}", accepted)
            if isinstance(value, str) and not value.strip():
                self.refuse(key, "it is empty", f"{_accepted(key)}; or no such key at all")
        if _URL in self:
            return
        for key in self._values:
            if key not in _KEYS:
                guess = "" if key in _SETTINGS else _closest(key)
                accepted = f"{_URL} = {_accepted(_URL)}; or no {_PREFIX}* key at all"
                self.refuse(key, f"without {_URL} there is no engine to set up{guess}", accepted)
        if "session" not in self:
            raise self.error(
                f"session, {_URL}",
                "one of them is needed, in this section ([DEFAULT] is not read)",
                f"session = {_accepted('session')}; {_URL} = {_accepted(_URL)}",
            )

    def read(self, key: str) -> Any:
        """What the value of *key* stands for."""
        return _key(key).read(self, key, self._values[key])

    def shown(self, key: str) -> str:
        """The value of *key*, for everybody to see."""
        return self._shown[key]

    def entry(self, key: str) -> str:
        """The line of the file, for everybody to see."""
        return f"{key} = {self._shown[key]}"

    def refuse(self, key: str, problem: str, accepted: str = "", cause: Exception | None = None) -> NoReturn:
        """Raise the error that names the key, its value, and what is accepted."""
        # An engine is made of its URL too. A name is resolved without it.
        keys = (key, _URL) if key.startswith(_PREFIX) and _URL in self else (key,)
        raise self.error(self.entry(key), problem, accepted or _accepted(key), cause, keys)

    def error(
        self, entry: str, problem: str, accepted: str, cause: Exception | None = None, keys: Iterable[str] = ()
    ) -> ValueError:
        """The error to raise; its cause is told only where that quotes nothing that is masked in these keys."""
        if cause is not None:
            told = _messages(cause)
            if any(hidden in told for key in keys for hidden in self._hidden[key]):
                problem, cause = f"{problem} ({type_name(cause)})", None
            else:
                problem = f"{problem} ({type_name(cause)}: {cause})"
        error = ValueError(f"{entry}: {problem}; accepted: {accepted}")
        error.__cause__ = cause
        return error

    def _mask(self, key: str, value: Any) -> str:
        """What errors show of *value*; the rest is noted as hidden."""
        if isinstance(value, URL):
            value = value.render_as_string(hide_password=False)
        if not isinstance(value, str):
            # By its repr, an object may tell anything.
            return repr(value) if isinstance(value, (bool, int, float, type(None))) else f"<{type_name(value)}>"
        # A URL may stand anywhere: who confuses two keys may confuse the one with the URL too.
        shown, hidden = _mask_url(value)
        if _SECRET_NAME.search(key) or _SECRET_INSIDE.search(value.partition("?")[0]):
            shown, hidden = "***", [value]
        self._hidden[key] = {part for text in hidden for part in _parts(text)}
        return shown if shown == "***" else repr(shown)


def _parts(secret: str) -> set[str]:
    """What of *secret* an error may quote: all of it, or the parts that a parser, misled by it, takes for others."""
    parts: set[str] = set()
    for whole in (secret, unquote(secret)):
        parts.update([whole, *re.findall(r"\w{4,}", whole), *whole.split("@")[1:]])
    return parts - {""}


def _messages(error: BaseException | None) -> str:
    """What *error* says, and those that it comes from: not the code that it passed through, which quotes no value."""
    said = []
    while error is not None:
        said += traceback.format_exception_only(error)
        error = error.__cause__ or error.__context__
    return "".join(said)
