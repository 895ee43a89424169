"""Breaks the package in one place after the other, and sees whether the tests notice.

::

    python -m tests.proof.mutants                  # all modules
    python -m tests.proof.mutants _scope paste     # these alone
    python -m tests.proof.mutants --again          # what survived the last time unexplained, or was not tried

``tox -e mutants`` does the first.  It takes hours, on as many processes as there are processors; Ctrl-C keeps what is
known by then.  The last needs ``$PROOF_REPORT``, and takes what it finds there of modules that are what they were then.

Everything happens in copies of the checkout.  First the tests run there, each in one of them, and are measured: how
long each takes, and which lines it runs.  Then, for each mutant, the tests that run the changed line are run until one
fails: first those that have noticed a neighbour, then in turn one that runs what few others run of the same function,
one that runs little else, and one that is fast.  A test that takes more than ``SECONDS_OF_A_TEST`` has noticed, too.
One that fails where nothing is broken, if nothing runs before it, is not believed.

What survives, and is not explained in ``survivors.rst``, is tried with SQLAlchemy 1.4 as well, if
``$MUTANTS_SQLALCHEMY_14`` names a folder that has it; and then once more with ten times as many seconds, and with the
tests that run anything in the module.

What survives has to be explained.  Exit status 1: fewer than ``ENOUGH`` of all were noticed, or a
survivor is not explained.  Where ``$PROOF_REPORT`` names a folder, the figures are written to ``mutants.json`` there,
and what became of each mutant to ``each_mutant.json``.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from importlib import import_module
from itertools import accumulate, chain, count
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, TypeVar, cast

import coverage
import pytest

from tests.proof.mutants import databases
from tests.proof.mutants.mutations import Mutant, changed_functions, first_line, mutants_of

if TYPE_CHECKING:
    from tests.servers import DatabaseServer

ENOUGH = 0.95
#: The slowest takes three.
SECONDS_OF_A_TEST = 20
TIMEOUT = ("-o", f"faulthandler_timeout={SECONDS_OF_A_TEST}")
#: How long the tests of one mutant may take.
SECONDS_OF_A_MUTANT = float(os.environ.get("MUTANTS_SECONDS", "30"))
#: Whether also those are tried that run other code of the module: what is done once for a process, such as to listen to
#: something, was measured with one test, and others depend on it.
TRIES_MORE_TESTS = bool(os.environ.get("MUTANTS_MORE_TESTS"))
#: So many are tried first: most mutants do not see another one.
FIRST = 30
#: What runs other code, reads the documents, or needs a browser.
IGNORED = ("test_docs.py", "test_ledger_browser.py", "test_readme.py", "test_servers.py")
#: Each process that runs one of these starts three servers: they come last.
SLOW_TO_BEGIN = ("tests/test_replicas.py", "tests/test_replicas_load.py")
#: Imported once and not for each mutant; they know nothing of the package.
IMPORTED = (
    "psycopg",
    "psycopg2",
    "pymysql",
    "sqlalchemy.ext.asyncio",
    "sqlalchemy.orm",
    "waitress",
    "webob",
    "webtest",
)
SURVIVORS = Path(__file__).with_name("survivors.rst")
CHECKOUT = Path(__file__).parents[3]
PACKAGE = "sa_wsgi_session"
EACH_MUTANT = "each_mutant.json"

_T = TypeVar("_T")
#: How many seconds each test takes, and which tests run a line, by file and line; without a name: it is run when the
#: tests are imported.
Measured = tuple[Counter[str], dict[str, dict[int, set[str]]]]


def test_files(copy: Path) -> list[str]:
    """The modules of tests that may notice a mutant; the longest first."""
    found = sorted(copy.glob("tests/test_*.py"), key=lambda path: -path.stat().st_size)
    return [f"tests/{path.name}" for path in found if path.name not in IGNORED]


class Tests:
    """The tests of the copy, with one version of SQLAlchemy: a pytest plugin."""

    def __init__(self, copy: Path) -> None:
        self._copy = copy
        self._package = copy / PACKAGE
        self._seconds: Counter[str] = Counter()  # of floats
        self._running: dict[str, dict[int, set[str]]] = defaultdict(partial(defaultdict, set))
        #: How many lines a test runs.
        self._lines: Counter[str] = Counter()
        self._noticed: dict[tuple[Path, str], list[str]] = defaultdict(list)
        self._items: dict[str, pytest.Item] = {}
        #: The names of tests that pass where nothing is broken, whatever ran before.
        self._reliable: set[str] = set()
        self._functions: list[FunctionType] = []
        self._servers: dict[str, DatabaseServer] = {}
        self._failed = ""
        self._mutants: list[Mutant] | None = None
        self._tell: Callable[[Mutant, str, str], None] = print

    def _pytest(self, *arguments: str) -> int:
        # Of the capturing of pytest, only what the processes of the mutants inherit without harm.
        options = "-q", "-p", "no:cacheprovider", "--capture=sys", f"--basetemp={self._copy.with_name('tmp')}"
        return int(pytest.main([*options, *arguments], plugins=[self]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Without its fixtures: whoever is the first to use a server starts it.
        self._seconds[report.nodeid] += report.duration if report.when == "call" else 0.01  # type: ignore[assignment]
        if report.failed:
            self._failed = report.nodeid

    def measure(self, files: Sequence[str]) -> Measured:
        """Run those in these files, and note what each does."""
        options = "-p", "pytest_cov", f"--cov={self._package}", "--cov-context=test", "--cov-report="
        seconds = self._in_process(lambda: self._pytest(*files, *options) or self._seconds, 3600)
        if not isinstance(seconds, Counter):
            end = self._log.read_text(errors="replace")[-5_000:]
            sys.exit(f"the tests fail where nothing is broken:\n{end}")
        data = coverage.CoverageData(str(self._copy / ".coverage"))
        data.read()
        running = {}
        for path in self._package.glob("*.py"):
            lines = data.contexts_by_lineno(str(path)) or data.contexts_by_lineno(str(path.relative_to(self._copy)))
            running[path.name] = {line: {name.rpartition("|")[0] for name in names} for line, names in lines.items()}
        return seconds, running

    def learn(self, measured: Measured) -> None:
        """What :meth:`measure` has found, in this copy or another one."""
        seconds, running = measured
        self._seconds.update(seconds)
        for module, lines in running.items():
            for line, tests in lines.items():
                self._running[module][line] |= tests

    def notice(self, mutants: list[Mutant], tell: Callable[[Mutant, str, str], None]) -> None:
        """Tell of each mutant what becomes of it, and which test has noticed it."""
        # Two mutants of one second and one length are the same to the cache.
        shutil.rmtree(self._package / "__pycache__", ignore_errors=True)
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
        self._mutants, self._tell = mutants, tell
        found = (tests for lines in self._running.values() for tests in lines.values())
        self._lines = Counter(chain.from_iterable(found))
        self._pytest(*test_files(self._copy), *TIMEOUT)

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if self._mutants is None:
            return None  # as ever
        self._items = {item.nodeid: item for item in session.items}
        functions = [thing for thing in gc.get_objects() if type(thing) is FunctionType]
        self._functions = [it for it in functions if it.__code__.co_filename.startswith(str(self._package))]
        with self._databases():
            gc.freeze()
            for mutant in self._mutants:
                outcome, test = self._try(mutant)
                while test and self._fails_alone(test):
                    outcome, test = self._try(mutant)
                if test:
                    self._noticed[place_of(mutant)].append(test)
                self._tell(mutant, outcome, test)
        return True

    @contextmanager
    def _databases(self) -> Iterator[None]:
        """The database servers of ``conftest.py``, started once for the processes of all mutants."""
        from tests import conftest

        with ExitStack() as stack:
            for name in "run_postgresql", "run_mariadb":
                server = stack.enter_context(getattr(conftest, name)())
                setattr(conftest, name, partial(nullcontext, server))
                self._servers[name] = server
            databases.describe(self._servers, self._copy.with_name("databases"))
            yield

    def _try(self, mutant: Mutant) -> tuple[str, str]:
        original = mutant.path.read_text()
        tests = self._in_order(mutant)
        # For the processes that tests start.
        mutant.path.write_text(mutant.code)
        try:
            return self._notice(mutant, changed_functions(original, mutant), tests)
        finally:
            mutant.path.write_text(original)

    def _fails_alone(self, test: str) -> bool:
        """Whether *test* fails where nothing is broken, if nothing runs before it; then it is of no use here."""
        name = test.partition("[")[0]
        if name in self._reliable:
            return False
        items = [item for item in self._items.values() if item.nodeid.partition("[")[0] == name]
        if self._in_process(lambda: self._run_changed({}, items), 600) == "":
            self._reliable.add(name)
            return False
        print(f"{name} fails where nothing is broken, if nothing runs before it", file=sys.__stdout__, flush=True)
        for item in items:
            self._seconds.pop(item.nodeid, None)
        return True

    def _notice(self, mutant: Mutant, changes: dict[CodeType, CodeType], tests: list[str]) -> tuple[str, str]:
        limit = 120 + 5 * sum(self._seconds[test] for test in tests)
        if changes:
            # Only functions differ: the package that is imported already is changed, in a process of its own.
            items = [self._items[test] for test in tests]
            found = self._in_process(lambda: self._run_changed(changes, items), limit)
            if found is None:
                return "timed out", ""
            if found:
                return "killed", found
            if not any("" in self._running[mutant.path.name].get(line, ()) for line in mutant.lines):
                return "survived", ""
        return self._run_anew(tests, limit)

    def _run_changed(self, changes: dict[CodeType, CodeType], items: list[pytest.Item]) -> str:
        for function in self._functions:
            function.__code__ = changes.get(function.__code__, function.__code__)
        for server in self._servers.values():
            databases.use_databases_of_its_own(server)
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self._failed:
                break
        return self._failed

    def _run_anew(self, tests: list[str], limit: float) -> tuple[str, str]:
        plugins = "-p", "no:cacheprovider", "-p", databases.__name__
        options = ["-x", "-q", *plugins, *TIMEOUT]
        for some in filter(None, (tests[:FIRST], tests[FIRST:])):
            try:
                run = subprocess.run(
                    [sys.executable, "-m", "pytest", *options, *some], capture_output=True, text=True, timeout=limit
                )
            except subprocess.TimeoutExpired:
                return "timed out", ""
            if run.returncode != 0:
                found = re.search(r"^(?:FAILED|ERROR) (\S+::[^\s\[]+)", run.stdout, re.MULTILINE)
                if found is None and "Timeout" in run.stderr:
                    return "timed out", ""
                # Without a test: the package could not be imported.
                return "killed", found[1] if found else ""
        return "survived", ""

    def _in_process(self, work: Callable[[], _T], limit: float) -> _T | None:
        """What it returns; nothing where it crashes, or takes longer than *limit* seconds, or than a test may."""
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = os.fork()
        if process == 0:
            try:
                log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sender.send(work())
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                sys.stdout.flush()
                os._exit(0)
        sender.close()
        try:
            return cast(_T, receiver.recv()) if receiver.poll(limit) else None
        except EOFError:
            return None
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)

    @property
    def _log(self) -> Path:
        return self._copy.with_name("pytest.log")

    def _in_order(self, mutant: Mutant) -> list[str]:
        tests = self._that_run(mutant) & self._seconds.keys() or set(self._seconds)
        known = [test for test in reversed(self._noticed[place_of(mutant)]) if test in tests]
        fast_first = sorted(tests, key=self._seconds.__getitem__)
        narrow_first = sorted(fast_first, key=self._lines.__getitem__)
        rare_first = sorted(fast_first, key=self._rarity(mutant).__getitem__)
        # The first set of parameters of each, then the second...
        rounds: dict[str, Iterator[int]] = defaultdict(count)
        number = {test: next(rounds[test.partition("[")[0]]) for test in fast_first}
        various_first = sorted(fast_first, key=number.__getitem__)
        orders = rare_first, narrow_first, various_first
        order = dict.fromkeys([*known, *chain.from_iterable(zip(*orders, strict=True))])
        order = dict.fromkeys(sorted(order, key=lambda test: test.startswith(SLOW_TO_BEGIN)))
        if TRIES_MORE_TESTS:
            order |= dict.fromkeys(sorted(self._that_run_anything_in(mutant.path.name), key=self._seconds.__getitem__))
        total = accumulate(self._seconds[test] for test in order)
        return [test for test, seconds in zip(order, total, strict=True) if seconds <= SECONDS_OF_A_MUTANT]

    def _rarity(self, mutant: Mutant) -> Counter[str]:
        """Of each test, how many run the line that the fewest run, of those lines of the function that it runs."""
        running, rarity = self._running[mutant.path.name], Counter[str]()
        lines = [running.get(line, set()) for line in _function(_parse(mutant.path.read_text()), mutant.lines.start)]
        for tests in sorted(lines, key=len, reverse=True):
            for test in tests:
                rarity[test] = len(tests)
        return rarity

    def _that_run(self, mutant: Mutant) -> set[str]:
        """Those that run the statement; where it is run by an import: those that run what uses its name."""
        module, line = mutant.path.name, mutant.lines.start
        modules = {path.name: path.read_text() for path in mutant.path.parent.glob("*.py")}
        trees = {name: _parse(code) for name, code in modules.items()}
        if _function(trees[module], line):
            # A line of a condition may be run by the mutant alone.
            lines = _body(trees[module], line) or _statement(trees[module], line)
            found = self._that_run_lines(module, lines)
            if found:
                return found
        # The import itself may be the doing of whichever test was the first to need the module.
        names, asked, found = _names(trees[module], line), set[str](), set[str]()
        while names - asked:
            name = (names - asked).pop()
            asked.add(name)
            for using, code in modules.items():
                for number, text in enumerate(code.splitlines(), 1):
                    if re.search(rf"\b{name}\b", text):
                        is_run = bool(_function(trees[using], number))
                        tests = self._that_run_lines(using, [number]) if is_run else set[str]()
                        found |= tests
                        names |= set() if tests else _names(trees[using], number, of_classes=False)
        return found

    def _that_run_anything_in(self, module: str) -> set[str]:
        return self._that_run_lines(module, self._running[module]) & self._seconds.keys()

    def _that_run_lines(self, module: str, lines: Iterable[int]) -> set[str]:
        return {test for line in lines for test in self._running[module].get(line, ()) if test}


#: The modules that are asked about are the same ones for each mutant.
_parse = lru_cache(maxsize=64)(ast.parse)


def _body(tree: ast.AST, line: int) -> range:
    """The lines in the body of the function, if any, whose parameters or decorators are in that line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and first_line(node) <= line < node.body[0].lineno:
            return range(node.body[0].lineno, (node.end_lineno or line) + 1)
    return range(0)


