"""What one process of several does in tests/test_distributed.py: `torchrun several_processes.py OUT`.

A tiny model's step in two batches, with DistributedDataParallel and with its frozen weights split; the first process
writes gradients, losses and what was generated.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import EOC, FAST, IMAGE, PAD, TinyEncoder, assemble, tiny_flamingo, tiny_lm

from flamingo import ranks
from flamingo.fast import checkpointing
from flamingo.interop import compat
from flamingo.model.vlm import VisionLanguageModel
from flamingo.training import distributed

TEXTS, BATCHES = 7, 2
CASES = {
    "plain": {}, "own head, fast": {"fast": FAST, "tied": False},
    "spare rows, fast, checkpointed": {"fast": FAST, "vocab_size": 60},
    "stream": {"fusion_type": "language-stream", "tokenizer_type": "linear", "linear_num_patches": 4},
}  # fmt: skip


def model_of(case: str) -> VisionLanguageModel:
    settings = dict(CASES[case])
    torch.manual_seed(1)
    lm = tiny_lm(settings.pop("vocab_size", 50))
    if not settings.pop("tied", True):
        lm.lm_head.weight = torch.nn.Parameter(torch.randn_like(lm.lm_head.weight))
    if "fusion_type" in settings:
        return assemble(TinyEncoder(), lm, **settings)
    model = tiny_flamingo(lm=lm, **settings)
    if "checkpointed" in case:
        checkpointing.checkpoint_layers(model)
    return model


def batch(number: int) -> tuple[dict, int]:
    """A batch of texts of very different length; the first has nothing to predict. (inputs, labelled tokens of each)"""
    draw = torch.Generator().manual_seed(number)
    lengths = [0, 1, 9, 2, 5, 1, 8]
    ids = torch.full((TEXTS, 12), PAD)
    labels = torch.full((TEXTS, 12), -100)
    for row, length in enumerate(lengths):
        words = torch.randint(3, 50, (length,), generator=draw)
        ids[row, : length + 2] = torch.tensor([2, IMAGE, *words])
        if length:
            ids[row, length + 2] = EOC
            labels[row, 2 : length + 3] = ids[row, 2 : length + 3]
    pixels = torch.randn(TEXTS, 1, 1, 3, 8, 8, generator=draw)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels, "pixel_values": pixels}


def targets_of(inputs: dict) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def step(model: VisionLanguageModel, together: torch.nn.Module) -> torch.Tensor:
    """As the loop of train.py: the loss of a step, and its gradients in the model."""
    group = [{name: ranks.share(value) for name, value in batch(number).items()} for number in range(BATCHES)]
    (targets,) = ranks.total(sum(map(targets_of, group)))
    loss = torch.zeros(())
    for inputs in group:
        with distributed.adding_up(together, now=inputs is group[-1]):
            part = together(**inputs).loss * (targets_of(inputs) / targets)
            part.backward()
        loss += part.detach()
    ranks.add_up(loss)
    return loss


def gradients(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def generated(model: VisionLanguageModel) -> list:
    inputs = {name: value[:3, :2] for name, value in batch(0).items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.generate(**inputs, pixel_values=batch(0)["pixel_values"][:3], max_new_tokens=4).tolist()


def main(out: Path) -> None:
    found, facts = {}, {}
    with ranks.joined("several_processes.py"):
        for case in CASES:
            for shard in (False, True) if compat.can_shard() else (False,):
                model = model_of(case)
                frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
                together = distributed.for_training(model, torch.device("cpu"), shard)
                loss = step(model, together).item()
                title = f"{case} {'sharded' if shard else 'copied'}"
                found |= {f"{title} {name}": grad for name, grad in gradients(model).items()}
                own_bytes = 0
                for name, p in model.named_parameters():
                    if not p.requires_grad:
                        whole = p.full_tensor() if compat.is_sharded(p) else p
                        assert whole.equal(frozen[name]), name
                        own = p.to_local() if compat.is_sharded(p) else p
                        own_bytes += own.nbytes
                facts[title] = {"loss": loss, "own_bytes": own_bytes, "generated": generated(model)}
        if ranks.is_first():
            save_file(found, out / "gradients.safetensors")
            (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
