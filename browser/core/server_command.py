"""The command that starts a server like this one, with other folders or for other devices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from browser.core.options import NETWORK_PORT
from browser.core.server_state import Site
from browser.core.tokens import choose_account_port
from modules.errors import UserError
from modules.option_values import option_argv
from project.options import MODELS


def find_worker(site: Site) -> str:
    """Return who runs the queue: "here", "elsewhere" or "" (nobody), or why that is not known."""
    try:
        return site.queue.worker
    except UserError as error:
        return str(error)


def make_server_argv(site: Site, extra_folders: Sequence[Path] = ()) -> list[str]:
    """Return the command that starts this page with these settings, and with additional folders."""
    settings = site.settings
    port = None if settings.port in (None, choose_account_port()) else settings.port
    return _make_argv(
        site, host=settings.host, port=port, token=_find_token_file(site), extra_folders=extra_folders
    )


def make_phone_argv(site: Site) -> list[str]:
    """Return the command that starts this page so that other devices, such as a phone, can open it."""
    token = _find_token_file(site) or str(Path("token.txt").absolute())
    return _make_argv(site, host="0.0.0.0", port=NETWORK_PORT, token=token)


def _find_token_file(site: Site) -> str | None:
    """Return the file of --token; None without this option."""
    token = site.settings.token
    is_given = site.settings.is_token_given and token.path is not None
    return str(token.path.absolute()) if is_given and token.path is not None else None


def _make_argv(
    site: Site, host: str, port: int | None, token: str | None, extra_folders: Sequence[Path] = ()
) -> list[str]:
    """Return the command that starts a server like this one, with the given address and token."""
    # options whose value is None are omitted
    options: dict[str, Any] = {
        "--models": None if site.models == MODELS else str(site.models.absolute()),
        "--host": None if host == "127.0.0.1" else host,
        "--port": port,
        "--public_url": site.settings.public_origin,
        "--token": token,
        # a server without a token starts another one without a token
        "--no_token": (token is None and site.settings.token.secret is None) or None,
        "--work": find_worker(site) == "here" or None,
        "--read_only": site.read_only or None,
    }
    folders = [str(root) for root in (*site.runs.roots, *extra_folders)]
    return ["python", "tools/run_browser.py", *folders, *option_argv(options)]
