"""Which errors are taken for a lost race, and what they mean for the transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, NoReturn

import pymysql
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from sa_wsgi_session._transient import Conflict, classify
from tests.support import Base, note

# -- the databases ----------------------------------------------------------------------------------------------------


@contextmanager
def two_connections(url: URL, **options: Any) -> Iterator[tuple[Connection, Connection]]:
    """To a database that has a table of two rows, (1, 0) and (2, 0)."""
    engine = sa.create_engine(url, future=True, **options)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE counter (id INTEGER PRIMARY KEY, value INTEGER)")
        connection.exec_driver_sql("INSERT INTO counter VALUES (1, 0), (2, 0)")
    try:
        with engine.connect() as one, engine.connect() as other:
            yield one, other
    finally:
        engine.dispose()


def count(connection: Connection, row: int) -> None:
    connection.exec_driver_sql(f"UPDATE counter SET value = value + 1 WHERE id = {row}")


def counted(connection: Connection) -> list[int]:
    return list(connection.exec_driver_sql("SELECT value FROM counter ORDER BY id").scalars())


def error_of(connection: Connection, statement: str) -> DBAPIError:
    with pytest.raises(DBAPIError) as caught:
        connection.exec_driver_sql(statement)
    return caught.value


def test_postgresql_cannot_serialize(postgresql_url: URL) -> None:
    with two_connections(postgresql_url, isolation_level="REPEATABLE READ") as (one, other):
        assert counted(one) == [0, 0]
        count(other, 1)
        other.commit()
        assert classify(error_of(one, "DELETE FROM counter")) == Conflict("SQLSTATE 40001")


def deadlock(one: Connection, other: Connection) -> DBAPIError:
    """Each counts a row and then the other's; both commit. The error is that of the loser, whichever it is."""

    def go_on(connection: Connection, row: int) -> DBAPIError | None:
        try:
            count(connection, row)
        except DBAPIError as error:
            return error
        finally:
            connection.commit()
        return None

    count(one, 1)
    count(other, 2)
    with ThreadPoolExecutor() as threads:
        (error,) = filter(None, threads.map(go_on, (one, other), (2, 1)))
    return error


def test_postgresql_finds_a_deadlock(postgresql_url: URL) -> None:
    with two_connections(postgresql_url) as (one, other):
        for connection in (one, other):
            connection.exec_driver_sql("SET deadlock_timeout = 10")
        assert classify(deadlock(one, other)) == Conflict("SQLSTATE 40P01")


def test_postgresql_ends_a_connection(postgresql_url: URL) -> None:
    with two_connections(postgresql_url) as (one, _other):
        error = error_of(one, "SELECT pg_terminate_backend(pg_backend_pid())")
        assert classify(error) == Conflict("connection lost", disconnect=True)


def test_mariadb_has_undone_all_when_it_finds_a_deadlock(mariadb_url: URL) -> None:
    with two_connections(mariadb_url) as (one, other):
        assert classify(deadlock(one, other)) == Conflict("MySQL 1213", undone=True)
        assert counted(one) == [1, 1]


def test_mariadb_has_undone_all_when_a_row_is_newer_than_the_snapshot(mariadb_url: URL) -> None:
    with two_connections(mariadb_url) as (one, other):
        if not one.exec_driver_sql("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'").all():
            pytest.skip("this MariaDB has no innodb_snapshot_isolation")
        one.exec_driver_sql("SET innodb_snapshot_isolation = ON")
        assert counted(one) == [0, 0]
        count(one, 2)
        count(other, 1)
        other.commit()
        error = error_of(one, "UPDATE counter SET value = 7 WHERE id = 1")
        assert classify(error) == Conflict("MySQL 1020", undone=True)
        one.commit()
        assert counted(one) == [1, 0]


def test_mariadb_has_undone_nothing_when_a_lock_cannot_be_had(mariadb_url: URL) -> None:
    with two_connections(mariadb_url) as (one, other):
        count(one, 2)
        count(other, 1)
        error = error_of(one, "SELECT * FROM counter WHERE id = 1 FOR UPDATE NOWAIT")
        assert classify(error) == Conflict("MySQL 1205", survived=True)
        one.commit()
        assert counted(one) == [0, 1]


