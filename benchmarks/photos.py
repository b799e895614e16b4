"""Which captions better after the same time: our modules or OpenFlamingo's, on photographs and a real language model?

    python -m benchmarks.photos --data my_photos --minutes 15 [--json FILE]

Both sides train around the same frozen SmolLM2-135M on the same cached features and the same captions, each for the
time given, in bfloat16, with a warmup and a cosine over that time. Ours is `--preset photos`. OpenFlamingo's resampler,
blocks, mask, batches (a picture of its own beside every caption, all captions mixed), optimizer groups and learning
rate are its own; it looks in every third layer, and its gates start closed, as it makes them. Both caption the test
split with the likeliest token each time.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.peer import INSTALL
from flamingo.config import TrainingOptions
from flamingo.data.batches import Collate, batches
from flamingo.data.captions import load_captions
from flamingo.data.feature_cache import ExamplesWithFeatures, with_cached_features
from flamingo.data.processor import FlamingoProcessor, add_flamingo_tokens
from flamingo.errors import InputError
from flamingo.evaluation.captioning import NEW_TOKENS, caption
from flamingo.evaluation.metrics import caption_metrics
from flamingo.fast.enable import enable
from flamingo.fast.precision import autocast, cast_frozen_to_bf16
from flamingo.interop.backbones import build_flamingo, load_language_model
from flamingo.presets import PRESETS, model_config
from flamingo.training import loop, optimizer

CPU = torch.device("cpu")
DTYPE = "bfloat16"
TEXTS = 40  # in a step of either side: eight pictures with five captions each
PARTS = 1000  # of the time given, for the learning rate's schedule
EVERY = 3  # of the peer's layers one looks
METRICS = ("cider_d", "bleu_4", "rouge_l")


def train_for(minutes: float, peaks: torch.optim.Optimizer, parameters: list[nn.Parameter],
              losses: Iterator[Callable[[], Tensor]]) -> dict:  # fmt: skip
    """Optimizer steps until the time is over. losses: for each step what computes its loss (and may see to what a side
    does beside it)."""
    began, steps, loss = time.monotonic(), 0, float("nan")
    for compute in losses:
        share = (time.monotonic() - began) / (60 * minutes)
        if share >= 1:
            break
        for group in peaks.param_groups:
            group["lr"] = group["peak_lr"] * optimizer.warmup_cosine(int(share * PARTS), PARTS, PARTS // 12)
        value = compute()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        peaks.step()
        peaks.zero_grad(set_to_none=True)
        loss, steps = value.item(), steps + 1
    return {"steps": steps, "minutes": (time.monotonic() - began) / 60, "last_loss": loss}


# ------------------------------------------------------------------------------------------------------------ ours
def run_ours(examples: ExamplesWithFeatures, test: Tensor, minutes: float) -> tuple[dict, list[str]]:
    """test: (N, 1, v, d) features. → (what the training took, a caption for each)."""
    options = TrainingOptions(preset="photos", **PRESETS["photos"]["training"])
    torch.manual_seed(options.seed)
    model, processor, _ = build_flamingo(model_config(options))
    model.train()
    collate = Collate(processor, options.max_tokens, layout=True)
    loop.fit_features(model, examples, collate, CPU)
    adamw = optimizer.make_optimizer(model, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    enable(model)
    cast_frozen_to_bf16(model)
    pictures = options.batch_size * options.accumulate
    stream = batches(examples, collate, batch_size=pictures, steps=10**6, seed=options.seed)

    def losses() -> Iterator[Callable[[], Tensor]]:
        for step, batch in enumerate(stream):
            optimizer.open_gates(model, step, options)

            def compute(step=step, batch=batch) -> Tensor:
                with autocast(CPU, DTYPE):
                    return model(**loop.some_patches(batch, step, options).inputs()).loss

            yield compute

    took = train_for(minutes, adamw, trained, losses()) | {"trained": sum(p.numel() for p in trained)}
    model.eval()
    with torch.no_grad(), autocast(CPU, DTYPE):
        latents = model.tokenize_images(test.float()).float()
    return took, caption(model, processor, latents, [""] * len(test), autocast=lambda: autocast(CPU, DTYPE))


# ------------------------------------------------------------------------------------------------------- the peer
class FeaturesAsTower(nn.Module):
    """In the place of their vision encoder: "pixels" (N, 1, v, d) that are features already → (…, (N, v, d))."""

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, x[:, 0]


def build_peer(d: int) -> tuple[nn.Module, FlamingoProcessor]:
    """Their Flamingo around SmolLM2. Raises InputError if it is not installed."""
    try:
        from open_flamingo.src.flamingo import Flamingo
        from open_flamingo.src.flamingo_lm import FlamingoLMMixin
        from open_flamingo.src.utils import extend_instance
    except ImportError as error:
        raise InputError(f"this benchmark compares with OpenFlamingo, which is missing ({error}): {INSTALL}") from error
    lm, tokenizer = load_language_model(model_config(TrainingOptions(preset="photos")).language.name)
    add_flamingo_tokens(tokenizer)
    processor = FlamingoProcessor(tokenizer, lambda picture: picture)
    lm.resize_token_embeddings(len(tokenizer))
    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("model.layers")
    tower = SimpleNamespace(visual=FeaturesAsTower())
    model = Flamingo(tower, lm, processor.eoc_token_id, processor.media_token_id, vis_dim=d,
                     cross_attn_every_n_layers=EVERY)  # fmt: skip
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    model.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    model.lang_encoder.get_input_embeddings().requires_grad_(True)
    return model, processor


def run_peer(examples: ExamplesWithFeatures, test: Tensor, minutes: float, lr: float) -> tuple[dict, list[str]]:
    torch.manual_seed(0)
    model, processor = build_peer(test.shape[-1])
    decay = [p for n, p in model.named_parameters() if p.requires_grad and "gated_cross_attn" in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "gated_cross_attn" not in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([group | {"lr": lr, "peak_lr": lr} for group in groups])
    collate = Collate(processor, 64)
    pairs = [(i, text) for i in range(len(examples)) for text in examples.examples.texts(i)]
    rows, added = model.lang_encoder.get_input_embeddings().weight, [processor.eoc_token_id, processor.media_token_id]
    mask = torch.zeros(len(rows), 1).index_fill_(0, torch.tensor(added), 1.0)
    rows.register_hook(lambda gradient: gradient * mask)  # of the embeddings only the added rows learn

    def losses() -> Iterator[Callable[[], Tensor]]:
        rng = random.Random("peer")
        while True:
            rng.shuffle(pairs)
            for first in range(0, len(pairs) - TEXTS + 1, TEXTS):
                chosen = pairs[first : first + TEXTS]
                tokens, _ = collate.tokens([text for _, text in chosen])
                features = torch.stack([examples[i].features.float() for i, _ in chosen])  # (B, 1, 1, v, d)

                def compute(features=features, tokens=tokens) -> Tensor:
                    with autocast(CPU, DTYPE):
                        return model(features[:, :, None], tokens["input_ids"], tokens["attention_mask"],
                                     tokens["labels"]).loss  # fmt: skip

                yield compute

    took = train_for(minutes, adamw, decay + rest, losses())
    took["trained"] = sum(p.numel() for p in decay + rest) - rows.numel() + 2 * rows.shape[1]
    model.eval()
    said = []
    for features in test.float().split(16):
        # Their `generate` needs a padded prompt with transformers 5: one token of padding before <image>.
        prompt = torch.tensor([[processor.pad_token_id, processor.media_token_id]]).repeat(len(features), 1)
        seen = torch.tensor([[0, 1]]).repeat(len(features), 1)
        with torch.no_grad(), autocast(CPU, DTYPE):
            ids = model.generate(features[:, None, None], prompt, seen, max_new_tokens=NEW_TOKENS,
                                 pad_token_id=processor.pad_token_id)  # fmt: skip
        said += processor.decode_captions(ids, 2)
    return took, said


# ------------------------------------------------------------------------------------------------------ side by side
def main(argv: list[str]) -> None:
    def add(parser) -> None:
        parser.add_argument("--data", required=True, help="captioned set with a test split (see README)")
        parser.add_argument("--minutes", type=float, default=15, help="of training for each side (default: 15)")
        parser.add_argument("--peer-lr", type=float, default=1e-4, help="its own default (default: 1e-4)")
        parser.add_argument("--cache", default="~/.cache/flamingo", help="folder for features (default: %(default)s)")

    args = common.parse("photos", __doc__.splitlines()[0], argv, add)
    splits = load_captions(args.data)
    if "test" not in splits:
        raise InputError(f"{args.data} has no test split")
    encoder = build_flamingo(model_config(TrainingOptions(preset="photos"))).model.vision_encoder
    train, test = (with_cached_features(splits[name], encoder, args.cache) for name in ("train", "test"))
    features = torch.cat([test[i].features for i in range(len(test))])  # (N, 1, v, d)
    truths = [[chunk.caption for text in test.examples.texts(i) for chunk in text] for i in range(len(test))]
    result = {"data": Path(args.data).name, "minutes": args.minutes, "sides": {}}
    for name, run in (("ours", lambda: run_ours(train, features, args.minutes)),
                      ("OpenFlamingo", lambda: run_peer(train, features, args.minutes, args.peer_lr))):  # fmt: skip
        took, said = run()
        scores = caption_metrics(said, truths)
        result["sides"][name] = took | {"scores": {m: scores[m].to_dict() for m in METRICS}, "captions": said}
        print(name, {metric: round(scores[metric].value, 3) for metric in METRICS}, took, said[:3])
    rows = [[name, side["steps"], side["trained"], *(side["scores"][m]["value"] for m in METRICS)]
            for name, side in result["sides"].items()]  # fmt: skip
    common.print_table(["", "steps", "trained parameters", *METRICS], rows)
    common.finish(args, result, draw)


def draw(result: dict, path: Path) -> None:
    ours, theirs = (result["sides"][name]["scores"] for name in ("ours", "OpenFlamingo"))
    rows = [(metric, ours[metric]["value"], theirs[metric]["value"]) for metric in METRICS]
    common.draw_bars(path, rows, "score on the test pictures", f"Photographs, {result['minutes']:g} minutes each",
                     times=False)  # fmt: skip


if __name__ == "__main__":
    common.command("photos", main, sys.argv[1:])
