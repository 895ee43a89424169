"""A multithreaded web.py application with scheduled jobs, whose sessions are nobody's chore.

Start it with ``python -m examples.webpy_jobs``. All of it is in ``application.py``.
"""