def _statement(tree: ast.AST, line: int) -> range:
    """The lines of the innermost statement that has that line; of a compound one, its head."""
    found = range(line, line + 1)
    for node in ast.walk(tree):  # the outer ones first
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or line):
            body = getattr(node, "body", None)
            found = range(node.lineno, max(line, body[0].lineno - 1 if body else node.end_lineno or line) + 1)
    return found


def _function(tree: ast.AST, line: int) -> range:
    """The lines of the innermost function, if any, that has that line."""
    found = range(0)
    for node in ast.walk(tree):  # the outer ones first
        if isinstance(node, ast.FunctionDef) and first_line(node) <= line <= (node.end_lineno or line):
            found = range(node.lineno, (node.end_lineno or line) + 1)
    return found


def _names(tree: ast.Module, line: int, *, of_classes: bool = True) -> set[str]:
    """What the statement in that line defines: one of the module, or of a class."""
    body, names = tree.body, set[str]()
    while True:
        node = next((node for node in body if node.lineno <= line <= (node.end_lineno or 0)), None)
        if isinstance(node, ast.ClassDef) and of_classes:
            body, names = node.body, {node.name}
            continue
        targets = [node.target] if isinstance(node, (ast.AnnAssign, ast.For)) else getattr(node, "targets", [])
        return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)} or names


