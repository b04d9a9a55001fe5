"""How a loaded network is run: compiled, block by block, within the available memory."""
