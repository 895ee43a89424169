"""Which errors are lost races: two transactions have collided, and the loser may be begun anew.

Each database has codes of its own for that, and each driver another place for them.  The codes are in the tables
below; how to read an exception comes after them.  This file reads exceptions and does nothing else: it is asked in the
middle of an error, whatever that is, so it sends nothing and never raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.exc import StaleDataError


class Conflict(NamedTuple):
    """What a transient error means for the transaction that met it."""

    #: For the log: the database's name of the error, and never its text.
    code: str
    #: The database has rolled back the whole transaction and goes on as if nothing had happened: what comes next is
    #: in a new transaction, whose COMMIT would keep half.
    undone: bool = False
    #: Only the statement is undone: the transaction can go on without it.
    survived: bool = False
    #: The connection was lost: replayed only if that was before COMMIT was sent.
    disconnect: bool = False
    #: Whether it was committed is unknown: never replayed.
    unknown: bool = False


# The SQL standard, part 2, "SQLSTATE class and subclass values", class 40; PostgreSQL's manual, appendix "PostgreSQL
# Error Codes"; CockroachDB's manual, "Transaction Retry Error Reference" and "Common Errors" (40003).
_SQLSTATES = {
    "40001": Conflict("SQLSTATE 40001"),
    "40003": Conflict("SQLSTATE 40003", unknown=True),
    "40P01": Conflict("SQLSTATE 40P01"),
}

_Table = Mapping[int | str, Conflict]

# MySQL's manual, "InnoDB Error Handling" and "Server Error Message Reference"; MariaDB's, "Error 1020".
_MYSQL: _Table = {
    # MariaDB: a row is newer than the snapshot (innodb_snapshot_isolation, on by default in 11.8).
    1020: Conflict("MySQL 1020", undone=True),
    # Only the statement is rolled back: innodb_rollback_on_timeout is off by default.  MariaDB's NOWAIT, too.
    1205: Conflict("MySQL 1205", survived=True),
    1213: Conflict("MySQL 1213", undone=True),
    3572: Conflict("MySQL 3572", survived=True),
}

# SQLite's manual, "Result and Error Codes".  Python 3.10 passes on only the text.
_BUSY, _LOCKED = Conflict("SQLite BUSY", survived=True), Conflict("SQLite LOCKED", survived=True)
_SQLITE: _Table = {
    5: _BUSY,
    6: _LOCKED,
    "database is locked": _BUSY,
    "database table is locked": _LOCKED,
    "database schema is locked": _LOCKED,
}

# Oracle's "Database Error Messages".  Both roll back the statement alone.
_ORACLE: _Table = {60: Conflict("ORA-00060", survived=True), 8177: Conflict("ORA-08177", survived=True)}

# SQL Server's documentation, "Database Engine events and errors".
_SQL_SERVER: _Table = {
    1205: Conflict("SQL Server 1205", undone=True),
    3960: Conflict("SQL Server 3960", undone=True),
    # mssql-python passes on neither the number nor the SQLSTATE, but its own name of the latter.
    "Serialization failure": Conflict("SQLSTATE 40001", undone=True),
    "Statement completion unknown": Conflict("SQLSTATE 40003", unknown=True),
}

#: A number means nothing without its database, which the driver tells: the package that defines the exception.
_DRIVERS: Mapping[str, _Table] = {
    **dict.fromkeys(("MySQLdb", "aiomysql", "asyncmy", "cymysql", "mariadb", "mysql", "pymysql"), _MYSQL),
    **dict.fromkeys(("aiosqlite", "pysqlcipher3", "pysqlite2", "pysqlite3", "sqlcipher3", "sqlite3"), _SQLITE),
    **dict.fromkeys(("cx_Oracle", "oracledb"), _ORACLE),
    **dict.fromkeys(("mssql_python", "pymssql", "pytds"), _SQL_SERVER),
}

# Through ODBC anything may answer.  What has passed a message on, the database last, is named at its beginning, and
# pyodbc appends the number: "[40001] [Microsoft][ODBC Driver 18 for SQL Server][SQL Server]... (1205) (SQLExecute)".
_ODBC = re.compile(r"\[\w{5}\] ((?:\[[^\]]*\])+).* \((\d{1,9})\) \(SQL\w+\)", re.DOTALL)
_ODBC_SOURCES: Mapping[str, _Table] = {"SQL Server": _SQL_SERVER, "mysqld": _MYSQL, "MariaDB": _MYSQL}


def classify(error: BaseException) -> Conflict | None:
    """The lost race of which *error* itself tells, be it SQLAlchemy's or a driver's; its causes are not looked at."""
    if issubclass(type(error), StaleDataError):
        return Conflict("StaleDataError")
    if not issubclass(type(error), DBAPIError):
        return _of_driver(error)
    conflict = _of_driver(_get(error, "orig"))
    if _get(error, "connection_invalidated"):
        # Whatever else it is: if COMMIT was under way, nobody knows what has become of that.
        return (conflict or Conflict("connection lost"))._replace(disconnect=True)
    return conflict


def leaves_unknown(error: BaseException) -> bool:
    """Whether nobody knows what has come of the ``COMMIT`` that has raised *error*."""
    conflict = classify(error)
    # The COMMIT of a loser is refused, and so is that of what breaks a constraint.  Of any other error, a lost
    # connection in the first place, nobody knows when it came.
    return (conflict is None or conflict.unknown) and all(
        cls.__name__ != "IntegrityError" for cls in type(error).__mro__
    )


def _of_driver(error: object) -> Conflict | None:
    packages = {str(cls.__module__).partition(".")[0] for cls in type(error).__mro__}
    tables = [table for package, table in _DRIVERS.items() if package in packages]
    args = _get(error, "args")
    first, second = (*args, None, None)[:2] if type(args) is tuple else (None, None)
    sqlstates = [
        _get(error, "sqlstate"),  # psycopg, asyncpg and most others
        _get(error, "pgcode"),  # psycopg2
        first.get("C") if type(first) is dict else None,  # pg8000
    ]
    extended = _get(error, "sqlite_errorcode")
    numbers = [
        _get(error, "errno"),  # drivers of MySQL, not all of them
        _get(error, "number"),  # pytds
        _get(error, "driver_error"),  # mssql-python
        extended & 0xFF if type(extended) is int else None,  # sqlite3
        _get(first, "code"),  # Oracle's drivers
        # The others' number; or sqlite3's text, perhaps with a colon and the name of a table.
        first.partition(":")[0] if type(first) is str else first,
    ]
    if "pyodbc" in packages:
        sqlstates.append(first)
        match = _ODBC.match(second) if type(second) is str else None
        if match is not None:
            numbers = [int(match[2])]
            tables = [table for source, table in _ODBC_SOURCES.items() if source in match[1]]

    by_sqlstate = _look_up(_SQLSTATES, sqlstates)
    if by_sqlstate is not None and by_sqlstate.unknown:
        return by_sqlstate
    # The number first, because it tells more: MySQL's deadlock has the SQLSTATE 40001, too.
    by_number = (_look_up(table, numbers) for table in tables)
    return next(filter(None, by_number), by_sqlstate)


def _look_up(table: Mapping[Any, Conflict], codes: Iterable[object]) -> Conflict | None:
    # Drivers give exactly these types; a subclass may do anything when it is compared.
    return next((table[code] for code in codes if type(code) in (int, str) and code in table), None)


def _get(holder: object, name: str) -> Any:
    """An attribute, or none where it can't be had: an exception may be anything."""
    try:
        return getattr(holder, name, None)
    except Exception:
        return None
