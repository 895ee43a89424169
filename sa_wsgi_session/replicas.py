"""Read replicas that never show a visitor the past.

::

    from sa_wsgi_session.replicas import ReadReplicas

    replicas = ReadReplicas([create_engine(url_a), create_engine(url_b)], secret=secret)
    application = SessionMiddleware(application, Session, replicas=replicas)

Safe requests read from a replica, all others and jobs use the primary, which is what the session is bound to.  What a
visitor has seen, or written, they see again in their next request, wherever that goes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine
from sqlalchemy.orm import sessionmaker

from ._cluster import Cluster
from ._errors import type_name, why_unusable
from ._retry import check_number
from ._routing import ReplicaError, Router, divert
from ._tokens import Tokens
from ._watching import session_class_of

if TYPE_CHECKING:
    from ._middleware import Environ

__all__ = ["ReadReplicas", "ReplicaError"]

_SHORTEST_SECRET = 32
# RFC 9110, section 5.6.2, of which a cookie's name must not have more either (RFC 6265, section 4.1.1).
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class ReadReplicas:
    """The replicas of a database, for ``SessionMiddleware(…, replicas=…)``.

    :param engines: an engine for each of them.  They need nothing of the primary's but the same dialect; how long to
        wait for a connection, and whether to ping one (``pool_pre_ping``), is their business.
    :param secret: signs what is told to visitors; 32 characters, or bytes, or more, the same in each process, and
        known to nobody else.
    :param max_lag: a replica that lags by more seconds is not used.
    :param sticky: for so many seconds only the primary serves a visitor of whom nobody knows how far replicas must be:
        where the database has no positions, after they have used the primary; and where a response had begun before
        its transaction was committed.
    :param read_only: called as ``read_only(environ)``; true means that a replica may serve the request.  ``None``: its
        method says so, ``GET``, ``HEAD`` or ``OPTIONS``.
    :param positions: whether the database can tell how far a replica is; ``None``: PostgreSQL can, others can't.
        ``False``: it can't, such as Amazon Aurora.
    :param cookie_name: of the cookie; there is a second one, with ``_home`` after that.
    :param header: the header in which clients without cookies get the same, and send it back; ``None``: there is none.
    :param clock: what the time is, in seconds since the epoch.
    :raises TypeError: if an argument is of the wrong type.
    :raises ValueError: if it has a wrong value.

    The same object may serve several middlewares whose sessions are bound to the same primary.
    """

    def __init__(
        self,
        engines: Iterable[Engine],
        *,
        secret: str | bytes,
        max_lag: float = 10.0,
        sticky: float = 5.0,
        read_only: Callable[[Environ], object] | None = None,
        positions: bool | None = None,
        cookie_name: str = "replica_position",
        header: str | None = "Replica-Position",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engines = _check_engines(engines)
        self._secret = _check_secret(secret)
        check_number("max_lag", max_lag, "a number of seconds, more than 0")
        if max_lag == 0:
            raise ValueError(
                f"max_lag must be a number of seconds, more than 0, not {max_lag!r}: any replica lags a bit"
            )
        self._max_lag = float(max_lag)
        check_number("sticky", sticky, "a number of seconds, 0 or more")
        self._sticky = float(sticky)
        unusable = why_unusable(read_only)
        if read_only is not None and unusable:
            raise TypeError(f"read_only must be a callable that takes the environ, or None, not {unusable}")
        self._read_only = read_only
        if positions is not None and not isinstance(positions, bool):
            raise TypeError(f"positions must be True, False or None, not an object of type {type_name(positions)}")
        self._positions = positions
        _check_name("cookie_name", cookie_name)
        if header is not None:
            _check_name("header", header)
        if not callable(clock):
            raise TypeError(f"clock must be a callable without arguments, not an object of type {type_name(clock)}")
        self._cookie_name, self._header, self._clock = cookie_name, header, clock
        self._router: Router | None = None

    def __repr__(self) -> str:
        return f"<ReadReplicas, engines: {len(self._engines)}>"

    def _attach(self, factory: object) -> Router:
        """Make the sessions of *factory* use them."""
        primary = _primary_of(factory)
        router = self._router
        if router is None:
            router = self._router = self._make_router(primary)
        elif router.primary is not primary:
            raise ValueError(
                "replicas is in use with a session that is bound to another primary: make a ReadReplicas for each"
            )
        divert(session_class_of(factory))
        return router

    def _make_router(self, primary: Engine) -> Router:
        for number, engine in enumerate(self._engines, 1):
            if engine is primary or engine.pool is primary.pool:
                raise ValueError(
                    f"engine {number} of replicas is the one that the session is bound to, the primary: leave it out; "
                    f"requests go there anyway where no replica can serve them"
                )
            if engine.dialect.name != primary.dialect.name:
                raise ValueError(
                    f"engine {number} of replicas is of the dialect {engine.dialect.name!r}, and the primary, which "
                    f"the session is bound to, of {primary.dialect.name!r}: they must be copies of one database"
                )
        positions = primary.dialect.name == "postgresql" if self._positions is None else self._positions
        if positions and primary.dialect.name != "postgresql":
            raise ValueError(
                f"positions must be False, or None, for {primary.dialect.name!r}: only PostgreSQL has them"
            )
        cluster = Cluster(primary, self._engines, key=self._secret, max_lag=self._max_lag, positions=positions)
        # A visitor of whom nothing is known has seen nothing in the last half of it: by then any replica that does not
        # lag too much has replayed what they have seen before.
        lifetime = 2 * max(1.25 * self._max_lag, self._sticky) + 60
        tokens = Tokens(
            self._secret,
            cookie_name=self._cookie_name,
            header=self._header,
            lifetime=int(lifetime),
            clock=self._clock,
        )
        router = Router(cluster, tokens, self._read_only, self._sticky)
        router.listen()
        return router


def check_replicas(value: object) -> ReadReplicas:
    """Return *value*, or raise ``TypeError`` where it is no ``ReadReplicas``."""
    if isinstance(value, ReadReplicas):
        return value
    raise TypeError(f"replicas must be a ReadReplicas, or None, not an object of type {type_name(value)}")


def _check_engines(engines: Any) -> list[Engine]:
    if isinstance(engines, Engine) or not isinstance(engines, Iterable):
        raise TypeError(f"engines must be a list of Engines, not an object of type {type_name(engines)}")
    checked: list[Engine] = []
    for number, engine in enumerate(engines, 1):
        refuse_async_engine(engine, number)
        if not isinstance(engine, Engine):
            raise TypeError(f"engine {number} of replicas must be an Engine, not an object of type {type_name(engine)}")
        if any(engine is other or engine.pool is other.pool for other in checked):
            raise ValueError(f"engine {number} of replicas is there twice: give each replica an engine of its own")
        checked.append(engine)
    if not checked:
        raise ValueError("engines must have one Engine or more, not none: without replicas, leave replicas= out")
    return checked


def refuse_async_engine(engine: object, number: int) -> None:
    if type(engine).__module__.startswith("sqlalchemy.ext.asyncio"):
        raise TypeError(
            f"engine {number} of replicas must be an Engine, not an object of type {type_name(engine)}: WSGI calls the "
            f"application synchronously, so that an AsyncEngine could not be awaited"
        )


def _check_secret(secret: Any) -> bytes:
    # It must not be in the message, not even its length.
    if not isinstance(secret, (str, bytes)):
        raise TypeError(f"secret must be a str or bytes, not an object of type {type_name(secret)}")
    as_bytes = secret.encode() if isinstance(secret, str) else secret
    if len(as_bytes) < _SHORTEST_SECRET:
        raise ValueError(
            f"secret must have {_SHORTEST_SECRET} characters, or bytes, or more: with one that can be guessed anybody "
            f"signs; Python's secrets.token_hex() makes one"
        )
    return as_bytes


def _check_name(argument: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a str, not an object of type {type_name(value)}")
    if not _TOKEN.fullmatch(value):
        raise ValueError(
            f"{argument} must be a token of RFC 9110 (letters, digits, and signs such as '-' and '_'), not {value!r}"
        )


def _primary_of(factory: Any) -> Engine:
    """The engine that the sessions of *factory* are bound to."""
    if not isinstance(factory, sessionmaker):
        raise TypeError(
            f"session must be a sessionmaker, or a scoped_session of one, where there are replicas, not one of an "
            f"object of type {type_name(factory)}: only the Sessions of a sessionmaker have a class of their own, "
            f"which can be told to use another engine"
        )
    options = factory.kw
    bind = options.get("bind")
    if not isinstance(bind, Engine):
        what = "nothing" if bind is None else f"an object of type {type_name(bind)}"
        raise ValueError(
            f"session must be bound to an Engine where there are replicas, sessionmaker(engine), not to {what}: that "
            f"is the primary"
        )
    if options.get("twophase"):
        raise ValueError("session must not be in two-phase mode (twophase=True) where there are replicas")
    return bind
