"""Blur what a detector finds, and keep it blurred."""
