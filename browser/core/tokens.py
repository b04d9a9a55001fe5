"""The secrets of the page: only who has one of them may use it.

Without --token the page creates a token, because all accounts of a machine can reach its ports. It is stored
for this user alone, for programs. What is printed is another word, which admits one browser.
"""

import hashlib
import ipaddress
import logging
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from browser.core.options import TOKEN_PATTERN, BrowserOptions
from modules.user_files import read_user_file, user_folder, write_user_file

logger = logging.getLogger(__name__)

FILE = "page_token"  # name of a file in the user's settings
TICKET_SECONDS = 120.0  # time that a browser may take to start
CONNECTION_TABLES = Path("/proc/net")  # on Linux: the account that owns each connection
_SHOWS_OWNERS = sys.platform.startswith("linux")
_ESTABLISHED = "01"  # state of a connection that both ends have open
CLOSED_CONNECTION = -1  # stands for the owner of a closed connection; not a valid user id
# marks the end of a token of this version. Older tokens never end with it, and are no longer accepted: they
# were stored in cookies, which browsers sent to the servers at all ports of this machine
TOKEN_SUFFIX = "_"
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def choose_account_port() -> int:
    """Return the port of this account's page, 20000 to 29999: always the same, but not that of others."""
    digest = hashlib.sha256(f"{Path.home()} {getattr(os, 'getuid', str)()}".encode()).digest()
    return 20_000 + int.from_bytes(digest[:4]) % 10_000


@dataclass(frozen=True)
class Connection:
    """Both ends of a connection to a server."""

    client: str
    client_port: int
    server: str
    server_port: int


@dataclass(frozen=True)
class PageToken:
    """The secret token of a server, and the file in which it is stored."""

    secret: str | None  # None: no token is required
    path: Path | None = None  # file of the token; None: not stored


def select_token(options: BrowserOptions) -> PageToken:
    """Return the token from --token, or the user's stored one.

    Raises OptionError if the file of --token cannot be used.
    """
    if options.token is not None:
        secret = options.read_token()
        if os.name != "nt" and stat.S_IMODE(options.token.stat().st_mode) & 0o077:
            warning = "--token %s: other users of this machine can read it. Run: chmod 600 %s"
            logger.warning(warning, options.token, options.token)
        return PageToken(secret, options.token)
    if options.no_token:
        return PageToken(None)
    stored = _read_stored_token()
    if stored is None:
        try:
            write_user_file(FILE, f"{_make_token()}\n")
        except OSError as error:
            logger.info("The token changes at each start, because it cannot be stored: %s", error)
            return PageToken(_make_token())
        stored = _read_stored_token()  # another server may have written it first
    return PageToken(_make_token()) if stored is None else PageToken(stored, user_folder() / FILE)


def _make_token() -> str:
    return f"{secrets.token_urlsafe(32)[:-1]}{TOKEN_SUFFIX}"


def _read_stored_token() -> str | None:
    """Return the user's stored token; None if there is none, or only one from an older version."""
    secret = (read_user_file(FILE) or "").strip()
    return secret if TOKEN_PATTERN.fullmatch(secret) and secret.endswith(TOKEN_SUFFIX) else None


@dataclass
class PrintedWord:
    """The word in the printed address, which admits one browser; then the next word is printed.

    A word that was used is worth nothing, wherever a browser or a program keeps the address.
    """

    show_next: Callable[[str], None]  # prints the address with a new word
    secret: str = field(default_factory=secrets.token_urlsafe)

    def take(self, text: str) -> bool:
        """Return whether `text` is the word; if it is, replace the word and show the new one."""
        if not secrets.compare_digest(text.encode(), self.secret.encode()):
            return False
        self.secret = secrets.token_urlsafe()
        self.show_next(self.secret)
        return True


@dataclass
class Ticket:
    """A secret that opens the page once, for the web browser that this program starts.

    All users of the machine can see the command line of that browser, so it must not contain the token.
    """

    secret: str = field(default_factory=secrets.token_urlsafe)
    end: float = field(default_factory=lambda: time.monotonic() + TICKET_SECONDS)
    is_used: bool = False

    def take(self, text: str, connection: Connection | None) -> bool:
        """Return whether `text` is this ticket's secret and still valid, and invalidate the ticket.

        `connection` is the connection that sent it. If the system shows its owner, it must be this user.
        """
        if self.is_used or time.monotonic() > self.end:
            return False
        if not secrets.compare_digest(text.encode(), self.secret.encode()):
            return False
        self.is_used = True
        return connection is not None and is_own_connection(connection)


def is_own_connection(connection: Connection) -> bool:
    """Return whether this user opened a connection from a port of this machine.

    Also returns True if the system hides who owns a connection, because it hides command lines too, where
    other users could read a ticket.
    """
    return not _SHOWS_OWNERS or find_owner(connection) == os.getuid()


def find_owner(connection: Connection) -> int | None:
    """Return the id of the user who opened a connection on this machine.

    Returns None if the system does not show the owner, or if another machine opened the connection;
    CLOSED_CONNECTION if it is already closed, because the system then reports root as its owner.
    """
    if not _SHOWS_OWNERS:
        return None
    for _ in range(2):  # the list may miss a row while connections open and close
        owner = _look_up_owner(connection)
        if owner is not None:
            return owner
    return None


def _look_up_owner(connection: Connection) -> int | None:
    wanted_endpoints = _list_endpoints(connection)
    for name in ("tcp", "tcp6"):
        try:
            lines = (CONNECTION_TABLES / name).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, remote, state, _, _, _, user, *_ = line.split()
            # both ends: another account may use the same local port for a connection elsewhere
            if (local, remote) in wanted_endpoints:
                return int(user) if state == _ESTABLISHED else CLOSED_CONNECTION
    return None


def _list_endpoints(connection: Connection) -> list[tuple[str, str]]:
    """Return how Linux may list a TCP connection in /proc/net, as pairs of client and server."""
    # Both are written as hexadecimal `ADDRESS:PORT`. An IPv4 connection gives two pairs, because the kernel
    # lists it as IPv4 or as an IPv6 address that contains the IPv4 address.
    try:
        hosts = [ipaddress.ip_address(host) for host in (connection.client, connection.server)]
    except ValueError:  # not an IP address, for example the path of a Unix socket
        return []
    addresses = [getattr(host, "ipv4_mapped", None) or host for host in hosts]
    spellings = [addresses]
    if all(host.version == 4 for host in addresses):
        spellings.append([ipaddress.ip_address(f"::ffff:{host}") for host in addresses])
    endpoints = []
    for client, server in spellings:
        client_text = f"{_hexadecimal(client)}:{connection.client_port:04X}"
        server_text = f"{_hexadecimal(server)}:{connection.server_port:04X}"
        endpoints.append((client_text, server_text))
    return endpoints


def _hexadecimal(host: Address) -> str:
    """Return an IP address in hexadecimal as /proc/net shows it: 32-bit words in native byte order."""
    packed = host.packed
    words = [packed[start : start + 4] for start in range(0, len(packed), 4)]
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
