"""The image guides' form of a dataset: its configuration, or folders alone, as tables."""
