"""What a trained model is used for: to continue texts, and to say how likely each of several continuations is.

Both lay the pictures beside the text once, by the model's fusion, and then leave the work to the language model.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flamingo.interop import compat

OPEN_FLAMINGO_NAMES = {"vision_x": "pixel_values", "lang_x": "input_ids"}


def with_open_flamingo_names(method: Callable) -> Callable:
    """A method that also takes its pictures as vision_x (B, T_img, F, C, H, W) and its texts as lang_x (B, T_txt)."""

    @functools.wraps(method)
    def renamed(self, *args, **kwargs):
        for theirs, ours in OPEN_FLAMINGO_NAMES.items():
            if theirs in kwargs:
                if ours in kwargs:
                    raise ValueError(f"{theirs} and {ours} are two names of the same thing: give one of them")
                kwargs[ours] = kwargs.pop(theirs)
        return method(self, *args, **kwargs)

    return renamed


class TextGeneration:
    """Methods of a `VisionLanguageModel` (vlm.py).

    tokens_per_image: how many places of the text a picture takes; none if it is laid beside it.
    """

    tokens_per_image = 0

    def room_of_texts(self) -> tuple[int, int] | None:
        """(positions of the language model, how many of them a picture takes) if a picture takes any and they end."""
        positions = compat.max_positions(self.lang_encoder.config)
        return (positions, self.tokens_per_image) if positions and self.tokens_per_image else None

    @with_open_flamingo_names
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        media_locations: Tensor | None = None,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        latents: Tensor | None = None,
        image_index: Tensor | None = None,
        texts_per_image: int | None = None,
        blind: bool = False,
        **generation_options,
    ) -> Tensor:
        """Continue texts: (B, T_txt) → (B, longer), the prompt included. Prompts are padded on the left.

        inputs_embeds: (B, T_txt, D) in place of the ids, with media_locations; no prompt is in what comes back then.
        pixel_values … blind: see `prepare_images`.
        generation_options: those of transformers' `generate` (max_new_tokens, num_beams, do_sample, …). What they leave
        open stands in the language model's `generation_config` (build.py); 32 tokens if nothing says how many.

        Raises ValueError before the first step if prompt and new tokens need more positions than there are, and for
        guidance_scale: transformers reads a second text beside the first then, with the same pictures laid beside it.
        """
        options = dict(generation_options)
        config = options.get("generation_config") or self.lang_encoder.generation_config
        if options.get("guidance_scale", config.guidance_scale) not in (None, 1):
            raise ValueError("guidance_scale is not offered: its second text would see the pictures of the first")
        lengths = [options.get("max_new_tokens"), options.get("max_length"), config.max_new_tokens, config.max_length]
        if not any(lengths) and "generation_config" not in options:  # which would say for itself how long to go on
            lengths[0] = options["max_new_tokens"] = 32
        images = self.prepare_images(pixel_values, features, latents, image_index, texts_per_image, blind)
        text = (input_ids, attention_mask, media_locations, None, inputs_embeds)
        with self.reading(images, *text, generating=True) as text:
            more = lengths[0] or lengths[2]
            if not more and (most := lengths[1] or lengths[3]):  # of the prompt, padding included, and what follows
                read = text.input_ids if text.input_ids is not None else text.inputs_embeds
                more = max(0, most - read.shape[1])
            self.check_room(text.inputs(), more or 0)
            # With embeddings to read first, the ids are what they are the embeddings of, and part of what comes back.
            prompt = {} if text.input_ids is None else {"input_ids": text.input_ids}
            return self.lang_encoder.generate(**(text.inputs() | prompt), **options)

    def check_room(self, inputs: dict[str, Tensor], more: int) -> None:
        """Raises ValueError if the language model has fewer positions than `more` tokens behind its `inputs` need."""
        positions = compat.max_positions(self.lang_encoder.config)
        if positions is None:
            return
        if "position_ids" in inputs:  # padding takes none; the last token's is the largest of a text
            needed = inputs["position_ids"][:, -1] + 1 + more
        else:
            read = inputs.get("input_ids", inputs.get("inputs_embeds"))
            needed = torch.full((len(read),), read.shape[1] + more)
        in_the_text = self.tokens_per_image
        compat.check_values(
            needed <= positions,
            lambda i: (
                f"prompt and new tokens need {int(needed[i])} positions, the language model has {positions}"
                + (f" (a picture takes {in_the_text})" if in_the_text else "")
                + ": shorten the prompt, give fewer examples, or lower max_new_tokens"
            ),
        )

    @torch.no_grad()
    def score_sequences(
        self,
        input_ids: Tensor,
        candidates: Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        *,
        media_locations: Tensor | None = None,
        mean: bool = False,
        **images,
    ) -> Tensor:
        """Log-likelihood of each candidate as the continuation of each text: (B, K) in nats.

        (flamingo-mini has such a method; the use for classification is OpenFlamingo's.)

        Args:
            input_ids, attention_mask: (B, T_txt) prompts, padded on the left.
            candidates: K lists of token ids, the same for each text.
            mean: per token instead of the sum, so that long candidates are not at a disadvantage.
            images: see `prepare_images`.
        """
        lm, texts, count = self.lang_encoder, len(input_ids), len(candidates)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        length = max(map(len, candidates))
        ids = torch.full((count, length), self.pad_token_id, device=input_ids.device)
        real = torch.zeros(count, length, dtype=attention_mask.dtype, device=input_ids.device)
        for k, candidate in enumerate(candidates):
            ids[k, : len(candidate)] = torch.as_tensor(candidate, device=ids.device)
            real[k, : len(candidate)] = 1
        ids, real = ids.repeat(texts, 1), real.repeat(texts, 1)  # (B·K, L): all candidates of a text side by side
        images = self.prepare_images(**images)
        with self.reading(images, input_ids, attention_mask, media_locations, generating=True) as text:
            self.check_room(text.inputs(), length)
            read = lm(**(text.inputs() | positions_of(lm, text.attention_mask)), use_cache=True)
            cache = compat.cache_of(read)
            cache.batch_repeat_interleave(count)
            whole_mask = torch.cat([text.attention_mask.repeat_interleave(count, dim=0), real], dim=1)
            positions = positions_of(lm, whole_mask, last=length)
            continued = lm(
                input_ids=ids, attention_mask=whole_mask, **compat.cache_argument(lm, cache), **positions
            ).logits
        before = read.logits[:, -1:].repeat_interleave(count, dim=0)
        logits = torch.cat([before, continued[:, :-1]], dim=1).float()  # (B·K, L, vocabulary): what comes next
        chosen = -F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * real
        total = chosen.sum(dim=1) / (real.sum(dim=1) if mean else 1)
        return rearrange(total, "(B K) -> B K", K=count)


def positions_of(lm: torch.nn.Module, attention_mask: Tensor, last: int | None = None) -> dict[str, Tensor]:
    """{"position_ids": (B, T_txt)} for texts padded on the left, of the `last` tokens if given; empty for models that
    have no such argument. (`generate` does this by itself, and models that learn positions need it.)"""
    if not compat.takes_position_ids(lm):
        return {}
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"position_ids": positions if last is None else positions[:, -last:]}
