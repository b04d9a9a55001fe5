"""Extract a LoRA from a fine-tuned Qwen-Image transformer."""

import modules.interpreter  # noqa: F401
from networks.extracting import NON_DIT_OPTIONS, BlockExtractOptions, ExtractOptions
from protocols.families import plain_script

main = plain_script(
    __doc__, "networks.extracting.extract_qwen", ExtractOptions, BlockExtractOptions, without=NON_DIT_OPTIONS
)


if __name__ == "__main__":
    main.run()
