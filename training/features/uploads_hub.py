"""Upload to and download from the Hugging Face hub; write the model card, README.md with YAML front matter.

A failed upload is logged and never ends a run. A card ends with a comment with the card's SHA-256, so that
an edited card is recognized and kept.
"""

import hashlib
import html
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from modules.control_codes import escape_control_codes
from modules.errors import OptionError
from protocols.families import HIGH_NOISE
from protocols.rules import ModelRelease
from training.features.uploads_options import UploadOptions
from training.reports.history import AVERAGE
from training.saving.files import PublishedRun

logger = logging.getLogger(__name__)

CARD = "README.md"
MAX_PROMPTS = 8
_CARD_END = re.compile(r"(?s)(.*)<!-- reelsmith card ([0-9a-f]{12}) ([0-9a-f]{64}) -->\s*")
SETTINGS = {  # settings of a run in the text: key of the metadata -> words
    "ss_network_module": "network",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_network_args": "network arguments",
    "ss_optimizer": "optimizer",
    "ss_learning_rate": "learning rate",
    "ss_lr_scheduler": "schedule",
    "ss_max_train_steps": "steps",
    "ss_num_epochs": "epochs",
    "ss_num_train_items": "items with repeats",
    "ss_gradient_accumulation_steps": "gradient accumulation",
    "ss_timestep_sampling": "timesteps",
    "ss_discrete_flow_shift": "flow shift",
    "ss_mixed_precision": "mixed precision",
    "ss_seed": "seed",
    "ss_training_comment": "comment",
}
# license identifiers of the hub that are kept if a user gives one
# fmt: off
HUB_LICENSES = {
    "apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "unlicense", "openrail", "cc0-1.0",
    "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "creativeml-openrail-m",
}
# fmt: on
TABLE_KEYS = ("resolution", "target_frames", "frame_extraction", "num_repeats")


def write_card(
    name: str,
    is_lora: bool,
    release: ModelRelease,
    metadata: Mapping[str, str],
    prompts: Sequence[str] = (),
    files: Mapping[str, Path] | None = None,
) -> str:
    """Return the text of a model card for the hub, README.md: YAML front matter, then Markdown.

    Text from the user is escaped, so that it cannot end the front matter, a block or the comment at the end.

    Args:
        name: Value of --output_name.
        is_lora: Whether the files are LoRAs.
        release: The released model.
        metadata: Metadata of the trained file.
        prompts: Prompts of the samples.
        files: Files of one save by the name of their expert; the key is "" for a file for all of them.
    """
    model_spec = {key.removeprefix("modelspec."): text for key, text in metadata.items()}
    dataset_tables: list[dict[str, Any]] = json.loads(metadata.get("ss_datasets", "[]"))
    trigger_words = _list_trigger_words(dataset_tables)
    title = model_spec.get("title", name)
    lines = [f"# {_escape(title)}", "", _describe_origin(is_lora, release)]
    if model_spec.get("description"):
        lines += ["", _escape(model_spec["description"])]
    if trigger_words:
        lines += ["", f"Words that it was taught: {_escape(', '.join(trigger_words))}"]
    if is_lora:
        lines += ["", "## Use", "", _as_block(f"{_lora_arguments(name, files)} --lora_multiplier 1.0")]
    settings = _list_settings(metadata, dataset_tables)
    if settings:
        lines += ["", "## Training", "", *map(_as_block, settings)]
    licence = model_spec.get("license", release.licence)
    lines += ["", "## License", "", f"{_escape(licence)}. License of the base model: {release.license_url}"]
    front_matter = _front_matter(is_lora, release, prompts, spec=model_spec, trigger_words=trigger_words)
    text = f"---\n{front_matter}---\n\n" + "\n".join(lines) + "\n\n"
    # the digest shows later whether a user has edited the card
    return f"{text}<!-- reelsmith card {_run_id(name)} {_digest(text)} -->\n"


def _describe_origin(is_lora: bool, release: ModelRelease) -> str:
    """Return the first sentence of a model card, with a link to the base model."""
    base_model = release.repositories[0]
    kind = "LoRA" if is_lora else "model"
    return f"A {kind} for [{base_model}](https://huggingface.co/{base_model}), trained with Reelsmith."


