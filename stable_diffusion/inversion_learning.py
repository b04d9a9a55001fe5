"""Textual inversion in training: the vectors of a new word, for each text encoder of the checkpoint.

Only the new rows of the tables of token embeddings learn, and only they are in the optimizer. Files are those
that A1111's Web UI, ComfyUI and gen_img.py read: clip_l and clip_g for Stable Diffusion XL, else emb_params.
Source: Gal et al. 2022, arXiv 2208.01618, whose code (MIT) has the sentences.
"""
# Letters: V vectors of the word, C width of a text encoder

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from checkpoints.opening import open_checkpoint
from checkpoints.writing import stream_tensors
from contract.loading import TensorInfo
from contract.made_networks import DefaultRate, MadeNetwork
from contract.new_words import WordToLearn
from encoders.clip_l import ClipWords
from encoders.clip_layers import ClipText
from modules.console import count_of, quiet
from modules.errors import CheckpointError, DatasetError, OptionError
from modules.option_values import option_words
from networks.bundled_words import find_words, is_of_word
from stable_diffusion.contract import SDXL
from stable_diffusion.inversion_options import InversionOptions
from stable_diffusion.new_words import GrowingEmbedding, NewWord
from stable_diffusion.textual_inversion import (
    SEVERAL,
    SINGLE,
    LearnedWord,
    check_words,
    read_bundled,
    read_words,
    with_words,
)
from stable_diffusion.training_files import TrainingFiles
from stable_diffusion.training_options import StableDiffusionTrainingOptions, generation_options

logger = logging.getLogger(__name__)

CALLED = "textual inversion"
MODULE = "textual inversion"  # there is no network module: files say so
DEFAULT_RATE = DefaultRate(1e-4, "1e-3", 2e-2)  # a vector moves by about the rate at each step
LOUD = 3.0  # a vector that exceeds the mean norm by this factor drowns out the other words of a prompt

_OF_OBJECTS = """
a photo of a {}; a rendering of a {}; a cropped photo of the {}; the photo of a {}; a photo of a clean {};
a photo of a dirty {}; a dark photo of the {}; a photo of my {}; a photo of the cool {};
a close-up photo of a {}; a bright photo of the {}; a cropped photo of a {}; a photo of the {};
a good photo of the {}; a photo of one {}; a close-up photo of the {}; a rendition of the {};
a photo of the clean {}; a rendition of a {}; a photo of a nice {}; a good photo of a {};
a photo of the nice {}; a photo of the small {}; a photo of the weird {}; a photo of the large {};
a photo of a cool {}; a photo of a small {}
"""
# two of the nineteen come twice
_OF_STYLES = """
painting; rendering; cropped painting; the painting; clean painting; dirty painting; dark painting; picture;
cool painting; close-up painting; bright painting; cropped painting; good painting; close-up painting;
rendition; nice painting; small painting; weird painting; large painting
"""


def _split(sentences: str) -> tuple[str, ...]:
    return tuple(" ".join(sentence.split()) for sentence in sentences.split(";"))


OBJECT_SENTENCES = _split(_OF_OBJECTS)
STYLE_SENTENCES = tuple(
    f"{kind if kind.startswith('the ') else f'a {kind}'} in the style of {{}}" for kind in _split(_OF_STYLES)
)


