"""Recipes: which backbones, which shape, which training. (Imports nothing heavy: `--help` needs it.)"""

import dataclasses
import os
from collections.abc import Callable

from flamingo.config import PART_OF, ModelConfig, TrainingOptions
from flamingo.errors import InputError
from flamingo.limits import checked, in_range, quoted
from flamingo.settings import parse_setting, with_settings

_LARGE_TRAINING = {
    "data": "jxie/flickr8k", "steps": 3000, "batch_size": 32, "lr": 3e-4, "gate_lr": 0.01, "warmup_steps": 200,
    "eval_every": 250, "workers": 4, "max_tokens": 64,
}  # fmt: skip

# The architectures of open_flamingo's modeling package, and what trains in each beside the added tokens: tokenizer and
# cross-attention (flamingo, the default), everything but the vision encoder (kosmos), the tokenizer (blip). And LLaVA's
# first stage, in which only the projection trains, and the same with LoRA beside the language model.
ARCHITECTURES = {
    "kosmos": {"fusion_type": "language-stream", "language.freeze": False},
    "blip": {"fusion_type": "language-stream", "tokenizer_type": "qformer"},
    "llava": {"fusion_type": "language-stream", "tokenizer_type": "linear", "linear.shuffle": 2},
}
ARCHITECTURES["llava-lora"] = ARCHITECTURES["llava"] | {"language.lora_rank": 8}

# What a preset changes: in ModelConfig ("model", by dotted name) and in TrainingOptions ("training").
PRESETS = {
    "classroom": {
        "model": {
            "language.name": "asset:classroom/opt", "vision.name": "asset:classroom/clip",
            "tokenizer.depth": 2, "tokenizer.heads": 6, "tokenizer.dim_head": 32, "tokenizer.num_latents": 16,
            "tokenizer.ff_mult": 2, "tokenizer.init_gain": 10.0, "tokenizer.query_gain": 3.0,
            "tokenizer.latents_std": 0.5,
            "fusion.heads": 6, "fusion.dim_head": 32, "fusion.ff_mult": 2, "fusion.init_gain": 5.0,
            "fusion.every": 3,  # of four layers the first and the last: assets/classroom/EXPERIMENTS.md
        },
        "training": {
            "steps": 920, "batch_size": 32, "optimizer": "muon", "lr": 2e-3, "gate_opening": 0.3,
            "gate_reopening": 0.2, "where_weight": 0.25, "max_tokens": 192, "eval_every": 100, "eval_batches": 4,
        },
    },
    # With 500 photographs a map from patches to words, and a LoRA, learn more than cross-attention does, whose fresh
    # layers have much to learn before they say anything: assets/photos/EXPERIMENTS.md has both.
    "photos": {
        "model": {
            "language.name": "smollm2-135m", "vision.name": "efficientnet-lite2",
            "fusion_type": "language-stream", "tokenizer_type": "linear", "linear.shuffle": 3,
            "linear.standardize": True, "language.lora_rank": 8,
        },
        "training": {
            "steps": 120, "batch_size": 4, "accumulate": 2, "lr": 5e-4, "lm_lr": 5e-4, "weight_decay": 0.1,
            "warmup_steps": 20, "max_tokens": 64, "eval_every": 20, "save_every": 20, "eval_batches": 8, "patience": 3,
        },
    },
    "photos-flamingo": {
        "model": {
            "language.name": "smollm2-135m", "vision.name": "efficientnet-lite2",
            "tokenizer.depth": 2, "tokenizer.num_latents": 32, "fusion.every": 3,
        },
        "training": {
            "steps": 130, "batch_size": 16, "lr": 5e-4, "gate_lr": 0.02, "warmup_steps": 20, "max_tokens": 64,
            "eval_every": 26, "save_every": 26, "patience": 2,
        },
    },
    "opt-125m": {
        "model": {
            "language.name": "facebook/opt-125m", "vision.name": "ViT-L-14-quickgelu:openai",
            "tokenizer.max_num_frames": 4,
        },
        "training": _LARGE_TRAINING,
    },
    "gpt2": {
        "model": {
            "language.name": "gpt2", "vision.name": "openai/clip-vit-base-patch32", "tokenizer.max_num_frames": 4,
        },
        "training": _LARGE_TRAINING,
    },
    "medical": {  # chest X-rays and their reports; what it must not be used for: README
        "model": {
            "language.name": "microsoft/biogpt",
            "vision.name": "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
            "tokenizer.max_num_frames": 4,
        },
        "training": {name: value for name, value in _LARGE_TRAINING.items() if name != "data"} | {"max_tokens": 160},
    },
}  # fmt: skip

# A language model on text alone (training/text.py), of the size of the classroom's OPT. "palm": fields of PaLMConfig.
PRESETS["palm-text"] = {
    "model": {},
    "palm": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "head_dim": 32, "ff_mult": 4},
    "training": {"steps": 900, "batch_size": 32, "max_tokens": 192, "lr": 2e-3, "warmup_steps": 50},
}


def is_text_only(preset: str) -> bool:
    return "palm" in PRESETS[preset]


def language_model_on_hub(options: TrainingOptions) -> str | None:
    """The preset's language model, if it is to be had from a hub only, and no other one is named."""
    own, used = PRESETS[options.preset]["model"].get("language.name"), model_config(options).language.name
    return own if own == used and not options.preset.startswith(("classroom", "photos")) else None


