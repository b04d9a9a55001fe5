"""Long names of options in prompt lines and sample lines: --steps next to --s, --cfg next to --l.

Standard library only.
"""

from collections.abc import Callable, Collection

from modules.command import did_you_mean

# the sides of --video_size, which have keys of their own in a line
SIDES = {"width": "video_size_width", "height": "video_size_height"}
# names that are suggested in addition to the options' own
DEFAULT_NAMES = (
    "width", "height", "frames", "size", "seed", "steps", "cfg", "scale", "shift", "negative", "solver",
    "image", "end_image", "control", "reference",
)  # fmt: skip


def find_option_key(word: str, keys: Collection[str]) -> str | None:
    """Return the key of the option with a long name, in any spelling; None if there is no such option.

    Args:
        word: The long name.
        keys: Keys of all options: their names on the command line, with keys for the height and the width of
            --video_size.
    """
    name = word.lower().replace("-", "_")
    name = SIDES.get(name, name)  # width and height are sides of --video_size
    if name in keys:
        return name
    from modules.mistyped import find_our_option  # only names of other programs need it

    return find_our_option(name, keys) or None


def known_names(letters: Collection[str], keys: Collection[str], find: Callable[[str], object]) -> list[str]:
    """Return all names that can start an option of a prompt line.

    Args:
        letters: One-letter names of the options.
        keys: Long names of the options.
        find: Returns an option by its name, or None.
    """
    names = dict.fromkeys((*letters, *keys, *DEFAULT_NAMES))
    return [name for name in names if find(name) is not None]


def suggest(word: str, letters: Collection[str], names: Collection[str]) -> str:
    """Return advice about an unknown option of a prompt line: the most similar name, or all letters.

    Args:
        word: The unknown option.
        letters: One-letter options that the line accepts.
        names: All option names, from `known_names`.
    """
    near = did_you_mean(word.lower().replace("-", "_"), names).strip()
    return near.replace("mean ", "mean --") or f"Use {' '.join(f'--{character}' for character in letters)}"
