"""A small PaLM: the language model of flamingo-pytorch's Flamingo, as one that transformers knows.

What this file teaches: a decoder-only transformer after its details have been simplified for speed (Chowdhery et al.
2022, section 2). Beside GPT or OPT five things are other:

    parallel layers        x + attention(norm(x)) + feed_forward(norm(x)), one norm, instead of one after the other
    SwiGLU                 the feed-forward's middle is silu(a) · b, two matrices where GPT has one
    rotary positions       queries and keys are turned by an angle for each position; there is no table, so no limit
    multi-query attention  every head has queries of its own, all share one set of keys and values: a cache of 1/h
    no biases, tied        not in linear layers nor in norms; the token embeddings are the head

It is an ordinary `PreTrainedModel`: it saves, loads, generates, and `extend_instance` makes a Flamingo of it. It is
trained by `python train.py --preset palm-text`, then named by `--lm`.

Letters: B texts, T tokens of this call, S tokens so far, D wide; h heads, c channels of a head.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from flamingo.interop import compat


class PaLMConfig(PreTrainedConfig):
    """The shape of a `PaLMForCausalLM`.

    hidden_size, num_hidden_layers, num_attention_heads, head_dim: D, layers, h, c. ff_mult: width of the feed-forward
    in D. rotary_base: the slowest pair of channels turns once in about 2π · rotary_base tokens.
    """

    model_type = "palm"
    vocab_size: int = 20000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    head_dim: int = 64
    ff_mult: int = 4
    rotary_base: float = 10000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


def rotation(positions: Tensor, channels: int, base: float) -> tuple[Tensor, Tensor]:
    """Positions (B, T) → cosines and sines (B, 1, T, c) of the angle of each channel there."""
    pairs = torch.arange(0, channels, 2, device=positions.device)
    angles = positions[..., None].float() * base ** (-pairs / channels)  # (B, T, c / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """(B, h, T, c): channel i and channel i + c/2 are a point in a plane, turned by its angle. Of two such points only
    the difference of their positions is left in their product."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turn
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class ParallelLayer(nn.Module):
    """x + attention(norm(x)) + feed_forward(norm(x))."""

    def __init__(self, config: PaLMConfig, layer_idx: int):
        super().__init__()
        dim, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.heads, self.layer_idx = config.num_attention_heads, layer_idx
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * config.head_dim, bias=False)  # one head for all
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.ff_in = nn.Linear(dim, 2 * config.ff_mult * dim, bias=False)  # first half through silu, second half as is
        self.ff_out = nn.Linear(config.ff_mult * dim, dim, bias=False)

    def forward(self, hidden_states: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, cache: Cache | None) -> Tensor:
        """(B, T, D) → (B, T, D). mask: (B, 1, T, S), True where a token may look. cache: keys and values so far."""
        x = self.norm(hidden_states)
        gated, plain = self.ff_in(x).chunk(2, dim=-1)
        return hidden_states + self.attend(x, turn, mask, cache) + self.ff_out(F.silu(gated) * plain)

    def attend(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor, cache: Cache | None) -> Tensor:
        q = rotate(rearrange(self.to_q(x), "B T (h c) -> B h T c", h=self.heads), turn)
        k, v = self.to_kv(x)[:, None].chunk(2, dim=-1)  # (B, 1, T, c)
        k = rotate(k, turn)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, 1, S, c)
        k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(rearrange(out, "B h T c -> B T (h c)"))


def causal_mask(attention_mask: Tensor, length: int) -> Tensor:
    """(B, S), 1 at real tokens → (B, 1, T, S): the last `length` tokens see the real ones before them, and themselves
    (a row of padding that saw nothing at all would be 0/0)."""
    so_far = attention_mask.shape[1]
    place = torch.arange(so_far, device=attention_mask.device)
    query = place[so_far - length :, None]
    return ((place <= query) & attention_mask.bool()[:, None, None, :]) | (place == query)


def _must_do_nothing(others: dict) -> None:
    """Raises ValueError for an argument of a call that would be ignored. (Older versions of `generate` pass the cache's
    positions, which the cache knows; and None or False asks for nothing.)"""
    for name, value in others.items():
        if name != "cache_position" and value is not None and value is not False:
            raise ValueError(f"this PaLM does nothing with {name}={value!r}: leave it out")


class PaLMPreTrainedModel(PreTrainedModel):
    config_class = PaLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ("ParallelLayer",)


class PaLMModel(PaLMPreTrainedModel):
    """Token embeddings, the layers, a last norm."""

    def __init__(self, config: PaLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(ParallelLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, cache: Cache | None = None,
        past_key_values: Cache | None = None, use_cache: bool | None = None, output_hidden_states: bool | None = None,
        **others,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """(B, T) → `.last_hidden_state` (B, T, D).

        attention_mask, position_ids: (B, S) of the whole text, (B, T). cache (past_key_values before transformers
        5.24): of the tokens before. output_hidden_states: `.hidden_states` as well, what each layer reads and the last
        one. Raises ValueError unless one of input_ids and inputs_embeds is given, and for an argument that would do
        nothing.
        """
        _must_do_nothing(others)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        length, so_far = x.shape[1], compat.tokens_read(cache) + x.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(len(x), so_far, dtype=torch.long, device=x.device)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        turn, mask = self.turn(position_ids), causal_mask(attention_mask, length)
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = []  # only if asked for: else each would be kept until the last layer is through
        for layer in self.layers:
            states += [x] if asked else []
            x = layer(x, turn, mask, cache)
        x = self.norm(x)
        hidden = (*states, x) if asked else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **compat.as_output(cache))

    def turn(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return rotation(position_ids, self.config.head_dim, self.config.rotary_base)


class PaLMForCausalLM(PaLMPreTrainedModel, GenerationMixin):
    """A `PaLMModel` and the head, which is its token embeddings."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own way)
    accepts_loss_kwargs = False  # its loss is the mean of a batch: transformers' Trainer is not to count tokens for it

    def __init__(self, config: PaLMConfig):
        super().__init__(config)
        self.model = PaLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, cache: Cache | None = None,
        past_key_values: Cache | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int = 0, return_dict: bool | None = None, **others,
    ) -> CausalLMOutputWithPast | tuple:  # fmt: skip
        """As `PaLMModel`, and `.logits` (B, T, vocabulary); with labels (B, T) the mean loss of the next tokens.

        logits_to_keep: of the last tokens only; 0 for all. return_dict: False for a tuple.
        """
        output = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, cache, past_key_values, use_cache, **others
        )  # fmt: skip
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        found = compat.as_output(compat.find_cache(output.values()))
        result = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=output.hidden_states, **found)
        return result.to_tuple() if return_dict is False else result


AutoConfig.register(PaLMConfig.model_type, PaLMConfig, exist_ok=True)
AutoModelForCausalLM.register(PaLMConfig, PaLMForCausalLM, exist_ok=True)
