"""The right SQLAlchemy session for any WSGI application.

::

    application = SessionMiddleware(application, Session)

Bound for each request, committed or rolled back by the response's status, alive while the body
streams, removed at the end whatever happens.  :func:`session_scope` and :func:`with_session` give
the same unit of work to code that runs outside of requests.
"""

from ._binding import contextual_session
from ._errors import NoActiveScope, RollbackOnlyError
from ._jobs import session_scope, with_session
from ._middleware import SessionMiddleware, default_commit_veto
from ._retry import RetryPolicy
from ._scope import SessionScope, current_scope

__all__ = [
    "NoActiveScope",
    "RetryPolicy",
    "RollbackOnlyError",
    "SessionMiddleware",
    "SessionScope",
    "contextual_session",
    "current_scope",
    "default_commit_veto",
    "session_scope",
    "with_session",
]

for _public in (NoActiveScope, RetryPolicy, RollbackOnlyError, SessionMiddleware, SessionScope):
    # One name for each, also in tracebacks: where it is imported from.
    _public.__module__ = __name__
