"""Which session belongs to the code that is running: the binding of a registry.

A :class:`~sqlalchemy.orm.scoped_session` keeps its session in a *registry*: SQLAlchemy's
thread-local one, a dictionary keyed by a scope function, or the :class:`ContextRegistry` of
this file.  A *unit* (of work) is *bound* while code of the application runs in it: the
registry then yields the session of that unit and no other.  What the registry held before is
set aside and comes back when the unit is unbound.

Two things are kept apart:

* **where we are** is the context variable ``here``.  It points to a :class:`Frame`, which points
  to the unit bound there and to the frame around it.  An empty frame (``unit is None``) is
  transparent: lookups pass through it.  That makes it safe to leave one behind, which is how a
  streamed body is bound and unbound around every chunk without a ``ContextVar.set``, the
  dearest step of all (about 0.15 microseconds, twice per chunk).  It also means that a context
  copied while a unit was bound (a task, a thread started with ``copy_context()``) stops seeing
  the unit when it is unbound, instead of keeping its session alive.
* **where the session is**: in the registry while the unit is bound, in ``unit.held`` while it is
  not.  The :class:`ContextRegistry` has no store of its own: it always looks into ``held``.

This file knows registries, threads and contexts.  It does not know transactions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import ThreadLocalRegistry

from ._errors import NoActiveScope, type_name

if TYPE_CHECKING:
    from typing import TypeAlias

    #: What the public functions accept as ``session``.
    SessionSource: TypeAlias = "scoped_session[Any] | sessionmaker[Any]"


class Unit:
    """What can be bound: the base of a unit of work, with the state that its binder needs."""

    __slots__ = ("binder", "frame", "held", "set_aside", "within")

    #: How to bind it.
    binder: Binder
    #: For a SAVEPOINT: the unit of work that it is part of, and whose session it uses.
    within: Unit | None
    #: The session while no registry holds it.
    held: Session | None
    #: The session that the registry held before this unit was bound.
    set_aside: Session | None
    #: The frame in which the unit is bound; what it says is stale while the unit is unbound.
    frame: Frame

    def bind(self) -> None:
        """Bind the unit here."""
        if self.within is None:
            self.binder.enter(self)
        else:
            self.binder.nest(self)

    def unbind(self) -> None:
        """Undo :meth:`bind`; the unit is the innermost one here."""
        if self.within is None:
            self.binder.leave(self)
        else:
            self.binder.unnest(self)


class Frame:
    """A place in the running code where a unit is bound, and the one around it."""

    __slots__ = ("covered", "outer", "thread", "unit")

    def __init__(self, unit: Unit | None, outer: Frame | None) -> None:
        #: The unit (always a ``SessionScope``, of which this file need not know), or ``None``.
        self.unit: Any = unit
        # A frame that is empty now cannot be around us: its unit is not running.  Skipping it
        # keeps the chain as short as the calls are deep, however streams are interleaved.
        while outer is not None and outer.unit is None:
            outer = outer.outer
        self.outer: Frame | None = outer
        #: Whether another frame was ever put on top of this one (see :func:`unwind`).
        self.covered = False
        if outer is not None:
            outer.covered = True
        self.thread = get_ident()


#: Where a unit is that was never bound.
NOWHERE = Frame(None, None)

here: ContextVar[Frame | None] = ContextVar("sa_wsgi_session", default=None)


def innermost(key: object = None) -> Unit | None:
    """The innermost unit bound here (of the registry with that key, if one is given)."""
    frame = here.get()
    while frame is not None:
        unit: Unit | None = frame.unit  # once: another thread, with a copy of the context, may see it go
        if unit is not None and (key is None or unit.binder.key is key) and _is_visible(unit, frame):
            return unit
        frame = frame.outer
    return None


def frames_around(unit: Unit) -> Iterator[Frame]:
    """The frames around *unit*, which is bound here; some may be empty."""
    frame = unit.frame.outer
    while frame is not None:
        yield frame
        frame = frame.outer


def is_here(unit: Unit) -> bool:
    """Whether *unit*, or a SAVEPOINT within it, is bound here."""
    frame = here.get()
    while frame is not None:
        bound: Unit | None = frame.unit
        if bound is not None and (bound is unit or bound.within is unit):
            return _is_visible(unit, frame)
        frame = frame.outer
    return False


def _is_visible(unit: Unit, frame: Frame) -> bool:
    """Whether the session of *unit*, which is bound in *frame*, can be had on this thread.

    A context that was copied from another thread still has its frames, but a thread-local registry does not follow.
    """
    return frame.thread == get_ident() or unit.binder.contextual


def unwind(frame: Frame) -> list[Unit]:
    """Unbind what code has left bound on top of *frame*, and return it, innermost first.

    A generator that has a ``with session_scope(…)`` around a ``yield`` does that.
    """
    frame.covered = False
    above = []
    inner = here.get()
    while inner is not None and inner is not frame:
        if inner.unit is not None:
            above.append(inner.unit)
        inner = inner.outer
    if inner is None:
        return []  # another context, in which that frame never was
    for unit in above:
        unit.unbind()
    return above


def rewind(units: list[Unit]) -> None:
    """Bind again what :func:`unwind` has unbound."""
    for unit in reversed(units):
        unit.bind()


class Binder:
    """Binds units to a registry by the four methods that every registry of SQLAlchemy has."""

    __slots__ = ("dialect", "factory", "key", "registry")

    #: Whether the registry itself looks for the unit, so that nothing has to be moved.
    contextual = False

    def __init__(self, registry: Any, factory: Callable[..., Session]) -> None:
        self.registry = registry
        self.factory = factory
        #: The last one that was listened to (``_watching``).
        self.dialect: object = None
        #: Two binders with the same key bind the same sessions.
        self.key: object = registry

    def nest(self, unit: Unit) -> None:
        """Make *unit* the innermost one, with the session that is bound already."""
        outer = here.get()
        if outer is unit.frame and outer.thread == get_ident():
            outer.unit = unit  # here it was paused
        else:
            unit.frame = frame = Frame(unit, outer)
            here.set(frame)

    def unnest(self, unit: Unit) -> None:
        """Undo :meth:`nest`."""
        frame = unit.frame
        frame.unit = None
        if here.get() is frame:
            here.set(frame.outer)

    def enter(self, unit: Unit) -> None:
        """Bind *unit* here."""
        registry = self.registry
        unit.set_aside = registry() if registry.has() else None
        if unit.held is not None:
            registry.set(unit.held)
        elif unit.set_aside is not None:
            registry.clear()
        self.nest(unit)

    def leave(self, unit: Unit) -> None:
        """Unbind *unit*, the innermost one: the registry is what it was before :meth:`enter`."""
        self.pause(unit)
        frame = unit.frame
        if here.get() is frame:
            here.set(frame.outer)

    def pause(self, unit: Unit) -> None:
        """The same, but its frame stays, empty: it will be bound again, here, soon."""
        unit.frame.unit = None
        registry = self.registry
        unit.held = registry() if registry.has() else None
        if unit.set_aside is not None:
            registry.set(unit.set_aside)
            unit.set_aside = None
        elif unit.held is not None:
            registry.clear()

    def peek(self, unit: Unit) -> Session | None:
        """The session of *unit*, which is bound here, if it has one already."""
        cover = self._cover(unit)
        if cover is not None:
            return cover.set_aside
        return self.registry() if self.registry.has() else None

    def session(self, unit: Unit) -> Session:
        """The session of *unit*, which is bound here; made now if it has none yet."""
        cover = self._cover(unit)
        if cover is None:
            return self.registry()  # type: ignore[no-any-return]
        if cover.set_aside is None:
            cover.set_aside = self.factory()
        return cover.set_aside

    def _cover(self, unit: Unit) -> Unit | None:
        """The unit that was bound to the same registry right on top of *unit*, and has set its session aside."""
        cover: Unit | None = None
        frame = here.get()
        while frame is not None and frame is not unit.frame:
            other: Unit | None = frame.unit
            if other is not None and other.binder.key is self.key and other.within is None:
                cover = other
            frame = frame.outer
        return cover


class ThreadBinder(Binder):
    """The same for SQLAlchemy's own thread-local registry, by way of its ``threading.local``.

    Asking a ``threading.local`` for a missing attribute raises and catches an
    ``AttributeError``: half a microsecond.  Its dictionary answers in a tenth of that.
    """

    __slots__ = ("local",)

    def __init__(self, registry: Any, factory: Callable[..., Session]) -> None:
        super().__init__(registry, factory)
        self.local = registry.registry

    def enter(self, unit: Unit) -> None:
        values: dict[str, Any] = self.local.__dict__
        unit.set_aside = values.pop("value", None) if values else None
        if unit.held is not None:
            values["value"] = unit.held
        self.nest(unit)

    def pause(self, unit: Unit) -> None:
        unit.frame.unit = None
        values: dict[str, Any] = self.local.__dict__
        unit.held = values.pop("value", None) if values else None
        if unit.set_aside is not None:
            values["value"] = unit.set_aside
            unit.set_aside = None

    def peek(self, unit: Unit) -> Session | None:
        if here.get() is not unit.frame:
            cover = self._cover(unit)
            if cover is not None:
                return cover.set_aside
        return self.local.__dict__.get("value")  # type: ignore[no-any-return]


class ContextBinder(Binder):
    """The same for :class:`ContextRegistry`, which finds the unit by itself."""

    __slots__ = ()

    contextual = True

    def __init__(self, registry: Any, factory: Callable[..., Session]) -> None:
        super().__init__(registry, factory)
        # Any number of contextual_session(factory) share the unit of work of that factory, so
        # that whoever was given only the sessionmaker meets the same session.
        self.key = factory

    enter = Binder.nest
    leave = Binder.unnest

    def pause(self, unit: Unit) -> None:
        unit.frame.unit = None

    def peek(self, unit: Unit) -> Session | None:
        return (unit.within or unit).held

    def session(self, unit: Unit) -> Session:
        holder = unit.within or unit
        if holder.held is None:
            holder.held = self.factory()
        return holder.held


class ContextRegistry:
    """The registry of :func:`contextual_session`: the session is that of the unit bound here."""

    __slots__ = ("createfunc",)

    def __init__(self, createfunc: Callable[..., Session]) -> None:
        self.createfunc = createfunc

    def _holder(self) -> Unit:
        unit = innermost(self.createfunc)
        if unit is not None:
            return unit.within or unit
        if here.get() is None:
            raise NoActiveScope(
                "no unit of work is active here, so this contextual session has no Session to "
                "give: wrap the code in session_scope() or with_session(), or run it within a "
                "request to SessionMiddleware"
            )
        raise NoActiveScope(
            "no unit of work of this contextual session is active here: the one that this "
            "context was in (or was copied from) has ended or is not running now; give this "
            "code a unit of work of its own with session_scope() or with_session()"
        )

    def __call__(self) -> Session:
        holder = self._holder()
        if holder.held is None:
            holder.held = self.createfunc()
        return holder.held

    def has(self) -> bool:
        unit = innermost(self.createfunc)
        return unit is not None and (unit.within or unit).held is not None

    def set(self, obj: Session) -> None:
        self._holder().held = obj

    def clear(self) -> None:
        if self.has():
            self._holder().held = None


def contextual_session(factory: Callable[..., Session]) -> scoped_session[Any]:
    """Make a ``scoped_session`` whose scope is the unit of work itself.

    :param factory: a ``sessionmaker``, or another callable that returns a new
        :class:`~sqlalchemy.orm.Session`.
    :return: a :class:`~sqlalchemy.orm.scoped_session`.  Within a unit of work it is *the* session
        of that unit: on threads, greenlets and tasks alike, also on those that were started with
        a copy of its context.
    :raises TypeError: if *factory* cannot be called, or makes ``AsyncSession``\\ s.
    :raises ValueError: if *factory* is a ``sessionmaker`` in SQLAlchemy 1.4's autocommit mode.

    Outside of a unit of work, and after the unit of work that a context was copied from has
    ended, any use raises :exc:`NoActiveScope`, where a plain ``scoped_session`` would silently
    make a session that nobody removes.

    All contextual sessions of the same *factory* are the same session.
    """
    refuse_async(factory, "factory")
    if isinstance(factory, scoped_session) or not callable(factory):
        raise TypeError(
            f"factory must be a sessionmaker or another callable that returns a Session, not {_shown(factory)}"
        )
    refuse_autocommit(factory, "factory")
    scoped: scoped_session[Any] = scoped_session(cast("sessionmaker[Any]", factory))
    scoped.registry = cast(Any, ContextRegistry(factory))
    return scoped


def as_scoped_session(session: object, argument: str = "session") -> scoped_session[Any]:
    """*session* as a ``scoped_session``, or an error that names the argument."""
    refuse_async(session, argument)
    if isinstance(session, sessionmaker):
        refuse_autocommit(session, argument)
        return contextual_session(session)
    if isinstance(session, scoped_session):
        refuse_async(session.session_factory, argument)
        refuse_autocommit(session.session_factory, argument)
        return session
    raise TypeError(f"{argument} must be a scoped_session (with any registry) or a sessionmaker, not {_shown(session)}")


def binder_of(session: object, argument: str = "session") -> Binder:
    """The binder for what a user gave as *session*."""
    scoped = as_scoped_session(session, argument)
    registry: Any = scoped.registry
    if isinstance(registry, ContextRegistry):
        return ContextBinder(registry, registry.createfunc)
    if type(registry) is ThreadLocalRegistry:
        return ThreadBinder(registry, scoped.session_factory)
    return Binder(registry, scoped.session_factory)


def refuse_async(value: object, argument: str) -> None:
    """Raise ``TypeError`` if *value* is, or makes, a session of SQLAlchemy's asyncio extension."""
    made = getattr(value, "class_", None)
    for cls in (type(value), made, value):
        if isinstance(cls, type) and any(base.__module__.startswith("sqlalchemy.ext.asyncio") for base in cls.__mro__):
            raise TypeError(
                f"{argument} must be a scoped_session or a sessionmaker of synchronous Sessions, "
                f"not {_shown(value)}: WSGI calls the application synchronously, so an "
                f"AsyncSession could not be awaited, committed or closed in time"
            )


def refuse_autocommit(factory: object, argument: str) -> None:
    """Raise ``ValueError`` for the autocommit mode of SQLAlchemy 1.4."""
    options = getattr(factory, "kw", None)
    if isinstance(options, dict) and options.get("autocommit"):
        raise ValueError(
            f"{argument} must not be in autocommit mode (autocommit={options['autocommit']!r}), "
            f"in which a Session has no transaction to commit or roll back: leave it out"
        )


def _shown(value: object) -> str:
    """How an error names a wrong argument: never by ``repr``, which may hold a password."""
    if isinstance(value, type):
        return f"the class {value.__module__}.{value.__qualname__}"
    if value is None:
        return "None"
    return f"an object of type {type_name(value)}"