# What comes out

Key = tuple[str, str, str]
#: What became of a mutant, and the test that has noticed it, if that is known.
Results = dict[Key, tuple[str, str]]


def place_of(mutant: Mutant) -> tuple[Path, str]:
    return mutant.path, mutant.where


def key_of(mutant: Mutant) -> Key:
    return mutant.path.name, mutant.where, "\n".join(mutant.change)


def explained() -> set[Key]:
    """The survivors that ``survivors.rst`` explains, each in a literal block."""
    blocks = re.findall(r"^    @@ (\S+), (.+) @@\n((?:    [-+] .*\n)+)", SURVIVORS.read_text(), re.MULTILINE)
    return {
        (module, where, re.sub(r"^    ", "", change, flags=re.MULTILINE).strip()) for module, where, change in blocks
    }


def shown(key: Key) -> str:
    """As it stands there."""
    module, where, change = key
    return "\n".join(f"    {line}" for line in (f"@@ {module}, {where} @@", *change.splitlines()))


def measure_share(folder: Path, number: int, measured: Path) -> None:
    """Run this process's share of the tests in a copy of its own, and keep what they do."""
    copy = Path.cwd()
    files = test_files(copy)[number :: os.cpu_count()]
    (measured / str(number)).write_bytes(pickle.dumps(Tests(copy).measure(files)))


