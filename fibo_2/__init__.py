"""Fibo 2.0, dev and edit-turbo: read family.py first, then model.py."""
