"""What the tests of read replicas share: a site with replicas, and visitors with cookies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.cookies import SimpleCookie
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import QueuePool

from sa_wsgi_session import SessionMiddleware
from sa_wsgi_session.observers import FinishedUnit
from sa_wsgi_session.replicas import ReadReplicas
from tests.servers import DatabaseServer, Replicated
from tests.support import Base, Exchange, Note, make_environ, make_session, respond

DRIVER = "psycopg2" if sa.__version__.startswith("1.4.") else "psycopg"
SECRET = "only for the tests, and longer than 32 characters"


class Visitor:
    """A client that keeps its cookies; or, without them, the header."""

    def __init__(self, app: Any, *, header: str | None = None) -> None:
        self.app = app
        self.cookies: dict[str, str] = {}
        #: The lines that the last response has set them with.
        self.set_cookies: list[str] = []
        self._header = header
        self.token: str | None = None

    def exchange(self, path: str = "/", method: str = "GET", **more: Any) -> Exchange:
        if self._header is None:
            if self.cookies:
                more["HTTP_COOKIE"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        elif self.token is not None:
            more["HTTP_" + self._header.upper().replace("-", "_")] = self.token
        exchange = Exchange(self.app, make_environ(path, method, **more))
        self.receive(exchange)
        return exchange

    def receive(self, exchange: Exchange) -> None:
        """Do what a browser does with the headers of a response."""
        self.set_cookies = [value for name, value in exchange.headers if name == "Set-Cookie"]
        for line in self.set_cookies:
            for name, morsel in SimpleCookie(line).items():
                if morsel["max-age"] == "0":
                    self.cookies.pop(name, None)
                else:
                    self.cookies[name] = morsel.value
        for name, value in exchange.headers:
            if name == self._header:
                self.token = value

    def request(self, path: str = "/", method: str = "GET", **more: Any) -> str:
        exchange = self.exchange(path, method, **more)
        return exchange.read().decode()


class Site:
    """An application whose database has replicas."""

    def __init__(
        self, primary: URL, replicas: list[URL], registry: str = "thread-local", *, pings: bool = False, **options: Any
    ) -> None:
        pool: dict[str, Any] = {"poolclass": QueuePool, "pool_size": 5, "max_overflow": 0, "pool_pre_ping": pings}
        if primary.get_backend_name() == "sqlite":
            pool["connect_args"] = {"check_same_thread": False}
        self.primary = sa.create_engine(primary, **pool)
        self.engines = [sa.create_engine(url, **pool) for url in replicas]
        self.Session: Any = make_session(registry, sessionmaker(self.primary))
        self.replicas = ReadReplicas(self.engines, **{"secret": SECRET, **options})
        self.units: list[FinishedUnit] = []
        self._ports = {url.port: f"replica {number} of {len(replicas)}" for number, url in enumerate(replicas, 1)}

    def app(self, view: Callable[[], Any], status: str = "200 OK", **options: Any) -> SessionMiddleware:
        options = {"observer": self.units.append, "replicas": self.replicas, **options}
        return SessionMiddleware(respond(view, status), self.Session, **options)

    def visitor(self, view: Callable[[], Any] | None = None, **options: Any) -> Visitor:
        return Visitor(self.app(self.where if view is None else view, **options))

    def where(self) -> list[bytes]:
        """A view that tells which server has answered it, in the words of FinishedUnit."""
        port = self.Session.execute(sa.text("SELECT inet_server_port()")).scalar()
        return [self._ports.get(port, "primary").encode()]

    def texts(self) -> list[bytes]:
        """A view that tells the notes that it sees."""
        return [",".join(self.Session.execute(sa.select(Note.text).order_by(Note.id)).scalars()).encode()]

    @property
    def checked_out(self) -> list[int]:
        return [engine.pool.checkedout() for engine in [self.primary, *self.engines]]  # type: ignore[attr-defined]

    @property
    def served(self) -> list[int]:
        """How many requests each replica serves at the moment."""
        router = self.replicas._router
        return [] if router is None else [len(replica.serving) for replica in router.cluster.replicas]

    def close(self) -> None:
        for engine in [self.primary, *self.engines]:
            engine.dispose()


class Sites:
    """Sites that several tests make, one after the other, on a database with a table of notes."""

    def __init__(self, servers: Replicated, url: URL) -> None:
        self.servers = servers
        #: Where it is on the primary.
        self.url = url.set(drivername=f"postgresql+{DRIVER}")

    @contextmanager
    def make(self, *standbys: int, **options: Any) -> Iterator[Site]:
        """A site with these standbys; its table is empty, and they have replayed that."""
        chosen = [self.servers.standbys[number] for number in standbys]
        url = self.url
        urls = [of_standby(url, standby) for standby in chosen]
        # Without any: a server that is no standby, or not any more.
        site = Site(url, urls or [url], **options)
        try:
            with site.primary.begin() as connection:
                connection.execute(sa.delete(Note))
            self.wait(*standbys)
            yield site
            assert not any(site.checked_out), site.checked_out
            assert not any(site.served)
        finally:
            site.close()

    def wait(self, *standbys: int) -> None:
        """Wait until these have replayed what the primary has done."""
        Replicated(self.servers.primary, [self.servers.standbys[number] for number in standbys]).wait_until_replayed()


@contextmanager
def make_sites(servers: Replicated) -> Iterator[Sites]:
    with servers.primary.database() as url:
        engine: Engine = sa.create_engine(url)
        Base.metadata.create_all(engine)
        engine.dispose()
        servers.wait_until_replayed()
        yield Sites(servers, url)


def of_standby(url: URL, standby: DatabaseServer) -> URL:
    return url.set(port=standby.url.port)