def notice_share(folder: Path, number: int, measured: Path) -> None:
    """Let the tests of a copy of its own notice this process's share of the mutants, and keep what came out."""
    for name in IMPORTED:
        with suppress(ImportError):
            import_module(name)

    def tell(mutant: Mutant, outcome: str, test: str) -> None:
        with (folder / f"results{number}").open("a") as file:
            print(json.dumps([*key_of(mutant), outcome, test]), file=file)
        print(outcome, test, f"\n{shown(key_of(mutant))}", file=sys.__stdout__, flush=True)

    tests = Tests(Path.cwd())
    for path in measured.iterdir():
        tests.learn(pickle.loads(path.read_bytes()))
    tests.notice(pickle.loads((folder / f"mutants{number}").read_bytes()), tell)


def run(
    mutants: Sequence[Mutant], results: Results, folder: Path, packages: str | None, *, is_last_attempt: bool
) -> None:
    """Try these mutants, on as many processes as there are processors.

    :param results: to be completed.
    :param packages: a folder of packages that come before those that are installed.
    :param is_last_attempt: whether to take more time, and more tests.
    """
    numbers = range(os.cpu_count() or 1)
    # Of one function all, so that what has noticed one of them is tried first for the next.
    functions = {place: number for number, place in enumerate(dict.fromkeys(map(place_of, mutants)))}
    measured = folder / f"measured-{Path(packages or 'installed').name}"
    with ExitStack() as stack:
        for number in numbers:
            # Whatever else happens.
            stack.callback(collect, folder / f"results{number}", results)
            copy = folder / str(number) / "copy"
            shutil.copytree(folder / "original", copy)
            stack.callback(shutil.rmtree, copy, ignore_errors=True)
            share = [mutant for mutant in mutants if functions[place_of(mutant)] % len(numbers) == number]
            (folder / f"mutants{number}").write_bytes(pickle.dumps(share))
        if not measured.exists():
            measured.mkdir()
            run_in_copies("--measure", folder, numbers, measured, packages)
        more = {"MUTANTS_SECONDS": str(10 * SECONDS_OF_A_MUTANT), "MUTANTS_MORE_TESTS": "1"} if is_last_attempt else {}
        run_in_copies("--notice", folder, numbers, measured, packages, **more)


