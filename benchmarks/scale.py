"""Several processes: how many captions a second they train, what they send each other, and where that would end.

    python -m benchmarks.scale [--json FILE]

The default run's model makes the same steps with 1, 2, … processes on this machine's CPU, with its frozen weights
copied and split. What is sent and what is kept is counted and held against a model of it (`sent_bytes`,
`fetched_bytes`). The same model then says what a step would take on H100s, under the assumptions below, none of which
was measured.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.timing import Spread
from flamingo import ranks
from flamingo.classroom.examples import ClassroomScenes
from flamingo.config import TrainingOptions
from flamingo.data.batches import Collate, batches
from flamingo.figures.run_figures import plt
from flamingo.interop import compat
from flamingo.interop.backbones import build_flamingo
from flamingo.model.cross_attention import GatedCrossAttentionBlock
from flamingo.model.resampler import PerceiverResampler
from flamingo.presets import model_config
from flamingo.training import distributed

PROCESSES = (1, 2, 4)
BATCH = 24  # examples a step, of all processes together

# ------------------------------------------------------------------------------- assumptions about H100s (SXM, 80 GB)
FLOPS = 989e12 * 0.4  # of bfloat16 products a second, and the share of them that trainings usually reach
IN_NODE, BETWEEN = 450e9, 50e9  # bytes a second and direction: NVLink of 8 GPUs; one 400 Gbit/s link a GPU
TEXTS, TOKENS = 128, 32  # texts a GPU and step, one caption of one picture each; tokens of a text
PATCHES, LATENTS, ENCODER = 256, 64, 304e6  # ViT-L-14, encoded anew for each picture, and the resampler's latents
GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Size:
    """A language model: layers of width D, of 12 D² weights each, and a vocabulary. every: of its cross-attention."""

    name: str
    layers: int
    width: int
    vocabulary: int = 50272
    every: int = 1

    @property
    def frozen(self) -> float:
        return self.layer * self.layers + self.vocabulary * self.width

    @property
    def layer(self) -> float:
        return 12 * self.width**2

    def trained(self) -> tuple[int, int]:
        """Weights of all cross-attention blocks, and of the resampler: counted on modules that are never made."""
        with torch.device("meta"):
            block = GatedCrossAttentionBlock(dim=self.width, dim_visual=1024)
            resampler = PerceiverResampler(dim=1024, num_latents=LATENTS)
        count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
        return count(block) * len(range(0, self.layers, self.every)), count(resampler)


SIZES = (Size("OPT-125m", 12, 768), Size("3 B", 32, 2688, every=2), Size("9 B", 44, 4096, every=4))


# ------------------------------------------------------------------------------------------------------ the model
def sent_bytes(trained: float, processes: int) -> float:
    """What one process sends to add up the gradients in a ring: twice (N - 1)/N of them, in float32."""
    return 2 * (processes - 1) / processes * 4 * trained


def fetched_bytes(frozen_bytes: float, processes: int) -> float:
    """What one process fetches of split frozen weights: the others' pieces, forward and again backward."""
    return 2 * (processes - 1) / processes * frozen_bytes


def predicted(size: Size, gpus: int, shard: bool) -> dict:
    """Seconds of a step, tokens a second, bytes of a GPU, days for 100 million captions."""
    blocks, resampler = size.trained()
    trained, frozen = blocks + resampler, 2.0 * (size.frozen + ENCODER)  # bytes, in bfloat16
    tokens = TEXTS * TOKENS
    # Forward and, for what is frozen, back through it; what trains needs its own gradient as well.
    flops = tokens * (4 * size.frozen + 6 * blocks)
    flops += TEXTS * (2 * ENCODER * PATCHES + 6 * resampler * (PATCHES + LATENTS) / 2)
    speed = IN_NODE if gpus <= 8 else BETWEEN
    sent = sent_bytes(trained, gpus) + (fetched_bytes(frozen, gpus) if shard else 0.0)
    step = max(flops / FLOPS, sent / speed)  # sending goes on while the next layer is worked out
    kept = (
        2.0 * tokens * size.width * size.layers + 20.0 * tokens * size.width * 2
    )  # --gradient-checkpointing; one layer
    whole = 2.0 * (size.layer * 2 + size.vocabulary * size.width)  # two layers and the table, while they are needed
    memory = 16.0 * trained + kept + (frozen / gpus + whole if shard else frozen)  # 16: weight, gradient, AdamW's two
    captions = TEXTS * gpus / step
    return {"gpus": gpus, "shard": shard, "compute": flops / FLOPS, "communication": sent / speed, "memory": memory,
            "tokens_a_second": captions * TOKENS, "days": 1e8 / captions / 86400, "trained": trained}  # fmt: skip


