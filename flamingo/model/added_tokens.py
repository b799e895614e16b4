"""Added tokens: <image> and <|endofchunk|> for a frozen language model.

What this file teaches: how to give a frozen model new tokens without training its vocabulary. The usual ways both
hurt: resizing the table trains 38 million weights of OPT-125m for two tokens, masking the gradient still lets weight
decay move the other rows. Here the old table stays as it is, frozen, and a *decoupled* table of two rows, in and
out, is all that trains.

The new ids must be consecutive. They may lie inside the old table (OPT has spare rows: 50265 of 50272 are used; the
new rows then stand in for them) or begin right behind it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo.interop import compat


def _vocabulary_size(rows: int, first_id: int, count: int) -> int:
    """Of a table of `rows` with the added tokens. Raises ValueError if they do not fit to it."""
    if first_id > rows or first_id < rows < first_id + count:
        raise ValueError(
            f"the added token ids {first_id}..{first_id + count - 1} neither fit into the vocabulary of {rows} rows "
            "nor begin right behind it: is the tokenizer that of another language model?"
        )
    return max(rows, first_id + count)


class DecoupledEmbedding(nn.Embedding):
    """A frozen embedding table and a few trainable rows: token ids (B, T_txt) → (B, T_txt, D).

    Args:
        embedding: the frozen table; its weight is shared, not copied.
        first_id, count: the ids whose rows are new. New rows begin as the mean of the old ones.
    """

    def __init__(self, embedding: nn.Embedding, first_id: int, count: int):
        rows, dim = embedding.weight.shape
        super().__init__(_vocabulary_size(rows, first_id, count), dim, embedding.padding_idx, device="meta")
        self.weight = embedding.weight.requires_grad_(False)  # shared, not copied: it may also be the head's
        self.first_id, self.count = first_id, count
        self.scale = compat.embedding_scale(embedding)
        mean = embedding.weight.detach().float().mean(dim=0)
        self.additional_embedding = nn.Embedding(count, dim, _weight=mean.repeat(count, 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        is_new = (input_ids >= self.first_id) & (input_ids < self.first_id + self.count)
        old = F.embedding(input_ids.masked_fill(is_new, 0), self.weight)
        new = self.additional_embedding((input_ids - self.first_id).clamp(0, self.count - 1))
        return torch.where(is_new[..., None], new.to(old.dtype), old) * self.scale


class DecoupledLinear(nn.Linear):
    """A head, frozen elsewhere, and a few trainable output rows: hidden states (…, D) → logits (…, vocabulary)."""

    def __init__(self, head: nn.Linear, first_id: int, count: int):
        rows, dim = head.weight.shape
        super().__init__(dim, _vocabulary_size(rows, first_id, count), bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias  # shared, not copied
        self.first_id, self.count = first_id, count
        self.additional_fc = nn.Linear(dim, count, bias=False)
        with torch.no_grad():
            self.additional_fc.weight.copy_(head.weight.float().mean(dim=0).expand(count, dim))

    def forward(self, hidden: Tensor) -> Tensor:
        old = self.old_logits(hidden)  # (…, rows of the old table)
        new = self.additional_fc(hidden.to(self.additional_fc.weight.dtype)).to(old.dtype)  # (…, count)
        # The new columns stand where their ids are: behind the old ones, or in place of unused ones. (Written in place
        # there: logits are the largest tensor of a training step, and putting them together anew costs 5 % of it.)
        if self.first_id == old.shape[-1]:
            return torch.cat([old, new], dim=-1)
        old[..., self.first_id : self.first_id + self.count] = new
        return old

    def old_logits(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden)


def decouple_added_tokens(lm: nn.Module, ids: list[int]) -> None:
    """Give a Hugging Face causal language model trainable rows for the consecutive `ids`, in and out. In place."""
    first, count = min(ids), len(ids)
    if sorted(ids) != list(range(first, first + count)):
        raise ValueError(f"the ids of the added tokens must be consecutive, not {sorted(ids)}")
    lm.set_input_embeddings(DecoupledEmbedding(lm.get_input_embeddings(), first, count))
    lm.set_output_embeddings(DecoupledLinear(lm.get_output_embeddings(), first, count))
    # By this number transformers finds a token and its beam again among the scores of all beams.
    lm.config.get_text_config().vocab_size = lm.get_output_embeddings().out_features