def run_in_copies(
    what: str, folder: Path, numbers: Sequence[int], measured: Path, packages: str | None, **more: str
) -> None:
    """Have each of the processes do its share of that."""
    with ExitStack() as stack:
        running = []
        for number in numbers:
            copy = folder / str(number) / "copy"
            environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (packages, str(copy))))}
            environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **more}
            environ.pop("PYTHONDONTWRITEBYTECODE", None)
            command = [sys.executable, "-m", "tests.proof.mutants", what, str(folder), str(number), str(measured)]
            running.append(stack.enter_context(subprocess.Popen(command, cwd=copy, env=environ)))
        try:
            while None in (states := [process.poll() for process in running]) and not any(states):
                time.sleep(1)
            if any(states):
                raise SystemExit(f"a process has failed; how they have ended: {states}")
        finally:
            for each in running:
                each.terminate()


def collect(path: Path, results: Results) -> None:
    """Take what a process has kept there; it is gone then, so that it is not taken for what comes out the next time."""
    for line in path.read_text().splitlines() if path.exists() else ():
        module, where, change, outcome, test = json.loads(line)
        results[module, where, change] = outcome, test
    path.unlink(missing_ok=True)


def main(arguments: Sequence[str]) -> int:
    again, modules = "--again" in arguments, [it for it in arguments if it != "--again"]
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        original = folder / "original"
        files = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=CHECKOUT, text=True
        )
        for file in filter(None, files.split("\0")):
            (original / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / file, original / file)
        paths = [original / PACKAGE / f"{module}.py" for module in modules] or sorted((original / PACKAGE).glob("*.py"))
        with multiprocessing.Pool() as pool:
            made = chain.from_iterable(pool.map(mutants_of, paths, chunksize=1))
        mutants = [mutant._replace(path=mutant.path.relative_to(original)) for mutant in made]
        print(f"{len(mutants)} mutants", flush=True)
        # Of the copies: whatever becomes of the checkout meanwhile is another one.
        digests = {path.name: digest(path) for path in (original / PACKAGE).glob("*.py")}
        earlier = earlier_results(digests) if again else {}
        keys = {key_of(mutant) for mutant in mutants}
        results = {key: result for key, result in earlier.items() if key in keys}
        reasons = explained()
        packages = os.environ.get("MUTANTS_SQLALCHEMY_14")
        versions = [None, packages] if packages else [None]
        passes = [(version, is_last) for is_last in (False, True) for version in versions]
        try:
            for version, is_last in passes:
                known = {key for key, (outcome, _) in results.items() if outcome != "survived" or key in reasons}
                left = [mutant for mutant in mutants if key_of(mutant) not in known]
                if left:
                    run(left, results, folder, version, is_last_attempt=is_last)
        finally:
            keep(earlier | results, digests)
    return report(results, complete=not modules)


