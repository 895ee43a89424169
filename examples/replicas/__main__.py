"""``python -m examples.replicas``: a primary, two replicas and the wall, until Ctrl-C."""

from __future__ import annotations

import argparse
import sys

import waitress

from tests.servers import NotInstalled, run_replicated

from .application import Wall


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.replicas")
    parser.add_argument("--port", type=int, default=8080, help="port to serve; 0 takes a free one (%(default)s)")
    parser.add_argument("--delay", type=int, default=2000, help="milliseconds the second replica is late (%(default)s)")
    options = parser.parse_args()
    try:
        with run_replicated(delays=(0, options.delay)) as servers:
            urls = [server.url for server in (servers.primary, *servers.standbys)]
            wall = Wall(urls[0], urls[1:])
            try:
                server = waitress.create_server(wall.application, host="127.0.0.1", port=options.port)
                for number, standby in enumerate(servers.standbys, 1):
                    print(f"replica {number} has the process {standby.pid}: kill it, and go on", flush=True)
                print(f"The wall is at http://127.0.0.1:{server.effective_port}/ (Ctrl-C ends it)", flush=True)
                server.run()  # returns on Ctrl-C
            finally:
                wall.close()
    except NotInstalled as reason:
        print(reason, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
