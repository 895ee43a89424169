"""What is done to the package: the operators of cosmic-ray that are used, one of our own, and what makes no difference.

cosmic-ray replaces each operator by every other one.  Here each place gets one replacement, or two where a limit may be
meant (``<`` becomes ``<=`` and ``>=``): what notices one of them notices the others.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Keyword

_OPERATORS = re.compile(
    r"ours/LeaveOut|core/(AddNot|Replace(TrueWithFalse|FalseWithTrue|AndWithOr|OrWithAnd|BreakWithContinue|ContinueWithBreak)"
    r"|ReplaceComparisonOperator_(Is_IsNot|IsNot_Is|Eq_NotEq|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt|Gt_GtE|Gt_LtE)"
    r"|ReplaceUnaryOperator_(Delete_Not|USub_UAdd)"
    r"|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_FloorDiv|Div_Mul|Pow_FloorDiv|BitOr_BitAnd|BitAnd_BitOr)"
    r"|ExceptionReplacer|NumberReplacer|RemoveDecorator|ZeroIterationForLoop)"
)


class LeaveOut(Operator):
    """Leaves a statement out: a call, a ``raise``, a ``return``, a ``del``, an assignment to more than a local name."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "simple_stmt" and self._matters(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    @staticmethod
    def _matters(statement: Any) -> bool:
        if statement.type == "expr_stmt":
            target, operator = statement.children[:2]
            names = target.children[::2] if target.type == "testlist_star_expr" else [target]
            return str(getattr(operator, "value", "=")) != "=" or any(name.type != "name" for name in names)
        return statement.type in ("atom_expr", "power", "raise_stmt", "return_stmt", "del_stmt") or (
            statement.type == "keyword" and statement.value in ("raise", "return")
        )

    def mutate(self, node: Any, index: int) -> Any:
        statement, newline = node.children[0], node.children[-1]
        # Of as many lines, so that what comes after it is the same code.
        newline.value *= 1 + statement.end_pos[0] - statement.start_pos[0]
        node.children[0] = Keyword("pass", statement.start_pos, prefix=statement.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[Any, ...]:
        return (Example("x.y = 1\n", "pass\n"), Example("raise\n", "pass\n"))


cosmic_ray.plugins.OPERATOR_PROVIDERS["ours"] = {"LeaveOut": LeaveOut}


class Mutant(NamedTuple):
    """The package with one change."""

    path: Path
    #: The class and function; with a number, if the same change can be made there more than once.
    where: str
    #: The lines of the original that the change is in.
    lines: range
    #: The lines that go, with ``- `` before them, and those that come, with ``+ ``.
    change: tuple[str, ...]
    code: str


def mutants_of(path: Path) -> list[Mutant]:
    """All changes of a module that make it another program; those that make it none at all are left out."""
    return list(_mutants_of(path))


def _mutants_of(path: Path) -> Iterator[Mutant]:
    code = path.read_text()
    tree, nodes = ast.parse(code), list(ast_nodes(get_ast(code)))
    seen = {_program(tree)}
    same: Counter[object] = Counter()
    for name in filter(_OPERATORS.fullmatch, cosmic_ray.plugins.operator_names()):
        operator = cosmic_ray.plugins.get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, ((first, _), (last, _)) in enumerate(places):
            mutated = mutate_code(code, operator, occurrence)
            try:
                program = _program(ast.parse(mutated))
            except SyntaxError:
                continue
            if program not in seen:
                seen.add(program)
                where, change = _where(tree, first), _change(code, mutated)
                same[where, change] += 1
                if same[where, change] > 1:
                    where += f", {same[where, change]}"
                yield Mutant(path, where, range(first, last + 1), change, mutated)


def _change(old: str, new: str) -> tuple[str, ...]:
    """What differs, without regard to indentation."""
    before, after = old.splitlines(), new.splitlines()
    start = next(number for number, (one, other) in enumerate(zip(before, after, strict=False)) if one != other)
    while before[-1] == after[-1] and min(len(before), len(after)) > start + 1:
        del before[-1], after[-1]
    return tuple(
        f"{sign} {' '.join(line.split())}"
        for sign, lines in (("-", before), ("+", after))
        for line in lines[start:]
        if line.strip()
    )


def _where(tree: ast.Module, line: int) -> str:
    names = []
    for node in ast.walk(tree):  # the outer ones first
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and first_line(node) <= line <= (node.end_lineno or 0):
            names.append(node.name)
    return ".".join(names) or "the module"


def first_line(node: ast.ClassDef | ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def changed_functions(original: str, mutant: Mutant) -> dict[CodeType, CodeType]:
    """The functions that the mutant changes, and to what; nothing where the module or a class itself is another one."""
    old, new = (compile(code, str(mutant.path), "exec", dont_inherit=True) for code in (original, mutant.code))
    return _changed_functions(old, new) or {}


def _changed_functions(old: CodeType, new: CodeType) -> dict[CodeType, CodeType] | None:
    changed = {}
    if old.co_flags & CO_OPTIMIZED:
        if old != new:
            changed[old] = new
    elif _without_inner(old) != _without_inner(new):
        return None
    inner = [[it for it in code.co_consts if isinstance(it, CodeType)] for code in (old, new)]
    for one, other in zip(*inner, strict=False):
        found = _changed_functions(one, other)
        if found is None:
            return None
        changed |= found
    return changed


def _without_inner(code: CodeType) -> CodeType:
    # Nor the places in the file, of which one is the end of the inner function.
    return code.replace(co_consts=tuple(it for it in code.co_consts if not isinstance(it, CodeType)), co_linetable=b"")


# Annotations are never evaluated, and what is for type checkers is never run: no test can tell a change in them.


class _WithoutTypes(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        node.annotation = ast.Constant(None)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        names = {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)}
        return ast.Pass() if "TYPE_CHECKING" in names else node


def _program(tree: ast.Module) -> object:
    """What the interpreter makes of it: the same for what is merely written in another way."""
    code = compile(ast.fix_missing_locations(_WithoutTypes().visit(tree)), "", "exec", dont_inherit=True)
    return _instructions(code)


def _instructions(code: CodeType) -> object:
    constants = tuple(_instructions(it) if isinstance(it, CodeType) else repr(it) for it in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, code.co_flags, constants
