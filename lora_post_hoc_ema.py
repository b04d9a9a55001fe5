"""Average the saved LoRA files of a run (post-hoc EMA). All options: python lora_post_hoc_ema.py --help"""

import modules.interpreter  # noqa: F401
from modules.families import plain_script
from networks.tool_options import AveragingOptions

main = plain_script(__doc__, "networks.averaging.average_files", AveragingOptions)


if __name__ == "__main__":
    main.run()
