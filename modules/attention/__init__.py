"""Attention: one function over a table of back ends."""
