"""What the figures say: tables, which are reStructuredText, and plots, which are SVG."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.contenders import CASES, CONTENDERS, Contender

Result = dict[str, Any]
#: Whom the others of a family are compared with.
REFERENCES = {
    "WSGI": "by hand",
    "Flask": "Flask-SQLAlchemy",
    "Pyramid": "pyramid_tm",
    "Django": "Django",
}
#: The same for what the reference does not have.
OTHER_REFERENCES = {("Pyramid", "/race"): "pyramid_tm, pyramid_retry"}
TITLES = {
    "/none": "no session",
    "/session": "session only",
    "/read": "one-row read",
    "/rows": "1,000-row read",
    "/insert": "insert",
    "/stream": "1,000 chunks",
    "/error": "exception",
    "/race": "replay",
}


def reference_of(contender: Contender, case: str) -> str:
    return OTHER_REFERENCES.get((contender.family, case), REFERENCES[contender.family])


# Numbers


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper one."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Round by round: what disturbs a round disturbs both of them."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def number(value: float) -> str:
    """Three digits of it."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def shown(values: tuple[float, float, float], digits: int = 2) -> str:
    low, middle, high = values
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


# Tables


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A simple table of reStructuredText."""
    # Where there is nothing to say, a comment.
    cells = [list(header), *([*row[:1], *(cell or ".." for cell in row[1:])] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    body = "\n".join(f"   {line}".rstrip() for line in (rule, lines[0], rule, *lines[1:], rule))
    return f".. table:: {title}\n\n{body}\n"


def tables(facts: dict[str, str], results: Sequence[Result]) -> dict[str, str]:
    """All that there are figures for, by part."""
    parts: dict[str, Iterator[str]] = {
        "machine": _machine(facts),
        "contenders": _contenders(),
        "requests": chain(_requests(results), _memory(results)),
        "chunks": _chunks(results),
        "served": _served(results),
        "slow_clients": _slow_clients(results),
        "lost_races": _lost_races(results),
        "growth": _growth(results),
    }
    texts = {name: "\n\n".join(found) for name, found in parts.items()}
    return {name: text for name, text in texts.items() if text}


def _machine(facts: dict[str, str]) -> Iterator[str]:
    yield table("The machine, and the versions", ["what", "which"], facts.items())


def _contenders() -> Iterator[str]:
    rows = [(contender.name, contender.semantics, contender.versions) for contender in CONTENDERS]
    yield table("Who commits when", ["contender", "semantics", "versions"], rows)


def _of(results: Iterable[Result], part: str) -> list[Result]:
    return [result for result in results if result["part"] == part]


def _requests(results: Sequence[Result]) -> Iterator[str]:
    found = {(each["contender"], each["case"]): each for each in _of(results, "request")}
    if not found:
        return

    def time(contender: Contender, case: str) -> str:
        each = found.get((contender.name, case))
        return "" if each is None else number(statistics.median(each["microseconds"]))

    def ratio(contender: Contender, case: str) -> str:
        ours, theirs = found.get((contender.name, case)), found.get((reference_of(contender, case), case))
        if ours is None or theirs is None or ours is theirs:
            return "" if ours is None or ours is not theirs else "1"
        return shown(ratios(ours["microseconds"], theirs["microseconds"]))

    header = ["contender", *(TITLES[case] for case in CASES)]
    contenders = _measured(found)
    rows = [[contender.name, *(time(contender, case) for case in CASES)] for contender in contenders]
    yield table("Microseconds of processor time per request, medians", header, rows)
    rows = [[contender.name, *(ratio(contender, case) for case in CASES)] for contender in contenders]
    yield table("The same as a ratio to the reference of the family, which is 1: medians and quartiles", header, rows)


def _measured(found: Iterable[tuple[str, str]]) -> list[Contender]:
    """Those of which there is anything, by name and case."""
    names = {name for name, _ in found}
    return [contender for contender in CONTENDERS if contender.name in names]


def _memory(results: Sequence[Result]) -> Iterator[str]:
    found = {(each["contender"], each["case"]): each["peak_bytes"] for each in _of(results, "request")}
    if found:
        rows = [
            [
                contender.name,
                *(
                    "" if (contender.name, case) not in found else number(found[contender.name, case] / 1024)
                    for case in CASES
                ),
            ]
            for contender in _measured(found)
        ]
        header = ["contender", *(TITLES[case] for case in CASES)]
        yield table("KiB that a request has allocated at its peak, over what there was before it", header, rows)


def _chunks(results: Sequence[Result]) -> Iterator[str]:
    rows = []
    bare: dict[str, list[float]] = {}
    for each in _of(results, "chunk"):
        if each["contender"] == "bare generator":
            bare[each["case"]] = each["nanoseconds"]
            rows.append([each["contender"], each["case"], number(statistics.median(each["nanoseconds"])), ""])
        else:
            times = each["nanoseconds"]
            more = spread([one - other for one, other in zip(times, bare[each["case"]], strict=True)])
            rows.append(
                [f"{each['contender']} session", each["case"], number(statistics.median(times)), shown(more, 0)]
            )
    if rows:
        yield table(
            "Nanoseconds per chunk of a body that streams", ["body", "case", "per chunk", "more than bare"], rows
        )


def _served(results: Sequence[Result]) -> Iterator[str]:
    found = {
        (each["contender"], each["server"], each["case"], each["clients"]): each for each in _of(results, "served")
    }
    loads = sorted({key[1:] for key in found})
    for server in dict.fromkeys(load[0] for load in loads):
        rows = []
        for contender in CONTENDERS:
            for load in [load for load in loads if load[0] == server]:
                each = found.get((contender.name, *load))
                if each is None:
                    continue
                reference = found.get((reference_of(contender, load[1]), *load))
                rate = each["requests_per_second"]
                rows.append(
                    [
                        contender.name,
                        TITLES[load[1]],
                        str(load[2]),
                        number(statistics.median(rate)),
                        "" if reference is None else shown(ratios(rate, reference["requests_per_second"])),
                        number(statistics.median(each["p50_ms"])),
                        number(statistics.median(each["p99_ms"])),
                        str(each["errors"]),
                        str(each.get("missing", "")),
                    ]
                )
        header = [
            "contender",
            "request",
            "clients",
            "per second",
            "ratio",
            "p50 [ms]",
            "p99 [ms]",
            "errors",
            "missing rows",
        ]
        yield table(f"Requests per second under {server} on PostgreSQL", header, rows)


_WAITS = ("median", "p99", "max")


def _slow_clients(results: Sequence[Result]) -> Iterator[str]:
    rows = [
        [
            each["contender"],
            each["server"],
            *(number(each["wait_ms"][which]) if each["answers"] and each["begun"] else "" for which in _WAITS),
            str(each["answers"]),
            str(each["failures"]),
            str(each["begun"]),
            str(each["broken"]),
            str(each["leaked"]),
        ]
        for each in _of(results, "slow clients")
    ]
    if rows:
        header = [
            "contender",
            "server",
            "median [ms]",
            "p99",
            "longest",
            "answers",
            "failures",
            "begun",
            "broken",
            "leaked",
        ]
        yield table(
            "How long other requests take while 50 slow clients read 2 MB each, with two connections", header, rows
        )


def _lost_races(results: Sequence[Result]) -> Iterator[str]:
    rows = [
        [
            each["contender"],
            number(statistics.median(each["successes_per_second"])),
            f"{100 * each['failed'] / max(1, each['failed'] + each['succeeded']):.1f} %",
            number(statistics.median(each["p99_ms"])),
            str(each["lost"]),
            str(each["twice"]),
        ]
        for each in _of(results, "lost races")
    ]
    if rows:
        header = ["contender", "successes per second", "answered 5xx", "p99 [ms]", "lost", "done twice"]
        yield table("Eight clients that change the same few rows, SERIALIZABLE", header, rows)


_GROWTH = {
    "threads": "threads at work",
    "streams": "responses that stream meanwhile",
    "requests": "requests served before",
}


def _growth(results: Sequence[Result]) -> Iterator[str]:
    found = _of(results, "growth")
    for what, title in _GROWTH.items():
        here = [each for each in found if each["with"] == what]
        counts = list(dict.fromkeys(each["count"] for each in here))
        rows = []
        for name in dict.fromkeys(each["contender"] for each in here):
            times = [each["microseconds"] for each in here if each["contender"] == name]
            rows.append([name, *(number(statistics.median(each)) for each in times)])
        if rows:
            header = ["contender", *(f"{count:,}" for count in counts)]
            yield table(f"Microseconds per request that only makes a session, by {title}", header, rows)
        rows = []
        for name in dict.fromkeys(each["contender"] for each in here if "grown_bytes" in each):
            rows.append([name, *(f"{each['grown_bytes']:,}" for each in here if each["contender"] == name)])
        if rows:
            yield table(f"Bytes that requests of another hundredth leave behind, by {title}", header, rows)


# Plots

#: That can be seen on white and on black.
_GREY = "#888888"
_OURS, _REFERENCE, _OTHERS = "#2a9d8f", "#888888", "#e9a13b"


def plot(results: Sequence[Result], folder: Path) -> Iterator[Path]:
    """Draw what there are figures for, into *folder*."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "sa_wsgi_session",
            "font.family": "sans-serif",
            "text.color": _GREY,
            "axes.labelcolor": _GREY,
            "axes.edgecolor": _GREY,
            "xtick.color": _GREY,
            "ytick.color": _GREY,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    plots: dict[str, Callable[[Sequence[Result], Path], bool]] = {
        "requests": _plot_requests,
        "served": _plot_served,
        "slow_clients": _plot_slow_clients,
        "lost_races": _plot_lost_races,
        "growth": _plot_growth,
    }
    for name, draw in plots.items():
        path = folder / f"{name}.svg"
        if draw(results, path):
            yield path


