"""Whatever applications, servers and databases do: what comes out is what the oracle, which knows the promises, says.

``PROOF_EXAMPLES`` episodes altogether.  In their default number they are the same ones each time; more of them are
other ones each time, and a failure prints how to have the same again.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.proof.conftest import Tell
from tests.proof.harness import Harness, SessionHasGone
from tests.proof.oracle import Unspecified, predict
from tests.proof.programs import Episode
from tests.proof.strategies import episodes

EXAMPLES_IN_CI = 5000
EXAMPLES = int(os.environ.get("PROOF_EXAMPLES", EXAMPLES_IN_CI))

SETTINGS = [
    (registry, commit_at, attempts)
    for registry in ("thread-local", "contextual")
    for commit_at in ("start", "end")
    for attempts in ((1,), (2, 3))
]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    harness = Harness(tmp_path_factory.mktemp("harness"))
    yield harness
    harness.close()


@pytest.mark.parametrize(("registry", "commit_at", "attempts"), SETTINGS)
def test_an_episode_ends_as_the_promises_say(
    harness: Harness, registry: str, commit_at: str, attempts: tuple[int, ...], tell: Tell
) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=-(-EXAMPLES // len(SETTINGS)),
        derandomize=EXAMPLES <= EXAMPLES_IN_CI,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(episodes(registry, commit_at, attempts))
    def check(episode: Episode) -> None:
        compare(harness, episode, seen)
        if seen["episodes"] % 100 == 0:
            freeze()

    freeze()
    try:
        check()
    finally:
        # What Hypothesis remembers of 25,000 episodes, up to 3 GB, is not wanted for the next ones.
        gc.unfreeze()
        gc.collect()
    tell(f"{registry}, {commit_at}, {attempts}", seen)


def freeze() -> None:
    """What is there by now stays, what Hypothesis remembers among it.

    To look through all that after each episode would soon take more time than the episode.
    """
    gc.collect()
    gc.freeze()


def compare(harness: Harness, episode: Episode, seen: Counter[str]) -> None:
    seen["episodes"] += 1
    try:
        expected = predict(episode)
    except Unspecified:
        seen["unspecified"] += 1
        # What must hold after every call must hold all the same.
        with suppress(SessionHasGone):
            harness.play(episode)
        return
    try:
        happened = harness.play(episode)
    except SessionHasGone:
        seen["session gone"] += 1
        return
    assert happened == expected, difference(happened, expected)
    for what, *data in happened:
        seen[what] += 1
        if what == "attempt" and data[1] > 1:
            seen["replayed"] += 1


def difference(happened: list[Any], expected: list[Any]) -> str:
    lines = ["what happened, and what the oracle has expected instead:"]
    for here, there in zip_longest(happened, expected):
        lines.append(f"  {here}" if here == there else f"! {here}\n!     {there}")
    return "\n".join(lines)
