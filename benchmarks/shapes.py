"""What both sides are given: the same weights, the same texts, the same pictures."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BOS, PAD = 2, 1  # OPT's
DTYPES = ("float32", "bfloat16")  # what each side is tried in


@dataclass(frozen=True)
class Shape:
    """Sizes of the two backbones. The resampler (6 layers, 64 latents) and a cross-attention in every layer are what
    OpenFlamingo makes of them, without a choice."""

    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    words: int = 50265  # OPT's vocabulary; <|endofchunk|> and <image> follow
    dim: int = 768
    layers: int = 12
    heads: int = 12

    @property
    def eoc(self) -> int:
        return self.words

    @property
    def image(self) -> int:
        return self.words + 1


FULL = Shape()
QUICK = Shape(
    image_size=16, patch_size=8, vision_width=64, vision_layers=2, vision_heads=2, words=100, dim=64, layers=2, heads=2
)


def vision_tower(shape: Shape) -> nn.Module:
    """ViT-L-14 with random weights."""
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=shape.image_size, patch_size=shape.patch_size, width=shape.vision_width, layers=shape.vision_layers,
        heads=shape.vision_heads, mlp_ratio=4.0, output_dim=shape.vision_width,
    ).eval().requires_grad_(False)  # fmt: skip


def language_model(shape: Shape) -> nn.Module:
    """OPT-125m with random weights and room for the two added tokens."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=shape.words + 2, hidden_size=shape.dim, word_embed_proj_dim=shape.dim, ffn_dim=4 * shape.dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
    )  # fmt: skip
    return OPTForCausalLM(config)


@dataclass(frozen=True)
class Text:
    """Token ids, and the pictures of its <image> tokens."""

    pictures: tuple[int, ...]
    ids: tuple[int, ...]


def caption_length(rng: random.Random) -> int:
    """Tokens of a caption as people write them: 13 on average, most between 8 and 20, at most 32."""
    return min(32, max(4, round(rng.lognormvariate(2.514, 0.32))))


def make_text(
    shape: Shape,
    rng: random.Random,
    pictures: Sequence[int],
    tokens: int | None = None,
    words: Sequence[int] | None = None,
) -> Text:
    """<image>caption<|endofchunk|> for each picture, captions of random tokens, or of random ones among `words`."""
    ids = [BOS]
    for _ in pictures:
        caption = (rng.choice(words or range(4, shape.words)) for _ in range(tokens or caption_length(rng)))
        ids += [shape.image, *caption, shape.eoc]
    return Text(tuple(pictures), tuple(ids))


def make_texts(shape: Shape, examples: int, captions: int, distinct: int, seed: int = 0) -> list[list[Text]]:
    """`examples` pictures with `captions` texts each. Only `distinct` pictures are different ones: what a picture
    shows makes no difference to the time, and both sides read each as often as if all were."""
    rng = random.Random(f"texts {seed}")
    return [[make_text(shape, rng, [i % distinct]) for _ in range(captions)] for i in range(examples)]


def make_pictures(shape: Shape, count: int) -> Tensor:
    """(count, 1, 3, H, W)."""
    return torch.randn(count, 1, 3, shape.image_size, shape.image_size, generator=torch.Generator().manual_seed(1))


def pad(texts: Sequence[Text], side: str = "right") -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, T_txt)."""
    rows = [torch.tensor(text.ids) for text in texts]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side=side)
    return input_ids, (input_ids != PAD).long()
