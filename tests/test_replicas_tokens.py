"""The tokens of read replicas by themselves, on a clock that is put forward by hand."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import URL

from sa_wsgi_session._tokens import NOTHING_SEEN, Tokens
from tests.replicated import Site

LIFETIME = 240
NAME = "seen"
HOME = "replica-1-0"


class Clock:
    now = 1_000_007.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(clock: Clock) -> Tokens:
    return make(clock)


def make(clock: Clock, lifetime: int = LIFETIME) -> Tokens:
    return Tokens(b"a secret", cookie_name=NAME, header="X-Seen", lifetime=lifetime, clock=clock)


def cookie(headers: Any, number: int = 0) -> str:
    """What the client sends back of a response's cookie."""
    cookies = [value for name, value in headers if name == "Set-Cookie"]
    return str(cookies[number].partition(";")[0])


def home(tokens: Tokens, issued: int | None = None) -> str:
    return cookie(tokens.home_headers(HOME, tokens.rounded_now() if issued is None else issued, False))


def position(tokens: Tokens, number: int, pinned: int = 0) -> str:
    return cookie(tokens.position_headers(number, pinned, secure=False, forget_home=False))


# -- what is seen -----------------------------------------------------------------------------------------------------


def test_nothing_is_seen_in_what_is_not_there(tokens):
    assert tokens.seen(None, None) is tokens.seen("other=1", None) is NOTHING_SEEN
    assert NOTHING_SEEN == (0, (), False, False)


def test_a_cookie_says_where_it_is_good(tokens):
    (name, value), (header, _token) = tokens.home_headers(HOME, tokens.rounded_now(), True)
    assert (name, header) == ("Set-Cookie", "X-Seen")
    assert {part.strip() for part in value.split(";")[1:]} == {
        "Path=/",
        "HttpOnly",
        "SameSite=Lax",
        "secure",
        f"Max-Age={LIFETIME}",
    }


def test_a_visitor_who_is_not_at_home_there_any_more_has_that_cookie_forgotten(tokens):
    headers = tokens.position_headers(1, 0, secure=True, forget_home=True)
    assert [name for name, _value in headers] == ["Set-Cookie", "X-Seen", "Set-Cookie"]
    name_and_value, *attributes = headers[2][1].split("; ")
    assert name_and_value == f"{NAME}_home="
    assert set(attributes) == {"Path=/", "HttpOnly", "SameSite=Lax", "secure", "Max-Age=0"}


@pytest.mark.parametrize("number", [1, 15, 16, 0x123456789ABCDEF, 2**64 - 1])
def test_a_position_is_read_as_it_was_written_in_the_header_and_in_the_cookie(tokens, number):
    headers = tokens.position_headers(number, 0, secure=False, forget_home=False)
    assert tokens.seen(cookie(headers), None) == (number, (), False, False)
    assert tokens.seen(None, dict(headers)["X-Seen"]) == (number, (), False, False)


def test_what_has_more_than_160_characters_is_not_read(tokens):
    def header(home: str) -> str:
        return str(dict(tokens.home_headers(home, tokens.rounded_now(), False))["X-Seen"])

    good, longer = header("x" * 78), header("x" * 79)
    assert (len(good), len(longer)) == (160, 162)
    for token, homes in (good, ("x" * 78,)), (longer, ()):
        assert tokens.seen(None, token).homes == homes
        assert tokens.seen(f"{NAME}_home={token}", None).homes == homes
    # What is no part of a token is passed over; but that was one character too many.
    assert tokens.seen(None, f".{header('x' * 75)}").homes == ("x" * 75,)
    assert tokens.seen(None, f".{good}").homes == ()


def test_of_several_positions_the_highest_counts_among_the_first_four(tokens):
    cookies = [position(tokens, number) for number in range(1, 6)]
    assert tokens.seen("; ".join(cookies), None).position == 4
    assert tokens.seen("; ".join(reversed(cookies)), None).position == 5


@pytest.mark.parametrize(("seconds", "is_good"), [(-31, False), (-30, True), (LIFETIME, True), (LIFETIME + 1, False)])
def test_a_token_is_good_for_its_lifetime_and_a_little_before(tokens, clock, seconds, is_good):
    sent = position(tokens, 7)
    clock.now = int(clock.now) + seconds
    assert tokens.seen(sent, None).position == (7 if is_good else 0)


@pytest.mark.parametrize(
    ("max_lag", "sticky", "seconds"), [(10, 5, 85), (40, 5, 160), (8, 5, 80), (4, 20, 100), (0.5, 0, 61)]
)
def test_half_its_lifetime_is_longer_than_any_lag_and_longer_than_a_visitor_is_pinned(
    max_lag, sticky, seconds, tmp_path: Path
):
    """A visitor whose token is too old has seen nothing for so long that any replica has it."""
    primary, replica = (URL.create("sqlite", database=str(tmp_path / name)) for name in ("primary", "replica"))
    with closing(Site(primary, [replica], max_lag=max_lag, sticky=sticky)) as site:
        visitor = site.visitor(lambda: [str(site.Session.execute(sa.text("SELECT 1")).scalar()).encode()])
        assert visitor.request("/", "POST") == "1"
    assert f"Max-Age={seconds}" in visitor.set_cookies[0].split("; ")