def earlier_results(digests: Mapping[str, str]) -> Results:
    """What :func:`keep` has kept, of the modules that are the same as they were."""
    path = Path(os.environ["PROOF_REPORT"], EACH_MUTANT)
    if not path.exists():
        sys.exit(f"--again: there is no {path}; run without it first")
    of_then, mutants = json.loads(path.read_text())
    return {
        (module, where, change): (outcome, test)
        for module, where, change, outcome, test in mutants
        if of_then[module] == digests.get(module)
    }


def keep(results: Results, digests: Mapping[str, str]) -> None:
    if folder := os.environ.get("PROOF_REPORT"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        each = [[*key, *outcome] for key, outcome in results.items()]
        Path(folder, EACH_MUTANT).write_text(json.dumps([digests, each], indent=1) + "\n")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report(results: Results, *, complete: bool) -> int:
    """Print the figures, write them, and return the exit status."""
    reasons = explained()
    figures: dict[str, Counter[str]] = defaultdict(Counter)
    for key, (outcome, _) in results.items():
        outcome = "explained" if outcome == "survived" and key in reasons else outcome
        for module in key[0], "all":
            figures[module].update(["mutants", outcome])
    columns = ("mutants", "killed", "timed out", "explained", "survived")
    print(f"{'module':20}", *(f"{column:>9}" for column in columns))
    for module, counts in sorted(figures.items()):
        print(f"{module:20}", *(f"{counts[column]:9}" for column in columns))
    if "PROOF_REPORT" in os.environ:
        path = Path(os.environ["PROOF_REPORT"], "mutants.json")
        by_module = {module: {column: counts[column] for column in columns} for module, counts in figures.items()}
        path.write_text(json.dumps(by_module, indent=2) + "\n")
    unexplained = [key for key, (outcome, _) in results.items() if outcome == "survived" and key not in reasons]
    print(*(f"survived:\n{shown(key)}" for key in unexplained), sep="\n")
    # The list is no place for what tests notice, or for what is no code any more.
    obsolete = [key for key in reasons if results.get(key, ("survived" if not complete else "",))[0] != "survived"]
    print(*(f"explained, but not a survivor:\n{shown(key)}" for key in obsolete), sep="\n")
    noticed = (figures["all"]["killed"] + figures["all"]["timed out"]) / figures["all"]["mutants"]
    print(f"{noticed:.1%} noticed")
    return int(bool(unexplained or obsolete) or noticed < ENOUGH)


if __name__ == "__main__":
    share = {"--measure": measure_share, "--notice": notice_share}.get("".join(sys.argv[1:2]))
    if share is not None:
        share(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        sys.exit(main(sys.argv[1:]))
