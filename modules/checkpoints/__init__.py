"""Open, recognise, load and write files of weights."""