def _list_trigger_words(dataset_tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the trigger words of dataset tables, each once and without blank ones."""
    trigger_words = (table.get("trigger_word") for table in dataset_tables)
    return list(dict.fromkeys(word for word in trigger_words if isinstance(word, str) and word.strip()))


def make_model_card(run: PublishedRun, path: Path) -> str | None:
    """Return the model card for a saved file of a run; None for a file with averaged (EMA) weights."""
    stem = run.names.get_stem(path)
    if stem.endswith(AVERAGE):
        return None
    return write_card(
        run.names.name,
        is_lora=run.is_lora,
        release=run.release,
        metadata=run.metadata,
        prompts=run.prompts,
        files=run.names.model_files(stem),
    )


def _lora_arguments(name: str, files: Mapping[str, Path] | None) -> str:
    """Return the command-line options that load the LoRA files described by a model card."""
    # `files` are the files of one save by expert (None if unknown), and `name` is the name of the run.
    arguments = []
    for expert, path in (files or {"": Path(f"{name}.safetensors")}).items():
        flag = f"--lora_weight_{HIGH_NOISE}" if expert == HIGH_NOISE else "--lora_weight"
        arguments.append(f"{flag} {path.name}")
    return " ".join(arguments)


def _list_settings(metadata: Mapping[str, str], tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each training setting in a file's metadata, and for each of its tables."""
    lines = []
    for key, name in SETTINGS.items():
        text = metadata.get(key, "None")
        if text not in ("None", "", "{}"):
            lines.append(f"{name}: {text}")
    for table in tables:
        info = (f"{key} {table[key]}" for key in TABLE_KEYS if table.get(key) is not None)
        lines.append(f"data: {', '.join(info)}")
    return lines


def can_replace_card(existing: str, card: str) -> bool:
    """Return whether a model card may be replaced, because this run wrote it and nobody has edited it."""
    old, new = (_CARD_END.fullmatch(text.replace("\r\n", "\n")) for text in (existing, card))
    return old is not None and new is not None and old[2] == new[2] and _digest(old[1]) == old[3]


def _front_matter(
    is_lora: bool,
    release: ModelRelease,
    prompts: Sequence[str],
    spec: Mapping[str, str],
    trigger_words: Sequence[str],
) -> str:
    """Return the YAML header of a model card, which the hub reads."""
    tags = ["reelsmith", *(["lora"] if is_lora else [])]
    tags += [tag.strip() for tag in spec.get("tags", "").split(",")]
    values: dict[str, Any] = {
        "base_model": list(release.repositories),
        "base_model_relation": "adapter" if is_lora else "finetune",
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
    }
    values |= _license_values(release, licence=spec.get("license", release.licence))
    if trigger_words:
        values["instance_prompt"] = ", ".join(trigger_words)
    if prompts:
        values["widget"] = [{"text": prompt} for prompt in prompts[:MAX_PROMPTS]]
    # ASCII, because readers of YAML disagree about which characters end a line
    return str(yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=False, width=10_000))


def _license_values(release: ModelRelease, licence: str) -> dict[str, str]:
    """Return the license entries of the YAML header: an identifier of the hub, or "other" and a name."""
    is_release_license = licence == release.licence
    license_key = licence.strip().lower()
    if license_key not in HUB_LICENSES:
        license_key = release.license_key if is_release_license else "other"
    if license_key != "other":
        return {"license": license_key}
    license_name = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")[:64] or "other"
    values = {"license": "other", "license_name": license_name}
    if is_release_license:
        values["license_link"] = release.license_url
    return values


