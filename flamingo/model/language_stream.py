"""Fusion by language stream: a picture's latents stand among the text's tokens, right behind its <image>.

What this file teaches: the other way to show a picture to a language model (Kosmos, BLIP-2, LLaVA). Nothing is built
into its layers; the latents are brought to the width of token embeddings and read as if they were words:

    text      <s>  <image>  a  dog  <|endofchunk|>
    stream    <s>  <image>  ▣  ▣  ▣  a  dog  <|endofchunk|>            n = 3 latents

(Or in place of the <image>, as open_flamingo has it: `in_place`.) It costs no new layers, but every picture makes the
text n tokens longer, in every layer and in the cache of every later step; cross-attention leaves the text as long as it
was. And a token attends to *all* pictures before it, by the causal attention that was there already. Generated text
follows from the cache: a picture is read once.

`lay_stream` is the one function that knows where everything stands. What it returns is in the stream's places; what
comes out of the model is at the text's tokens again (`Text.at_tokens`), so labels and losses need no second rule.

Letters: B texts, T_txt tokens of the longest, D wide; N pictures in the bank, n latents each; T_img picture slots of a
text; S = T_txt + T_img n places of the stream (in place: n - 1).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flamingo.config import ModelConfig
from flamingo.interop import compat
from flamingo.model.added_tokens import decouple_added_tokens
from flamingo.model.cross_attention import Images
from flamingo.model.resampler import PerceiverResampler
from flamingo.model.vlm import SpecialTokens, Text, VisionLanguageModel


class ProjectedResampler(PerceiverResampler):
    """A Perceiver resampler (N, F, v, d) → (N, n, D): its latents brought to the width of token embeddings.

    Args: dim: d; dim_out: D; **settings: the fields of `ResamplerConfig`.
    """

    def __init__(self, *, dim: int, dim_out: int, **settings):
        super().__init__(dim=dim, **settings)
        self.dim, self.projection = dim_out, nn.Linear(dim, dim_out)

    def forward(self, x: Tensor, media_time: Tensor | None = None) -> Tensor:
        return self.projection(super().forward(x, media_time))


class Stream(NamedTuple):
    """What the language model reads, and where the text's tokens are in it.

    embeds: (B, S, D). attention_mask: (B, S), 1 where something stands. position_ids: (B, S), counted over that.
    places: (B, T_txt) the place from which what follows a token is predicted: its own, and of an <image> that of its
    last latent. So labels stay with the text's tokens, and a latent never has one.
    """

    embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    places: Tensor


def lay_stream(
    embeds: Tensor, media_locations: Tensor, attention_mask: Tensor, images: Images,
    room_on_the_left: bool = False, in_place: bool = False,
) -> Stream:  # fmt: skip
    """Put the latents of each picture right behind its <image>, or in its place.

    Args:
        embeds: (B, T_txt, D) of the text's tokens. media_locations: (B, T_txt) bool, True at <image>.
        attention_mask: (B, T_txt).
        images: latents (N, n, D), and the pictures of each text (B, T_img); of those behind the last <image> none
            stands in the stream.
        room_on_the_left: where the places are that a text with fewer pictures than T_img leaves empty. (S is the same
            whatever stands in the texts: to look at their values would be a wait on a GPU.)

    Raises:
        ValueError: a text has more <image> tokens than pictures.
    """
    (_, length, _), (_, n, _), slots = embeds.shape, images.latents.shape, images.image_index.shape[1]
    picture = media_locations.cumsum(dim=1)  # (B, T_txt) <image> tokens up to and including this one
    count = (images.image_index >= 0).sum(dim=1)  # (B,)
    too_many = lambda i: (  # noqa: E731
        f"text {i} has {int(picture[i, -1])} <image> tokens but {int(count[i])} pictures: give one picture for each "
        "<image>"
    )
    compat.check_values(picture[:, -1] <= count, too_many)
    first = 0 if in_place else 1  # latents begin so far behind where the <image> stands …
    more = first + n - 1  # … and by so many places a picture makes the text longer
    stands = torch.arange(length, device=embeds.device) + more * (picture - media_locations.long())  # (B, T_txt)
    if room_on_the_left:
        stands = stands + more * (slots - picture[:, -1:])
    place = torch.arange(length + more * slots, device=embeds.device).expand(len(embeds), -1)  # (B, S)
    begun = torch.zeros_like(place).scatter(1, stands, 1).cumsum(dim=1)  # tokens that stand here or before
    token = (begun - 1).clamp(min=0)  # (B, S) the last of them …
    behind = place - stands.gather(1, token)  # … and how far behind it this place is
    is_latent = (begun > 0) & (behind >= first) & (behind < first + n) & media_locations.gather(1, token)
    is_token = (begun > 0) & (behind == 0) & ~is_latent

    row = images.image_index.gather(1, (picture.gather(1, token) - 1).clamp(min=0))  # (B, S) of the bank
    latents = images.latents.to(embeds.dtype)[row.clamp(min=0), (behind - first).clamp(0, n - 1)]  # (B, S, D)
    words = embeds.gather(1, token[..., None].expand(-1, -1, embeds.shape[-1]))  # (B, S, D)
    stream = torch.where(is_latent[..., None], latents, words * is_token[..., None])
    mask = attention_mask.gather(1, token) * (is_token | is_latent)
    return Stream(
        embeds=stream,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        places=stands + more * media_locations.long(),
    )


class LanguageStreamFusion:
    """Fusion by language stream: a longer text, of embeddings. The language model itself holds nothing."""

    def __init__(self, lm: nn.Module, media_token_id: int, in_place: bool):
        self.lm, self.media_token_id, self.in_place = lm, media_token_id, in_place

    @contextmanager
    def __call__(self, images: Images | None, text: Text, generating: bool = False) -> Iterator[Text]:
        """The Text to call the language model with; without pictures the one that was given.

        Raises ValueError if the stream is longer than the language model's positions, or it is not known where the
        pictures are.
        """
        if images is None:
            yield text
            return
        embeds, media_locations = text.inputs_embeds, text.media_locations
        if embeds is None:
            embeds = self.lm.get_input_embeddings()(text.input_ids)
            media_locations = text.input_ids == self.media_token_id if media_locations is None else media_locations
        if media_locations is None or media_locations.shape != embeds.shape[:2]:
            raise ValueError("inputs_embeds do not say where the pictures are: give media_locations as well")
        if len(images.image_index) != len(embeds):
            raise ValueError(f"{len(embeds)} texts, but pictures for {len(images.image_index)}")
        mask = text.attention_mask
        mask = torch.ones_like(media_locations, dtype=torch.long) if mask is None else mask
        stream = lay_stream(embeds, media_locations.bool(), mask, images, generating, self.in_place)
        self._must_fit(stream.attention_mask.sum(dim=1), images.latents.shape[1])
        positions = stream.position_ids if compat.takes_position_ids(self.lm) else None
        yield Text(text.input_ids, stream.attention_mask, text.labels, None, stream.embeds, positions, stream.places)

    def _must_fit(self, lengths: Tensor, n: int) -> None:
        positions = compat.max_positions(self.lm)
        if positions is not None:
            compat.check_values(
                lengths <= positions,
                lambda i: (
                    f"text {i} with its pictures takes {int(lengths[i])} of {positions} positions, {n} for each "
                    "picture: give fewer pictures, a shorter text, or fewer latents a picture"
                ),
            )


class LanguageStreamModel(VisionLanguageModel):
    """A vision tokenizer that speaks the language model's own language: latents among the token embeddings.

    Args: see `VisionLanguageModel`; vision_tokenizer: (N, F, v, d) → (N, n, D), D the width of token embeddings.
    config: of which `stream` is read.
    """

    def __init__(self, vision_encoder, vision_tokenizer, lang_encoder, tokens: SpecialTokens, config: ModelConfig):
        lang_encoder.requires_grad_(False)
        decouple_added_tokens(lang_encoder, sorted((tokens.image, tokens.eoc)))
        fusion = LanguageStreamFusion(lang_encoder, tokens.image, config.stream.in_place)
        super().__init__(vision_encoder, vision_tokenizer, lang_encoder, fusion, tokens)
        self.tokens_per_image = vision_tokenizer.num_latents - config.stream.in_place
        self.train(False)
