"""Divide and round integers upwards."""


def ceil_div(number: int, divisor: int) -> int:
    """Return number / divisor, rounded up to an integer."""
    return -(-number // divisor)


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of `step` that is not below the number."""
    return ceil_div(number, step) * step
