"""The old name of tools/lora_post_hoc_ema.py."""

import modules.interpreter  # noqa: F401
from tools.lora_post_hoc_ema import main

if __name__ == "__main__":
    main.run()
