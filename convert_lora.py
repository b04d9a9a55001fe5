"""Convert a LoRA file between dialects. All options: python convert_lora.py --help"""

import modules.interpreter  # noqa: F401
from networks.scripts import lora_tool
from networks.tool_options import ConvertOptions

main = lora_tool(__doc__, "networks.convert.convert", ConvertOptions)


if __name__ == "__main__":
    main.run()
