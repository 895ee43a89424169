"""What SQLAlchemy sees of a ``SharedConnection``: a pool, its proxies of a connection, a few methods of the dialect.

SQLAlchemy lets pools be written, but not the proxies that they hand out; these stand in for its own
(``_ConnectionFairy`` and ``_ConnectionRecord`` of ``sqlalchemy/pool/base.py``), and have what it uses of them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import pool as sqlalchemy_pool
from sqlalchemy.exc import ArgumentError, DisconnectionError
from sqlalchemy.pool import Pool

if TYPE_CHECKING:
    from ._shared_connection import SharedConnection, Tenant


class Record:
    """What takes the place of a pool's record of a connection, for the events of the pool and for the dialect."""

    def __init__(self, lease: Lease, original: Any) -> None:
        self.fairy_ref = weakref.ref(lease)
        self._original = original
        self.record_info: dict[Any, Any] = {}
        #: How SQLAlchemy has a connection's isolation level reset: not called, there is nothing to reset.
        self.finalize_callback: deque[Callable[[Any], None]] = deque()

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        lease = self.fairy_ref()
        if lease is not None:
            lease.invalidate(e, soft)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class Lease:
    """What SQLAlchemy takes for the pool's proxy of a connection."""

    __slots__ = ("__weakref__", "_connection_record", "_pool", "_tenant", "dbapi_connection")

    def __init__(self, shared_pool: SharedPool, tenant: Tenant) -> None:
        self._pool = shared_pool
        self._tenant = tenant
        self._connection_record: Record | None = Record(self, shared_pool.shared.record)
        self.dbapi_connection: Any = shared_pool.shared.driver

    # As the driver's connection

    def cursor(self, *args: Any, **options: Any) -> Any:
        return self._pool.shared.cursor(self._tenant, args, options)

    def commit(self) -> None:
        self._pool.shared.commit(self._tenant)

    def rollback(self) -> None:
        self._pool.shared.roll_back(self._tenant)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dbapi_connection, name)

    # As the pool's proxy

    @property
    def driver_connection(self) -> Any:
        return self.dbapi_connection

    @property
    def connection(self) -> Any:
        return self.dbapi_connection

    @property
    def is_valid(self) -> bool:
        return self.dbapi_connection is not None

    @property
    def is_detached(self) -> bool:
        return False

    @property
    def info(self) -> dict[Any, Any]:
        info: dict[Any, Any] = self._pool.shared.record.info
        return info

    @property
    def record_info(self) -> dict[Any, Any] | None:
        return None if self._connection_record is None else self._connection_record.record_info

    def close(self) -> None:
        self._close_special()

    def _close_special(self, transaction_reset: bool = False) -> None:
        record, dispatch = self._connection_record, self._pool.dispatch
        if record is None:
            return
        try:
            # The listeners get this object for the driver's connection, whose rollback() must not reach the database.
            if dispatch.reset:
                dispatch.reset(self, record, *_reset_state(transaction_reset))
            if getattr(self._pool._reset_on_return, "name", "") == "reset_commit":
                self._pool._dialect.do_commit(cast(Any, self))
            if dispatch.checkin:
                dispatch.checkin(self, record)
        finally:
            self._leave()

    def _leave(self) -> None:
        self._connection_record = None
        self.dbapi_connection = None
        self._pool.shared.leave(self._tenant)

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:
        """In production this one connection would be closed, with its transaction; the others would not mind."""
        if self._connection_record is not None and not soft:
            if self._pool.dispatch.invalidate:
                self._pool.dispatch.invalidate(self, self._connection_record, e)
            self._leave()

    def detach(self) -> None:
        """In production the pool would forget the connection; its transaction ends when it is closed, as ever."""


def _reset_state(transaction_reset: bool) -> tuple[Any, ...]:
    state: Any = getattr(sqlalchemy_pool, "PoolResetState", None)
    if state is None:
        return ()  # SQLAlchemy 1.4
    return (state(transaction_was_reset=transaction_reset, terminate_only=False, asyncio_safe=True),)


class SharedPool(Pool):
    """A pool with one connection, which it gives to everybody."""

    def __init__(self, shared: SharedConnection, pool: Pool) -> None:
        self.shared = shared
        self._instead_of = pool
        super().__init__(creator=lambda: shared.driver, dialect=shared.dialect, echo=pool.echo)
        self._reset_on_return = pool._reset_on_return
        # The very same: listeners that are added or removed meanwhile stay so.
        self.__dict__["dispatch"] = pool.dispatch

    def connect(self) -> Any:
        shared = self.shared
        tenant = shared.admit()
        lease = Lease(self, tenant)
        # One that is dropped instead of closed: whatever runs now, it is not the moment to send statements.
        weakref.finalize(lease, shared.dropped.append, tenant).atexit = False
        if self.dispatch.checkout:
            try:
                self.dispatch.checkout(lease, lease._connection_record, lease)
            except DisconnectionError as error:
                lease.invalidate(error)
                raise shared.tell(
                    "a listener to the pool's checkout event has found its connection lost, and there is no other one "
                    "within isolated()"
                ) from error
            except BaseException:
                lease._leave()
                raise
        return lease

    def dispose(self) -> None:
        """The connection is needed until the end of the block; the pool itself was not touched."""

    def recreate(self) -> Pool:
        return self

    def _invalidate(self, connection: Any, exception: BaseException | None = None, _checkin: bool = True) -> None:
        """SQLAlchemy invalidates *connection* besides; the other ones are as good as before."""

    def checkedout(self) -> int:
        return len(self.shared.tenants)

    def status(self) -> str:
        return f"SharedPool of isolated(): {self.checkedout()} tenants of one connection"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instead_of, name)


