"""Copy a page that others may see: without folders, commands and links to your files.

All options: python share_page.py --help
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.pages.options import ShareOptions
from modules.parser import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, ShareOptions)

    from modules.pages.page import share_page

    share_page(options.page, options.copy)


if __name__ == "__main__":
    command_line(main)
