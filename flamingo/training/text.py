"""Next-token prediction on text alone: the language model before it becomes a Flamingo.

    python train.py --preset palm-text                      a small PaLM on the classroom's documents
    python train.py --preset palm-text --data book.txt      on any text file
    python train.py --lm runs/palm-text                     and then a Flamingo of it

What this file teaches: pretraining is the same loop with less in it. There is no picture and no prompt, every token is
a target, and rows of equal length are cut from the text, so that nothing is padded. What comes out is a folder that
transformers loads like any other (`AutoModelForCausalLM`), with the tokenizer it was trained with.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from flamingo import ranks
from flamingo.classroom.documents import document_row
from flamingo.config import TrainingOptions
from flamingo.errors import InputError
from flamingo.fast import device
from flamingo.fast.precision import autocast
from flamingo.files import write_json, writing
from flamingo.interop.backbones import load_tokenizer
from flamingo.model.palm import PaLMConfig, PaLMForCausalLM
from flamingo.presets import PRESETS
from flamingo.run_folder import METRICS, SUMMARY
from flamingo.training.checkpoint import save_by_its_own_library
from flamingo.training.optimizer import set_learning_rate

TOKENIZER = "asset:classroom/opt"  # of bytes, so it spells any text; --lm names another model's
HELD_OUT = 0.05  # of a text file: its end
VALIDATION_ROWS = 32
# What this loop reads of TrainingOptions; all else belongs to pictures, or to runs that can be resumed.
READ = {"preset", "data", "data_place", "out", "lm", "seed", "steps", "batch_size", "accumulate", "lr", "weight_decay",
        "warmup_steps", "clip_norm", "max_tokens", "eval_every", "device", "dtype"}  # fmt: skip


def train_on_text(options: TrainingOptions, folder: Path) -> None:
    """Train the preset's PaLM and write it into the run folder.

    Raises InputError for an option of pictures, or a text that cannot be read or is too short.
    """
    began = time.time()
    refuse_unread(options)
    if ranks.count() > 1:
        raise InputError(f"{options.preset} is trained by one process: start it without torchrun")
    torch.manual_seed(options.seed)
    place = device.pick_device(options.device)
    device.tune(place)
    tokenizer = load_tokenizer(options.lm or TOKENIZER)
    train, held_out = rows_of(options, tokenizer)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = PaLMForCausalLM(PaLMConfig(vocab_size=len(tokenizer), **special, **PRESETS[options.preset]["palm"]))
    model.to(place).train()
    dtype = options.dtype if options.dtype != "auto" else ("bfloat16" if place.type == "cuda" else "float32")
    adamw = make_optimizer(model, options)
    count = sum(p.numel() for p in model.parameters())
    print(f"training a PaLM of {count:,} parameters on {place} in {dtype}; run folder {folder}")
    with writing(folder / METRICS):
        metrics = open(folder / METRICS, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
    score = float("nan")
    bar = tqdm(range(options.steps), desc="train", unit="step")
    for step in bar:
        set_learning_rate(adamw, step, options)
        loss = torch.zeros((), device=place)
        for _ in range(options.accumulate):
            rows = next(train).to(place)  # (B, T)
            with autocast(place, dtype):
                part = model(rows, labels=rows, use_cache=False).loss / options.accumulate
            part.backward()
            loss += part.detach()
        entry = {"step": step + 1, "loss": loss.item(), "seconds": time.time() - began}
        if not torch.isfinite(loss):
            raise InputError(f"the loss of step {step + 1} is {entry['loss']}: start anew with a smaller --lr")
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if (step + 1) % options.eval_every == 0 or step + 1 == options.steps:
            entry["val_loss"] = score = validate(model, held_out, place, dtype)
        metrics.write(json.dumps(entry) + "\n")
        metrics.flush()
        bar.set_postfix(loss=f"{entry['loss']:.3f}", validation=f"{score:.3f}")
    metrics.close()
    save_by_its_own_library(folder, model.eval())
    save_by_its_own_library(folder, tokenizer)
    write_json(folder / SUMMARY, {
        "preset": options.preset, "seconds": time.time() - began, "steps": options.steps, "final_val_loss": score,
        "trainable_parameters": count, "frozen_parameters": 0, "device": str(place), "dtype": dtype,
        "seed": options.seed, "options": dataclasses.asdict(options),
    })  # fmt: skip
    print(f"validation loss {score:.3f} nats a token; a Flamingo of it: python train.py --lm {folder}")


def refuse_unread(options: TrainingOptions) -> None:
    """Raises InputError for an option that was given and would change nothing."""
    for entry in dataclasses.fields(options):
        if entry.name not in READ and getattr(options, entry.name) != entry.default:
            flag = "set" if entry.name == "overrides" else entry.name.replace("_", "-")
            raise InputError(f"--{flag} does nothing with --preset {options.preset}, which is trained on text")


def make_optimizer(model: PaLMForCausalLM, options: TrainingOptions) -> torch.optim.AdamW:
    """Matrices decay; norms and token embeddings, which are the head too, do not."""
    table = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p is not table]
    rest = [p for p in model.parameters() if p.ndim < 2 or p is table]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    for group in groups:
        group["lr"] = group["peak_lr"] = options.lr
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


@torch.no_grad()
def validate(model: PaLMForCausalLM, rows: Tensor, place: torch.device, dtype: str) -> float:
    """Mean loss, nats a token, of held-out rows (R, T)."""
    model.eval()
    with autocast(place, dtype):
        sums = [len(some) * model(some, labels=some, use_cache=False).loss.item() for some in rows.to(place).split(8)]
    model.train()
    return sum(sums) / len(rows)


# ------------------------------------------------------------------------------------------------------- the text
def rows_of(options: TrainingOptions, tokenizer: PreTrainedTokenizerBase) -> tuple[Iterator[Tensor], Tensor]:
    """(batches of training rows (B, T), held-out rows (R, T)), T = max_tokens. A function of the seed alone.

    Raises InputError for a file that is no text or is too short.
    """
    if options.data is None:
        test = _documents(tokenizer, options, "validation")
        held_out = torch.stack([next(test) for _ in range(VALIDATION_ROWS)])
        return _batches(_documents(tokenizer, options, "train"), options.batch_size), held_out
    ids, length = _read(Path(options.data), tokenizer), options.max_tokens
    first = int((1 - HELD_OUT) * len(ids))
    if len(ids) - first < length + 1:
        raise InputError(
            f"{options.data} is too short: {len(ids)} tokens, of which {HELD_OUT:.0%} are held out, and these must be "
            f"more than --max-tokens {length}"
        )
    held_out = ids[first:].unfold(0, length, length)[:VALIDATION_ROWS]
    return _batches(_windows(ids[:first], length, options.seed), options.batch_size), held_out


def _read(path: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data {path} cannot be read as a text file in UTF-8: {error}") from None
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _documents(tokenizer: PreTrainedTokenizerBase, options: TrainingOptions, split: str) -> Iterator[Tensor]:
    """Rows of the classroom's documents, one after the other, each row beginning with one."""
    index = 0
    while True:
        row, index = document_row(
            tokenizer, options.seed, split, index, options.max_tokens, include_novel=split == "train"
        )
        yield torch.tensor(row)


def _windows(ids: Tensor, length: int, seed: int) -> Iterator[Tensor]:
    """Rows cut anywhere."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        first = int(torch.randint(0, len(ids) - length + 1, (1,), generator=draw))
        yield ids[first : first + length]


def _batches(rows: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    while True:
        yield torch.stack([next(rows) for _ in range(size)])
