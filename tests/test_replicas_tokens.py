"""The tokens of read replicas by themselves, on a clock that is put forward by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sa_wsgi_session._tokens import NOTHING_SEEN, Tokens

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


def test_of_several_positions_the_highest_counts_among_the_first_four(tokens):
    cookies = [position(tokens, number) for number in range(1, 6)]
    assert tokens.seen("; ".join(cookies), None).position == 4
    assert tokens.seen("; ".join(reversed(cookies)), None).position == 5


@pytest.mark.parametrize(("seconds", "is_good"), [(-31, False), (-30, True), (LIFETIME, True), (LIFETIME + 1, False)])
def test_a_token_is_good_for_its_lifetime_and_a_little_before(tokens, clock, seconds, is_good):
    sent = position(tokens, 7)
    clock.now = int(clock.now) + seconds
    assert tokens.seen(sent, None).position == (7 if is_good else 0)


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
