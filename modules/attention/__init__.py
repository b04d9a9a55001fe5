"""One function of attention over a table of back ends."""
