"""A small bank ledger in the browser whose balances must always add up.

Start it with ``python -m examples.ledger`` and open the address that it prints. README.rst tells
what to try.

Where to read: ``views.py`` is what an application looks like that leaves its sessions to the
middleware; ``application.py`` puts that middleware in place, in one line; ``jobs.py`` is the same
unit of work outside of requests; ``model.py`` holds the tables. The rest is a web site like any
other.
"""