def test_what_is_not_ours_or_not_good_any_more_hides_nothing(tokens, clock):
    good, issued = position(tokens, 7), int(clock.now)
    clock.now = issued - LIFETIME - 1
    old, home_of_old = position(tokens, 9), home(tokens)
    clock.now = issued
    assert tokens.seen(f"{NAME}=forged; {old}; {home_of_old}; {good}", None) == (7, (), False, False)


@pytest.mark.parametrize(("seconds", "is_pinned"), [(-10, True), (0, True), (30, True), (31, False), (32, False)])
def test_a_visitor_is_pinned_for_so_many_seconds(tokens, clock, seconds, is_pinned):
    sent, not_pinned = position(tokens, 0, pinned=31), position(tokens, 1)
    clock.now = int(clock.now) + seconds
    assert tokens.seen(sent, None).pinned is is_pinned
    assert not tokens.seen(not_pinned, None).pinned
    assert not tokens.seen(home(tokens, int(clock.now) - seconds), None).pinned


def test_the_time_of_a_home_is_rounded_so_that_all_visitors_share_it(clock):
    assert make(clock).rounded_now() == 1_000_005  # a sixteenth of the lifetime
    assert make(clock, lifetime=1).rounded_now() == 1_000_007


# -- the short way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cookies", ["{}", "{}; other=1", "other=1; {}", "a=1; {}; b=2"])
def test_a_home_that_is_known_is_found_by_the_short_way(tokens, cookies):
    cookies = cookies.format(home(tokens))
    assert tokens.fresh_home(cookies) is None  # never seen: it may be forged
    assert tokens.seen(cookies, None).homes == (HOME,)
    assert tokens.fresh_home(cookies) == HOME


@pytest.mark.parametrize("cookies", ["", "other=1", "{position}; {home}", "{home}; {position}", "{home}; {home}"])
def test_it_is_not_taken_where_there_is_more_to_know(tokens, cookies):
    known = home(tokens)
    tokens.seen(known, None)
    assert tokens.fresh_home(cookies.format(home=known, position=position(tokens, 1))) is None


def test_it_takes_no_other_cookie_for_the_home(tokens):
    known = home(tokens)
    tokens.seen(known, None)
    name, _, token = known.partition("=")
    # Of which the value is where that of the home would be if the cookies began with its name.
    for spare in range(-1, 2):
        other = "x" * (len(name) + spare) + "=" + token
        assert tokens.fresh_home(other) is None
        assert tokens.fresh_home(f"{other}; {position(tokens, 1)}") is None


@pytest.mark.parametrize("pinned", [0, 5])
def test_it_takes_no_other_token_for_that_of_a_home(tokens, pinned):
    for number in 0, 1:
        known = position(tokens, number, pinned)
        tokens.seen(known, None)
        assert tokens.fresh_home(known.replace(f"{NAME}=", f"{NAME}_home=")) is None


@pytest.mark.parametrize(
    ("seconds", "is_fresh"),
    [(-31, False), (-30, True), (0, True), (LIFETIME / 2, True), (LIFETIME / 2 + 1, False)],
)
def test_it_ends_when_the_visitor_has_to_be_told_again(tokens, clock, seconds, is_fresh):
    issued = int(clock.now)
    known = home(tokens, issued)
    assert tokens.seen(known, None).fresh
    assert not tokens.seen(position(tokens, 1), None).fresh
    clock.now = issued + seconds
    assert tokens.fresh_home(known) == (HOME if is_fresh else None)
    assert tokens.seen(known, None).fresh is is_fresh


def test_several_homes_are_known_at_once(tokens):
    first, second = home(tokens), cookie(tokens.home_headers("replica-2-0", tokens.rounded_now(), False))
    for each in first, second:
        tokens.seen(each, None)
    assert (tokens.fresh_home(first), tokens.fresh_home(second)) == (HOME, "replica-2-0")


def test_however_many_homes_there_were_a_new_one_is_known(tokens, clock):
    for _ in range(1_100):
        clock.now += LIFETIME / 16
        new = home(tokens)
        tokens.seen(new, None)
        assert tokens.fresh_home(new) == HOME
        # Nor are they kept for ever.
        assert len(tokens._fresh_homes) <= 512


def test_a_token_that_is_too_old_is_not_remembered(tokens, clock):
    old = home(tokens)
    clock.now += LIFETIME + LIFETIME / 16
    tokens.seen(old, None)
    clock.now -= LIFETIME
    assert tokens.fresh_home(old) is None
    tokens.seen(old, None)
    assert tokens.fresh_home(old) == HOME