def _with_architecture(preset: str, architecture: str, model: dict | None = None, training: dict | None = None) -> None:
    """The preset's backbones and data under another architecture, as a preset of its own."""
    base, built = PRESETS[preset], ModelConfig(**{k: v for k, v in ARCHITECTURES[architecture].items() if "." not in k})
    kept = {path: value for path, value in base["model"].items() if built.is_built(path.partition(".")[0])}
    PRESETS[f"{preset}-{architecture}"] = {
        "model": kept | ARCHITECTURES[architecture] | (model or {}), "training": base["training"] | (training or {}),
    }  # fmt: skip


_NO_LOOKS = {"gate_opening": 0.0, "gate_reopening": 0.0, "where_weight": 0.0}  # where there is no cross-attention
# At 1e-4 some seeds do not find a name again that two examples gave; at 5e-4 names it was not shown are forgotten.
_with_architecture("classroom", "kosmos", {"tokenizer.standardize": True}, _NO_LOOKS | {"lm_lr": 2e-4})
# BLIP reads what it sees later than the others do, and with Muon not as well: assets/classroom/EXPERIMENTS.md.
_with_architecture("classroom", "blip", {
    "qformer.depth": 4, "qformer.width": 192, "qformer.heads": 6, "qformer.ff_mult": 2, "qformer.num_latents": 16,
    "qformer.dropout": 0.0, "qformer.query_gain": 18.0,
}, _NO_LOOKS | {"optimizer": "adamw", "steps": 1080})  # fmt: skip
_with_architecture("classroom", "llava", training=_NO_LOOKS)
_with_architecture("classroom", "llava-lora", training=_NO_LOOKS | {"lm_lr": 1e-3})
for _architecture in ARCHITECTURES:
    _with_architecture("opt-125m", _architecture, training={"lm_lr": 2e-4 if "lora" in _architecture else 2e-5})


def model_config(options: TrainingOptions) -> ModelConfig:
    """The preset's model, then the backbones that were named, then every --set."""
    settings = dict(PRESETS[options.preset]["model"])
    for option, path in (("lm", "language.name"), ("clip_model_type", "vision.name")):
        if getattr(options, option):
            settings[path] = getattr(options, option)
    named = dict(map(parse_setting, options.overrides or ()))
    config = with_settings(ModelConfig(), settings | named)
    for path in named:
        part = path.partition(".")[0]
        if not config.is_built(part):
            setting, value = PART_OF[part]
            raise InputError(
                f"--set {path}: this model has no such part, for its {setting} is {getattr(config, setting)!r}, not "
                f"{value!r}"
            )
    return config


def training_options(values: dict, flag: Callable[[str], str] = str) -> TrainingOptions:
    """Options from outside, each of its type and in its range; what is not named has its default.

    flag: an option's name → as the user wrote it. Raises InputError for a mistake, one in --set included.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(TrainingOptions)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise InputError(f"there is no option {quoted(unknown[0])} (of a newer version of this repository?)")
    options = TrainingOptions(**{name: checked(flag(name), value, fields[name].type, name)
                                 for name, value in values.items()})  # fmt: skip
    if options.preset not in PRESETS:
        raise InputError(f"unknown preset {quoted(options.preset)}: choose one of {', '.join(PRESETS)}")
    if options.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"{flag('dtype')} must be auto, float32 or bfloat16, not {quoted(options.dtype)}")
    if options.optimizer not in ("adamw", "muon"):
        raise InputError(f"{flag('optimizer')} must be adamw or muon, not {quoted(options.optimizer)}")
    for name in ("data", "out", "resume", "lm"):
        if (value := getattr(options, name)) and value.startswith("~"):  # a shell expands no `--out=~/run`
            setattr(options, name, os.path.expanduser(value))
    options.cache = "off" if options.cache.lower() == "off" else options.cache
    reads = options.steps * options.accumulate * options.batch_size
    in_range(" times ".join(map(flag, ("steps", "accumulate", "batch_size"))), reads, 1, 10**15)
    return options


def must_be_read(options: TrainingOptions, flag: Callable[[str], str]) -> None:
    """Raises InputError for an option that was given where it changes nothing, or cannot be done. (Of a command line: a
    run folder that was trained with one is still read.)"""
    if is_text_only(options.preset):
        return  # training/text.py says what it reads
    config, defaults = model_config(options), TrainingOptions()

    def is_given(name: str) -> bool:
        usual = PRESETS[options.preset]["training"].get(name, getattr(defaults, name))
        return getattr(options, name) not in (usual, 0)

    for name in filter(is_given, ("gate_opening", "gate_reopening", "gate_lr", "where_weight")):
        if config.fusion_type == "language-stream":
            raise InputError(f"{flag(name)} is about cross-attention, and a {config.fusion_type} has none")
    own_scenes = options.data is None and options.preset.startswith("classroom")
    for name in filter(is_given, ("gate_reopening", "where_weight")):
        if not own_scenes:
            raise InputError(
                f"{flag(name)} is for the classroom's own scenes: only of these is known where things stand"
            )
    if is_given("lm_lr") and config.language.freeze and not config.language.lora_rank:
        raise InputError(
            f"{flag('lm_lr')} does nothing while the language model is frozen: --set language.freeze=false trains it, "
            "--set language.lora_rank=8 a LoRA beside it"
        )
    if is_given("patches"):
        if own_scenes or options.stream or options.cache == "off":
            raise InputError(f"{flag('patches')} draws from cached features, and this run has none")
        if config.tokenizer_type == "linear" and config.linear.shuffle > 1:
            raise InputError(
                f"{flag('patches')}: linear.shuffle joins neighbouring patches, so it needs all of them in their places"
            )
