"""Vocabulary whose words are spread over the tensor-parallel ranks: embedding, logits and masked-word loss.

If the number of words is not divisible by the number of ranks, the last shards end in rows that belong to no word. They
take no part in logits or losses, so their gradient is 0 and they stay 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor, nn

from eve_ds.model.shards import Shard
from eve_ds.ops.autocast import like_linear
from eve_ds.ops.masked_loss import WeightGradient, chunk_rows
from eve_ds.parallel.tensor.layers import CONFIG


class WordEmbedding(VocabParallelEmbedding):
    """Embedding of this rank's words; a call returns the embeddings of all words, summed over the ranks."""

    def __init__(self, num_words: int, width: int, tp_size: int) -> None:
        padded = math.ceil(num_words / tp_size) * tp_size
        super().__init__(padded, width, init_method=nn.init.zeros_, config=CONFIG)


class ShardedVocabulary(NamedTuple):
    """Embeddings and biases of this rank's words; see :class:`eve_ds.model.vocabulary.Words`."""

    weight: Tensor
    """(W, D); W of the V words are this rank's, padding left out."""
    bias: Tensor | None
    """(W,)."""
    shard: Shard
    """Place of the weight among those of all ranks."""
    group: dist.ProcessGroup
    """Tensor-parallel group."""

    @classmethod
    def of(cls, word: nn.Module, bias: Tensor | None, shard: Shard) -> ShardedVocabulary:
        """Vocabulary of a word embedding and the bias of a text head, of which this rank holds `shard`."""
        own = shard.runs.run // shard.shape[1]
        group = parallel_state.get_tensor_model_parallel_group()
        return cls(cast(Tensor, word.weight)[:own], None if bias is None else bias[:own], shard, group)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (M, V) of states (M, D), without gradients; a collective, in which all ranks have the same M."""
        own = hidden @ self.weight.to(hidden.dtype).t()
        if self.bias is not None:
            own += self.bias.to(hidden.dtype)
        sent = F.pad(own, (0, self.shard.length - own.shape[1]))
        received = [torch.empty_like(sent) for _ in range(self.shard.size)]
        dist.all_gather(received, sent, group=self.group)
        return torch.cat(received, dim=1)[:, : self.shard.shape[0]]

    def cross_entropy(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Sum of the cross entropies of states (M, D) with word ids (M,), () fp32; a collective."""
        first = self.shard.rank * self.shard.length
        # All ranks must have the same chunks, so those are chosen for the longest shard, whose logits are fp32.
        chunk = chunk_rows(hidden.shape[0], 4 * self.shard.length, hidden.device)
        return cross_entropy(hidden, self.weight, self.bias, target, first, self.group, chunk)

    def copied(self) -> ShardedVocabulary:
        """See :meth:`eve_ds.model.vocabulary.Words.copied`."""
        return self._replace(weight=self.weight.clone(), bias=None if self.bias is None else self.bias.clone())


@like_linear
def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    first: int,
    group: dist.ProcessGroup,
    chunk: int,
) -> Tensor:
    """Summed cross entropy over the words of all ranks, () fp32, equal on all of them.

    Like :func:`eve_ds.ops.linear_cross_entropy`, the forward forms the gradients, `chunk` rows at a time, so that
    logits larger than a chunk are never held whole. The backward can run only once.

    Args:
        hidden: (N, D), equal on all ranks; its gradient is, too.
        weight: (W, D) embeddings of this rank's words; W may be 0.
        bias: (W,), or None.
        target: (N,) int64 ids over the words of all ranks.
        first: id of this rank's first word.
        group: process group of the ranks.
        chunk: rows of logits at a time, equal on all ranks.
    """
    return _CrossEntropy.apply(hidden, weight, bias, target, first, group, chunk)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        first: int,
        group: dist.ProcessGroup,
        chunk: int,
    ) -> Tensor:
        learns = any(ctx.needs_input_grad)
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        d_weight = WeightGradient(weight, chunks=math.ceil(hidden.shape[0] / chunk))
        d_bias = hidden.new_zeros(weight.shape[0], dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.t()).float()
            logits = logits if bias is None else logits.add_(bias.float())
            loss += _losses(logits, target[part] - first, group).sum()
            if learns:
                d_logits = logits.to(hidden.dtype)
                torch.mm(d_logits, weight, out=d_hidden[part])
                d_weight.add(d_logits, hidden[part])
                d_bias += logits.sum(dim=0)
        if learns:
            dist.all_reduce(d_hidden, group=group)
            ctx.gradients = (d_hidden, d_weight.finish(), None if bias is None else d_bias.to(bias.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("cross_entropy runs backward once: its gradients were formed in the forward pass")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(d_loss) for gradient in gradients), None, None, None, None


def _losses(logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Losses (n,) of logits (n, W) of this rank's words, which become their gradients in place.

    `target` (n,) counts from this rank's first word, so it may lie outside of [0, W).
    """
    rows, words = logits.shape
    top = logits.amax(dim=1) if words else logits.new_full((rows,), -math.inf)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    logits -= top.unsqueeze(1)
    is_own = ((target >= 0) & (target < words)).float().unsqueeze(1)
    column = target.clamp(0, max(words - 1, 0)).unsqueeze(1)  # some column where the target is another rank's
    sums = logits.new_zeros(2, rows)
    if words:
        sums[1] = (logits.gather(1, column) * is_own).squeeze(1)
        sums[0] = logits.exp_().sum(dim=1)
    dist.all_reduce(sums, group=group)
    logits /= sums[0].unsqueeze(1)
    if words:
        logits.scatter_add_(1, column, -is_own)
    return sums[0].log() - sums[1]
