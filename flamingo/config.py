"""Every number that decides what is built and how it is trained: one dataclass for each part, read by that part alone.

    ModelConfig
      vision      VisionConfig           model/vision.py, interop/backbones.py
      tokenizer   ResamplerConfig        model/resampler.py
      qformer     QFormerConfig          model/qformer.py
      linear      LinearConfig           model/linear.py
      fusion      CrossAttentionConfig   model/cross_attention.py, model/language_model.py
      stream      StreamConfig           model/language_stream.py
      language    LanguageConfig         interop/backbones.py
    TrainingOptions                      train.py

How a field is named from outside: settings.py. (Imports nothing heavy.)
"""

import dataclasses
from dataclasses import dataclass, field


@dataclass
class VisionConfig:
    """The frozen encoder.

    name: in any spelling of interop/backbones.py. dim: d; found from the encoder when None, checked when given.
    feature_norm: patch features after the encoder's final norm, or before it, as open_flamingo and flamingo-mini were
        trained. class_token: it stands before the patches (flamingo-mini) or is left out.
    image_size: side of the pictures in pixels; the one it was trained with when None (timm's encoders take others).
    freeze: only True can be trained. fingerprint: of the weights the model was trained with; filled in by us.
    """

    name: str = "ViT-L-14-quickgelu:openai"
    dim: int | None = None
    feature_norm: bool = True
    class_token: bool = False
    image_size: int | None = None
    freeze: bool = True
    fingerprint: str | None = None


@dataclass
class ResamplerConfig:
    """The Perceiver resampler.

    depth: layers, each an attention and a feed-forward. dim_head, heads: attention geometry. num_latents: n.
    max_num_frames: frames with an embedding of their own (video), 0 for none. max_num_media: places of a picture in its
        text with an embedding of their own, 0 for none.
    ff_mult, act: width factor and activation (gelu, relu, sqrelu) of the feed-forward.
    init_gain, query_gain, latents_std: how the weights begin. The learned latents are the same for every picture, and
        what attention adds to them is what differs: at 1 and 1 at first a tenth of the whole (init_gain, latents_std).
        And attention begins all but uniform, so that every latent holds the same mean of all patches; with larger
        queries each begins with a look of its own (query_gain).
    standardize: shift and scale each channel of the features first (model/standardize.py).
    """

    depth: int = 6
    dim_head: int = 64
    heads: int = 8
    num_latents: int = 64
    max_num_frames: int = 0
    max_num_media: int = 0
    ff_mult: int = 4
    act: str = "gelu"
    init_gain: float = 1.0
    query_gain: float = 1.0
    latents_std: float = 1.0
    standardize: bool = False


@dataclass
class QFormerConfig:
    """The Q-Former of BLIP-2, with BLIP-2's numbers.

    depth, width, heads, ff_mult: of its transformer. every: which layers look at the picture (the first of each group).
    num_latents: n, its queries. dropout: while it trains. max_num_frames: frames with an embedding of their own
    (video), 0 for none. query_gain, standardize: as of the resampler.
    """

    depth: int = 12
    width: int = 768
    heads: int = 12
    ff_mult: int = 4
    every: int = 2
    num_latents: int = 32
    dropout: float = 0.1
    max_num_frames: int = 0
    query_gain: float = 1.0
    standardize: bool = False


@dataclass
class LinearConfig:
    """The linear projection.

    shuffle: so many by so many patches beside each other become one token; 1 leaves each patch a token.
    num_patches: v; found from the encoder when None. standardize: as of the resampler.
    """

    shuffle: int = 1
    num_patches: int | None = None
    standardize: bool = False


@dataclass
class BlockConfig:
    """A gated cross-attention block.

    dim_head, heads: attention geometry. ff_mult, act: width factor and activation of the feed-forward.
    init_gain: scales what the attention adds at first. tanh(gate) is at most 1, so a block whose output is small beside
        the language model's hidden states has little effect even with its gate wide open, until its weights have grown.
    """

    dim_head: int = 64
    heads: int = 8
    ff_mult: int = 4
    act: str = "gelu"
    init_gain: float = 1.0