class Hooks:
    """What has to be done otherwise in the dialect of the engine, as long as the block lasts."""

    def __init__(self, shared: SharedConnection) -> None:
        self._shared = shared
        self._dialect: Any = shared.dialect
        self._installed: dict[str, tuple[Any, Any]] = {}
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            self._install(name, self._execute)
        self._install("do_commit", self._commit)
        for name in ("set_isolation_level", "set_readonly", "set_deferrable"):
            if hasattr(self._dialect, name):
                self._install(name, self._set_characteristic)
        if self._dialect.name != "sqlite":  # which has no two-phase commit, and says so
            self._install("do_begin_twophase", self._begin_twophase)
            self._install("do_prepare_twophase", self._prepare_twophase)
            self._install("do_commit_twophase", self._commit_twophase)
            self._install("do_rollback_twophase", self._rollback_twophase)

    def _install(self, name: str, hook: Callable[..., None]) -> None:
        was: Any = self._dialect.__dict__.get(name)
        installed = partial(hook, getattr(self._dialect, name))
        setattr(self._dialect, name, installed)
        self._installed[name] = (was, installed)

    def remove(self) -> None:
        for name, (was, installed) in self._installed.items():
            if self._dialect.__dict__.get(name) is not installed:
                continue  # somebody has wrapped it since; from now on it does nothing of its own
            if was is None:
                delattr(self._dialect, name)
            else:
                setattr(self._dialect, name, was)

    def _tenant_of(self, proxy: Any) -> Tenant | None:
        """Whose it is, if it is a proxy of the shared connection."""
        if isinstance(proxy, Lease) and proxy._pool.shared is self._shared:
            return proxy._tenant
        return None

    def _refuse_earlier(self) -> None:
        if not self._shared.has_ended:
            raise self._shared.tell(
                "a transaction was about to be committed that had begun before isolated(), on a connection of its own, "
                "so it would stay: end it before, or begin isolated() earlier"
            )

    def _execute(self, original: Callable[..., None], cursor: Any, statement: str, *more: Any) -> None:
        context = more[-1] if more else None  # it comes last, if there is one
        tenant = self._tenant_of(getattr(context, "_dbapi_connection", None))
        run = partial(original, cursor, statement, *more)
        if tenant is None:
            run()
        else:
            options = cast(Any, context).root_connection.get_execution_options()
            self._shared.execute(tenant, cursor, run, statement, options)

    def _commit(self, original: Callable[..., None], proxy: Any) -> None:
        if not isinstance(proxy, Lease):
            self._refuse_earlier()
        original(proxy)

    def _set_characteristic(self, original: Callable[..., None], connection: Any, value: Any) -> None:
        if self._shared.has_ended or connection is not self._shared.driver:
            original(connection, value)
            return
        # There is nobody to be isolated from.  (AUTOCOMMIT, and whether it is read-only, is told by the execution
        # options with each statement.)  But SQLAlchemy 1.4 leaves it to the dialect to refuse what is no level.
        levels = getattr(self._dialect, "_isolation_lookup", None)
        if levels is not None and isinstance(value, str) and value.replace("_", " ") not in (*levels, "AUTOCOMMIT"):
            raise ArgumentError(f"Invalid value {value!r} for isolation_level")

    def _begin_twophase(self, original: Callable[..., None], connection: Any, xid: Any) -> None:
        if self._tenant_of(connection.connection) is None:
            original(connection, xid)

    def _prepare_twophase(self, original: Callable[..., None], connection: Any, xid: Any) -> None:
        tenant = self._tenant_of(connection.connection)
        if tenant is None:
            self._refuse_earlier()
            original(connection, xid)
        else:
            self._shared.prepare(tenant)

    def _commit_twophase(self, original: Callable[..., None], connection: Any, *args: Any, **options: Any) -> None:
        if self._tenant_of(connection.connection) is None:
            original(connection, *args, **options)  # it was prepared, and not refused then
        else:
            self._dialect.do_commit(connection.connection)

    def _rollback_twophase(self, original: Callable[..., None], connection: Any, *args: Any, **options: Any) -> None:
        if self._tenant_of(connection.connection) is None:
            original(connection, *args, **options)
        else:
            self._dialect.do_rollback(connection.connection)
