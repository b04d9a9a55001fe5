"""Prepared requests of no family, for code that is tested without one."""

from contract.data import SamplingDefaults
from contract.requests import Prepared, Request, settle, size_of

USUAL = SamplingDefaults(3, 16.0, 5.0, 6.0, 3.0, "unipc", 32, 32, 5)


def prepare(request: Request, usual_negative: str | None = "bad") -> Prepared:
    """Fill what is not said with `USUAL`."""
    flow_shift = 3.0 if request.flow_shift is None else request.flow_shift
    return settle(request, USUAL, size_of(request, USUAL), flow_shift, usual_negative)
