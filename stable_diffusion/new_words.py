"""A word whose vectors a training learns, and the table of a text encoder that has them as further rows."""
# Letters: B captions, L tokens, V vectors of the word, C width

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NewWord:
    """A new word for a prompt. Alone it means all of its vectors; with a 1, 2, ... appended, a single one."""

    text: str
    count: int = 1  # number of the word's vectors

    def list_ids(self, vocabulary: int) -> dict[str, list[int]]:
        """Return the token ids of the word and of its single vectors.

        Args:
            vocabulary: Number of rows of the table without the word.
        """
        ids = [*range(vocabulary, vocabulary + self.count)]
        single = {f"{self.text}{index}": [number] for index, number in enumerate(ids[1:], 1)}
        return {self.text: ids, **single}


class GrowingEmbedding(nn.Embedding):
    """A frozen table of token embeddings with V additional rows, which are stored separately."""

    def __init__(self, table: nn.Embedding, count: int) -> None:
        """Wrap the table's weight. The additional rows are zero until `rows` is set."""
        super().__init__(table.num_embeddings, table.embedding_dim, _weight=table.weight)
        self.count = count
        self.rows: Callable[[], Tensor] = self._make_zeros  # V C

    def _make_zeros(self) -> Tensor:
        return self.weight.new_zeros(self.count, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of token ids, B L C."""
        places = ids - self.num_embeddings
        is_new = places >= 0
        old = super().forward(ids.masked_fill(is_new, 0))
        new = F.embedding(places.clamp(min=0), self.rows().to(old.dtype))
        return torch.where(is_new[..., None], new, old)
