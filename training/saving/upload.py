"""Upload to and download from the Hugging Face hub. A failed upload is logged and never ends a run."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from training.saving.model_card import CARD, may_replace
from training.saving.options import HubOptions

logger = logging.getLogger(__name__)


def hub() -> Any:
    """Return the client library. Raises OptionError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise OptionError(
            "the Hugging Face hub needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


@dataclass(frozen=True)
class Uploads:
    """Upload finished files and folders to the repository of --huggingface_repo_id; do nothing without one.

    api: the client, `huggingface_hub.HfApi`. Uploads run one after the other, so that the repository is
    created once. The model card is uploaded once a run, if the repository has none or an unchanged one of the
    same run.
    """

    options: HubOptions
    api: Any = None
    _waiting: list[threading.Thread] = field(default_factory=list)
    _sent_cards: set[str] = field(default_factory=set)

    def publish(self, path: Path, card: str | None = None) -> None:
        """Upload a file or a folder, and its model card; with --async_upload in the background."""
        if self.options.huggingface_repo_id is None:
            return
        if not self.options.async_upload:
            self._try_upload(path, card)
            return
        before = self._waiting[-1] if self._waiting else None
        thread = threading.Thread(target=self._upload_after, args=(before, path, card), daemon=True)
        self._waiting.append(thread)
        thread.start()

    def publish_state(self, folder: Path) -> None:
        """Upload a state folder if --save_state_to_huggingface is given."""
        if self.options.save_state_to_huggingface:
            self.publish(folder)

    @contextlib.contextmanager
    def finish_uploads(self) -> Iterator[None]:
        """Wait for uploads however the block ends, also after an error: the files are saved."""
        try:
            yield
        finally:
            self.wait()

    def wait(self) -> None:
        """Wait until every upload is done or has failed."""
        while self._waiting:
            self._waiting.pop(0).join()

    def _upload_after(self, before: threading.Thread | None, path: Path, card: str | None) -> None:
        if before is not None:
            before.join()
        self._try_upload(path, card)

    def _try_upload(self, path: Path, card: str | None) -> None:
        try:
            self._upload(path)
            if card is not None and self.options.huggingface_repo_type in (None, "model"):
                self._upload_card(card)
        except Exception as error:  # whatever it is, the file is saved and training continues
            logger.error(
                "%s was saved but not uploaded to %s: %s", path, self.options.huggingface_repo_id, error
            )

    def _upload(self, path: Path) -> None:
        options = self.options
        where = {
            "repo_id": options.huggingface_repo_id,
            "repo_type": options.huggingface_repo_type or "model",
        }
        target = (
            path.name
            if options.huggingface_path_in_repo is None
            else f"{options.huggingface_path_in_repo}/{path.name}"
        )
        self.api.create_repo(**where, private=options.huggingface_repo_visibility != "public", exist_ok=True)
        if path.is_dir():
            self.api.upload_folder(**where, folder_path=str(path), path_in_repo=target)
        else:
            self.api.upload_file(**where, path_or_fileobj=str(path), path_in_repo=target)
        logger.info("Uploaded %s to %s", path.name, options.huggingface_repo_id)

    def _upload_card(self, card: str) -> None:
        """Upload the model card, unless the repository has one of somebody else."""
        repo = self.options.huggingface_repo_id
        if card in self._sent_cards:
            return
        self._sent_cards.add(card)  # also if it fails: the files matter more than the card
        where = {"repo_id": repo, "repo_type": "model"}
        try:
            if self.api.file_exists(filename=CARD, **where):
                existing = Path(self.api.hf_hub_download(filename=CARD, **where)).read_text(encoding="utf-8")
                if not may_replace(existing, card):
                    logger.info("%s keeps its own %s", repo, CARD)
                    return
            self.api.upload_file(path_or_fileobj=card.encode("utf-8"), path_in_repo=CARD, **where)
        except Exception as error:  # the files are there, so the run continues
            logger.warning("the model card was not uploaded to %s: %s", repo, error)
            return
        logger.info("Uploaded the model card to %s", repo)


def make_uploads(options: HubOptions, make_api: Callable[..., Any] | None = None) -> Uploads:
    """Return the uploads of a run. Raises OptionError if the client library is missing."""
    if options.huggingface_repo_id is None:
        return Uploads(options)
    return Uploads(options, (make_api or hub().HfApi)(token=options.huggingface_token))


def download_state(
    place: str, token: str | None, folder: Path, download: Callable[..., str] | None = None
) -> Path:
    """Download the state folder that `owner/repo/path[:revision[:type]]` names and return its path.

    folder: files are put below it. Raises OptionError if the name is malformed or nothing is found.
    """
    name, _, rest = place.partition(":")
    revision, _, repo_type = rest.partition(":")
    parts = name.strip("/").split("/")
    if len(parts) < 3:
        raise OptionError(
            f"--resume {place}: with --resume_from_huggingface write owner/repo/path[:revision[:type]]"
        )
    repo, path = "/".join(parts[:2]), "/".join(parts[2:])
    fetch = download or hub().snapshot_download
    try:
        fetched = fetch(
            repo_id=repo,
            repo_type=repo_type or "model",
            revision=revision or None,
            allow_patterns=f"{path}/*",
            local_dir=str(folder),
            token=token,
        )
    except Exception as error:  # the client raises many kinds: network, rights, names
        raise OptionError(f"--resume {place}: cannot be downloaded from the hub: {error}") from error
    state = Path(fetched) / path
    if not state.is_dir():
        raise OptionError(
            f"--resume {place}: {repo} has no folder {path}"
            + (f" at revision {revision}" if revision else "")
        )
    return state
