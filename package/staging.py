"""Lay out the files of a distribution: the checkout's for the sdist, below `reelsmith` for the wheel.

In the wheel, imports of our modules and commands in strings are changed to that name too.
"""

import ast
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from modules.installation import CHECKOUT_SCRIPTS, SCRIPT_ROOMS
from modules.option_tables import TABLES
from modules.script_words import console_words, has_own_command
from modules.version import VERSION
from package.reelsmith.commands import find_commands

PACKAGE = "reelsmith"
FRONT_NAME = "package.reelsmith"  # files at the top level of the package
MAIN_BLOCK = re.compile(r'\nif __name__ == "__main__":\n((?:    .*\n)+)\Z')
RUN = '''
def run() -> None:
    """Run this script as a program, with the options of the command line."""
{body}

if __name__ == "__main__":
    import sys

    sys.argv[0] = "{script}"
    run()
'''


def package_name(name: str) -> str:
    """Return the import name, in the installed package, of a top-level package or module of the checkout."""
    return PACKAGE + name.removeprefix(FRONT_NAME) if name.startswith(FRONT_NAME) else f"{PACKAGE}.{name}"


def rewrite_imports(source: str, own_names: Collection[str]) -> str:
    """Rewrite all absolute imports of this project's modules as imports from `reelsmith`, line by line.

    `own_names` are the top-level modules of the checkout.

    Raises:
        ValueError: If the source contains, for example, `import modules.errors` and uses the name `modules`.
            In the package, this import would bind `reelsmith` instead.
    """
    tree = ast.parse(source)
    used_names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    lines = source.encode().splitlines(keepends=True)  # the offsets of `ast` count bytes
    # from the end of the text, so that earlier offsets stay valid
    for line, offset, name, is_bound in sorted(_find_imports(tree, lines, own_names), reverse=True):
        top_module = name.partition(".")[0]
        if is_bound and top_module in used_names:
            raise ValueError(
                f"line {line}: `import {name}` binds {top_module}, which is used; import from it"
            )
        text = lines[line - 1]
        end = offset + len(name.encode())
        assert text[offset:end] == name.encode(), f"line {line}: {name} is not where `ast` says"
        lines[line - 1] = text[:offset] + package_name(name).encode() + text[end:]
    return b"".join(lines).decode()


class OwnImport(NamedTuple):
    """An import of one of this project's modules."""

    line: int
    offset: int  # position of the name in its line, in bytes
    name: str
    is_bound: bool  # whether it binds the top-level name


def _find_imports(tree: ast.AST, lines: list[bytes], own_names: Collection[str]) -> Iterator[OwnImport]:
    """Yield the position and name of each import of this project's modules in a source file."""
    # `tree` and `lines` are the parsed source and its lines, `own_names` are the project's top-level modules.
    # Relative imports are skipped, because they work in the package without a change.
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in own_names:
                    yield OwnImport(alias.lineno, alias.col_offset, alias.name, alias.asname is None)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            name = node.module or ""
            if name.partition(".")[0] in own_names:
                word = re.match(rb"from\s+", lines[node.lineno - 1][node.col_offset :])
                assert word is not None, f"line {node.lineno}: no name follows `from`"
                yield OwnImport(node.lineno, node.col_offset + word.end(), name, is_bound=False)


def rename_scripts(source: str, scripts: Collection[str]) -> str:
    """Replace commands in a source file's strings with the installed console commands.

    `python wan_cache_latents.py` becomes `wan_cache_latents`, and `python tools/compare.py` becomes
    `reelsmith compare`. A launcher's command names the module: `accelerate launch ... -m
    reelsmith.wan_train_network`.
    """
    names = "|".join(sorted(scripts))
    rooms = "|".join(SCRIPT_ROOMS)
    in_launcher = rf'(accelerate launch [^"\n]*?)\b({names})\.py\b'
    word_start = r"(?:\b|(?<=\\n))"  # also at the start of a line, which tables write as \\n
    in_command = (
        rf"(?P<opening>[\"'])?(?P<python>{word_start}python )?{word_start}(?:(?:{rooms})/)?"
        rf"(?P<script>{names})\.py\b(?P<closing>[\"'])?"
    )
    # launchers first: the pattern for commands would match their scripts, too
    source = re.sub(in_launcher, rf"\1-m {PACKAGE}.\2", source)
    source = re.sub(r"\bpython reelsmith\.py\b", PACKAGE, source)
    return re.sub(in_command, _rename_command, source)


