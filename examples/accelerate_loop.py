"""A loop of your own under Hugging Face's launcher: one process or several, on whatever `accelerate config` says.

    accelerate launch examples/accelerate_loop.py my_pictures runs/mine
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py my_pictures runs/mine

my_pictures as in hugging_face.py. Only what trains has gradients, goes to the optimizer and is saved. (pip install
accelerate)
"""

import os
import sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader

from flamingo import FlamingoModel, FlamingoProcessor
from flamingo.data.batches import caption_labels
from flamingo.files import asset

folder, out = sys.argv[1:]
accelerator, start = Accelerator(), asset("classroom/flamingo")
model, processor = FlamingoModel.from_pretrained(start).train(), FlamingoProcessor.from_pretrained(start)
pictures = load_dataset("imagefolder", data_dir=folder, split="train")


def collate(rows: list[dict]) -> dict:
    """Pictures and captions → a batch with labels: a loss on the caption and the token that ends it."""
    texts = processor.prepare_captions([row["caption"] for row in rows])
    batch = processor(images=[row["image"] for row in rows], text=texts, padding_side="right")
    special = processor.media_token_id, processor.eoc_token_id
    return {**batch, "labels": caption_labels(batch["input_ids"], batch["attention_mask"], *special)}


trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
batches = DataLoader(pictures, batch_size=4, shuffle=True, collate_fn=collate)
together, optimizer, batches = accelerator.prepare(model, optimizer, batches)
for epoch in range(3):
    for batch in batches:
        loss = together(**batch).loss  # of this process: accelerate takes the mean of the processes' gradients
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch + 1}: loss {accelerator.reduce(loss.detach(), 'mean').item():.3f}")
if accelerator.is_main_process:
    accelerator.unwrap_model(together).save_pretrained(out)
    processor.save_pretrained(out)
accelerator.end_training()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort a process that takes Python down before it ends (flamingo/ranks.py)
