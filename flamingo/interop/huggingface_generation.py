"""What a FlamingoModel says: continuations, captions, and how likely each of several answers is.

What this file teaches: to generate is the language model's own business, with every strategy that transformers has. The
pictures are laid beside it for the whole of a `generate`, an assistant's beside the assistant, and defaults that a user
sets in `model.generation_config` are the ones it reads.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import Cache, PreTrainedModel

from flamingo.data.chunks import MEDIA_TOKEN
from flamingo.data.processor import FlamingoProcessor
from flamingo.errors import InputError
from flamingo.evaluation.attention import recorded_cross_attention
from flamingo.interop import compat
from flamingo.interop.selfcheck import check_decoding


class Generate:
    """Methods of `FlamingoModel` (huggingface.py)."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        media_locations: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        image_index: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        assistant_model: PreTrainedModel | None = None,
        **generation_options,
    ) -> Tensor:
        """Continue texts, prompt included: `Flamingo.generate` with the arguments of `forward`.

        What generation_options leave open stands in `generation_config`. assistant_model: a language model with the
        same tokens, or another FlamingoModel, which sees the same pictures. output_attentions and
        return_dict_in_generate: `.attentions` and `.cross_attentions` for each step, and in it for each layer, of the
        tokens read in that step: see `forward`.
        """
        if input_ids is None:
            input_ids = generation_options.pop("inputs", None)
        images = self._images(
            len(inputs_embeds if input_ids is None else input_ids), pixel_values, visual_features, image_index
        )
        if assistant_model is not None and not self.get_modified_layers():
            raise InputError("assistant_model: a language stream begins with embeddings, which no assistant can read")
        self.flamingo.lang_encoder.generation_config = self.generation_config
        if media_locations is None and input_ids is not None:
            media_locations = input_ids == self.flamingo.media_token_id
        with ExitStack() as stack:
            weights = self._keep_attentions(stack, assistant_model, generation_options)
            if isinstance(assistant_model, Generate):
                helper = assistant_model.flamingo
                seen = helper.prepare_images(**images)
                stack.enter_context(helper.reading(seen, input_ids, None, media_locations, generating=True))
                assistant_model = helper.lang_encoder
            made = self.flamingo.generate(
                input_ids, attention_mask, inputs_embeds=inputs_embeds, media_locations=media_locations, **images,
                **({} if assistant_model is None else {"assistant_model": assistant_model}), **generation_options,
            )  # fmt: skip
        if weights:
            layers = len(self.get_modified_layers())
            calls = [tuple(weights[first : first + layers]) for first in range(0, len(weights), layers)]
            made["cross_attentions"] = tuple(calls[-len(made.attentions) :])  # a long prompt may be read in pieces
        return made

    def _keep_attentions(self, stack: ExitStack, assistant_model, options: dict) -> list[Tensor]:
        """Until the stack is closed: a list that fills with the weights of each cross-attention of each call, if the
        options ask for them; the language model then keeps its own. Raises ValueError where calls are no steps."""
        given = options.get("generation_config") or self.generation_config
        wanted = {
            name: options.get(name, getattr(given, name, None))
            for name in ("output_attentions", "return_dict_in_generate", "prompt_lookup_num_tokens")
        }
        if not (wanted["output_attentions"] and wanted["return_dict_in_generate"]):
            return []
        if assistant_model is not None or wanted["prompt_lookup_num_tokens"]:
            raise ValueError(
                "output_attentions needs one token a step: leave out assistant_model and prompt_lookup_num_tokens"
            )
        stack.enter_context(compat.eager_attention(self.flamingo.lang_encoder))
        return stack.enter_context(recorded_cross_attention(self.flamingo))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        media_locations: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        image_index: Tensor | None = None,
        past: Cache | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        next_sequence_length: int | None = None,
        is_first_iteration: bool | None = None,
        **kwargs,
    ) -> dict:
        """The arguments of `forward` for the next step of a loop of your own. (transformers' own method would leave the
        pictures out, for `generate` here lays them beside the language model itself.)

        input_ids, attention_mask: of the whole text so far. past, past_key_values, cache: one thing, by the names it
        has had; if there is one, forward gets the tokens that are not in it (in a language stream the last), and no
        pictures if they are kept with it. next_sequence_length: how many tokens, if it is not to be found out.
        is_first_iteration: whatever transformers says here, the cache shows it.
        """
        cache = next((given for given in (cache, past_key_values, past) if given is not None), None)
        read = compat.tokens_read(cache)
        pictures = {"pixel_values": pixel_values, "visual_features": visual_features, "image_index": image_index}
        if read:  # places of a stream are not tokens: the count of one says nothing of the other
            new = next_sequence_length or (1 if self._is_stream() else max(1, input_ids.shape[1] - read))
            input_ids = input_ids[:, -new:]
            if hasattr(cache, "text_so_far"):
                pictures, media_locations = {}, None
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "media_locations": media_locations}
        given |= pictures | {"cache": cache} | kwargs
        return {name: value for name, value in given.items() if value is not None}

    def compute_transition_scores(self, *args, **options) -> Tensor:
        """Log-probability of each generated token: the language model's, which knows how many tokens there are."""
        return self.flamingo.lang_encoder.compute_transition_scores(*args, **options)

    def generate_captions(
        self,
        processor: FlamingoProcessor,
        images: Image.Image | Sequence[Image.Image] | None = None,
        pixel_values: Tensor | None = None,
        prompt: str = MEDIA_TOKEN,
        device: torch.device | str | None = None,
        **generation_options,
    ) -> list[str]:
        """One caption for each picture (with num_return_sequences=k, k for each, side by side).

        images: PIL pictures or files. pixel_values: (N, C, H, W) or (N, F, C, H, W) instead. prompt: with one <image>;
        it is not part of what comes back. device: move the model there first; where it is if not given.
        """
        if device is not None:
            self.to(device)
        if (images is None) == (pixel_values is None):
            raise ValueError("give images or pixel_values, one of them")
        if prompt.count(MEDIA_TOKEN) != 1:
            raise ValueError(f"the prompt {prompt!r} must have exactly one {MEDIA_TOKEN}: each picture has a text")
        if not self._decodes_rightly:
            check_decoding(self.flamingo)
            self._decodes_rightly = True
        if pixel_values is None:
            pixel_values = processor.preprocess_images(images)
        elif pixel_values.ndim == 4:
            pixel_values = rearrange(pixel_values, "N C H W -> N 1 C H W")
        text = processor.encode_text([prompt] * len(pixel_values)).to(self.device)
        generated = self.generate(
            **text, pixel_values=pixel_values.to(self.device, self.dtype)[:, None], **generation_options
        )
        return processor.decode_captions(generated, text["input_ids"].shape[1])

    def prepare_captions(self, captions: Sequence[str]) -> list[str]:
        """As the model is trained on them: `FlamingoProcessor.prepare_captions`."""
        return self.processor.prepare_captions(captions)

    def score_sequences(
        self,
        input_ids: Tensor,
        candidates: Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        media_locations: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        image_index: Tensor | None = None,
        mean: bool = False,
    ) -> Tensor:
        """Log-likelihood (B, K) of K candidate continuations: `Flamingo.score_sequences` with these arguments."""
        images = self._images(len(input_ids), pixel_values, visual_features, image_index)
        return self.flamingo.score_sequences(
            input_ids, candidates, attention_mask, media_locations=media_locations, mean=mean, **images
        )