def _rename_command(match: re.Match[str]) -> str:
    """Return the console command that replaces a script's path in a string literal."""
    # A literal that is only a script's path stays: code finds the script by this path, and `command_words`
    # translates it when the command is shown. A script with a console command of its own loses its suffix
    # even there, because either form names that script.
    opening, closing = match["opening"] or "", match["closing"] or ""
    script = match["script"]
    is_literal = opening and opening == closing and not match["python"]
    if not is_literal:
        return f"{opening}{' '.join(console_words(script))}{closing}"
    return f"{opening}{script}{closing}" if has_own_command(script) else match[0]


def add_entry_point(source: str, script: str) -> str:
    """Move a script's `__main__` block into a new function `run`, which its console command calls.

    Raises:
        ValueError: If the script does not end with a `__main__` block.
    """
    block = MAIN_BLOCK.search(source)
    if block is None:
        raise ValueError(f"{script}.py does not end with: if __name__ == ...")
    return source[: block.start()] + RUN.format(body=block[1], script=" ".join(console_words(script)))


# folders of Python that are for work on Reelsmith, or for its quickstart
NOT_INSTALLED = {"benchmarks", "package", "pocket", "tests"}
FRONT_FOLDER = Path("package", "reelsmith")
# read by setuptools, or carried along
COPIED_DOCUMENTS = ("pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE*", "NOTICE*")
IGNORED_FILES = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def find_rooms(root: Path) -> list[str]:
    """Return the sorted names of the top-level folders that are Python packages and get installed."""
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    return sorted(folders - NOT_INSTALLED)


def find_own_names(root: Path) -> set[str]:
    """Return the top-level import names of this project: its packages, root scripts and `package`."""
    return {*find_rooms(root), *(path.stem for path in root.glob("*.py")), "package"} - {PACKAGE}


def lay_out_sources(root: Path, folder: Path) -> None:
    """Copy the files from which a wheel is built into `folder`: sources and documents, unchanged."""
    _copy_documents(root, folder)
    for name in [*find_rooms(root), "package", "docs"]:
        shutil.copytree(root / name, folder / name, ignore=IGNORED_FILES)
    for path in _top_modules(root):
        shutil.copy(path, folder / path.name)
    (folder / "MANIFEST.in").write_text("global-include *\n", encoding="utf-8")


def lay_out_package(root: Path, folder: Path) -> None:
    """Copy the files to install into `folder`/reelsmith, with their imports and strings rewritten.

    Raises ValueError, which names the file, if a file cannot be rewritten.
    """
    _copy_documents(root, folder)
    package = folder / "reelsmith"
    shutil.copytree(root / FRONT_FOLDER, package, ignore=IGNORED_FILES)
    for name in find_rooms(root):
        shutil.copytree(root / name, package / name, ignore=IGNORED_FILES)
    for path in _top_modules(root):
        shutil.copy(path, package / path.name)
    shutil.copy(root / "requirements.txt", package / "requirements.txt")
    version = f'"""The version of Reelsmith."""\n\nVERSION = "{VERSION}"\n'
    (package / "modules" / "version.py").write_text(version, encoding="utf-8")
    # Rewrite the imports and strings of all modules in the package
    commands = find_commands(root)
    own_names = find_own_names(root)
    scripts = {command.script for command in commands}
    entry_scripts = {package / command.path.relative_to(root) for command in commands}
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        try:
            text = rename_scripts(rewrite_imports(text, own_names), scripts)
            if path in entry_scripts:
                text = add_entry_point(text, path.stem)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{path.name}: {error}") from error
        path.write_text(text, encoding="utf-8")
    # strings of modules are the keys of translations, so both are renamed in the same manner
    tables = (package / "modules" / TABLES.name).rglob("*.json")
    for path in (*tables, *(package / "browser").rglob("*.json")):
        path.write_text(rename_scripts(path.read_text(encoding="utf-8"), scripts), encoding="utf-8")


def _copy_documents(root: Path, folder: Path) -> None:
    for pattern in COPIED_DOCUMENTS:
        for path in root.glob(pattern):
            shutil.copy(path, folder / path.name)
    entries = [f"{name} = {target}" for name, target in sorted(entry_points(root).items())]
    text = "\n".join(("[console_scripts]", *entries, ""))
    (folder / "entry_points.txt").write_text(text, encoding="utf-8")


def entry_points(root: Path) -> dict[str, str]:
    """Return the console commands: `reelsmith`, and one for each script of a model."""
    targets = {"reelsmith": "reelsmith.commands:main"}
    for command in find_commands(root):
        if has_own_command(command.script):
            targets[command.script] = f"{package_name(command.module)}:run"
    return targets


def _top_modules(root: Path) -> list[Path]:
    return [path for path in sorted(root.glob("*.py")) if path.stem not in CHECKOUT_SCRIPTS]
