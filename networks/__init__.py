"""LoRAs and similar adapters: train, read, convert, merge and extract them."""