def test_sqlite_is_busy(sqlite_url: URL) -> None:
    with two_connections(sqlite_url, connect_args={"timeout": 0}) as (one, other):
        count(one, 1)
        assert classify(error_of(other, "BEGIN IMMEDIATE")) == Conflict("SQLite BUSY", survived=True)


def test_sqlite_is_busy_where_a_row_is_newer_than_the_snapshot(sqlite_url: URL) -> None:
    with two_connections(sqlite_url, connect_args={"timeout": 0}) as (one, other):
        one.exec_driver_sql("PRAGMA journal_mode = WAL")
        other.exec_driver_sql("BEGIN")
        assert counted(other) == [0, 0]
        count(one, 1)
        one.commit()
        # An extended code, SQLITE_BUSY_SNAPSHOT.
        assert classify(error_of(other, "DELETE FROM counter")) == Conflict("SQLite BUSY", survived=True)


def test_sqlite_has_locked_a_table() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE counter AS SELECT 1 AS id UNION SELECT 2")
        with closing(connection.execute("SELECT id FROM counter")) as reading:
            next(reading)
            with pytest.raises(sqlite3.OperationalError) as caught:
                connection.execute("DROP TABLE counter")
        assert classify(caught.value) == Conflict("SQLite LOCKED", survived=True)


def test_a_row_that_sqlalchemy_does_not_find_again_is_a_lost_race(sqlite_url: URL) -> None:
    engine = sa.create_engine(sqlite_url)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        lost: Any = note("first")
        session.add(lost)
        session.flush()
        session.connection().exec_driver_sql("DELETE FROM note")
        lost.text = "second"
        with pytest.raises(StaleDataError) as caught:
            session.flush()
    engine.dispose()
    assert classify(caught.value) == Conflict("StaleDataError")


# -- the drivers ------------------------------------------------------------------------------------------------------


class Attributes:
    """The object that Oracle's drivers have for their only argument."""

    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


def error_from(name: str, *args: object, **attributes: object) -> Exception:
    """An exception like those of a driver that the tests do without.

    Name, arguments and attributes are the driver's own: seen in pg8000 1.31, asyncpg 0.32, SQLAlchemy's adapter of it,
    mysql-connector-python 26.10, mariadb 2.0, asyncmy 0.2, cymysql 1.1, pysqlite3 0.5, sqlcipher3 0.6, oracledb 26.1,
    pymssql 2.4, python-tds 1.17 and mssql-python 1.16; read in the source of mysqlclient, cx_Oracle and pyodbc.
    """
    module, _, name = name.rpartition(".")
    error: Exception = type(name, (Exception,), {"__module__": module})(*args)
    vars(error).update(attributes)
    return error


def pyodbc_error(sqlstate: str, message: str) -> Exception:
    return error_from("pyodbc.Error", sqlstate, f"[{sqlstate}] {message}")


