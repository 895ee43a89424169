"""``python -m examples.replicas``: a primary, two replicas and the ledger, until Ctrl-C."""

from __future__ import annotations

import argparse
import sys

from sqlalchemy import create_engine

from examples.ledger.__main__ import listen, serve
from examples.ledger.application import Ledger
from examples.ledger.model import Refusal
from sa_wsgi_session.observers import FinishedUnit
from tests.servers import NotInstalled, run_replicated


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.replicas")
    parser.add_argument("--port", type=int, default=8080, help="port to serve; 0 takes a free one (%(default)s)")
    parser.add_argument("--delay", type=int, default=2000, help="milliseconds the second replica is late (%(default)s)")
    options = parser.parse_args()
    try:
        with listen("127.0.0.1", options.port) as listener, run_replicated(delays=(0, options.delay)) as servers:
            # Two transfers that collide are noticed where transactions are serializable; replicas only read.
            primary = create_engine(servers.primary.url, isolation_level="SERIALIZABLE", pool_pre_ping=True)
            replicas = [create_engine(server.url, pool_pre_ping=True) for server in servers.standbys]
            ledger = Ledger(primary, replicas, observer=tell)
            for number, standby in enumerate(servers.standbys, 1):
                print(f"replica {number} has the process {standby.pid}: kill it, and go on", flush=True)
            serve(ledger, listener)
    except (NotInstalled, Refusal) as reason:
        print(reason, file=sys.stderr)
        return 2
    return 0


def tell(unit: FinishedUnit) -> None:
    if unit.engine is not None:
        print(f"{unit.name}: {unit.status}, {unit.engine} ({unit.engine_reason})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