# --------------------------------------------------------------------------------------------------- measurements
def one_process(out: Path, rounds: int) -> None:
    """A process of several (or the only one): the same steps, timed and counted. The first writes what it found."""
    torch.set_num_threads(1)
    with ranks.joined("benchmarks.scale"):
        found = {}
        for how in ("copied", "sharded") if ranks.count() > 1 and compat.can_shard() else ("copied",):
            torch.manual_seed(0)
            model, processor, _ = build_flamingo(model_config(TrainingOptions()))
            model.train()
            frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            together = distributed.for_training(model, torch.device("cpu"), shard=how == "sharded")
            own = [p.to_local() if compat.is_sharded(p) else p for p in model.parameters() if not p.requires_grad]
            found[how] = {"frozen": frozen, "kept": sum(p.nbytes for p in own), "trained": trained,
                          "captions_a_second": [], "wire": []}  # fmt: skip
            examples, collate = ClassroomScenes("train"), Collate(processor, 192)
            steps = list(batches(examples, collate, batch_size=BATCH, steps=rounds + 1, seed=0))
            for number, batch in enumerate(steps):
                (captions,) = ranks.total(len(batch.input_ids))
                began, before = time.perf_counter(), on_the_wire()
                together(**batch.inputs()).loss.backward()
                ranks.total(0)  # all are done
                if number:  # the first one settles in
                    found[how]["captions_a_second"].append(captions / (time.perf_counter() - began))
                    found[how]["wire"].append(on_the_wire() - before)
                model.zero_grad()
        if ranks.is_first():
            out.write_text(json.dumps(found))


def on_the_wire() -> int:
    """Bytes that this machine has sent to itself, of all programs; 0 where there is no such counter."""
    counters = Path("/proc/net/dev")
    lines = counters.read_text().splitlines() if counters.exists() else []
    return sum(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def measure(rounds: int, processes: tuple[int, ...]) -> dict:
    """Number of processes → what its first process found."""
    found = {}
    for count in processes:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--module"]
            command = [sys.executable, "-m", *(launcher if count > 1 else []), "benchmarks.scale"]
            worker = ["--rounds", str(rounds), "--device", "cpu", "--worker", str(out)]
            subprocess.run([*command, *worker], check=True, cwd=common.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
            found[str(count)] = json.loads(out.read_text())
    return found


def compared(found: dict) -> list[tuple]:
    """(processes, copied or sharded, captions a second, MB sent by all, by the model, MB kept by one, by the model)."""
    rows = []
    for count, cases in found.items():
        for how, case in cases.items():
            n = int(count)
            sent = n * (sent_bytes(case["trained"], n) + (fetched_bytes(case["frozen"], n) if how == "sharded" else 0))
            kept = case["frozen"] / (n if how == "sharded" else 1)
            median = {name: Spread.of(case[name]).median for name in ("captions_a_second", "wire")}
            rows.append((n, how, median["captions_a_second"], median["wire"] / 1e6, sent / 1e6, case["kept"] / 1e6,
                         kept / 1e6))  # fmt: skip
    return rows


def draw(result: dict, path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for how, style in (("copied", "o-"), ("sharded", "s--")):
        rows = [row for row in result["measured"] if row[1] == how]
        counts = [row[0] for row in rows]
        left.plot(counts, [row[2] for row in rows], style, color=common.COLORS["ours"], label=f"frozen weights {how}")
        middle.plot(counts, [row[3] for row in rows], style, color=common.COLORS["ours"], label=f"measured, {how}")
        middle.plot(
            counts, [row[4] for row in rows], "x", color="black", label="by the model" if how == "copied" else None
        )
    left.set(xlabel="processes on this machine", ylabel="captions a second", ylim=(0, None))
    middle.set(xlabel="processes on this machine", ylabel="MB sent in a step, by all")
    for size in SIZES:
        rows = [row for row in result["predicted"] if row["name"] == size.name and not row["shard"]]
        right.plot([row["gpus"] for row in rows], [row["tokens_a_second"] for row in rows], "o-", label=size.name)
    right.set(xlabel="H100s (by the model)", ylabel="tokens a second", xscale="log", yscale="log")
    right.set_xticks(GPUS, map(str, GPUS))
    for axes in (left, middle):
        axes.set_xticks(PROCESSES)
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, facecolor="white", format="png")
    plt.close(figure)


def main(argv: list[str]) -> None:
    def add(parser) -> None:
        parser.add_argument("--worker", type=Path, help="for this benchmark's own use: be one of the processes")

    args = common.parse("scale", __doc__.splitlines()[0], argv, add)
    if args.worker:
        return one_process(args.worker, args.rounds)
    measured = compared(measure(args.rounds, PROCESSES[:2] if args.quick else PROCESSES))
    table = [{"name": size.name} | predicted(size, gpus, shard)
             for size in SIZES for gpus in GPUS for shard in (False, True)]  # fmt: skip
    head = ["processes", "frozen", "captions/s", "MB sent", "model", "MB kept", "model"]
    common.print_table(head, measured)
    head = ["", "trained", "H100s", "frozen", "tokens/s", "GB a GPU", "compute s", "send s", "days for 1e8 captions"]
    rows = [(row["name"], f"{row['trained'] / 1e6:.0f} M", row["gpus"], "split" if row["shard"] else "copied",
             row["tokens_a_second"], row["memory"] / 1e9, row["compute"], row["communication"], row["days"])
            for row in table]  # fmt: skip
    common.print_table(head, rows)
    common.finish(args, {"measured": measured, "predicted": table}, draw)


if __name__ == "__main__":
    common.command("scale", main, sys.argv[1:])
