"""README.rst: every Python block is run, and does what the text around it says. (``docs/`` is read by test_docs.py.)"""

from __future__ import annotations

import configparser
import logging
import re
from contextlib import closing
from xml.etree import ElementTree

import pytest
import sqlalchemy as sa
from docutils import nodes
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DatabaseError, IntegrityError

from sa_wsgi_session import NoActiveScope
from tests.reading import FIRST, README, ROOT, Rival, Sections, parse, reader, visit
from tests.support import Exchange

__all__ = ["reader"]  # the fixture

section = Sections(README)


def test_every_python_block_is_run_by_a_test():
    section.check()


@section(*FIRST)
def test_the_smallest_example_commits_what_the_request_added(reader):
    reader.run()
    response = visit(reader["application"], "/Ada")
    assert (response.status, response.content) == ("200 OK", b"Welcome!\n")
    assert reader.guests() == {"Ada"}
    with pytest.raises(IntegrityError):  # the COMMIT fails: no status was forwarded
        visit(reader["application"], "/Ada")
    assert not reader["Session"].registry.has()


@section(README, "Jobs, threads, scripts")
def test_jobs(reader, capsys):
    reader.insert("Edsger")
    reader.run()
    assert reader.guests() == {"Ada", "Edsger"}
    reader["forget"]("Edsger")
    assert reader.guests() == {"Ada"}
    assert not reader["Session"].registry.has()
    reader.run()
    assert capsys.readouterr().out.startswith("Ada was here before")
    assert reader.guests() == {"Ada", "Grace"}


@section(README, "Streaming, and commit_at")
def test_streaming(reader):
    reader.insert("Ada", "Grace")
    reader.run()
    assert visit(reader.wrap("export")).content.splitlines() == [b"Ada", b"Grace"]

    reader.run()
    cut_off = Exchange(reader.wrap("farewell"))
    assert (cut_off.status, cut_off.next()) == ("200 OK", b"Goodbye, Ada!\n")
    cut_off.close()
    assert reader.guests() == {"Ada", "Grace"}
    assert visit(reader.wrap("farewell")).content == b"Goodbye, Ada!\nGoodbye, Grace!\n"
    assert reader.guests() == set()


@section(README, "What counts as a success")
def test_a_veto_of_ones_own(reader):
    reader.run()
    assert visit(reader["application"], "/Ada", "GET").status == "200 OK"
    assert visit(reader["application"], "/Grace", "POST").status == "200 OK"
    assert reader.guests() == {"Grace"}


@section(README, "After the commit, or not at all")
def test_what_is_done_after_the_commit(reader):
    sent = []
    reader.names["send_mail"] = lambda name: sent.append((name, reader.guests()))
    reader.run()
    assert visit(reader.wrap("invite"), "/Ada").status == "200 OK"
    assert sent == [("Ada", {"Ada"})]
    dry_run = visit(reader.wrap("invite"), "/Grace", QUERY_STRING="dry-run")
    assert (dry_run.status, dry_run.content) == ("200 OK", b"Grace is invited\n")
    assert (len(sent), reader.guests()) == (1, {"Ada"})


@section(README, "Lost races")
def test_a_lost_race_is_replayed(reader):
    reader.run()
    with closing(Rival(reader["engine"])) as rival:
        rival.write()
        assert visit(reader["application"], "/Ada").status == "200 OK"
    assert rival.won == 1
    assert reader.guests() == {"Ada"}


@section(README, "Test it")
def test_tests_leave_no_trace(reader):
    reader.run()
    reader["test_a_guest_is_welcome"]()
    assert reader.guests() == set()
    visit(reader["application"], "/Grace")
    with pytest.raises(AssertionError):
        # Grace is there: they are two.
        reader["test_a_guest_is_welcome"]()
    assert reader.guests() == {"Grace"}


@section(README, "See what it does")
def test_what_it_does_is_seen(reader, caplog):
    reader.run()
    caplog.set_level(logging.INFO, "sa_wsgi_session.units")
    response = visit(reader["application"], "/Ada")
    assert dict(response.headers)["Server-Timing"].startswith("db;dur=")
    (record,) = caplog.records
    assert record.getMessage().startswith("GET /Ada: 200, committed in ")


