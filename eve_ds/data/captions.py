"""Encoding of captions to token IDs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from eve_ds import limits
from eve_ds.config import Config, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Raise :class:`ConfigError` if the tokenizer has IDs without a row in the word embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.model.vocab_size:
        raise ConfigError(
            f"tokenizer '{config.data.tokenizer}' has a vocabulary of {largest + 1} tokens, larger than "
            f"model.vocab_size ({config.model.vocab_size}); raise model.vocab_size or use a smaller tokenizer"
        )


class CaptionEncoder:
    """Encoder of single captions; a batch call would start threads, which a forked worker must not have.

    Special tokens that are written in a caption, such as "[SEP]", are ordinary text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self._tokenizer: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self._max_length = max_length
        self.cls_id, self.sep_id = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)
        self.pad_id, self.mask_id = int(tokenizer.pad_token_id), int(tokenizer.mask_token_id)
        self._unk_id = int(tokenizer.unk_token_id)
        self._special_ids = np.array(tokenizer.all_special_ids, dtype=np.int64)

    def encode(self, caption: str | None) -> NDArray[np.int64]:
        """Return the token IDs of [CLS] caption [SEP], (n,), truncated to the maximum length; empty for None.

        The caption is cut to `limits.CAPTION_CHARACTERS` first. Its own tokens are never special, except [UNK].
        """
        if caption is None:
            return np.empty(0, dtype=np.int64)
        encoding = self._tokenizer.encode(caption[: limits.CAPTION_CHARACTERS], add_special_tokens=False)
        ids = np.array(encoding.ids[: self._max_length - 2], dtype=np.int64)
        # A tokenizer that splits at white space only finds "[SEP]" in its vocabulary as an ordinary word.
        ids[np.isin(ids, self._special_ids)] = self._unk_id
        return np.concatenate([[self.cls_id], ids, [self.sep_id]])


def padded(rows: Sequence[NDArray[np.int64]], length: int, pad_id: int) -> Tensor:
    """Return the rows with padding, (B, length) int64."""
    filled = np.full((len(rows), length), pad_id, dtype=np.int64)
    for place, row in zip(filled, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(filled)
