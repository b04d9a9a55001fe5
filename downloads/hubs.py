"""Ask a site for the address, size and checksum of a file before it is downloaded."""

import logging
import os
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

import requests
from huggingface_hub import constants, errors, get_hf_file_metadata, get_token, hf_hub_url

from downloads.catalogue import ReleasedFile
from modules.downloading import DownloadRejected, RetryableError, ask_http
from modules.errors import DownloadError

logger = logging.getLogger(__name__)

GITHUB = "https://github.com"
TIMEOUTS = (10.0, 60.0)  # seconds: to connect; between two pieces of data
SHA256 = re.compile("[0-9a-f]{64}")
SHA1 = re.compile("[0-9a-f]{40}")
# the owners' names on ModelScope, where they differ; other repositories are tried under their own name
ON_MODELSCOPE = {
    "tencent/HunyuanVideo": "AI-ModelScope/HunyuanVideo",
    "openai/clip-vit-large-patch14": "AI-ModelScope/clip-vit-large-patch14",
}


@dataclass(frozen=True)
class RemoteFile:
    """A file on a download site. Checksums are hexadecimal; None if the site does not state one."""

    url: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None  # for small files, which git itself stores
    headers: Mapping[str, str]  # for the request: the user's token
    page: str  # for people


def find_file(file: ReleasedFile, source: str) -> RemoteFile:
    """Look up a file on one of the `SOURCES`; files that ModelScope lacks are looked up on the hub.

    Raises:
        DownloadError: If the site cannot be reached, does not have the file, or refuses to serve it.
    """
    if file.release is not None:
        return find_on_github(file)
    if source == "modelscope":
        remote = find_on_modelscope(file)
        if remote is not None:
            return remote
        logger.info("%s: not on ModelScope, so it comes from the Hugging Face hub", file.name)
    return find_on_hub(file)


def find_on_hub(file: ReleasedFile, endpoint: str | None = None) -> RemoteFile:
    """Look up a file on the Hugging Face hub or a mirror, by default the one in HF_ENDPOINT.

    Raises:
        DownloadError: If the hub cannot be reached, does not have the file, or refuses to serve it.
    """
    site = (endpoint or constants.ENDPOINT).rstrip("/")
    page = f"{site}/{file.repository}"
    token = get_token()
    try:
        url = hf_hub_url(file.repository, file.file, endpoint=site)
        metadata = get_hf_file_metadata(url, token=token or False)
    except Exception as error:  # one class for each reason, and others in each version of the library
        raise _explain_hub_error(error, file.file, page, has_token=token is not None) from error
    if metadata.size is None:
        raise DownloadError(f"{page} does not say how large {file.file} is: this is not a mirror of the hub.")
    # the address of this commit, so that a repository change during the download cannot mix two versions
    url = hf_hub_url(file.repository, file.file, revision=metadata.commit_hash or "main", endpoint=site)
    checksum = (metadata.etag or "").strip('"').lower()
    return RemoteFile(
        url=url,
        size_bytes=metadata.size,
        sha256=checksum if re.fullmatch(SHA256, checksum) else None,
        git_sha1=checksum if re.fullmatch(SHA1, checksum) else None,
        headers={"authorization": f"Bearer {token}"} if token else {},
        page=page,
    )


def _explain_hub_error(error: Exception, file: str, page: str, has_token: bool) -> DownloadError:
    """Return the error that explains an exception of huggingface_hub."""
    if isinstance(error, errors.OfflineModeIsEnabled):
        return DownloadError(f"{page}: HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it.")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return explain_status(status, file, page, has_token)
    return unreachable(page, error)


def explain_status(status: int, file: str, page: str, has_token: bool) -> DownloadError:
    """Return the error that explains an HTTP error status of a download site, such as 404."""
    if status in (401, 403):
        hint = "Log in with `hf auth login`, or set HF_TOKEN."
        if has_token:
            hint = "The token that is stored on this machine or in HF_TOKEN may lack the rights."
        return DownloadError(
            f"{page}: access to {file} is refused ({status}). Accept the license on that page with your "
            f"account.\n  {hint}"
        )
    if status == 404:
        return DownloadError(f"{page} has no file {file} (404). The page shows what it has now.")
    return DownloadError(f"{page}: the site answers {status} for {file}. Try again later.")


