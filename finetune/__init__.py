"""Commands by the names of sd-scripts, for its users."""