LOST_RACES = [
    # SQLSTATE
    (error_from("psycopg.errors.SerializationFailure", "secret", sqlstate="40001"), Conflict("SQLSTATE 40001")),
    (error_from("psycopg2.errors.DeadlockDetected", "secret", pgcode="40P01"), Conflict("SQLSTATE 40P01")),
    (
        error_from("pg8000.dbapi.ProgrammingError", {"S": "ERROR", "V": "ERROR", "C": "40001", "M": "secret"}),
        Conflict("SQLSTATE 40001"),
    ),
    (error_from("asyncpg.exceptions.SerializationError", "secret", sqlstate="40001"), Conflict("SQLSTATE 40001")),
    (
        error_from("sqlalchemy.dialects.postgresql.asyncpg.Error", "secret", pgcode="40P01", sqlstate="40P01"),
        Conflict("SQLSTATE 40P01"),
    ),
    (
        error_from("psycopg.errors.StatementCompletionUnknown", "secret", sqlstate="40003"),
        Conflict("SQLSTATE 40003", unknown=True),
    ),
    (pyodbc_error("40001", "ERROR: secret;\nError (1) (SQLExecDirectW)"), Conflict("SQLSTATE 40001")),
    # MySQL and MariaDB
    (pymysql.err.OperationalError(1213, "secret"), Conflict("MySQL 1213", undone=True)),
    (error_from("pymysql.err.OperationalError", 1213, "", sqlstate="40001"), Conflict("MySQL 1213", undone=True)),
    (pymysql.err.OperationalError(1205, "secret"), Conflict("MySQL 1205", survived=True)),
    (pymysql.err.OperationalError(3572, "secret"), Conflict("MySQL 3572", survived=True)),
    (error_from("MySQLdb._exceptions.OperationalError", 1213, "secret"), Conflict("MySQL 1213", undone=True)),
    (
        error_from("mysql.connector.errors.DatabaseError", 1205, "secret", "HY000", errno=1205, sqlstate="HY000"),
        Conflict("MySQL 1205", survived=True),
    ),
    (
        error_from("mariadb.OperationalError", "secret", errno=1213, sqlstate="40001"),
        Conflict("MySQL 1213", undone=True),
    ),
    (
        error_from("asyncmy.errors.OperationalError", 3572, "secret", sqlstate="HY000"),
        Conflict("MySQL 3572", survived=True),
    ),
    (error_from("cymysql.err.InternalError", 1020, "", errno=1020), Conflict("MySQL 1020", undone=True)),
    (
        pyodbc_error("40001", "[MySQL][ODBC 8.0(w) Driver][mysqld-8.0.33]Deadlock (1213) (SQLExecDirectW)"),
        Conflict("MySQL 1213", undone=True),
    ),
    (
        pyodbc_error("HY000", "[ma-3.1.15][10.11.6-MariaDB]Lock (1205) (SQLExecute)"),
        Conflict("MySQL 1205", survived=True),
    ),
    # SQLite, whose drivers tell the code, or only the text
    (
        error_from("sqlcipher3.dbapi2.OperationalError", "", sqlite_errorcode=5 | 1 << 8),
        Conflict("SQLite BUSY", survived=True),
    ),
    (error_from("sqlite3.OperationalError", "", sqlite_errorcode=6 | 1 << 8), Conflict("SQLite LOCKED", survived=True)),
    (sqlite3.OperationalError("database is locked"), Conflict("SQLite BUSY", survived=True)),
    (sqlite3.OperationalError("database table is locked: secret"), Conflict("SQLite LOCKED", survived=True)),
    (
        error_from("pysqlite3.dbapi2.OperationalError", "database schema is locked: main"),
        Conflict("SQLite LOCKED", survived=True),
    ),
    # Oracle
    (error_from("oracledb.exceptions.DatabaseError", Attributes(code=8177)), Conflict("ORA-08177", survived=True)),
    (error_from("cx_Oracle.DatabaseError", Attributes(code=60)), Conflict("ORA-00060", survived=True)),
    # SQL Server
    (error_from("pymssql.exceptions.OperationalError", 1205, b"secret"), Conflict("SQL Server 1205", undone=True)),
    (
        error_from("pytds.tds_base.OperationalError", "secret", None, number=3960),
        Conflict("SQL Server 3960", undone=True),
    ),
    (
        error_from("mssql_python.exceptions.OperationalError", "secret", driver_error="Serialization failure"),
        Conflict("SQLSTATE 40001", undone=True),
    ),
    (
        error_from("mssql_python.exceptions.OperationalError", "secret", driver_error="Statement completion unknown"),
        Conflict("SQLSTATE 40003", unknown=True),
    ),
    (
        pyodbc_error("40001", "[Microsoft][ODBC Driver 18 for SQL Server][SQL Server]secret (1205) (SQLExecDirectW)"),
        Conflict("SQL Server 1205", undone=True),
    ),
    (
        pyodbc_error("42000", "[FreeTDS][SQL Server]secret (3960) (SQLExecDirectW); [01000] secret (3621)"),
        Conflict("SQL Server 3960", undone=True),
    ),
    # Whose number it is, the text does not say.
    (
        pyodbc_error("HY000", "[ma-3.1.15][10.11.6-MariaDB]SQL Server (1205) (SQLExecute)"),
        Conflict("MySQL 1205", survived=True),
    ),
    (pyodbc_error("40003", "[FreeTDS][SQL Server] (1205) (SQLExecute)"), Conflict("SQLSTATE 40003", unknown=True)),
]


def wrapped(error: BaseException, *, disconnected: bool = False) -> DBAPIError:
    return DBAPIError("SELECT 1", {}, error, connection_invalidated=disconnected)


@pytest.mark.parametrize(("error", "conflict"), LOST_RACES)
def test_each_driver_has_its_own_way_to_tell_of_a_lost_race(error: Exception, conflict: Conflict) -> None:
    assert classify(error) == conflict
    assert classify(wrapped(error)) == conflict
    assert classify(wrapped(error, disconnected=True)) == conflict._replace(disconnect=True)


