"""flamingo-pytorch's three classes, by its names and arguments, made of our parts.

What this file teaches: the same model seen from another README. flamingo-pytorch has a PaLM of its own with the new
parts in it, and no tokenizer, data or loop; what it calls `FlamingoPaLM` is our PaLM (model/palm.py), extended by the
mixin that extends any language model. Two things are kept apart that it mixes: a call never decides what trains
(`train_pictures_only` does, once), and a picture that is not there is seen by nobody.

    from flamingo.interop.flamingo_pytorch import FlamingoPaLM, GatedCrossAttentionBlock, PerceiverResampler
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo.config import CrossAttentionConfig
from flamingo.model import cross_attention, resampler
from flamingo.model.cross_attention import Images, MediaMask, media_attention_mask
from flamingo.model.language_model import FlamingoLMMixin, extend_instance
from flamingo.model.palm import PaLMConfig, PaLMForCausalLM
from flamingo.model.vision import trains


class PerceiverResampler(resampler.PerceiverResampler):
    """(B, T_img, v, d) → (B, T_img, n, d), each picture marked by its place among the pictures of its text.

    num_time_embeds: of such places (num_media_embeds in its code).
    """

    def __init__(
        self, *, dim: int, depth: int, dim_head: int = 64, heads: int = 8, num_latents: int = 64,
        num_time_embeds: int = 4, ff_mult: int = 4,
    ):  # fmt: skip
        super().__init__(
            dim=dim, depth=depth, dim_head=dim_head, heads=heads, num_latents=num_latents, ff_mult=ff_mult,
            max_num_media=num_time_embeds,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T_img, v, d), or (B, v, d) for one picture a text. Raises ValueError for more pictures than places."""
        x = rearrange(x, "B v d -> B 1 v d") if x.ndim == 3 else x
        texts, pictures = x.shape[:2]
        if pictures > len(self.media_time_embs):
            raise ValueError(f"a text has {pictures} pictures, but num_time_embeds is {len(self.media_time_embs)}")
        place = torch.arange(pictures, device=x.device).repeat(texts)
        latents = super().forward(rearrange(x, "B T v d -> (B T) 1 v d"), place)
        return rearrange(latents, "(B T) n d -> B T n d", B=texts)


class GatedCrossAttentionBlock(cross_attention.GatedCrossAttentionBlock):
    """A block that is called by itself, on text and the pictures of each text."""

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8, ff_mult: int = 4):
        super().__init__(dim=dim, dim_visual=dim, dim_head=dim_head, heads=heads, ff_mult=ff_mult)

    def forward(
        self, x: Tensor, media: Tensor, time_mask: Tensor | None = None, media_locations: Tensor | None = None
    ) -> Tensor:
        """x (B, T_txt, D), media (B, T_img, n, D) → (B, T_txt, D).

        time_mask: (B, T_img) bool, which pictures are there; all if not given. media_locations: (B, T_txt) bool, where
        the text mentions them; without it all of the text sees the first picture. What mentions a picture that is not
        there sees none.
        """
        if media_locations is None:
            media_locations = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            media_locations[:, 0] = True
        keys_values = self.attn.project_media(media.flatten(0, 1))
        return super().forward(x, keys_values, who_sees_what(media_locations, *media.shape[:2], time_mask))


def who_sees_what(media_locations: Tensor, texts: int, pictures: int, time_mask: Tensor | None) -> MediaMask:
    """The rule of model/cross_attention.py as if every mentioned picture were there; then those that are not are taken
    out again."""
    index = torch.arange(texts * pictures, device=media_locations.device).view(texts, pictures)
    there = torch.ones_like(index, dtype=torch.bool) if time_mask is None else time_mask.bool()
    missing = max(0, int(media_locations.sum(dim=1).max()) - pictures)
    index, there = F.pad(index, (0, missing)), F.pad(there, (0, missing), value=False)
    rule = media_attention_mask(media_locations, index)
    seen = (rule.sees_image if rule.mask is None else rule.mask) & there[:, None]
    return MediaMask(index, seen, seen.any(dim=-1, keepdim=True))