@dataclass
class CrossAttentionConfig(BlockConfig):
    """Fusion by gated cross-attention: its blocks, and

    every, placement: which decoder layers get one (`layers_with_cross_attention`).
    only_immediate_media: a token sees the last picture before it (True), or all pictures before it.
    """

    every: int = 1
    placement: str = "near"
    only_immediate_media: bool = True

    def block_settings(self) -> dict:
        """The fields of `BlockConfig`."""
        return {block.name: getattr(self, block.name) for block in dataclasses.fields(BlockConfig)}


@dataclass
class StreamConfig:
    """Fusion by language stream.

    in_place: latents take the place of their <image> (open_flamingo), or stand right behind it.
    """

    in_place: bool = False


def layers_with_cross_attention(count: int, every: int, placement: str = "near") -> list[int]:
    """Which of `count` layers get a cross-attention before them.

    near: the first of each group of `every` (flamingo-mini); far: the last of each group (open_flamingo).
    """
    if every < 1:
        raise ValueError(f"xattn_every must be at least 1, not {every}")
    if placement not in ("near", "far"):
        raise ValueError(f"xattn_placement must be near or far, not {placement!r}")
    offset = 0 if placement == "near" else 1
    return [i for i in range(count) if (i + offset) % every == 0]


@dataclass
class LanguageConfig:
    """The language model.

    name: Hugging Face id or folder. dim: D; found from the model when None, checked when given.
    freeze: False trains its own weights too. lora_rank: a frozen one gets matrices of this rank beside its own, which
        train (LoRA); 0 for none. lora_dropout: of what they read, while they train.
    decoder_layers: where its layers are, if they cannot be found.
    fingerprint: of the weights the model was trained with; filled in by us.
    """

    name: str = "facebook/opt-125m"
    dim: int | None = None
    freeze: bool = True
    lora_rank: int = 0
    lora_dropout: float = 0.0
    decoder_layers: str | None = None
    fingerprint: str | None = None


