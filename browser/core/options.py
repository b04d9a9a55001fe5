"""Options of tools/run_browser.py. Standard library only."""

import ipaddress
import re
import urllib.parse
from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option
from modules.paths import explain_missing
from modules.text_files import read_text, real_path
from project.options import MODELS

LOCAL = "localhost"
NETWORK_PORT = 8765  # in the command that lets other machines in
PROJECT_CONFIG = "dataset.toml"  # the file that `new` writes into a folder
READABLE_SUFFIXES = (".toml", "-history.jsonl")  # suffixes of datasets and of runs' histories
MIN_TOKEN_LENGTH = 16  # characters of a token
TOKEN_PATTERN = re.compile(rf"[\w-]{{{MIN_TOKEN_LENGTH},}}", re.ASCII)
MAX_TOKEN_BYTES = 1024
HOW_TO_MAKE_TOKEN = 'This makes one: python -c "import secrets; print(secrets.token_urlsafe())" > {}'


class BrowserOptions(Options, title="browser"):
    """Folders to show, and who may see them."""

    folders: tuple[Path, ...] = option(
        "folders with runs in them, at any depth (default: this one, or ~/Reelsmith if this is the home "
        "folder or that of the program); with --export the folder of one run, or its history",
        default=(Path(),),
        positional=True,
        nargs="*",
        metavar="FOLDER",
    )
    port: int | None = option(
        "port to listen at; 0: any that is free (default: one that your account always has, or any if that "
        "is taken)",
        minimum=0,
        maximum=65535,
    )
    host: str = option(
        "address to listen at. Others than this machine's own let the network in, and need --token: 0.0.0.0 "
        "is every network that this machine is in",
        default="127.0.0.1",
    )
    public_url: str | None = option(
        "address by which others reach the page through a tunnel or a proxy, such as "
        "https://my-page.example.org; without it only addresses of this machine are answered",
        metavar="URL",
        excludes=("export",),
    )
    token: Path | None = option(
        "file with a secret word; who does not have it sees nothing (default: the printed address has a "
        "word that lets one browser in, and then the next one is printed)"
    )
    no_token: bool = option(
        "let everybody who has an account on this machine use the page, and do what you may do",
        excludes=("token", "export"),
    )
    models: Path = option("folder of the models' files, which downloads fill", default=MODELS)
    work: bool = option(
        "run the command lines of the queue one after another: FOLDER/reelsmith-queue/queue.txt, see "
        "docs/browser.md",
        excludes=("read_only", "export"),
    )
    read_only: bool = option("show no buttons and write no file")
    no_open: bool = option(
        "do not open the page in a web browser; it is opened only from a terminal of a machine with a "
        "screen, if the page is for this machine alone"
    )
    export: Path | None = option(
        "write one run as a page that needs no server, and end",
        metavar="FILE",
        place="new file",
        excludes=("host", "port", "token", "read_only"),
    )

    def __post_init__(self) -> None:
        """Raise OptionError if options contradict each other, or admit other machines without a token."""
        for folder in self.folders:
            # the output folder of a described folder does not exist before its first training
            is_described = (folder.absolute().parent / PROJECT_CONFIG).is_file()
            if not folder.exists() and not (is_described and self.export is None):
                raise OptionError(f"{folder}: no such folder.{explain_missing(folder)}")
            if folder.is_file() and not folder.name.endswith(READABLE_SUFFIXES):
                raise OptionError(
                    f"{folder} is a file: pass a folder with runs in it, such as {real_path(folder).parent}, "
                    "a run's ...-history.jsonl, or a dataset's .toml"
                )
        if self.no_token and not self.is_local:
            raise OptionError(f"--host {self.host} lets others in: omit --no_token, and pass --token FILE")
        if self.public_url is not None:
            url = self.public_url
            if self.no_token:
                raise OptionError(f"--public_url {url} lets others in: omit --no_token")
            try:
                parts = urllib.parse.urlsplit(url)
                has_host_and_port_only = bool(parts.hostname) and parts.username is None and parts.port != 0
            except ValueError:
                has_host_and_port_only = False
            if not has_host_and_port_only or parts.scheme not in {"http", "https"}:
                raise OptionError(f"--public_url {url}: pass an address such as https://my-page.example.org")
            if parts.path not in {"", "/"} or parts.query or parts.fragment:
                raise OptionError(
                    f"--public_url {url}: the page needs a host name of its own, as it cannot lie below a "
                    f"path. Pass {parts.scheme}://{parts.netloc}, and let the proxy pass all of its paths on"
                )
        if not (self.is_local or self.token):
            raise OptionError(
                f"--host {self.host} lets others in: pass --token FILE, a text file with a secret word of at "
                f"least {MIN_TOKEN_LENGTH} characters, or omit --host. "
                f"{HOW_TO_MAKE_TOKEN.format('token.txt')}"
            )
        if self.export is not None:
            if self.export.suffix.lower() not in {".html", ".htm"}:
                raise OptionError(f"--export {self.export}: name a file that ends in .html")
            if len(self.folders) != 1:
                raise OptionError(
                    f"--export writes one run: pass its folder, not {len(self.folders)} folders"
                )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == LOCAL:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def public_origin(self) -> str | None:
        """Origin of --public_url as browsers send it, such as https://my-page.example.org."""
        if self.public_url is None:
            return None
        parts = urllib.parse.urlsplit(self.public_url)
        default = {"http": 80, "https": 443}[parts.scheme]
        port = "" if parts.port in (None, default) else f":{parts.port}"
        name = parts.hostname or ""
        return f"{parts.scheme}://{f'[{name}]' if ':' in name else name}{port}"

    def read_token(self) -> str | None:
        """Return the secret token. Raises OptionError if it is short or cannot be read."""
        if self.token is None:
            return None
        try:
            token = read_text(self.token, MAX_TOKEN_BYTES).strip()
        except UnicodeDecodeError:  # "" is rejected below
            token = ""
        except OSError as error:
            raise OptionError(
                f"--token {self.token} cannot be read: {error.strerror or error}. "
                f"{HOW_TO_MAKE_TOKEN.format(self.token)}"
            ) from None
        if not TOKEN_PATTERN.fullmatch(token):
            raise OptionError(
                f"--token {self.token}: the word has to have at least {MIN_TOKEN_LENGTH} letters, digits, - "
                f"and _, without spaces. {HOW_TO_MAKE_TOKEN.format(self.token)}"
            )
        return token
