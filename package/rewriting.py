"""Put a module of the checkout below the name `reelsmith`: its imports, and the commands in its texts."""

import ast
import re
from collections.abc import Collection, Iterator

from modules.installation import SCRIPT_ROOMS

PACKAGE = "reelsmith"
FRONT = "package.reelsmith"  # what stands at the top of the package
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
    """Return the name in the package of a module of ours."""
    return PACKAGE + name.removeprefix(FRONT) if name.startswith(FRONT) else f"{PACKAGE}.{name}"


def rewrite_imports(source: str, ours: Collection[str]) -> str:
    """Let every absolute import of our modules name them below `reelsmith`; lines stay where they are.

    ours: top-level names of the checkout. Raises ValueError for `import modules.errors` if the text uses the
    name `modules` that this binds: in the package it would bind `reelsmith`.
    """
    tree = ast.parse(source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    lines = source.encode().splitlines(keepends=True)  # the offsets of `ast` count bytes
    for line, offset, name, is_bound in sorted(_find_imports(tree, lines, ours), reverse=True):
        top = name.partition(".")[0]
        if is_bound and top in used:
            raise ValueError(f"line {line}: `import {name}` binds {top}, which is used; import from it")
        text, before = lines[line - 1], name.encode()
        assert text[offset:].startswith(before), f"line {line}: {name} is not where `ast` says"
        lines[line - 1] = text[:offset] + package_name(name).encode() + text[offset + len(before) :]
    return b"".join(lines).decode()


def find_own_imports(source: str, ours: Collection[str]) -> list[str]:
    """Return the absolute imports of our modules by their names in the checkout."""
    lines = source.encode().splitlines(keepends=True)
    return [name for _, _, name, _ in _find_imports(ast.parse(source), lines, ours)]


def _find_imports(
    tree: ast.AST, lines: list[bytes], ours: Collection[str]
) -> Iterator[tuple[int, int, str, bool]]:
    """Yield line, byte offset and name of each import of ours, and whether it binds its top-level name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in ours:
                    yield alias.lineno, alias.col_offset, alias.name, alias.asname is None
        elif isinstance(node, ast.ImportFrom) and not node.level:
            name = node.module or ""
            if name.partition(".")[0] in ours:
                word = re.match(rb"from\s+", lines[node.lineno - 1][node.col_offset :])
                assert word is not None, f"line {node.lineno}: no name follows `from`"
                yield node.lineno, node.col_offset + word.end(), name, False


def rename_scripts(source: str, scripts: Collection[str]) -> str:
    """Let texts name the console commands: `wan_cache_latents` for `python wan_cache_latents.py`.

    The launcher gets the module: `accelerate launch ... -m reelsmith.wan_train_network`. Commands in lists of
    words are translated when they are shown, by `command_words`.
    """
    names, rooms = "|".join(sorted(scripts)), "|".join(SCRIPT_ROOMS)
    source = re.sub(rf'(accelerate launch [^"\n]*?)\b({names})\.py\b', rf"\1-m {PACKAGE}.\2", source)
    return re.sub(rf"(?:\bpython )?\b(?:(?:{rooms})/)?({names})\.py\b", r"\1", source)


def add_entry_point(source: str, script: str) -> str:
    """Give a script the function `run` for its console command, with the work of its `__main__`.

    Raises ValueError if the script does not end with that.
    """
    found = MAIN_BLOCK.search(source)
    if found is None:
        raise ValueError(f"{script}.py does not end with: if __name__ == ...")
    return source[: found.start()] + RUN.format(body=found[1], script=script)
