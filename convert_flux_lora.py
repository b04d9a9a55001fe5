"""Convert a LoRA of FLUX.1 or Chroma: networks/convert_flux_lora.py, as the guides name it."""

import modules.interpreter  # noqa: F401
from networks.convert_flux_lora import main

if __name__ == "__main__":
    main.run()