def _save(figure: Any, path: Path) -> bool:
    import matplotlib.pyplot as plt

    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return True


def _colour(contender: Contender) -> str:
    return _OURS if contender.ours else _REFERENCE if contender.name in REFERENCES.values() else _OTHERS


def _bars(
    axes: Any, names: Sequence[str], values: Sequence[float], colours: Sequence[str], texts: Sequence[str]
) -> None:
    axes.barh(range(len(names)), values, color=colours, height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    for place, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.text(value, place, f" {text}", va="center", fontsize=7)
    axes.margins(x=0.2)
    axes.tick_params(axis="x", labelsize=7)


def _plot_requests(results: Sequence[Result], path: Path) -> bool:
    import matplotlib.pyplot as plt

    found = {(each["contender"], each["case"]): each["microseconds"] for each in _of(results, "request")}
    if not found:
        return False
    families = [family for family in ("WSGI", "Flask", "Pyramid") if (REFERENCES[family], CASES[0]) in found]
    if not families:
        return False
    cases = [case for case in CASES if case != "/race"]
    figure, grid = plt.subplots(len(cases), len(families), figsize=(12, 1.5 * len(cases)), squeeze=False)
    for row, case in zip(grid, cases, strict=True):
        for axes, family in zip(row, families, strict=True):
            reference = found[REFERENCES[family], case]
            shown_here = [
                each
                for each in CONTENDERS
                if each.family == family and (each.name, case) in found and each.name != "no session management"
            ]
            values = [ratios(found[each.name, case], reference)[1] for each in shown_here]
            names = [each.name.removeprefix(f"{family}, ") for each in shown_here]
            _bars(axes, names, values, [_colour(each) for each in shown_here], [f"{value:.2f}" for value in values])
            axes.axvline(1, color=_GREY, linewidth=0.8, linestyle=":")
            axes.set_title(f"{TITLES[case]}, {family}", fontsize=9)
    figure.tight_layout()
    return _save(figure, path)


def _plot_served(results: Sequence[Result], path: Path) -> bool:
    import matplotlib.pyplot as plt

    found = _of(results, "served")
    if not found:
        return False
    servers = list(dict.fromkeys(each["server"] for each in found))
    clients = sorted({each["clients"] for each in found})
    middle = clients[len(clients) // 2]
    figure, grid = plt.subplots(1, len(servers), figsize=(12, 4), squeeze=False)
    for axes, server in zip(grid[0], servers, strict=True):
        shown_here = [
            (contender, each)
            for contender in CONTENDERS
            for each in found
            if (each["contender"], each["server"], each["case"], each["clients"])
            == (contender.name, server, "/read", middle)
        ]
        values = [statistics.median(each["requests_per_second"]) for _, each in shown_here]
        texts = [
            f"{value:,.0f} (p99 {number(statistics.median(each['p99_ms']))} ms)"
            for value, (_, each) in zip(values, shown_here, strict=True)
        ]
        names, colours = [each.name for each, _ in shown_here], [_colour(each) for each, _ in shown_here]
        _bars(axes, names, values, colours, texts)
        axes.set_title(f"one-row reads per second, {server}, {middle} clients", fontsize=9)
        axes.margins(x=0.4)
    figure.tight_layout()
    return _save(figure, path)


def _plot_slow_clients(results: Sequence[Result], path: Path) -> bool:
    import matplotlib.pyplot as plt

    found = _of(results, "slow clients")
    if not found:
        return False
    servers = list(dict.fromkeys(each["server"] for each in found))
    figure, grid = plt.subplots(1, len(servers), figsize=(12, 4), squeeze=False)
    for axes, server in zip(grid[0], servers, strict=True):
        here = [each for each in found if each["server"] == server]
        # Without a slow client that gets anything nobody waits for one.
        values = [0 if not each["begun"] else each["wait_ms"]["p99"] if each["answers"] else 10_000 for each in here]
        texts = [
            "all long responses broken"
            if not each["begun"]
            else f"{number(value)} ms" + (f", {each['failures']} without an answer" if each["failures"] else "")
            for value, each in zip(values, here, strict=True)
        ]
        colours = [_OURS if "sa_wsgi_session" in each["contender"] else _OTHERS for each in here]
        _bars(axes, [each["contender"] for each in here], values, colours, texts)
        axes.set_xscale("log")
        axes.margins(x=0.5)
        axes.set_title(f"p99 of other requests, {server}", fontsize=9)
    figure.tight_layout()
    return _save(figure, path)


def _plot_lost_races(results: Sequence[Result], path: Path) -> bool:
    import matplotlib.pyplot as plt

    found = _of(results, "lost races")
    if not found:
        return False
    figure, axes = plt.subplots(figsize=(8, 2.5))
    values = [statistics.median(each["successes_per_second"]) for each in found]
    shares = [100 * each["failed"] / max(1, each["failed"] + each["succeeded"]) for each in found]
    texts = [f"{value:,.0f}, {share:.1f} % answered 5xx" for value, share in zip(values, shares, strict=True)]
    colours = [_OURS if "sa_wsgi_session" in each["contender"] else _OTHERS for each in found]
    _bars(axes, [each["contender"] for each in found], values, colours, texts)
    axes.margins(x=0.4)
    axes.set_title("successes per second, eight clients on the same few rows", fontsize=9)
    return _save(figure, path)


def _plot_growth(results: Sequence[Result], path: Path) -> bool:
    import matplotlib.pyplot as plt

    found = _of(results, "growth")
    if not found:
        return False
    figure, grid = plt.subplots(1, len(_GROWTH), figsize=(12, 3), squeeze=False)
    for axes, (what, title) in zip(grid[0], _GROWTH.items(), strict=True):
        for name in dict.fromkeys(each["contender"] for each in found):
            here = [each for each in found if each["with"] == what and each["contender"] == name]
            axes.plot(
                [each["count"] for each in here],
                [statistics.median(each["microseconds"]) for each in here],
                marker="o",
                markersize=3,
                label=name,
                color=_REFERENCE if name == "by hand" else _OURS,
                linestyle="--" if "contextual" in name else "-",
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel(title, fontsize=8)
        axes.tick_params(labelsize=7)
    grid[0][0].set_ylabel("µs per request", fontsize=8)
    grid[0][-1].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return _save(figure, path)
