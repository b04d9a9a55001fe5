"""Prepared requests of no family, for code that is tested without one."""

from protocols.data import SamplingDefaults
from protocols.requests import Prepared, Request, get_size, resolve_request

DEFAULT = SamplingDefaults(3, 16.0, 5.0, 6.0, 3.0, "unipc", 32, 32, 5)


def prepare(request: Request, default_negative: str | None = "bad") -> Prepared:
    """Fill what is not said with `DEFAULT`."""
    flow_shift = 3.0 if request.flow_shift is None else request.flow_shift
    return resolve_request(request, DEFAULT, get_size(request, DEFAULT), flow_shift, default_negative)
