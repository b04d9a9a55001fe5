"""Average the saved LoRA files of a run (post-hoc EMA). All options: python lora_post_hoc_ema.py --help"""

import modules.interpreter  # noqa: F401
from networks.scripts import lora_tool
from networks.tool_options import AveragingOptions

main = lora_tool(__doc__, "networks.averaging.average_files", AveragingOptions)


if __name__ == "__main__":
    main.run()
