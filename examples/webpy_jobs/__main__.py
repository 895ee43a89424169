"""``python -m examples.webpy_jobs``: serve the notice board and run its jobs until Ctrl-C."""

from __future__ import annotations

import argparse

import waitress

from .application import Jobs, application, count, open_database, take_down


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.webpy_jobs", description="A notice board in web.py.")
    parser.add_argument("--port", type=int, default=8081, help="port to serve; 0 takes a free one (%(default)s)")
    parser.add_argument("--database", default="notices.sqlite", help="SQLite file, made if need be (%(default)s)")
    options = parser.parse_args()
    try:
        server = waitress.create_server(application, host="127.0.0.1", port=options.port, threads=8)
    except (OSError, OverflowError) as error:
        parser.error(f"cannot serve port {options.port}: {error}")
    engine = open_database(options.database)
    jobs = Jobs(count, take_down, seconds=1)
    print(f"The notice board is at http://127.0.0.1:{server.effective_port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.run()  # returns on Ctrl-C
    finally:
        server.close()
        jobs.stop()
        engine.dispose()


if __name__ == "__main__":
    main()
