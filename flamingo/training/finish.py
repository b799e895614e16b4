"""The end of a run: the weights, a look at what the model has become, and a summary."""

from collections.abc import Sequence
from pathlib import Path

import torch

from flamingo import ranks
from flamingo.config import ModelConfig
from flamingo.data.processor import FlamingoProcessor
from flamingo.evaluation.first_look import first_look
from flamingo.evaluation.test_set import Item
from flamingo.fast.precision import autocast
from flamingo.files import write_json
from flamingo.interop.selfcheck import check_decoding
from flamingo.model.vlm import VisionLanguageModel
from flamingo.run_folder import METRICS, SUMMARY, remove_what_a_finished_run_needs_no_more
from flamingo.training.card import write_card
from flamingo.training.checkpoint import save_model
from flamingo.training.log import RunLog


def finish(
    folder: Path, model: VisionLanguageModel, processor: FlamingoProcessor, config: ModelConfig,
    items: Sequence[Item], log: RunLog, counts: tuple[int, int], device: torch.device, dtype: str,
) -> None:  # fmt: skip
    """Save, check that decoding is right, caption the validation items, and report.

    items: validation pictures with their captions. counts: parameters that train, and frozen ones.
    Raises InputError when these libraries would make captions nonsense; the weights are safe by then.
    """
    if ranks.is_first():
        save_model(folder, model, processor, config)
    precision = lambda: autocast(device, dtype)  # noqa: E731
    check_decoding(model, precision)
    look = first_look(model, processor, items, precision)
    summary = log.summary(device, dtype) | {
        "trainable_parameters": counts[0],
        "frozen_parameters": counts[1],
        "validation_captions": look and look.facts,
    }
    if not ranks.is_first():
        return
    write_card(folder, summary)
    write_json(folder / SUMMARY, summary)  # last: a run folder with a summary is a whole one
    remove_what_a_finished_run_needs_no_more(folder)
    if summary["steps_left_out"]:
        print(f"steps left out: {summary['steps_left_out']} (see {folder}/{METRICS})")
    print(
        f"trained for {summary['seconds']:.0f} s, weights of step {summary['steps']}: validation loss "
        f"{summary['final_val_loss']:.3f} with the picture, {summary['final_val_loss_blind']:.3f} without\n"
        + (f"{look.sentence}\n" if look else "")
        + f"look at {folder}/samples.png, then: python evaluate.py {folder}"
    )
    if device.type == "cuda" and log.options.preset == "classroom":
        free, whole = (number / 2**30 for number in torch.cuda.mem_get_info(device))
        print(
            f"this GPU has {free:.0f} of {whole:.0f} GiB free: `python train.py --preset opt-125m` would need about 8 "
            "(an estimate)"
        )
