"""Convert a LoRA file between dialects."""

import modules.interpreter  # noqa: F401
from networks.convert import ConvertOptions, convert
from protocols.families import plain_script

main = plain_script(__doc__, convert, ConvertOptions)


if __name__ == "__main__":
    main.run()
