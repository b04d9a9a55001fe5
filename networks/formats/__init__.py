"""What other programs do with network kinds: a table each, with a row for each kind they treat specially."""
