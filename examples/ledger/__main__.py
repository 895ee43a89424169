"""``python -m examples.ledger``: serve the ledger until Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from typing import Any

import waitress

from .application import Ledger
from .model import Refusal
from .views import LARGEST_FORM

_THREADS = 8


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.ledger",
        description="A small bank ledger in the browser whose balances must always add up.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve (%(default)s)")
    parser.add_argument("--port", type=_port, default=8080, help="port to serve; 0 takes a free one (%(default)s)")
    parser.add_argument("--database", default="ledger.sqlite", help="SQLite file, made if need be (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        # First the address: where that is taken, no database file is left behind.
        with listen(options.host, options.port) as listener:
            serve(Ledger(options.database), listener)
    except Refusal as refusal:
        print(refusal.reason, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to stop
        pass
    return 0


def serve(ledger: Ledger, listener: socket.socket) -> None:
    def stop(*_: Any) -> None:
        ledger.views.stopping.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    # On a busy machine it warns of the first request, which comes before all the threads do.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    try:
        server = waitress.create_server(
            ledger.application,
            sockets=[listener],
            threads=_THREADS,
            ident="ledger",
            max_request_body_size=LARGEST_FORM * 2,
        )
        try:
            ledger.start_jobs()
            print(f"The ledger is open at {_address(listener)} (Ctrl-C closes it)", flush=True)
            server.run()  # returns on Ctrl-C
        finally:
            server.close()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ledger.close()
    print("The ledger is closed.", flush=True)


def listen(host: str, port: int) -> socket.socket:
    where = f"port {port} of {host}"
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (socket.gaierror, UnicodeError):
        reason = "there is no such host"
    except OSError as error:
        reason = os.strerror(error.errno or 0)
    raise Refusal(f"Cannot serve {where}: {reason}. Choose another with --host and --port.")


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a number from 0 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
