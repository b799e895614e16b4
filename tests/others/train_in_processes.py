"""A short run of the Trainer, which tests/test_huggingface_processes.py starts in two processes and in one.

python -m torch.distributed.run --nproc-per-node 2 tests/others/train_in_processes.py OUT TEXTS_A_PROCESS
"""

import os
import sys

from transformers import Trainer, TrainingArguments

from flamingo import FlamingoModel, FlamingoProcessor
from flamingo.classroom import scenes
from flamingo.data.batches import caption_labels
from flamingo.files import asset

out, size = sys.argv[1], int(sys.argv[2])
processor = FlamingoProcessor.from_pretrained(asset("classroom/flamingo"))
made = [scenes.make_scene(0, "train", i) for i in range(8)]
rows = [{"image": scene.draw(), "caption": scene.caption("list" if i % 2 else "story")} for i, scene in enumerate(made)]


def collate(batch) -> dict:
    texts = processor.prepare_captions([row["caption"] for row in batch])
    inputs = processor(images=[row["image"] for row in batch], text=texts, padding_side="right")
    special = processor.media_token_id, processor.eoc_token_id
    return {**inputs, "labels": caption_labels(inputs["input_ids"], inputs["attention_mask"], *special)}


settings = TrainingArguments(
    out, max_steps=2, per_device_train_batch_size=size, learning_rate=1e-3, report_to="none", use_cpu=True,
    remove_unused_columns=False, disable_tqdm=True, save_steps=2, logging_steps=1, seed=0,
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
)  # fmt: skip
model = FlamingoModel.from_pretrained(asset("classroom/flamingo"))
trainer = Trainer(model, settings, train_dataset=rows, data_collator=collate, processing_class=processor)
trainer.train()
if trainer.is_world_process_zero():
    print("losses", *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
sys.stdout.flush()
os._exit(0)  # the Trainer leaves gloo's threads behind, which may abort a process that ends in its own time (ranks.py)
