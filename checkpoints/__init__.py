"""Open, recognize, load and write weight files."""