@section(README, "Two databases")
def test_two_databases(reader, postgresql_url: URL, other_postgresql_url: URL):
    reader.names.update(guests_url=postgresql_url, orders_url=other_postgresql_url)
    reader.run()
    guests, orders = reader["guests_engine"], reader["orders_engine"]
    reader["Base"].metadata.create_all(guests)
    reader["Base"].metadata.create_all(orders)

    def stored() -> tuple[set[str], list[int]]:
        with orders.connect() as connection:
            numbers = connection.execute(sa.text("SELECT number FROM orders")).scalars().all()
        return reader.guests(guests), list(numbers)

    def clear() -> None:
        for engine in guests, orders:
            with engine.begin() as connection:
                connection.execute(sa.text("DELETE FROM guests"))
                connection.execute(sa.text("DELETE FROM orders"))

    def demand_at_commit(engine: Engine, table: str, column: str) -> None:
        """Whatever is inserted there is refused, and not before the COMMIT (or the PREPARE) asks."""
        kind = {"name": "varchar(80)", "number": "integer"}[column]
        with engine.begin() as connection:
            connection.execute(sa.text(f"CREATE TABLE allowed ({column} {kind} PRIMARY KEY)"))
            connection.execute(
                sa.text(
                    f"ALTER TABLE {table} ADD CONSTRAINT is_allowed FOREIGN KEY ({column}) REFERENCES allowed"
                    " DEFERRABLE INITIALLY DEFERRED"
                )
            )

    def release(engine: Engine, table: str) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {table} DROP CONSTRAINT is_allowed"))
            connection.execute(sa.text("DROP TABLE allowed"))

    def outcome(expected: object) -> None:
        """What is stored after a request that the database has refused."""
        with pytest.raises(DatabaseError) as refused:
            visit(reader["application"])
        # psycopg 3 reports that there is nothing to roll back where a PREPARE TRANSACTION was refused.
        assert "is_allowed" in f"{refused.value} {refused.value.__context__}"
        assert stored() == expected

    assert visit(reader["application"]).status == "201 Created"
    assert stored() == ({"Ada"}, [1])
    clear()
    demand_at_commit(orders, "orders", "number")
    outcome((set(), []))  # the inner one fails: nothing is kept
    release(orders, "orders")
    demand_at_commit(guests, "guests", "name")
    outcome((set(), [1]))  # the outer one fails: the inner one is durable
    release(guests, "guests")
    clear()

    reader.run()
    assert visit(reader["application"]).status == "201 Created"
    assert stored() == ({"Grace"}, [2])
    clear()
    for engine, table, column in (orders, "orders", "number"), (guests, "guests", "name"):
        demand_at_commit(engine, table, column)
        outcome((set(), []))
        release(engine, table)
    for engine in guests, orders:
        with engine.connect() as connection:
            assert connection.execute(sa.text("SELECT count(*) FROM pg_prepared_xacts")).scalar() == 0
        assert engine.pool.checkedout() == 0


@section(README, "Which session")
def test_a_contextual_session(reader):
    reader.run()
    assert reader.guests() == {"Alan"}
    with pytest.raises(NoActiveScope):
        reader["Session"]()


def test_the_commands_name_environments_of_tox():
    text = "\n".join(node.astext() for node in parse(README).findall(nodes.literal_block))
    commands = [line for line in text.splitlines() if "tox" in line]
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox -e demo",
        "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox",
    ]
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    assert {f"testenv:{name}" for name in re.findall(r"tox -e (\S+)", text)} <= set(tox.sections())
    assert tox.get("tox", "env_list")  # what "tox" alone runs


def test_the_readme_installs_the_package_by_its_name():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert f"\n    pip install {setup.get('metadata', 'name')}\n" in (ROOT / README).read_text("utf-8")


def test_the_figure_is_the_one_of_this_repository_and_well_formed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    repository = setup.get("metadata", "url").replace("https://github.com/", "https://raw.githubusercontent.com/")
    [image] = parse(README).findall(nodes.image)
    assert image["uri"] == f"{repository}/main/docs/timeline.svg"
    assert image["alt"]
    figure = ElementTree.parse(ROOT / "docs/timeline.svg").getroot()
    assert figure.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in (ROOT / "docs/timeline.svg").read_text("utf-8")
