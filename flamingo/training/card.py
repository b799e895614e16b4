"""The model card of a run folder: README.md, with the metadata that a hub reads.

What this file teaches: a page about a model should say what it was made of, on what, how well it does, and what a model
that does not look would get on the same test. All of that stands in the folder already (config.json, summary.json,
evaluation.json); the card only puts it into sentences, and leaves out what is not known.
"""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from flamingo.config import ModelConfig
from flamingo.evaluation.controls import SHOWN_INSTEAD
from flamingo.files import read_json, write_atomically
from flamingo.interop.packaged import LANGUAGE_MODELS, VISION_ENCODERS
from flamingo.run_folder import SUMMARY, read_summary
from flamingo.training.checkpoint import read_config

CARD = "README.md"
OURS = "<!-- written by flamingo; a card without this line is left alone -->"
SHOWN = ("exact_match", "cider_d", "bleu_4", "rouge_l")  # of the metrics
TOLD = {"preset", "seed", "steps", "captions_seen", "seconds", "device", "dtype", "trainable_parameters",
        "frozen_parameters", "final_val_loss", "final_val_loss_blind"}  # fmt: skip
USE = """```python
from PIL import Image
from flamingo import FlamingoModel

model = FlamingoModel.from_pretrained("{name}")
print(model.generate_captions(model.processor, images=[Image.open("picture.jpg")]))
```"""


def write_card(folder: Path, summary: dict | None = None) -> None:
    """README.md of a run folder, from what lies in it; one that somebody else has written is left alone.

    summary: what summary.json will hold, if that is not written yet. Raises InputError for a damaged file.
    """
    if summary is None and (folder / SUMMARY).is_file():
        summary, _ = read_summary(folder)
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").is_file() else None
    write_card_text(folder, card_text(folder.name, read_config(folder), summary, evaluation))


def write_card_text(folder: Path, text: str) -> None:
    """Unless there is a card without our line."""
    file = folder / CARD
    if not file.is_file() or OURS in file.read_text(encoding="utf-8", errors="replace"):
        write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


def card_text(name: str, config: ModelConfig, summary: dict | None = None, evaluation: dict | None = None) -> str:
    """The card: metadata, what it is, how to use it, its training, its scores beside their controls."""
    parts = [
        f"---\n{_metadata(name, config, summary, evaluation).to_yaml()}\n---\n{OURS}",
        f"# {name}\n\nA Flamingo: the language model `{config.language.name}` looks at pictures through the vision "
        f"encoder `{config.vision.name}`. {_what_was_trained(config)}",
        USE.format(name=name),
    ]
    if summary and summary.keys() >= TOLD:
        parts.append(f"## Training\n\n{_training(summary)}")
    if evaluation:
        parts.append(f"## Scores\n\n{_scores(evaluation)}")
    return "\n\n".join(parts) + "\n"


def _what_was_trained(config: ModelConfig) -> str:
    """And what is therefore in the repository."""
    trained = [f"the {config.tokenizer_type} vision tokenizer"]
    if config.fusion_type == "cross-attention":
        trained.append("the cross-attention")
    if config.language.lora_rank:
        trained.append(f"a LoRA of rank {config.language.lora_rank} beside the language model")
    trained.append("two added tokens")
    if not config.language.freeze:
        return (
            f"The encoder is frozen; what was trained is {', '.join(trained)} and the language model, whose weights "
            "are in this repository too. The encoder is found by its name."
        )
    return (
        f"Both are frozen; what was trained is {', '.join(trained[:-1])} and {trained[-1]}. Only that is in this "
        "repository: the backbones are found by their names."
    )


def _metadata(name: str, config: ModelConfig, summary: dict | None, evaluation: dict | None) -> ModelCardData:
    backbones = [each for each in (config.language.name, config.vision.name) if _is_on_a_hub(each)]
    options = (summary or {}).get("options", {})
    data = options.get("data")
    results = [
        EvalResult(
            task_type="image-to-text", dataset_type=_shown(str(evaluation.get("data"))),
            dataset_name=_shown(str(evaluation.get("data"))),
            dataset_split=evaluation.get("split"), metric_type=metric, metric_value=held["value"], metric_name=metric,
        )
        for metric, held in (evaluation or {}).get("metrics", {}).items()
        if metric in SHOWN
    ]  # fmt: skip
    return ModelCardData(
        library_name="flamingo-classroom", pipeline_tag="image-text-to-text", base_model=backbones or None,
        tags=["flamingo", "vision-language-model", "image-captioning"],
        datasets=[data] if data and not options.get("data_place") and _is_an_id(data) else None,
        model_name=name if results else None, eval_results=results or None,
    )  # fmt: skip


def _is_on_a_hub(name: str) -> bool:
    """Neither one of ours, nor a package's, nor a folder, nor open_clip's `name:tag`."""
    return ":" not in name and name not in LANGUAGE_MODELS | VISION_ENCODERS and not Path(name).exists()


def _is_an_id(data: str) -> bool:
    """As a hub has it, `name` or `owner/name`."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data) is not None


def _shown(data: str) -> str:
    """An id; of somebody's own folders and files the last names alone."""
    return data if _is_an_id(data) else " + ".join(Path(each.strip()).name for each in data.split(" + "))


def _data_name(options: dict) -> str:
    """What it was trained on."""
    if not options.get("data"):
        return "classroom"
    return Path(options["data"]).name if options.get("data_place") else _shown(options["data"])


def _training(summary: dict) -> str:
    named = _data_name(summary.get("options", {}))
    data = "drawn classroom scenes (OpenMoji, CC BY-SA 4.0)" if named == "classroom" else f"`{named}`"
    return (
        f"Preset `{summary['preset']}`, seed {summary['seed']}, on {data}: {summary['steps']:,} steps, "
        f"{summary['captions_seen']:,} captions, {summary['seconds'] / 60:.1f} minutes on {summary['device']} in "
        f"{summary['dtype']}. {summary['trainable_parameters']:,} parameters were trained beside "
        f"{summary['frozen_parameters']:,} frozen ones. Validation loss {summary['final_val_loss']:.3f} nats per token "
        f"with the picture, {summary['final_val_loss_blind']:.3f} without."
    )


def _scores(evaluation: dict) -> str:
    """A table: each metric, and what the controls get."""
    controls = {name: held for name, held in evaluation.get("controls", {}).items() if name in SHOWN_INSTEAD and held}
    rows = [
        f"On {evaluation['n']} pictures of {_shown(str(evaluation.get('data')))} ({evaluation.get('split')}).\n",
        "| " + " | ".join(["", "this model (95 %)", *(SHOWN_INSTEAD[name] for name in controls)]) + " |",
        "|---" * (2 + len(controls)) + "|",
    ]
    for metric, held in evaluation.get("metrics", {}).items():
        if metric in SHOWN:
            own = f"{held['value']:.3f} ({held['low']:.3f} to {held['high']:.3f})"
            beside = [f"{c[metric]['value']:.3f}" if metric in c else "–" for c in controls.values()]
            rows.append("| " + " | ".join([metric, own, *beside]) + " |")
    return "\n".join(rows) + (f"\n\n{evaluation['verdict']}" if evaluation.get("verdict") else "")
