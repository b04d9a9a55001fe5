"""Addresses such as https:// and s3://: recognise them, and hide their secrets in messages. Standard library
only.

Passwords (`user:password@`) and the query of an address, which may be a signature, stand in no message,
record or name of a file.
"""

import re
from functools import lru_cache
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

_PLAIN = re.compile(r"[a-z0-9+.-]+://[a-z0-9.:-]*(?:/[^?#]*)?")  # nothing to leave out, nor to lower
# two letters at least: C:\data is a path
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(?:://|::)", re.ASCII)
_SECRETS = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]+:/{1,2})(?:[^\s\"'<>/]*@)?([^\s\"'<>?#]*)(\?[^\s\"'<>]*)?(#[^\s\"'<>]*)?",
    re.ASCII,
)
# parts of a query that sign it: they differ each time that an address of the same file is made
_SIGNATURES = re.compile(
    r"x-(amz|goog|oss|cos|tos)-.*|awsaccesskeyid|googleaccessid|ossaccesskeyid|signature|expires|policy"
    r"|key-pair-id|token|access_token|hdnts|hdnea|sig",
    re.IGNORECASE,
)
_AZURE = re.compile(r"s[eiprtv]|sr[ts]|spr|sip|sdd|sk(oid|tid|t|e|s|v)", re.IGNORECASE)  # only beside `sig`


def is_address(text: str) -> bool:
    """Return whether a text is an address, not a path."""
    return _ADDRESS.match(text) is not None


def protocol_of(address: str) -> str:
    """Return `https` of an address, in lower case."""
    found = _ADDRESS.match(address)
    assert found is not None
    return found[1].lower()


def split_address(address: str) -> SplitResult:
    """Take an address apart. One that cannot be (`http://[::1`) is a path alone; asking for it fails."""
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult(protocol_of(address), "", address.partition("://")[2], "", "")


def hide_secrets(text: str) -> str:
    """Return a text with the passwords and queries of its addresses left out; `?...` stands for a query."""
    return _SECRETS.sub(lambda found: f"{found[1]}{found[2]}{'?...' if found[3] else ''}", text)


@lru_cache(maxsize=1024)  # asked for a few times for each of a million addresses
def address_identity(address: str) -> str:
    """Return a file's identity: the address without password, signature and `#...`.

    Not to be shown: its query may hold a secret of a kind that is not known here.
    """
    if _PLAIN.fullmatch(address):
        return address
    parts = split_address(address)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    is_azure = any(name.lower() == "sig" for name, _ in pairs)
    pairs = [
        (name, value)
        for name, value in pairs
        if not (_SIGNATURES.fullmatch(name) or (is_azure and _AZURE.fullmatch(name)))
    ]
    host = parts.netloc.rpartition("@")[2].lower()
    query = f"?{urlencode(pairs)}" if pairs else ""
    return f"{parts.scheme.lower()}://{host}{parts.path}{query}"


def address_name(address: str) -> str:
    """Return the last part of an address's path, `cat 1.png`; "" if it has none."""
    path = address.partition("://")[2].partition("?")[0].partition("#")[0].partition("/")[2]
    return unquote(path.rstrip("/").rpartition("/")[2], errors="replace")


def short_hash(identity: str, digits: int = 12) -> str:
    """Return hexadecimal digits that stand for a text: with 12, a million texts differ (1 in 500 fails)."""
    import hashlib  # here: all options import this file

    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:digits]
