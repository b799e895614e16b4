"""Hugging Face's own tools on a folder of pictures: the Trainer, LoRA beside the language model, a pipeline.

    python examples/hugging_face.py my_pictures runs/mine

my_pictures holds a metadata.jsonl with {"file_name": "beach.jpg", "caption": "a dog runs along the beach"} a line. The
model begins as the classroom's; begin with another by its folder or name on a hub. (pip install accelerate peft)
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import Trainer, TrainingArguments, pipeline

from flamingo import FlamingoModel, FlamingoProcessor
from flamingo.data.batches import caption_labels
from flamingo.files import asset

folder, out = sys.argv[1:]
start = asset("classroom/flamingo")
model, processor = FlamingoModel.from_pretrained(start), FlamingoProcessor.from_pretrained(start)
model.add_adapter(
    LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
)  # resampler and cross-attention train on beside it
pictures = load_dataset("imagefolder", data_dir=folder, split="train")


def collate(rows: list[dict]) -> dict:
    """Pictures and captions → a batch with labels: a loss on the caption and the token that ends it."""
    texts = processor.prepare_captions([row["caption"] for row in rows])
    batch = processor(images=[row["image"] for row in rows], text=texts, padding_side="right")
    special = processor.media_token_id, processor.eoc_token_id
    return {**batch, "labels": caption_labels(batch["input_ids"], batch["attention_mask"], *special)}


options = TrainingArguments(
    out, num_train_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3,
    remove_unused_columns=False, logging_steps=1, save_strategy="epoch", report_to="none",
)  # fmt: skip
trainer = Trainer(model, options, train_dataset=pictures, data_collator=collate, processing_class=processor)
trainer.train()  # after a kill: resume_from_checkpoint=True
trainer.save_model()

answer = pipeline("image-text-to-text", model=out)
print(answer(images=pictures[0]["image"], text="<image>", max_new_tokens=20)[0]["generated_text"])
