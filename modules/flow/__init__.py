"""Noise schedules and the solvers that follow them."""