class LearntRows(nn.Module):
    """The vectors of a word, V C for each text encoder, by their names in files."""

    def __init__(self, word: WordToLearn, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.word = word
        self.default_norms: dict[str, float] = {}  # mean norm of the rows of each table
        for name, tensor in rows.items():
            self.register_parameter(name, Parameter(tensor))

    def prepare_optimizer_params(self, learning_rate: float) -> tuple[list[dict[str, Any]], list[str]]:
        """Return one parameter group with all vectors, and its name for the logs."""
        return [{"params": [*self.parameters()], "lr": learning_rate}], [CALLED]

    def set_multiplier(self, multiplier: float) -> None:
        """Do nothing: texts are encoded before a pass, so no pass can do without the word."""

    def log_norms(self) -> None:
        """Log the norm of each row and the mean norm of the table; warn of rows that are much longer."""
        for name, rows in self.named_parameters():
            norms = rows.detach().float().norm(dim=1).tolist()
            default = self.default_norms[name]
            text = ", ".join(f"{norm:.3g}" for norm in norms)
            if max(norms) > LOUD * default:
                logger.warning(
                    "%s: the vectors of %s have the norms %s, known words %.3g on average. So loud a word "
                    "drowns the others of a prompt: lower %s, or take an earlier file.",
                    name,
                    self.word.text,
                    text,
                    default,
                    self.word.flags.rate,
                )
            else:
                logger.info(
                    "%s: norms of the vectors of %s: %s; of known words: %.3g",
                    name,
                    self.word.text,
                    text,
                    default,
                )


def report_rows(module: nn.Module) -> None:
    """Log the norms of the vectors, as `LearntRows.log_norms`."""
    assert isinstance(module, LearntRows)
    module.log_norms()


def write_rows(module: nn.Module, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
    """Write the vectors, and log their norms.

    Args:
        module: Module with the vectors.
        path: Path of the file.
        dtype: Dtype of the file; None for float32.
        metadata: Metadata of the file.
    """
    report_rows(module)
    tensors = {name: rows.detach() for name, rows in module.named_parameters()}
    infos = {name: TensorInfo(dtype or rows.dtype, tuple(rows.shape)) for name, rows in tensors.items()}
    stream_tensors(path, infos, lambda name: tensors[name].to(infos[name].dtype), metadata)


def _leave_command(file: Path, sample: Mapping[str, Any], base: Sequence[str]) -> Sequence[str]:
    """Return the command of a sample unchanged, because the LoRA's file also contains the word."""
    return base


class Inversion:
    """The textual inversion of a training: its word, and the initial values of its vectors."""

    def __init__(self, word: WordToLearn, files: TrainingFiles) -> None:
        self.asked = word
        self.files = files
        self.word = NewWord(word.text, word.count)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the vectors in files, by text encoder."""
        return SEVERAL if self.files.kind is SDXL else (SINGLE,)

    def describe(self) -> MadeNetwork:
        """Describe this inversion as a network that is trained next to a LoRA."""
        word = self.word
        encoders = "both text encoders" if self.files.kind is SDXL else "the text encoder"
        return MadeNetwork(
            called=CALLED,
            words=f"the word {word.text}: {count_of(word.count, 'vector')} for {encoders}",
            ending="textual-inversion",
            make=self.make,
            check=self.check,
            generate=_leave_command,
            default_rate=DEFAULT_RATE,
            write=write_rows,
            report=report_rows,
            start_option="weights",
            values={
                "ss_token_string": word.text,
                "modelspec.trigger_phrase": word.text,
                "ss_num_vectors_per_token": word.count,
            },
            in_texts=True,
            check_captions=self.check_captions,
        )

    def make(self, encoders: nn.Module, with_values: bool) -> LearntRows:
        """Create the rows, and let the text encoders use them.

        Random rows are drawn from torch's generator.

        Args:
            encoders: Networks of the text encoders.
            with_values: Whether to initialize the rows; otherwise they are zero, as on the meta device.

        Raises:
            UserError: As in `check`.
        """
        networks = [cast(ClipText, network) for network in encoders.children()]
        tables = [cast(GrowingEmbedding, network.embeddings.token_embedding) for network in networks]
        starts: Sequence[Tensor]
        if with_values:
            starts = self._make_starts([table.weight.detach().float().cpu() for table in tables])
        else:
            starts = [torch.zeros(self.word.count, table.embedding_dim) for table in tables]
        rows = LearntRows(self.asked, dict(zip(self.names, starts, strict=True)))
        for name, table in zip(self.names, tables, strict=True):
            table.rows = partial(getattr, rows, name)
            if with_values:
                rows.default_norms[name] = float(table.weight.detach().float().norm(dim=1).mean())
        return rows

    def _make_starts(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """Return the first rows of each text encoder, V C.

        Args:
            tables: Tables of token embeddings, one for each text encoder.
        """
        count = self.word.count
        brought = self._read_weights()
        if brought is not None:
            return [vectors.clone() for vectors in brought.vectors]
        if self.asked.init_word is None:
            return [torch.randn(count, table.shape[1]) * table.std() for table in tables]
        starts = []
        for encoder_index, table in enumerate(tables):
            ids = self._read_init_word(encoder_index)
            if len(ids) != count:
                logger.warning(
                    "%s %r has %s in text encoder %d, %s is %d: its vectors are %s.",
                    self.asked.flags.init_word,
                    self.asked.init_word,
                    count_of(len(ids), "token"),
                    encoder_index + 1,
                    self.asked.flags.count,
                    count,
                    "repeated" if len(ids) < count else "cut",
                )
            starts.append(table[[ids[index % len(ids)] for index in range(count)]].clone())
        return starts

    def _read_init_word(self, number: int) -> list[int]:
        """Return the token ids of the initial words in a text encoder. Raises OptionError if it has none."""
        words: ClipWords = self.files.tokenizers[number]
        ids = words.tokenize(self.asked.init_word or "")
        if not ids or words.end in ids:
            raise OptionError(
                f"{self.asked.flags.init_word} {self.asked.init_word!r}: the text encoder has no token for "
                "it. Give a known word, or leave it out for random vectors"
            )
        return ids

    def _read_weights(self) -> LearnedWord | None:
        """Read the initial vectors from a textual inversion or a LoRA; None without a file.

        Raises:
            CheckpointError: If the file does not fit the text encoders or the options.
        """
        flags = self.asked.flags
        word: LearnedWord | None = None
        path = self.asked.weights or self.asked.lora
        option = "--network_weights" if self.asked.weights is None else flags.weights
        if path is not None:
            word = _find_in_lora(path, self.word.text, option)
        if path is None or (word is None and self.asked.weights is None):
            return None
        if word is None:
            (word,) = read_words([path], option=flags.weights)
        with self.files.opened() as release:
            widths = [text.network.config.dim for text in release.texts]
        check_words([word], widths, self.files.kind)
        stored = len(word.vectors[0])
        if stored != self.word.count:
            raise CheckpointError(
                f"{option} {path}: it has {count_of(stored, 'vector')}, {flags.count} is "
                f"{self.word.count}. Give {flags.count} {stored}.",
                path,
            )
        return word

    def check(self) -> None:
        """Raise UserError if the word is already a token, or its vectors cannot be initialized as asked."""
        for number in range(len(self.names)):
            if len(self.files.tokenizers[number].tokenize(self.word.text)) == 1:
                raise OptionError(
                    f"{self.asked.flags.word} {self.word.text}: the text encoder knows this word already. "
                    f"Give a new one, such as my-{self.word.text}"
                )
            if self.asked.init_word is not None:
                self._read_init_word(number)
        self._read_weights()

    def check_captions(self, captions: Sequence[str]) -> str:
        """Return a sentence about captions that lack the word.

        Raises:
            DatasetError: If no caption has the word.
        """
        found = with_words(lambda text: [], self.word.list_ids(0))
        without = [caption for caption in captions if not found(caption)]
        word = self.word.text
        if len(without) == len(captions):
            flags = self.asked.flags
            further = flags.without_captions and f", or {flags.without_captions}, which needs no captions"
            raise DatasetError(
                f"{flags.word} {word}: no caption has this word, so that nothing would be learned. Write "
                f'it into the captions, or give trigger_word = "{word}" in the dataset\'s configuration'
                f"{further}"
            )
        if not without:
            return ""
        count = count_of(len(captions), "caption")
        return f"{len(without)} of {count} lack the word {word} and teach it nothing, such as {without[0]!r}."


def learn_alone(network: MadeNetwork, options: InversionOptions) -> MadeNetwork:
    """Return the network of a word as the only network of a training."""
    sentences: tuple[str, ...] = ()
    if options.use_object_template:
        sentences = OBJECT_SENTENCES
    elif options.use_style_template:
        sentences = STYLE_SENTENCES
    word = options.word.text
    return replace(
        network,
        sentences=tuple(sentence.format(word) for sentence in sentences),
        generate=partial(_say_generation, options),
    )


def _find_in_lora(path: Path, word: str, option: str) -> LearnedWord | None:
    """Return the vectors of a word in a LoRA file; None if the file has none.

    Args:
        path: File of the LoRA.
        word: The word.
        option: Option that names the file.

    Raises:
        CheckpointError: If the vectors cannot be read.
    """
    if not path.is_file() or path.suffix.lower() != ".safetensors":
        return None
    with open_checkpoint(path) as checkpoint:
        stored = {name: checkpoint.read(name) for name in checkpoint.tensors if is_of_word(name)}
    content = find_words(stored).get(word)
    if content is None:
        return None
    with quiet():  # it is not about prompts
        (found,) = read_bundled({path: {word: content}}, option)
    return found


def _say_generation(
    options: InversionOptions, file: Path, sample: Mapping[str, Any], _: Sequence[str]
) -> list[str]:
    """Return the command that generates with a trained file.

    Args:
        options: Options of the run.
        file: The trained file.
        sample: Values of the sample, by the names of `Request`.
        _: Ignored; other kinds of networks need it.
    """
    words = {
        **generation_options(cast(StableDiffusionTrainingOptions, options), sample),
        "--textual_inversion_embeddings": file,
        "--prompt": sample.get("prompt") or f"a photo of {file.stem}",
        "--negative_prompt": sample.get("negative_prompt") or None,
        "--W": sample.get("width"),
        "--H": sample.get("height"),
        "--steps": sample.get("steps"),
        "--scale": sample.get("guidance_scale"),
        "--seed": sample.get("seed"),
        "--outdir": file.parent / "generated",
    }
    if "--i2i_path" in words:  # of an inpainting model
        words["--image_path"] = words.pop("--i2i_path")
    return ["gen_img.py", *option_words(words)]