def _plain(value: Any) -> Any:
    """Turn each string in nested data into a single line with escaped control codes."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return _one_line(value) if isinstance(value, str) else value


def _as_block(line: str) -> str:
    return "    " + _one_line(line)


def _escape(text: str) -> str:
    """Return `text` as a single line with Markdown and HTML syntax escaped."""
    line = html.escape(_one_line(text), quote=False)
    # signs of headings, lists and quotations are special at the start of a line only
    return re.sub(r"([\\`*_{}\[\]()!|~$]|^[#+=:-])", r"\\\1", line)


def _one_line(text: str) -> str:
    return " ".join(escape_control_codes(text).split())


def _run_id(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def import_hub_client() -> Any:
    """Import and return `huggingface_hub`.

    Raises:
        OptionError: If it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise OptionError(
            "the Hugging Face hub needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


@dataclass(frozen=True)
class Uploads:
    """Upload finished files and folders to the repository of --huggingface_repo_id.

    Uploads run one after the other, so that the repository is created only once. Each file is followed by
    the model card, which names the newest file, unless the repository's card was edited or belongs to another
    run.

    Attributes:
        api: The client, `huggingface_hub.HfApi`.
        card: Makes the model card for a file; None for files that the card does not name.
    """

    options: UploadOptions
    api: Any
    card: Callable[[Path], str | None] | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    _sent_cards: set[str] = field(default_factory=set)
    _card_failures: list[str] = field(default_factory=list)  # why no more cards are uploaded

    def for_run(self, run: PublishedRun) -> "Uploads":
        """Return a copy of this object that also uploads the model card of a run."""
        return replace(self, card=partial(make_model_card, run))

    def publish(self, path: Path) -> None:
        """Upload a file and its model card, in the background with --async_upload."""
        self._start_upload(path, None if self.card is None else self.card(path))

    def _start_upload(self, path: Path, card: str | None) -> None:
        if self.options.async_upload:
            self._pool.submit(self._upload, path, card)
        else:
            self._upload(path, card)

    def publish_state(self, folder: Path) -> None:
        """Start uploading a state folder, but only with --save_state_to_huggingface."""
        if self.options.save_state_to_huggingface:
            self._start_upload(folder, None)

    def close(self) -> None:
        """Wait until all uploads have ended. Call this after an error too, because files were saved."""
        self._pool.shutdown()

    def _upload(self, path: Path, card: str | None) -> None:
        """Upload a file or a folder, and its model card; failures are logged and do not end the run."""
        options, repo = self.options, self.options.huggingface_repo_id
        repo_arguments = {"repo_id": repo, "repo_type": options.huggingface_repo_type or "model"}
        target = "/".join(filter(None, (options.huggingface_path_in_repo, path.name)))
        is_private = options.huggingface_repo_visibility != "public"
        try:
            self.api.create_repo(**repo_arguments, private=is_private, exist_ok=True)
            if path.is_dir():
                self.api.upload_folder(**repo_arguments, folder_path=str(path), path_in_repo=target)
            else:
                self.api.upload_file(**repo_arguments, path_or_fileobj=str(path), path_in_repo=target)
            logger.info("Uploaded %s to %s", path.name, repo)
            if card is not None and repo_arguments["repo_type"] == "model":
                self._upload_card(card)
        except Exception as error:  # of any type: the file is saved, so training continues
            logger.error("%s was saved but not uploaded to %s: %s", path, repo, error)

    def _upload_card(self, card: str) -> None:
        """Upload the model card, unless the repository has a card that must be kept (`can_replace_card`)."""
        repo = self.options.huggingface_repo_id
        if card in self._sent_cards or self._card_failures:
            return
        self._sent_cards.add(card)
        repo_arguments = {"repo_id": repo, "repo_type": "model"}
        try:
            if self.api.file_exists(filename=CARD, **repo_arguments):
                existing = Path(self.api.hf_hub_download(filename=CARD, **repo_arguments)).read_text(
                    encoding="utf-8"
                )
                if not can_replace_card(existing, card):
                    logger.info("%s keeps its own %s", repo, CARD)
                    self._card_failures.append(CARD)  # so that no later card of the run is tried
                    return
            self.api.upload_file(path_or_fileobj=card.encode("utf-8"), path_in_repo=CARD, **repo_arguments)
        except Exception as error:  # the files are saved, so the run continues
            logger.warning("the model card was not uploaded to %s: %s", repo, error)
            self._card_failures.append(str(error))
            return
        logger.info("Uploaded the model card to %s", repo)


def make_uploads(options: UploadOptions, make_api: Callable[..., Any] | None = None) -> Uploads:
    """Return the uploads of a run.

    Raises:
        OptionError: If the client library is missing.
    """
    return Uploads(options, (make_api or import_hub_client().HfApi)(token=options.huggingface_token))


def download_state(
    address: str, token: str | None, folder: Path, download: Callable[..., str] | None = None
) -> Path:
    """Download the state folder that `owner/repo/path[:revision[:type]]` names and return its path.

    Args:
        address: Name of the state, as above.
        token: Access token; None for public repositories.
        folder: Folder in which the files are stored.
        download: Function that downloads a file; None for the client library's function.

    Raises:
        OptionError: If the name is malformed or nothing is found.
    """
    name, _, revision_and_type = address.partition(":")  # revision and type may be left out
    revision, _, repo_type = revision_and_type.partition(":")
    owner_repo_path = name.strip("/").split("/")
    if len(owner_repo_path) < 3:
        raise OptionError(
            f"--resume {address}: with --resume_from_huggingface write owner/repo/path[:revision[:type]]"
        )
    repo, path = "/".join(owner_repo_path[:2]), "/".join(owner_repo_path[2:])
    snapshot_download = download or import_hub_client().snapshot_download
    try:
        local_folder = snapshot_download(
            repo_id=repo,
            repo_type=repo_type or "model",
            revision=revision or None,
            allow_patterns=f"{path}/*",
            local_dir=str(folder),
            token=token,
        )
    except Exception as error:  # the client raises many kinds of errors: network, permissions, names
        raise OptionError(f"--resume {address}: cannot be downloaded from the hub: {error}") from error
    state = Path(local_folder) / path
    if not state.is_dir():
        raise OptionError(
            f"--resume {address}: {repo} has no folder {path}"
            + (f" at revision {revision}" if revision else "")
        )
    return state
