"""The page about a dataset, and the same numbers as JSON."""