class FlamingoPaLM(nn.Module):
    """A PaLM that can look at pictures. Text alone: the PaLM. With pictures: the Flamingo.

    Args:
        num_tokens, dim, depth, heads, dim_head, ff_mult: of the PaLM.
        img_encoder: any module (N, C, H, W) → patch embeddings (N, v, dim), such as those of `load_vision_encoder`; may
            be left out where embeddings are given.
        media_token_id: the token that stands for a picture.
        cross_attn_every: the first of each group of so many layers gets a cross-attention before it.
        perceiver_num_latents, perceiver_depth: of the resampler.
        max_video_frames: frames with an embedding of their own, None for still pictures.
        only_attend_immediate_media: a token sees the last picture before it, or all before it.
    """

    def __init__(
        self, *, num_tokens: int, dim: int, depth: int, heads: int = 8, dim_head: int = 64, ff_mult: int = 4,
        img_encoder: nn.Module | None = None, media_token_id: int = 3, cross_attn_every: int = 3,
        perceiver_num_latents: int = 64, perceiver_depth: int = 2, max_video_frames: int | None = None,
        only_attend_immediate_media: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.lm = PaLMForCausalLM(PaLMConfig(
            vocab_size=num_tokens, hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads,
            head_dim=dim_head, ff_mult=ff_mult,
        ))  # fmt: skip
        extend_instance(self.lm, FlamingoLMMixin)
        blocks = CrossAttentionConfig(
            dim_head=dim_head, heads=heads, every=cross_attn_every, only_immediate_media=only_attend_immediate_media
        )
        self.lm.init_flamingo(media_token_id=media_token_id, dim_visual=dim, config=blocks)
        self.lm.requires_grad_(True)  # a fresh PaLM has everything to learn
        self.perceiver = resampler.PerceiverResampler(
            dim=dim, depth=perceiver_depth, dim_head=dim_head, heads=heads, num_latents=perceiver_num_latents,
            max_num_frames=max_video_frames or 0,
        )  # fmt: skip
        self.img_encoder = img_encoder

    def train_pictures_only(self, img_encoder: bool = False) -> "FlamingoPaLM":
        """Freeze the PaLM: from now on the resampler and the cross-attention train, as in the paper. (flamingo-pytorch
        does this inside of forward.)

        img_encoder: train it as well, end to end.
        """
        self.requires_grad_(False)
        self.perceiver.requires_grad_(True)
        for layer in self.lm._get_decoder_layers():
            layer.gated_cross_attn_layer.requires_grad_(True)
        if self.img_encoder is not None:
            self.img_encoder.requires_grad_(img_encoder)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "FlamingoPaLM":
        """A frozen encoder stays in eval mode, or its dropout and batch norms would make another one of it."""
        super().train(mode)
        if self.img_encoder is not None and not trains(self.img_encoder):
            self.img_encoder.eval()
        return self

    def forward(
        self, text: Tensor, images: Tensor | None = None, *, embeds: Tensor | None = None,
        time_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Token ids (B, T_txt) → logits (B, T_txt, num_tokens).

        Args:
            images: (B, T_img, C, H, W), or (B, T_img, F, C, H, W) for videos.
            embeds: in their place (B, T_img, v, dim) or (B, T_img, F, v, dim), as the encoder gives them.
            time_mask: (B, T_img) bool, which pictures are there: those of a text come first.

        Raises:
            ValueError: images and embeds are both given, there is no encoder for images or it gives no patch
                embeddings, a text mentions more pictures than it has, or time_mask is of another shape or has a hole.
        """
        if images is None and embeds is None:
            return self.lm(text, use_cache=False).logits
        if images is not None and embeds is not None:
            raise ValueError("give images or embeds, not both")
        features = self._encode(images) if embeds is None else embeds
        features = rearrange(features, "B T v d -> B T 1 v d") if features.ndim == 4 else features
        texts, pictures = features.shape[:2]
        index = torch.arange(texts * pictures, device=text.device).view(texts, pictures)
        if time_mask is not None:
            index = index.masked_fill(~_checked(time_mask.bool(), index), -1)
        with self.lm.conditioned(Images(self.perceiver(features.flatten(0, 1)), index)):
            return self.lm(text, use_cache=False).logits

    def _encode(self, images: Tensor) -> Tensor:
        """(B, T_img, C, H, W) or (B, T_img, F, C, H, W) → (B, T_img, F, v, dim)."""
        if self.img_encoder is None:
            raise ValueError("there is no img_encoder: give one to FlamingoPaLM, or embeds in place of images")
        images = rearrange(images, "B T C H W -> B T 1 C H W") if images.ndim == 5 else images
        features = self.img_encoder(images.flatten(0, 2))  # (B·T·F, v, dim)
        dim, shape = self.perceiver.dim, tuple(features.shape) if isinstance(features, Tensor) else type(features)
        if not (isinstance(features, Tensor) and features.ndim == 3 and features.shape[-1] == dim):
            raise ValueError(
                f"img_encoder must give patch embeddings (N, v, {dim}), not {shape} (towers of timm and open_clip pool "
                "them: load_vision_encoder reads the patches)"
            )
        return features.unflatten(0, images.shape[:3])


def _checked(time_mask: Tensor, index: Tensor) -> Tensor:
    """Raises ValueError unless both are (B, T_img) and the pictures of a text come first."""
    if time_mask.shape != index.shape:
        raise ValueError(f"time_mask must be {tuple(index.shape)}, as there are pictures, not {tuple(time_mask.shape)}")
    if (time_mask[:, 1:] & ~time_mask[:, :-1]).any():
        raise ValueError("time_mask has a hole: the pictures of a text come first, those that are missing last")
    return time_mask
