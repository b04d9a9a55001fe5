"""Convert a LoRA file between dialects."""

import modules.interpreter  # noqa: F401
from contract.families import plain_script
from networks.convert import ConvertOptions, convert

main = plain_script(__doc__, convert, ConvertOptions)


if __name__ == "__main__":
    main.run()
