"""The optimizer, its groups, and the learning rate of each step."""

import math

import torch
from torch import nn

from flamingo.config import TrainingOptions
from flamingo.model.vlm import VisionLanguageModel
from flamingo.training.muon import MuonAdamW

NO_DECAY = ("additional", "latents", "_embs", "query_tokens")  # parts of the names of matrices that do not decay
REOPENING, SLOWER = 20, 0.02  # steps; times the gates' learning rate from then on


def make_optimizer(model: VisionLanguageModel, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW over what trains and nothing else, in three groups, and more if the language model or its LoRA trains; or
    Muon for the matrices of what is new (`options.optimizer`).

    Only matrices decay: pulling gates, norms, latents or embeddings towards 0 would mean something. The gates learn
    much faster than the rest: tanh(0) = 0 lets through neither signal nor gradient, so until they open nothing else
    in the block gets a gradient, and at the common rate they hardly open. A language model that knows its language
    already learns more slowly than what is new (`lm_lr`).
    """
    gates, muon, matrices, rest, lm_matrices, lm_rest = [], [], [], [], [], []
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    own = {id(p) for part in (model.vision_tokenizer, *model.added_parts()) for p in part.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and not any(part in name for part in NO_DECAY)
        if name.endswith("_gate"):
            gates.append(parameter)
        elif id(parameter) in own and decays:
            (muon if options.optimizer == "muon" and parameter.ndim == 2 else matrices).append(parameter)
        elif id(parameter) in own:
            rest.append(parameter)
        else:
            (lm_matrices if decays and id(parameter) not in tables else lm_rest).append(parameter)
    groups = [
        {"params": muon, "lr": options.lr, "weight_decay": options.weight_decay, "muon": True},
        {"params": matrices, "lr": options.lr, "weight_decay": options.weight_decay},
        {"params": rest, "lr": options.lr, "weight_decay": 0.0},
        {"params": gates, "lr": options.gate_lr, "weight_decay": 0.0},
        {"params": lm_matrices, "lr": options.lm_lr, "weight_decay": options.weight_decay},
        {"params": lm_rest, "lr": options.lm_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    for group in groups:
        group["peak_lr"], group["is_gates"] = group["lr"], group["params"] is gates
    kind = MuonAdamW if muon else torch.optim.AdamW
    return kind(groups, betas=(0.9, 0.98), fused=True)


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Factor of the learning rate: linear warmup, then half a cosine down to a hundredth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, options: TrainingOptions, reopening: int | None = None
) -> None:
    """Give each group its peak rate times `warmup_cosine`; the gates SLOWER, once one of them was opened again."""
    opened = options.gate_reopening > 0 and reopening is not None and step >= reopening
    for group in optimizer.param_groups:
        slower = SLOWER if opened and group.get("is_gates") else 1.0
        group["lr"] = slower * group["peak_lr"] * warmup_cosine(step, options.steps, options.warmup_steps)


@torch.no_grad()
def open_gates(model: VisionLanguageModel, step: int, options: TrainingOptions, reopening: int | None = None) -> None:
    """In the warmup the attention gates stand where the schedule wants them, from 0 to `gate_opening`.

    At step 0 the model is the language model it was. But whether a layer ever looks is decided by its gate: while it
    is shut the block behind it gets no gradient, so the first layer whose gate happens to open learns everything and
    the others stay shut. Opened alike, all learn from the start; after the warmup the gates are trained as all else.

    The first one soon shuts itself again: what it sees is of no use as long as nothing is looked up in examples. So
    when that begins, at step `reopening`, it is opened once more, over REOPENING steps to `gate_reopening`.
    """
    gates = [block.attn_gate for block in model.cross_attention_blocks()]
    if options.gate_opening and step < options.warmup_steps:
        for gate in gates:
            gate.fill_(math.atanh(options.gate_opening * (step + 1) / options.warmup_steps))
    elif options.gate_reopening and reopening is not None and reopening <= step < reopening + REOPENING:
        gates[0].fill_(math.atanh(options.gate_reopening * (step - reopening + 1) / REOPENING))
