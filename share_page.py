"""Copy a page that others may see: without folders, commands and links to your files.

All options: python share_page.py --help
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.options import read_options
from modules.pages.options import ShareOptions, add_share_arguments
from modules.parser import Parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_share_arguments(parser)
    options = read_options(ShareOptions, parser.parse_args(argv))

    from modules.pages.sharing import share_page

    share_page(options.page, options.copy)


if __name__ == "__main__":
    command_line(main)
