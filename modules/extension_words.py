"""Name the extensions that are on in a command of this program, and find those that one names."""

from collections.abc import Sequence
from pathlib import Path

from modules.extensions import list_named
from modules.installation import (
    CHECKOUT_SCRIPTS,
    EXTENSIONS_FLAG,
    FRONT_SCRIPT,
    MAX_BEFORE,
    find_script,
)
from modules.script_words import name_words


def add_extensions(argv: Sequence[str]) -> list[str]:
    """Return a command of this program with the extensions that are on; other commands are unchanged.

    Only the front script takes `--extensions`, so `python wan_train_network.py ...` becomes
    `python reelsmith.py --extensions NAMES train wan ...`.
    """
    names = ",".join(list_named())
    if not names or argv[:1] not in (["python"], ["accelerate"], ["reelsmith"]):
        return [*argv]
    for index, word in enumerate(argv[:MAX_BEFORE]):
        before, after = argv[:index], argv[index + 1 :]
        if Path(word).name == FRONT_SCRIPT or argv[: index + 1] == ["reelsmith"]:
            named = [] if after[:1] == [EXTENSIONS_FLAG] else [EXTENSIONS_FLAG, names]
            return [*before, word, *named, *after]
        script = find_script(word)
        if script is not None and script.stem not in CHECKOUT_SCRIPTS:
            return [*before, FRONT_SCRIPT, EXTENSIONS_FLAG, names, *name_words(script.stem).split(), *after]
    return [*argv]


def split_extensions(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the extensions that a command of the front script names, and the command without them.

    The first is "" for a command that names none.
    """
    if EXTENSIONS_FLAG not in argv[1:MAX_BEFORE]:
        return "", [*argv]
    index = argv.index(EXTENSIONS_FLAG, 1)
    follows_front_script = Path(argv[index - 1]).name in ("reelsmith", FRONT_SCRIPT)
    if not follows_front_script or index + 1 >= len(argv):
        return "", [*argv]
    return argv[index + 1], [*argv[:index], *argv[index + 2 :]]
