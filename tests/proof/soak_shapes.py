"""The requests of the long run: what is asked for, what has to be answered, and what has to be in the database then.

A request is known by its number: the same number is always the same request. It asks for a shape, which is a view of
``soak_views.py``, from one of four stacks: both registries, with and without a retry policy. Its rows in the database
are labelled with that number, and perhaps with what the view calls them.

Every fifth request is hung up by its client: for most of these in the middle of an answer that has no end, or in the
middle of what the client itself sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal
from zlib import crc32

#: Every so many requests, one is hung up.
HANG_UP_EVERY = 5

#: How many rows there are before the first request, of which the views read.
SEEDS = 20

DONE = b"done"
#: What a streamed answer begins with, and what it has after that.
FIRST, REST = b"first ", b"and the rest"

#: The registry, and whether there is a retry policy.
STACKS = ("thread-local", "thread-local-retried", "contextual", "contextual-retried")

#: Of a client that hangs up: how much it has sent of its request, or seen of the answer.
HangUp = Literal["in its body", "before the answer", "in the answer"]


@dataclass(frozen=True)
class Shape:
    """What a view does, and what has to come of it.

    The rows are named by what follows the number in their labels.
    """

    name: str
    #: The rows that are there once it is answered, or was hung up in the answer.
    keeps: tuple[str, ...] = ()
    #: Those that must never be there.
    refuses: tuple[str, ...] = ()
    status: int = 200
    #: What is answered; for ``None``, whatever page the server has for errors.
    body: bytes | None = DONE
    #: An exception, or an answer with ``exc_info``, reaches the server.
    fails: bool = False
    #: The answer is broken off after its beginning, which is *body*.
    breaks: bool = False
    method: str = "GET"
    #: The client sends something, and is answered what :func:`receipt` says.
    sends: bool = False
    #: It adds one to a number that all share.
    counts: bool = False
    #: Only under a retry policy.
    retried: bool = False
    #: How much more often than others it is asked for.
    weight: int = 2
    #: How a client leaves, if it does.
    hangs_up: HangUp | None = None


ORDINARY = (
    Shape("nothing", weight=12),
    Shape("reads", body=str(SEEDS).encode(), weight=12),
    Shape("writes", keeps=("",), status=201, weight=6),
    Shape("refused", refuses=("",), status=409),
    Shape("swallows_an_error", refuses=("",), status=500, body=None, fails=True, weight=1),
    Shape("fails", refuses=("",), status=500, body=None, fails=True, weight=1),
    Shape("fails_to_commit", refuses=("",), status=500, body=None, fails=True, weight=1),
    Shape("answers_again", refuses=("",), status=500, body=b"an error page", fails=True, weight=1),
    Shape("streams_a_result", body=b"seed\n" * SEEDS),
    Shape("writes_and_streams_a_result", keeps=("",), body=FIRST + REST, weight=1),
    Shape("streams_and_writes", keeps=("", "-body"), body=FIRST + REST),
    Shape("breaks_in_the_body", keeps=("",), refuses=("-body",), body=FIRST, breaks=True, weight=1),
    Shape("commits_at_the_end", keeps=("", "-body"), body=FIRST + REST),
    Shape("breaks_before_the_end", refuses=("", "-body"), body=FIRST, breaks=True, weight=1),
    Shape("uses_write", keeps=("", "-later"), body=FIRST + REST),
    Shape("sends_a_file", keeps=("",)),
    Shape("receives", keeps=("",), method="POST", sends=True),
    Shape("receives_again", keeps=("",), method="POST", sends=True, retried=True),
    Shape("loses_a_race", keeps=("",), retried=True),
    Shape("runs_a_race", keeps=("",), counts=True, retried=True),
    Shape("answers_a_lost_race", keeps=("",), counts=True, retried=True),
    Shape("nests", keeps=("", "-kept"), refuses=("-undone",)),
    Shape("is_independent", keeps=("", "-independent")),
    Shape("is_independent_and_fails", keeps=("-independent",), refuses=("",), status=409),
    Shape("joins", keeps=("", "-joined")),
    Shape("calls_back", keeps=("", "-callback")),
    Shape("calls_back_and_fails", keeps=("",), weight=1),
    Shape("calls_back_a_rollback", keeps=("-callback",), refuses=("",), status=409),
    Shape("dooms", refuses=("",)),
    Shape("asks_itself", keeps=("", "-inside")),
    Shape("asks_a_copy", keeps=("", "-inside")),
    Shape("commits_itself", keeps=("", "-before"), refuses=("-undone",)),
    Shape("removes", keeps=("", "-before"), refuses=("-undone",)),
    Shape("answers_a_head", keeps=("",), method="HEAD", body=b""),
)

HUNG_UP = (
    Shape("is_endless", keeps=("",), refuses=("-body",), hangs_up="in the answer", weight=4),
    Shape("reads_without_an_end", hangs_up="in the answer", weight=4),
    Shape("never_commits_at_the_end", refuses=("", "-body"), hangs_up="in the answer", weight=4),
    Shape("writes_without_an_end", keeps=("",), refuses=("-later",), hangs_up="in the answer"),
    Shape("sends_a_large_file", keeps=("",), hangs_up="in the answer"),
    Shape("receives", refuses=("",), method="POST", sends=True, hangs_up="in its body"),
    # Nobody knows what the server has begun by then: a row may be there or not.
    Shape("streams_and_writes", keeps=("", "-body"), body=FIRST + REST, hangs_up="before the answer", weight=1),
    Shape("writes", keeps=("",), hangs_up="before the answer", weight=1),
)

#: Those whose end the application sees.
ENDLESS = frozenset(
    {"is_endless", "reads_without_an_end", "never_commits_at_the_end", "writes_without_an_end"},
)

Pair = tuple[Shape, str]


def _pairs(shapes: tuple[Shape, ...]) -> list[Pair]:
    return [(shape, stack) for shape in shapes for stack in STACKS if "retried" in stack or not shape.retried]


_ORDINARY, _HUNG_UP = _pairs(ORDINARY), _pairs(HUNG_UP)


@dataclass(frozen=True)
class Request:
    """One request of a client."""

    number: int
    shape: Shape
    stack: str
    #: Whether a client that hangs up resets the connection instead of closing it.
    resets: bool

    @property
    def target(self) -> str:
        return f"/{self.stack}/{self.shape.name}?{self.number}"

    def labels(self, names: tuple[str, ...]) -> list[str]:
        return [f"{self.number}{name}" for name in names]

    @property
    def content(self) -> bytes | None:
        """What the client sends."""
        if not self.shape.sends:
            return None
        return f"{self.number} ".encode() * (200 + self.number % 2000)

    @property
    def answer(self) -> bytes | None:
        """What the body of the answer has to be; ``None``: whatever it is."""
        content = self.content
        return self.shape.body if content is None else receipt(content)


def receipt(content: bytes) -> bytes:
    """What the views answer that have received *content*."""
    return f"{len(content)} bytes, {crc32(content)}".encode()


def request(number: int) -> Request:
    """The request with that number. The first ones are of every shape, from every stack."""
    hung_up, place = divmod(number, HANG_UP_EVERY)
    random = Random(number)
    if place == HANG_UP_EVERY - 1:
        shape, stack = _choose(_HUNG_UP, hung_up, random)
    else:
        shape, stack = _choose(_ORDINARY, number - hung_up, random)
    return Request(number, shape, stack, resets=random.random() < 0.5)


def _choose(pairs: list[Pair], index: int, random: Random) -> Pair:
    if index < len(pairs):
        return pairs[index]
    return random.choices(pairs, [shape.weight for shape, _stack in pairs])[0]


#: How many requests it takes until each of them was there.
ALL_ONCE = max(HANG_UP_EVERY * len(_HUNG_UP), len(_ORDINARY) * HANG_UP_EVERY // (HANG_UP_EVERY - 1) + 1)
