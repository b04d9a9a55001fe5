"""Convert a LoRA file between dialects. All options: python convert_lora.py --help"""

import modules.interpreter  # noqa: F401
from contract.families import plain_script
from networks.tool_options import ConvertOptions

main = plain_script(__doc__, "networks.convert.convert", ConvertOptions)


if __name__ == "__main__":
    main.run()