def unreachable(page: str, error: Exception) -> DownloadError:
    """Return the error for a site that does not respond."""
    lines = str(error).strip().splitlines()
    reason = (lines[0] if lines else type(error).__name__)[:120]
    return DownloadError(
        f"{page} cannot be reached ({reason}).\n  Check the connection; HF_ENDPOINT can name a mirror, and "
        "--source modelscope is another site."
    )


def find_on_github(file: ReleasedFile, endpoint: str | None = None) -> RemoteFile:
    """Look up a file of a release on GitHub, which has no checksums.

    `endpoint` is a mirror, by default the one in GITHUB_ENDPOINT.

    Raises:
        DownloadError: If the site cannot be reached or does not have the file.
    """
    site = (endpoint or os.environ.get("GITHUB_ENDPOINT") or GITHUB).rstrip("/")
    page = f"{site}/{file.repository}/releases/tag/{file.release}"
    url = f"{site}/{file.repository}/releases/download/{file.release}/{urllib.parse.quote(file.file)}"
    if constants.HF_HUB_OFFLINE:
        raise DownloadError(f"{page}: HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it.")
    try:
        # no HEAD: addresses that it redirects to may be signed for GET only
        with ask_http(url, 0, None) as answer:
            size = answer.size_bytes
    except DownloadRejected as refused:
        if refused.status == 404:
            raise explain_status(404, file.file, page, has_token=False) from None
        raise DownloadError(f"{page}: {refused}, for {file.file}. Try again later.") from None
    except RetryableError as error:
        raise DownloadError(
            f"{page} cannot be reached ({error}).\n  Check the connection, or fetch {file.file} from that "
            "page in a browser."
        ) from None
    if size is None:
        raise DownloadError(f"{page} does not say how large {file.file} is. Try again later.")
    return RemoteFile(url=url, size_bytes=size, sha256=None, git_sha1=None, headers={}, page=page)


def find_on_modelscope(file: ReleasedFile, endpoint: str | None = None) -> RemoteFile | None:
    """Look up a file on ModelScope through its HTTP API, by default at MODELSCOPE_DOMAIN.

    Returns None if the site does not have the file. Source: the paths of modelscope/hub/file_download.py in
    the package modelscope.

    Raises:
        DownloadError: If the site cannot be reached.
    """
    site = endpoint or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    site = (site if "://" in site else f"https://{site}").rstrip("/")
    # some owners have a different name on ModelScope
    repository = ON_MODELSCOPE.get(file.repository) or re.sub("^alibaba-pai/", "PAI/", file.repository)
    page = f"{site}/models/{repository}"
    address = f"{site}/api/v1/models/{repository}/repo"
    try:
        entry = _find_modelscope_entry(file, address, page)
        if entry is None:
            return None
        size = int(entry["Size"])
        checksum = str(entry.get("Sha256") or "").lower()
    except requests.JSONDecodeError as error:
        raise DownloadError(f"{page}: the answer is not a list of files. Try again later.") from error
    except requests.RequestException as error:
        raise unreachable(page, error) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DownloadError(f"{page}: the list of files has an unknown format.") from error
    query = urllib.parse.urlencode({"Revision": "master", "FilePath": file.file})
    return RemoteFile(
        url=f"{address}?{query}",
        size_bytes=size,
        sha256=checksum if re.fullmatch(SHA256, checksum) else None,
        git_sha1=None,
        headers={},
        page=page,
    )


def _find_modelscope_entry(file: ReleasedFile, address: str, page: str) -> Mapping[str, str | int] | None:
    """Return the entry of a file in ModelScope's list of a repository; None if the site does not have it."""
    # `address` is the address of the repository. `page` is named in messages.
    query = {"Revision": "master", "Recursive": "true"}
    answer = requests.get(f"{address}/files", query, timeout=TIMEOUTS)
    if answer.status_code == 404:
        return None
    if not answer.ok:
        raise explain_status(answer.status_code, file.file, page, has_token=False)
    for entry in answer.json()["Data"]["Files"]:
        if entry["Path"] == file.file:
            return entry
    return None
