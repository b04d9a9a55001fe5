"""Textual inversion: train the embedding vectors of a new word for each text encoder of a model.

Only the new rows of the token embeddings are trained, and only these are in the optimizer.
Source: Gal et al. 2022, arXiv 2208.01618.
"""
# Letters: V vectors of the word, C width of a text encoder

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from checkpoints.embedding_files import read_embedding
from checkpoints.opening import open_checkpoint
from checkpoints.writing import stream_tensors
from encoders.new_words import (
    GrowingEmbedding,
    ModelWord,
    NewWord,
    compile_words,
    select_vectors,
    takes_words,
)
from modules.console import count_of, quiet
from modules.errors import CheckpointError, DatasetError, OptionError
from protocols.bundled_embeddings import WordContent, find_words, is_of_word
from protocols.family import TextEncoder
from protocols.family_networks import CustomNetwork, DefaultRate
from protocols.loading import TensorInfo
from protocols.new_tokens import WordToLearn

logger = logging.getLogger(__name__)

CALLED = "textual inversion"
DEFAULT_RATE = DefaultRate(1e-4, "1e-3", 2e-2)  # each step changes a vector by about the learning rate
LOUD = 3.0  # warn if a vector's norm exceeds this multiple of the mean norm, as it then dominates the prompt


class LearntRows(nn.Module):
    """Trained vectors of a word: one parameter, V C, for each name in files."""

    def __init__(self, word: WordToLearn, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.word = word
        self.mean_norms: dict[str, float] = {}  # name -> mean norm of the rows of its token embeddings
        for name, tensor in rows.items():
            self.register_parameter(name, Parameter(tensor))

    def prepare_optimizer_params(self, learning_rate: float) -> tuple[list[dict[str, Any]], list[str]]:
        """Return one parameter group with all vectors, and its name for the logs."""
        return [{"params": [*self.parameters()], "lr": learning_rate}], [CALLED]

    def join(self, names: Sequence[str]) -> Tensor:
        """Concatenate the vectors of several names."""
        return torch.cat([self.get_parameter(name) for name in names])

    def set_multiplier(self, multiplier: float) -> None:
        """Do nothing: texts are encoded before the forward pass, so the word cannot be scaled in it."""

    def log_norms(self) -> None:
        """Log the norm of each vector and the mean norm of known tokens; warn if a vector is much longer."""
        for name, rows in self.named_parameters():
            norms = rows.detach().float().norm(dim=1).tolist()
            # of the embeddings of known tokens
            mean_norm = self.mean_norms[name]
            text = ", ".join(f"{norm:.3g}" for norm in norms)
            if max(norms) > LOUD * mean_norm:
                logger.warning(
                    "%s: the vectors of %s have the norms %s, known words %.3g on average. So loud a word "
                    "drowns the others of a prompt: lower %s, or take an earlier file.",
                    name,
                    self.word.text,
                    text,
                    mean_norm,
                    self.word.flags.rate,
                )
            else:
                logger.info(
                    "%s: norms of the vectors of %s: %s; of known words: %.3g",
                    name,
                    self.word.text,
                    text,
                    mean_norm,
                )


def report_rows(module: nn.Module) -> None:
    """Log the norms of the vectors in a `LearntRows`."""
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


@dataclass(frozen=True)
class WordTower:
    """Names and tokenizer of a text encoder, for textual inversion before the encoder is loaded."""

    key: str  # key of its vectors in files
    embedding: str  # name of the weight of its token embeddings
    tokenize: Callable[[str], list[int]]  # without special tokens; [] if the text has no tokens
    # keys of separate vectors for several layers of the trained model, V C each; (): one set of vectors
    names: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of this encoder's vectors in files, one for each set of vectors."""
        return self.names or (self.key,)


class Inversion:
    """The textual inversion of a training run: its word, and the initial values of its vectors."""

    def __init__(
        self,
        word: WordToLearn,
        towers: Sequence[WordTower],
        read_vectors: Callable[[Path, str], Mapping[str, Tensor] | None],
    ) -> None:
        """Set up an inversion; no file is read.

        Args:
            word: The word to learn.
            towers: Names and tokenizers of the text encoders, in the order in which the model uses them.
            read_vectors: Reads the vectors from an embedding file or from a LoRA with the word; returns them,
                each V C, by the keys of the towers, or None for a LoRA without the word. The second argument
                is the option that names the file.
        """
        self.asked = word
        self.towers = towers
        self.read_vectors = read_vectors
        self.word = NewWord(word.text, word.count)

    def describe(self) -> CustomNetwork:
        """Describe this inversion as a network that is trained next to a LoRA."""
        word = self.word
        encoders = {1: "the text encoder", 2: "both text encoders"}[len(self.towers)]
        return CustomNetwork(
            label=CALLED,
            description=f"the word {word.text}: {count_of(word.count, 'vector')} for {encoders}",
            architecture_suffix="textual-inversion",
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
            in_text_encoders=True,
            check_captions=self.check_captions,
        )

    def make(self, encoders: nn.Module, with_values: bool) -> LearntRows:
        """Create the vectors of the word, and let the text encoders use them.

        Random vectors are drawn from torch's default generator.

        Args:
            encoders: Networks of the text encoders, in the order of `towers`.
            with_values: Whether to initialize the vectors; otherwise they are zero.

        Raises:
            UserError: If the initial values cannot be read, or have another width than the token embeddings.
        """
        # a tower is one text encoder (`WordTower`): here, its key in files -> its token embeddings
        tables: dict[str, GrowingEmbedding] = {}
        for network, tower in zip(encoders.children(), self.towers, strict=True):
            table = network.get_submodule(tower.embedding.removesuffix(".weight"))
            assert isinstance(table, GrowingEmbedding)
            tables[tower.key] = table
        if with_values:  # embeddings of the known tokens, from which initial values are taken
            known_rows = {key: table.weight.detach().float().cpu() for key, table in tables.items()}
            initial = self._make_initial(known_rows)
        else:
            initial = {}
            for tower in self.towers:
                for name in tower.keys:
                    initial[name] = torch.zeros(self.word.count, tables[tower.key].embedding_dim)
        rows = LearntRows(self.asked, initial)
        for tower in self.towers:
            table = tables[tower.key]
            table.rows = partial(rows.join, tower.keys)  # the encoder reads the trained values in each pass
            if with_values:
                # to compare the length of trained vectors with, in the log
                norm = float(table.weight.detach().float().norm(dim=1).mean())
                rows.mean_norms |= dict.fromkeys(tower.keys, norm)
        return rows

    def _make_initial(self, known_rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the initial vectors, each V C, by their keys in embedding files.

        They come from a file, else from the initial word, else they are random.

        Args:
            known_rows: Token embeddings of each text encoder (tower), by its key in embedding files.
        """
        count = self.word.count
        from_file = self._read_weights()
        if from_file is not None:
            self._check_widths(from_file, known_rows)
            return {name: from_file[name].clone() for tower in self.towers for name in tower.keys}
        initial = {}
        if self.asked.init_word is None:
            for tower in self.towers:
                table = known_rows[tower.key]
                for name in tower.keys:
                    # as spread as the embeddings of known tokens
                    initial[name] = torch.randn(count, table.shape[1]) * table.std()
            return initial
        for encoder_index, tower in enumerate(self.towers, 1):
            ids = self._read_init_word(tower)
            if len(ids) != count:
                logger.warning(
                    "%s %r has %s in text encoder %d, %s is %d: its vectors are %s.",
                    self.asked.flags.init_word,
                    self.asked.init_word,
                    count_of(len(ids), "token"),
                    encoder_index,
                    self.asked.flags.count,
                    count,
                    "repeated" if len(ids) < count else "cut",
                )
            # as many ids as vectors: repeated from the start, or cut
            repeated_ids = [ids[index % len(ids)] for index in range(count)]
            vectors = known_rows[tower.key][repeated_ids]
            initial |= {name: vectors.clone() for name in tower.keys}
        return initial

    def _read_init_word(self, tower: WordTower) -> list[int]:
        """Return the token ids of the initial word; raise OptionError if a text encoder has none for it."""
        ids = tower.tokenize(self.asked.init_word or "")
        if not ids:
            raise OptionError(
                f"{self.asked.flags.init_word} {self.asked.init_word!r}: the text encoder has no token for "
                "it. Give a known word, or leave it out for random vectors"
            )
        return ids

    def _read_weights(self) -> Mapping[str, Tensor] | None:
        """Read the initial vectors from an embedding file or a LoRA; None if options name no file with them.

        Raises:
            CheckpointError: If the vectors of the file do not fit the text encoders or the options.
        """
        flags = self.asked.flags
        path = self.asked.weights or self.asked.lora
        option = "--network_weights" if self.asked.weights is None else flags.weights
        if path is None:
            return None
        vectors = self.read_vectors(path, option)
        if vectors is None:
            return None
        # a tower: one text encoder; its keys name its vectors in files
        missing = [name for tower in self.towers for name in tower.keys if name not in vectors]
        if missing:
            raise CheckpointError(f"{option} {path}: it has no {' and no '.join(missing)}.", path)
        num_stored = len(next(iter(vectors.values())))
        if num_stored != self.word.count:
            raise CheckpointError(
                f"{option} {path}: it has {count_of(num_stored, 'vector')}, {flags.count} is "
                f"{self.word.count}. Give {flags.count} {num_stored}.",
                path,
            )
        return vectors

    def _check_widths(self, vectors: Mapping[str, Tensor], known_rows: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError if vectors of a file do not have the width of their text encoder."""
        for tower in self.towers:
            width = vectors[tower.keys[0]].shape[1]
            expected = known_rows[tower.key].shape[1]
            if width != expected:
                path = self.asked.weights or self.asked.lora
                raise CheckpointError(
                    f"{path}: its vectors {tower.keys[0]} have {width} numbers, this text encoder takes "
                    f"{expected}. Give a file that was made for this model.",
                    path,
                )

    def check(self) -> None:
        """Raise UserError if the word is already a token, or if its vectors cannot be initialized."""
        for tower in self.towers:
            if len(tower.tokenize(self.word.text)) == 1:
                raise OptionError(
                    f"{self.asked.flags.word} {self.word.text}: the text encoder knows this word already. "
                    f"Give a new one, such as my-{self.word.text}"
                )
            if self.asked.init_word is not None:
                self._read_init_word(tower)
        self._read_weights()

    def check_captions(self, captions: Sequence[str]) -> str:
        """Return a warning about captions that lack the word; "" if all have it.

        Raises:
            DatasetError: If no caption has the word.
        """
        # also matches the names of single vectors of the word
        pattern = compile_words([*self.word.list_ids(0)])
        without = [caption for caption in captions if not pattern.search(caption)]
        word = self.word.text
        if len(without) == len(captions):
            flags = self.asked.flags
            alternative = ""
            if flags.without_captions:
                alternative = f", or {flags.without_captions}, which needs no captions"
            raise DatasetError(
                f"{flags.word} {word}: no caption has this word, so that nothing would be learned. Write "
                f'it into the captions, or give trigger_word = "{word}" in the dataset\'s configuration'
                f"{alternative}"
            )
        if not without:
            return ""
        count = count_of(len(captions), "caption")
        return f"{len(without)} of {count} lack the word {word} and teach it nothing, such as {without[0]!r}."


def find_in_lora(path: Path, word: str) -> WordContent | None:
    """Return the vectors of a word in a LoRA file; None if `path` is no LoRA file or lacks the word."""
    if not path.is_file() or path.suffix.lower() != ".safetensors":
        return None
    with open_checkpoint(path) as checkpoint:
        stored = {name: checkpoint.read(name) for name in checkpoint.tensors if is_of_word(name)}
    return find_words(stored).get(word)


def invert_encoders(word: WordToLearn, encoders: Sequence[TextEncoder]) -> CustomNetwork:
    """Return the trainable vectors of a word for text encoders that support additional words.

    Args:
        word: The word to learn.
        encoders: All text encoders of a model; those without this ability tokenize the word as text.
    """
    word_encoders = [encoder for encoder in encoders if takes_words(encoder)]

    def read_vectors(path: Path, option: str) -> Mapping[str, Tensor] | None:
        content = find_in_lora(path, word.text)
        if content is None:
            if word.weights is None:  # a LoRA to continue training from need not have the word
                return None
            content = read_embedding(path, option)
        stored_word = ModelWord(word.text, content=content, source=path, option=option)
        with quiet():  # `select_vectors` logs words that prompts may use
            return select_vectors(stored_word, word_encoders)

    towers = []
    for encoder in word_encoders:
        towers.append(WordTower(encoder.word_keys[0], encoder.embedding, encoder.tokenize_word))
    return Inversion(word, towers, read_vectors).describe()
