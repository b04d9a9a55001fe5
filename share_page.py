"""Copy a page that others may see: without folders, commands and links to your files.

All options: python share_page.py --help
"""

import modules.interpreter  # noqa: F401
from modules.families import plain_script
from modules.pages.options import ShareOptions

main = plain_script(
    __doc__,
    "modules.pages.page.share_page",
    ShareOptions,
    prepare=lambda options: (options.page, options.copy),
)


if __name__ == "__main__":
    main.run()
