"""The server: who may ask for a page, how answers are built, and how pages are found."""
