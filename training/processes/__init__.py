"""Processes and their precision."""
