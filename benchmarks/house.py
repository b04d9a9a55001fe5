"""Print how much a reader of the product must keep in mind, and what runs on the main paths through it.

    python benchmarks/house.py               of all rooms
    python benchmarks/house.py --room wan    of one
    python benchmarks/house.py --worst 30    and the functions that demand most of a reader

An indicator, not a goal: if a figure and a reading disagree, the reading counts. Without --room the paths are
printed too, for which the commands of the pocket model run (benchmarks/way.py).
"""

import argparse
import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_PRODUCT = {"tests", "pocket", "benchmarks", "docs"}
SCRIPTS = "scripts"  # the room of the files at the root
LONG = 20  # lines from which on a function can be dense
DENSE = 6.0  # expressions a line
MAX_EXPRESSIONS, MAX_LOCALS, MAX_PARAMETERS = 300, 20, 12
MANY_ARGUMENTS = 5  # positional ones, from which on keywords are clearer
# local names and parameters that say nothing of what they hold
VAGUE = {
    *("told", "given", "one", "own", "found", "heard", "said", "there", "others", "more", "beside", "asked"),
    *("seen", "known", "wanted", "kept", "held", "made", "taken", "turned", "whole", "rest", "each", "other"),
    "same",
}
SPACING = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class FunctionFigures:
    """What a reader of one function keeps in mind, including functions inside it."""

    place: str  # file:line name
    lines: int
    expressions: int
    local_names: int
    parameters: int

    @property
    def is_dense(self) -> bool:
        """Whether it is long and has too many expressions per line."""
        return self.lines >= LONG and self.expressions / self.lines > DENSE

    @property
    def is_crowded(self) -> bool:
        """Whether it exceeds a limit of tests/test_size.py."""
        return (
            self.expressions > MAX_EXPRESSIONS
            or self.local_names > MAX_LOCALS
            or self.parameters > MAX_PARAMETERS
        )

    @property
    def weight(self) -> float:
        """Sum of its expressions, names and density, each relative to its limit."""
        density = self.expressions / self.lines / DENSE if self.lines >= LONG else 0.0
        return self.expressions / MAX_EXPRESSIONS + self.local_names / MAX_LOCALS + density


@dataclass
class RoomFigures:
    """Totals of many files."""

    files: int = 0
    lines: int = 0
    tokens: int = 0
    statements: int = 0
    vague_names: int = 0
    splats: int = 0
    positional_calls: int = 0
    text_imports: int = 0
    functions: list[FunctionFigures] = field(default_factory=list)

    def __str__(self) -> str:
        long = [one for one in self.functions if one.lines >= LONG]
        lines = sum(one.lines for one in long)
        per_line = sum(one.expressions for one in long) / max(lines, 1)
        figures = {
            "files": self.files,
            "lines": self.lines,
            "tokens": self.tokens,
            f"functions of {LONG} lines and more": len(long),
            f"of these above {DENSE:.0f} expressions a line": sum(one.is_dense for one in long),
            "expressions a line in them": f"{per_line:.2f}",
            f"above {MAX_EXPRESSIONS} expressions": self._count("expressions", MAX_EXPRESSIONS),
            f"above {MAX_LOCALS} local names": self._count("local_names", MAX_LOCALS),
            f"above {MAX_PARAMETERS} parameters": self._count("parameters", MAX_PARAMETERS),
            "vague names in 1,000 statements": f"{1000 * self.vague_names / max(self.statements, 1):.1f}",
            "splats of what the call itself builds": self.splats,
            f"calls with {MANY_ARGUMENTS} positional arguments and more": self.positional_calls,
            "imports as text": self.text_imports,
        }
        return "\n".join(f"{value:>9}  {name}" for name, value in figures.items())

    def _count(self, name: str, maximum: int) -> int:
        return sum(getattr(one, name) > maximum for one in self.functions)


def product_files(room: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield name and text of each file of the product, or of one room."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
    )
    for name in listed.stdout.splitlines():
        top = name.partition("/")[0] if "/" in name else SCRIPTS
        if top not in NOT_PRODUCT and room in (None, top):
            yield name, (ROOT / name).read_text(encoding="utf-8")


def measure(files: dict[str, str]) -> RoomFigures:
    """Count what the figures of these files consist of. `files` are texts by name."""
    trees = {name: ast.parse(text) for name, text in files.items()}
    own_names = {node.name for tree in trees.values() for node in ast.walk(tree) if _defines(node)}
    figures = RoomFigures(files=len(files))
    for name, tree in trees.items():
        figures.lines += files[name].count("\n")
        figures.tokens += _count_tokens(files[name])
        for node in ast.walk(tree):
            _add_node(figures, node, own_names)
            if isinstance(node, Function):
                figures.functions.append(measure_function(node, name))
    return figures


def measure_function(function: Function, file: str) -> FunctionFigures:
    """Return the figures of a function."""
    nodes = list(ast.walk(function))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    arguments = function.args
    return FunctionFigures(
        place=f"{file}:{function.lineno} {function.name}",
        lines=(function.end_lineno or function.lineno) - function.lineno + 1,
        expressions=sum(isinstance(node, ast.expr) for node in nodes),
        local_names=len(stored),
        parameters=len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs),
    )


def _defines(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def _add_node(figures: RoomFigures, node: ast.AST, own_names: set[str]) -> None:
    figures.statements += isinstance(node, ast.stmt)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        figures.vague_names += node.id in VAGUE
    elif isinstance(node, ast.arg):
        figures.vague_names += node.arg in VAGUE
    elif isinstance(node, ast.Starred) and isinstance(node.ctx, ast.Load):
        figures.splats += isinstance(node.value, (ast.Tuple, ast.List))
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func).rpartition(".")[2]
        figures.positional_calls += len(node.args) >= MANY_ARGUMENTS and called in own_names
        is_text = called == "import_own" and bool(node.args) and isinstance(node.args[0], ast.Constant)
        figures.text_imports += is_text


def _count_tokens(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type not in SPACING for token in tokens)


def main() -> None:
    """Print the figures, and the functions with the largest weight."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--room", help="a folder of the product, or scripts")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="list so many functions too")
    args = parser.parse_args()
    figures = measure(dict(product_files(args.room)))
    print(figures)
    for one in sorted(figures.functions, key=lambda one: -one.weight)[: args.worst]:
        print(f"{one.expressions:5} expressions {one.local_names:3} names {one.lines:3} lines  {one.place}")
    if args.room is None:
        print(flush=True)
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "way.py")], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