def test_an_exception_that_an_application_derives_from_a_drivers_is_one_of_the_driver() -> None:
    class Deadlock(pymysql.err.OperationalError):
        pass

    assert classify(Deadlock(1213, "")) == Conflict("MySQL 1213", undone=True)


@pytest.mark.parametrize(
    "error",
    [
        # Numbers of another database.
        sqlite3.OperationalError(1213),
        pymysql.err.OperationalError(3960, ""),
        pymysql.err.OperationalError(5, "database is locked"),
        error_from("pymssql.exceptions.OperationalError", 1213, b""),
        error_from("oracledb.exceptions.DatabaseError", Attributes(code=1205)),
        pyodbc_error("HY000", "[SomeBase][Driver]message (1205) (SQLExecDirectW)"),
        pyodbc_error("HY000", "message (1205) (SQLExecDirectW)"),
        # Numbers of nobody's, and those of another error.
        ValueError(1213),
        RuntimeError("database is locked"),
        error_from("mariadb.OperationalError", "", errno=0, sqlstate="HY000"),
        pymysql.err.IntegrityError(1062, "Duplicate entry '1213' for key 'PRIMARY'"),
        sqlite3.OperationalError("no such table: database is locked"),
        pyodbc_error(
            "23000", "[FreeTDS][SQL Server]Violation. The duplicate key value is (1205). (2627) (SQLExecDirectW)"
        ),
        error_from("psycopg.errors.UniqueViolation", "40001", sqlstate="23505"),
        error_from("psycopg.OperationalError", "connection failed", sqlstate=None),
    ],
)
def test_other_errors_are_no_lost_race(error: Exception) -> None:
    assert classify(error) is None
    assert classify(wrapped(error)) is None
    assert classify(wrapped(error, disconnected=True)) == Conflict("connection lost", disconnect=True)


def test_the_causes_of_an_error_are_not_looked_at() -> None:
    error = ValueError()
    error.__cause__ = error.__context__ = pymysql.err.OperationalError(1213, "")
    assert classify(error) is None


# -- odd exceptions ---------------------------------------------------------------------------------------------------


def fail(*_: object) -> NoReturn:
    raise LookupError


class Elusive(Exception):
    """Has no attribute at all."""

    __getattribute__ = fail


class Shy(sqlite3.OperationalError):
    """Has a text, and nothing else."""

    sqlite_errorcode = sqlstate = property(fail)


class Touchy(str):
    """A text that cannot be compared."""

    __slots__ = ()
    __eq__ = __hash__ = fail


def test_an_attribute_that_fails_hides_no_other() -> None:
    assert classify(Shy("database is locked")) == Conflict("SQLite BUSY", survived=True)
    assert classify(Elusive()) is None
    odd = wrapped(ValueError(), disconnected=True)
    odd.orig = Elusive()
    assert classify(odd) == Conflict("connection lost", disconnect=True)


@pytest.mark.parametrize(
    "error",
    [
        error_from("psycopg.Error", sqlstate=b"40001"),
        error_from("psycopg.Error", sqlstate=40001),
        error_from("psycopg.Error", sqlstate=["40001"]),
        error_from("psycopg.Error", sqlstate=Touchy("40001")),
        error_from("pg8000.exceptions.DatabaseError", {"C": None}),
        error_from("pymysql.err.Error"),
        error_from("pymysql.err.Error", "1213"),
        error_from("pymysql.err.Error", 1213.0),
        error_from("pymysql.err.Error", {}, errno=[1213]),
        error_from("sqlite3.Error", sqlite_errorcode="5"),
        error_from("oracledb.Error", Attributes(code="8177")),
        error_from("oracledb.Error", Elusive()),
        error_from("pyodbc.Error", "40000"),
        error_from("pyodbc.Error", b"40001", b"[40001] [SQL Server] (1205) (SQLExecute)"),
        pyodbc_error("HY000", f"[SQL Server] ({'1' * 5000}) (SQLExecute)"),
        SystemExit(1213),
        None,
    ],
)
def test_an_odd_exception_is_no_lost_race_and_no_trouble(error: Any) -> None:
    assert classify(error) is None
    assert classify(wrapped(error)) is None
    assert classify(wrapped(error, disconnected=True)) == Conflict("connection lost", disconnect=True)
