"""Every small program of a certain form: what fails, where, who swallows it, and what is done then.

The episodes of ``test_model.py`` are drawn at random, and what takes four things together is rare there.  Here the four
are put together in all ways: as many of these programs as ``PROOF_EXAMPLES`` says, spread over all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import prod
from typing import TYPE_CHECKING, Any

import pytest

from tests.proof.harness import Harness, SessionHasGone
from tests.proof.oracle import Unspecified, predict
from tests.proof.programs import (
    Add,
    Arm,
    Break,
    Commit,
    Doom,
    Episode,
    Exchange,
    Flush,
    Inner,
    Job,
    OnCommit,
    Program,
    Raise,
    Read,
    Remove,
    Rollback,
    Scope,
    Server,
    Start,
    Try,
    Write,
)
from tests.proof.test_model import EXAMPLES, EXAMPLES_IN_CI, SETTINGS, difference

if TYPE_CHECKING:
    from tests.proof.conftest import Tell

#: In CI, where the others are; in a full run, of each setting.
PROGRAMS_IN_CI = 1600
PROGRAMS = PROGRAMS_IN_CI if EXAMPLES <= EXAMPLES_IN_CI else EXAMPLES // 4

Steps = tuple[Any, ...]

OK = Start("200 OK", False)
SERVER = Server(None, 1, False, False)

#: What comes first.
BEFORE: list[Steps] = [(), (Add(),), (Read(),), (OnCommit("works"), Add(), Flush())]
#: What goes wrong then, if the work comes to it.
FAULTS: list[Steps] = [
    (),
    *((Arm(what, error, 1),) for what in ("execute", "commit") for error in ("plain", "race", "disconnect")),
    (Arm("committed", "disconnect", 1),),
    (Arm("rollback", "plain", 1),),
    (Arm("connect", "plain", 1),),
]
WORK: list[Steps] = [
    (Read(),),
    (Add(), Flush()),
    (Add(), Read()),
    (Break(),),
    (Add(), Commit()),
    (Add(), Rollback()),
    (Read(), Remove(), Add()),
    (Commit(), Add(), Raise("ValueError")),
    (Add(), Doom()),
]


def _request(steps: Steps) -> Exchange:
    return Exchange(Program((OK, *steps), "list", (), (), None), SERVER)


#: In what that happens, in which the fault and the work are.
AROUND: list[Any] = [
    lambda steps: steps,
    *(lambda steps, how=how: (Scope(how, steps),) for how in ("required", "nested", "requires_new")),
    *(lambda steps, shares=shares: (Inner(_request(steps), shares),) for shares in (True, False)),
    lambda steps: (Scope("nested", (Scope("nested", steps),)),),
    lambda steps: (Scope("nested", (Inner(_request(steps), True),)),),
]
#: Who swallows what comes of it: nobody, whoever does the work, whoever has that done.
SWALLOWED = ("never", "within", "around")
#: What comes then, within and after it.
WITHIN: list[Steps] = [(), (Add(),), (Write(),), (Rollback(), Add())]
AFTER: list[Steps] = [(), (Read(),), (Add(),), (Write(), Add())]


FACTORS: tuple[Sequence[Any], ...] = (BEFORE, FAULTS, WORK, AROUND, SWALLOWED, WITHIN, AFTER)
NUMBER = prod(map(len, FACTORS))
#: From one to the next that is tried.  A prime number, so that none is tried twice before all are.
STEP = 100_003


def program(number: int) -> Steps:
    chosen: list[Any] = []
    for factor in reversed(FACTORS):
        number, choice = divmod(number, len(factor))
        chosen.append(factor[choice])
    after, within, swallowed, around, work, fault, before = chosen
    done = (Try(work),) if swallowed == "within" else work
    whole = around((*fault, *done, *within))
    return (*before, *((Try(whole),) if swallowed == "around" else whole), *after)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    harness = Harness(tmp_path_factory.mktemp("harness"))
    yield harness
    harness.close()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_small_program_ends_as_the_promises_say(harness: Harness, setting: Any, tell: Tell) -> None:
    registry, commit_at, attempts = setting
    number = SETTINGS.index(setting)
    share = PROGRAMS if PROGRAMS > PROGRAMS_IN_CI else PROGRAMS // len(SETTINGS)
    seen: Counter[str] = Counter()
    for turn in range(share):
        steps = program((number * NUMBER // len(SETTINGS) + turn * STEP) % NUMBER)
        # In a job there is no write().
        as_job = turn % 3 == 1 and "Write(" not in repr(steps)
        part = Job(steps, decorated=True) if as_job else _request(steps)
        episode = Episode((part,), (), registry, False, commit_at, attempts[-1])
        seen["programs"] += 1
        try:
            expected = predict(episode)
        except Unspecified:
            seen["unspecified"] += 1
            with suppress(SessionHasGone):
                harness.play(episode)
            continue
        happened = harness.play(episode)
        assert happened == expected, f"{episode}\n{difference(happened, expected)}"
        seen["replayed"] += any(what == "attempt" and data[1] > 1 for what, *data in happened)
    tell(f"{registry}, {commit_at}, {attempts[-1]}", seen)
