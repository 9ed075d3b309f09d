"""Vocabulary by which the text head multiplies its states: logits, and the loss of masked words."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds import ops
from eve_ds.model.embeddings import vocabulary_matrix


class Words(Protocol):
    """Words that states of the text head are compared with; each process may hold all of them or some."""

    @property
    def weight(self) -> Tensor:
        """(V, D) embeddings of the words that this process holds."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (M, V) of states (M, D) for all words, in the dtype of the states."""

    def cross_entropy(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Sum of the cross entropies of states (M, D) with word ids (M,) int64, () fp32."""

    def copied(self) -> Words:
        """Return a copy that does not change with the parameters."""


class Vocabulary(NamedTuple):
    """Embeddings and biases of all words on one process."""

    weight: Tensor
    """(V, D), the word embedding."""
    bias: Tensor | None
    """(V,), bias of the text head; None if no objective predicts words."""

    @classmethod
    def of(cls, word: nn.Module, bias: Tensor | None) -> Vocabulary:
        """Vocabulary of a word embedding and the bias of a text head."""
        return cls(vocabulary_matrix(word), bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`Words.logits`."""
        # Outside autocast, whose states have a smaller dtype than the weights.
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.weight.to(hidden.dtype), bias)

    def cross_entropy(self, hidden: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Words.cross_entropy`."""
        return ops.linear_cross_entropy(hidden, self.weight, self.bias, target)

    def copied(self) -> Vocabulary:
        """See :meth:`Words.copied`."""
        return Vocabulary(self.weight.clone(), None if self.bias is None else self.bias.clone())