@dataclass
class ModelConfig:
    """The architecture. tokenizer_type and fusion_type: names in the tables of model/build.py; they decide which of the
    parts `tokenizer`, `qformer`, `linear`, `fusion` and `stream` are built (`PART_OF`)."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    tokenizer: ResamplerConfig = field(default_factory=ResamplerConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    fusion: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    tokenizer_type: str = "perceiver"
    fusion_type: str = "cross-attention"

    def is_built(self, part: str) -> bool:
        """Is there such a part in a model of this architecture?"""
        setting, name = PART_OF.get(part, (None, None))
        return setting is None or getattr(self, setting) == name


# A part that not every architecture has → the setting that decides, and its value.
PART_OF = {
    "tokenizer": ("tokenizer_type", "perceiver"), "qformer": ("tokenizer_type", "qformer"),
    "linear": ("tokenizer_type", "linear"), "fusion": ("fusion_type", "cross-attention"),
    "stream": ("fusion_type", "language-stream"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- training
def option(default, text: str):
    """A dataclass field with the help line of its command-line option."""
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingOptions:
    """The options of train.py. A preset sets some of the defaults."""

    preset: str = option(
        "classroom",
        "which recipe to train: classroom, photos, opt-125m, gpt2 or medical; classroom and opt-125m also with "
        "-kosmos, -blip, -llava or -llava-lora, photos with -flamingo; palm-text, a language model on text alone",
    )
    data: str | None = option(
        None,
        "what to train on: a hub name, a folder of captioned pictures, a .jsonl, .csv or .parquet file, or tar files "
        "'shards/{000..099}.tar'; several with weights, --data a:0.7 --data b:0.3, are mixed",
    )
    stream: bool = option(
        False, "read the data as they come, without looking at all of them before: a hub name or Parquet files"
    )
    image_column: str | None = option(None, "the data's picture column, if it cannot be found")
    caption_columns: str | None = option(None, "the data's caption columns, comma separated, if they cannot be found")
    allow_outside: bool = option(False, "let the data name files outside of its own folder")
    out: str | None = option(None, "run folder to write; a new one under runs/ if not given")
    resume: str | None = option(
        None, "go on with the unfinished run in this folder (that of --out or the preset if none is named)"
    )
    seed: int = option(0, "random seed of weights, order and (classroom) scenes")
    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(64, "examples per step (an example: a picture with its captions, or a document)")
    accumulate: int = option(1, "batches whose gradients are added up before each optimizer step")
    optimizer: str = option(
        "adamw", "adamw, or muon for the matrices of the new parts and AdamW for the rest (flamingo/training/muon.py)"
    )
    lr: float = option(1e-3, "peak learning rate of all that trains but the gates")
    gate_lr: float = option(0.05, "peak learning rate of the tanh gates")
    lm_lr: float = option(1e-4, "peak learning rate of the language model, where its own weights or a LoRA train")
    gate_opening: float = option(
        0.0,
        "open the attention gates to this value over the warmup, whatever their gradient (0: they learn from 0)",
    )
    gate_reopening: float = option(
        0.0,
        "open the first attention gate to this value again when a curriculum comes to what is looked up in examples "
        "(classroom); from then on the gates learn 50 times more slowly",
    )
    where_weight: float = option(
        0.0,
        "weight of a loss on the first look alone, which is asked where things stand (classroom only)",
    )
    weight_decay: float = option(0.05, "weight decay of the matrices; nothing else decays")
    warmup_steps: int = option(30, "optimizer steps of linear warmup, before the cosine")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    skip_bad_steps: int = option(
        0, "steps that may be left out because their loss or gradient is not finite; one more ends the run"
    )
    captions_per_picture: int = option(
        8, "captions of a picture in one step, at most; those that a picture has more come in other steps"
    )
    max_tokens: int = option(128, "longest text in tokens; the rest is cut")
    eval_every: int = option(100, "optimizer steps between validations")
    save_every: int = option(100, "optimizer steps between the points a killed run can be resumed from")
    eval_batches: int = option(4, "batches of a validation")
    patience: int = option(
        0, "stop after so many validations without a lower loss and keep the best weights; 0: all steps, the last ones"
    )
    patches: float = option(
        1.0,
        "share of a picture's cached patches that a step sees, drawn anew each time, so that few pictures are not "
        "learned by heart",
    )
    cache: str = option(
        "~/.cache/flamingo", "folder for features of a captioned set's pictures, encoded once (size is said); or off"
    )
    workers: int = option(0, "processes that prepare pictures; 0 prepares them in the training process")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, …")
    dtype: str = option("auto", "precision: float32, bfloat16 (autocast), or auto, which measures the faster one")
    compile: bool = option(
        False, "compile the resampler and the cross-attention (torch.compile; the first steps are slow)"
    )
    shard: bool = option(
        False,
        "of several processes (torchrun) each keeps a piece of the frozen weights only, in place of a copy (FSDP2)",
    )
    gradient_checkpointing: bool = option(
        False, "compute the layers' inner values twice instead of keeping them: less memory, a third more time"
    )
    lm: str | None = option(None, "language model, Hugging Face id or folder, in place of the preset's")
    clip_model_type: str | None = option(
        None, "vision encoder, in place of the preset's (see flamingo/interop/backbones.py)"
    )
    overrides: list[str] | None = option(  # noqa: RUF009
        None,
        "a field of the architecture, PART.FIELD=VALUE such as fusion.heads=4 (flamingo/config.py); may be repeated",
    )
    log: str | None = option(None, "also write losses, gates and samples for tensorboard: --log tensorboard")
    plain: bool = option(False, "leave out flamingo/fast: the model as flamingo/model has it, slower, the same numbers")
    data_place: str | None = None  # no option: where `data` was when the run began, whatever it is called from later
