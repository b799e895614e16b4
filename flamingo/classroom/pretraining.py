"""Pretrains the two frozen halves of the classroom: a small OPT and a small CLIP.

    python -m flamingo.classroom.pretraining --out assets/classroom        (about half an hour on 2 CPU cores)

What this file teaches: where the "frozen backbones" of a Flamingo come from, at a size one can watch.

1. A tokenizer (byte-level BPE, as OPT's) and a language model, trained by next-token prediction on documents
   that keep one caption style throughout and mostly do not name it. So the frozen model *follows its context*:
   that is the ability Flamingo's few-shot learning rests on.
2. A CLIP: pictures and captions meet in one space (the contrastive loss of Radford et al. 2021). A contrastive
   loss on whole captions does not need *where* things are, and the patch tokens then do not hold it. So four dense
   terms predict from every patch token what it shows, where it stands, where in the picture there is something at all,
   and how the scene is arranged. Without the second the tokens lose their places, and a Flamingo on top sees a bag of
   objects; without the last two no patch compares itself with others, and "two tomatoes" looks like "a tomato and a
   bus". *What* is predicted in the language model's own token embeddings (as in DeViSE, Frome et al. 2013): then one
   map, the same for all objects, turns what a patch shows into the embedding of its name, and a Flamingo that learns
   it on some objects has learned it for the others. Most of it is learned on crowded scenes: nine objects for the
   price of one picture.

Both see all objects, the novel ones too, and only training pairs of them. Both are ordinary: open_clip and
transformers load them through the same code as ViT-L-14 and OPT-125m.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from flamingo.classroom import probes, scenes
from flamingo.classroom.documents import document, naming_lines
from flamingo.classroom.probes import PATCH
from flamingo.fast.device import use_plain_attention
from flamingo.files import write_json
from flamingo.interop import compat
from flamingo.interop.backbones import load_language_model
from flamingo.training.optimizer import warmup_cosine

SEED = 20220429  # the day the paper appeared; the scenes of a run begin at seed 0, so none is shared
LM_WIDTH, LM_LAYERS, LM_HEADS, LM_POSITIONS = 192, 4, 6, 512
WORD_SPACE = 64  # dimensions that the token embeddings begin in, fewer than there are objects (see pretrain_lm)
CLIP_CONFIG = {
    "embed_dim": LM_WIDTH,  # pictures, captions and the language model's token embeddings in one space
    "vision_cfg": {"image_size": scenes.IMAGE_SIZE, "patch_size": PATCH, "width": 192, "layers": 4, "head_width": 32},
    # vocab_size is filled in
    "text_cfg": {"context_length": 32, "width": 128, "heads": 4, "layers": 2, "pool_type": "eos", "eos_id": 2,
                 "pad_id": 1},
}  # fmt: skip
DENSE_SCALE = (
    16.0  # of cosines: small, so that a patch must come near the name it shows, not just nearer than to others
)
# How a scene may be arranged, the classes of a dense term: (layout, how many things).
ARRANGEMENTS = [("one", 1), ("count", 2), ("count", 3), ("row", 2), ("column", 2), ("three", 3)]
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


# ------------------------------------------------------------------------------------------------ tokenizer
def train_tokenizer(texts: list[str], *, closing: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE with OPT's special ids: <s> 0, <pad> 1, </s> 2 (begins a text, as OPT's does), <unk> 3.

    closing: also end a text with </s> and begin it with <s>; CLIP's text tower reads its result at </s>.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=10, special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    template = "<s> $A </s>" if closing else "</s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=None, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if closing else "</s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", model_max_length=LM_POSITIONS, clean_up_tokenization_spaces=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- the two loops
def make_optimizer(modules: list[nn.Module], lr: float) -> torch.optim.AdamW:
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
         {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.98), eps=1e-8,
    )  # fmt: skip


def packed_rows(tokenizer, first: int, rows: int, length: int) -> tuple[Tensor, int]:
    """(rows, length) token ids: documents one after the other, each row beginning with a document."""
    batch = []
    while len(batch) < rows:
        row: list[int] = []
        while len(row) < length:
            row += tokenizer(document(SEED, "train", first, include_novel=True)).input_ids
            first += 1
        batch.append(row[:length])
    return torch.tensor(batch), first


@torch.no_grad()
def _spread_words(vectors: Tensor, tokenizer) -> None:
    """Token embeddings (V, D) far apart from the start: tied, they are the output weights too, and at the usual 0.02 no
    hidden state could predict one with confidence. And all in WORD_SPACE dimensions: with more objects than dimensions,
    what maps pictures of *some* objects to their names maps those of the others too. A plural begins as its singular
    and one step, the same for all: a model that can name one tomato can name three."""
    plane = torch.linalg.qr(torch.randn(vectors.shape[1], WORD_SPACE)).Q  # (D, WORD_SPACE) orthonormal columns
    vectors.copy_(0.17 * torch.randn(len(vectors), WORD_SPACE) @ plane.T)
    to_plural = 0.17 * torch.randn(WORD_SPACE) @ plane.T
    for name in scenes.OBJECTS:
        one, many = (tokenizer(f" {word}", add_special_tokens=False).input_ids for word in (name, scenes.plural(name)))
        if one != many and len(one) == len(many) == 1:
            vectors[many[0]] = vectors[one[0]] + to_plural


def read_documents(model: OPTForCausalLM, tokenizer, steps: int, lr: float) -> None:
    """Next-token prediction, `steps` batches of about 6000 tokens."""
    optimizer = make_optimizer([model], lr)
    device, first = model.device, 0
    bar = tqdm(range(steps), desc="OPT", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, steps, 50)
        # Every eighth batch has full-length rows, so that the far positions are trained too.
        length, rows = (LM_POSITIONS, 12) if step % 8 == 0 else (192, 32)
        input_ids, first = packed_rows(tokenizer, first, rows, length)
        input_ids = input_ids.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrain_lm(out: Path, steps: int, device: torch.device) -> dict:
    """Next-token prediction on caption documents. Writes `out/opt`."""
    began = time.time()
    corpus = [document(SEED, "train", 2**41 + i, include_novel=True) for i in range(6000)]
    tokenizer = train_tokenizer(corpus, closing=False)
    train_tokenizer(corpus, closing=True).save_pretrained(out / "clip")
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer), hidden_size=LM_WIDTH, word_embed_proj_dim=LM_WIDTH, ffn_dim=4 * LM_WIDTH,
            num_hidden_layers=LM_LAYERS, num_attention_heads=LM_HEADS, max_position_embeddings=LM_POSITIONS,
            dropout=0.0, attention_dropout=0.0, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        )
    ).to(device)  # fmt: skip
    _spread_words(model.get_input_embeddings().weight, tokenizer)
    read_documents(model, tokenizer, steps, lr=2e-3)
    model.eval()
    report = {"lm_parameters": sum(p.numel() for p in model.parameters()), "lm_seconds": round(time.time() - began)}
    held_out = [document(SEED, "test", i, include_novel=False) for i in range(200)]
    report["lm_test_perplexity"] = probes.perplexity(model.cpu(), tokenizer, held_out)
    named = [naming_lines(random.Random(f"recall {i}")) for i in range(200)]
    report["lm_recall_of_a_name"] = probes.recall(model, tokenizer, named)
    model.to(torch.float16).save_pretrained(out / "opt")  # half the bytes; from_pretrained(dtype=float32) widens it
    tokenizer.save_pretrained(out / "opt")
    return report


# ------------------------------------------------------------------------------------------------------ CLIP
def to_pixels(pictures: list) -> Tensor:
    """PIL pictures → (N, 3, H, W), normalised as open_clip will (MEAN, STD)."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))  # (N, H, W, 3) bytes
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def patch_names(scene: scenes.Scene, names: dict[str, int]) -> np.ndarray:
    """(36,) the class of what each patch shows: an object that covers over 30 % of it, the ground if nothing
    touches it, else -100 (no loss)."""
    side = scenes.IMAGE_SIZE // PATCH
    covered = np.zeros((len(scene.objects) + 1, side, side))
    edges = np.arange(side) * PATCH
    for k, placed in enumerate(scene.objects):
        left, top, right, bottom = placed.box
        x = np.clip(np.minimum(right, edges + PATCH) - np.maximum(left, edges), 0, None)
        y = np.clip(np.minimum(bottom, edges + PATCH) - np.maximum(top, edges), 0, None)
        covered[k] = np.outer(y, x) / PATCH**2
    ids = np.array([names[placed.name] for placed in scene.objects] + [names[scene.ground]])
    best = covered.argmax(0)
    target = np.where(covered.max(0) > 0.3, ids[best], -100)
    return np.where(covered.max(0) == 0, ids[-1], target).reshape(-1)


def encode_image(clip: open_clip.CLIP, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels → class embedding (N, E) and patch tokens (N, 36, d)."""
    return compat.open_clip_image_and_patches(clip.visual, pixels)


def encode_text(clip: open_clip.CLIP, ids: Tensor) -> Tensor:
    """Token ids (N, L) → text embedding (N, E). As clip.encode_text, but L may be shorter than the context."""
    length = int((ids != 1).sum(1).max())  # 1 is <pad>: cut what nobody uses
    ids = ids[:, :length]
    x = clip.token_embedding(ids) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    at_end = (ids == 2).int().argmax(1)  # 2 is </s>
    return x[torch.arange(len(ids), device=ids.device), at_end] @ clip.text_projection


def arrangement(scene: scenes.Scene) -> int:
    """The class of how a scene is arranged, a place in ARRANGEMENTS."""
    return ARRANGEMENTS.index((scene.layout, len(scene.objects)))


def contrastive_loss(clip, tokenizer, image: Tensor, drawn: list[scenes.Scene], rng: random.Random) -> Tensor:
    """Each picture (N, E) against the captions of all, and each caption, in a style of its own, against all."""
    captions = [f" {scene.caption(rng.choice(scenes.STYLES))}" for scene in drawn]
    text = F.normalize(encode_text(clip, tokenizer(captions).to(image.device)).float(), dim=-1)
    logits = clip.logit_scale.exp() * F.normalize(image.float(), dim=-1) @ text.T  # (N, N)
    same = torch.arange(len(drawn), device=image.device)
    return 0.5 * (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same))


def vision_batch(step: int, size: int, crowd: bool, names: dict[str, int]) -> tuple[list[scenes.Scene], Tensor, Tensor]:
    """Scenes of one training batch, their pixels (N, 3, H, W) and what their patches show (N, 36)."""
    layouts = random.Random(f"layouts {step}").choices(scenes.LAYOUTS, (1, 2, 2, 2, 2), k=size)
    drawn = [
        scenes.make_scene(SEED, "train", 2**42 + step * size + k, layout=layout, include_novel=True, crowd=crowd)
        for k, layout in enumerate(layouts)
    ]
    targets = torch.from_numpy(np.stack([patch_names(scene, names) for scene in drawn]))
    return drawn, to_pixels([scene.draw() for scene in drawn]), targets


def names_in_word_space(lm: OPTForCausalLM, tokenizer, words: list[str]) -> Tensor:
    """(words, E) what sets each name apart: its token embedding less the mean of them all, of length 1."""
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]
    vectors = lm.get_input_embeddings().weight.detach()[ids]
    return F.normalize(vectors - vectors.mean(dim=0), dim=-1)


def pretrain_clip(out: Path, lm: OPTForCausalLM, lm_tokenizer, steps: int, device: torch.device) -> dict:
    """Contrastive and dense loss on scenes. Writes `out/clip`, which open_clip loads as `local-dir:`."""
    began = time.time()
    config = json.loads(json.dumps(CLIP_CONFIG))
    config["text_cfg"] |= {"vocab_size": len(lm_tokenizer), "hf_tokenizer_name": "-"}
    clip = open_clip.CLIP(**config, output_dict=False).to(device)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(out / "clip"), context_length=config["text_cfg"]["context_length"])

    words = [*scenes.OBJECTS, *scenes.GROUNDS]
    names = {name: i for i, name in enumerate(words)}
    name_vectors = names_in_word_space(lm, lm_tokenizer, words).to(device)  # (words, E)
    patches_a_picture = (scenes.IMAGE_SIZE // PATCH) ** 2
    width = config["vision_cfg"]["width"]
    places = nn.Linear(width, patches_a_picture, device=device)  # these three only for training: not kept
    taken = nn.Linear(width, patches_a_picture, device=device)
    arrangements = nn.Linear(width, len(ARRANGEMENTS), device=device)
    optimizer = make_optimizer([clip, places, taken, arrangements], lr=1e-3)
    bar = tqdm(range(steps), desc="CLIP", mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * warmup_cosine(step, steps, 200)
        # First only crowded scenes (what do objects look like), later three of four batches are captioned pictures.
        crowd = step < 0.25 * steps or step % 4 == 0
        drawn, pixels, targets = vision_batch(step, 128 if crowd else 192, crowd, names)
        with torch.autocast(device.type, torch.bfloat16):
            image, tokens = encode_image(clip, pixels.to(device))
            patches = F.normalize((tokens @ clip.visual.proj).float(), dim=-1)  # (N, 36, E)
            patch_logits = DENSE_SCALE * patches @ name_vectors.T  # (N, 36, words): what is here?
            where = torch.arange(patches_a_picture, device=device).expand(len(tokens), -1)
            dense = F.cross_entropy(patch_logits.flatten(0, 1), targets.flatten().to(device))
            loss = dense + 0.5 * F.cross_entropy(places(tokens).float().flatten(0, 1), where.flatten())
            if not crowd:
                kind = torch.tensor([arrangement(scene) for scene in drawn], device=device)  # (N,)
                arranged = arrangements(tokens).float()  # (N, 36, kinds)
                loss = loss + F.cross_entropy(arranged.flatten(0, 1), kind.repeat_interleave(patches_a_picture))
                thing = ((targets >= 0) & (targets < len(scenes.OBJECTS))).float().to(device)  # (N, 36)
                seen = taken(tokens).float()  # (N, 36, 36): each patch's map of all patches
                loss = loss + 3 * F.binary_cross_entropy_with_logits(seen, thing[:, None].expand_as(seen))
                loss = loss + contrastive_loss(clip, tokenizer, image, drawn, random.Random(f"vision {step}"))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        clip.logit_scale.data.clamp_(0, math.log(100))
        if step % 21 == 0:  # now a crowd, now captioned pictures
            known = targets >= 0
            hits = (patch_logits.argmax(-1).cpu() == targets)[known & (targets < len(scenes.OBJECTS))].float().mean()
            shown = {"loss": loss.item(), "dense": dense.item(), "patch_hits": hits.item()}
            if not crowd:
                shown["arranged"] = (arranged.argmax(-1) == kind[:, None]).float().mean().item()
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
        if step % 250 == 249 or step == steps - 1:
            save_clip(out, config, clip)
    seconds = round(time.time() - began)
    clip.eval().cpu()
    return {
        "clip_parameters": sum(p.numel() for p in clip.parameters()),
        "clip_seconds": seconds,
        "retrieval_of_512": probes.retrieval(clip, tokenizer, to_pixels),
        "probe_object_of_a_patch": probes.probe_patches(clip, to_pixels, patch_names, names),
        "probe_object_in_the_left_half": probes.probe_left_half(clip, to_pixels, names),
        "probe_arrangement_from_one_patch": probes.probe_arrangement(clip, to_pixels, arrangement, len(ARRANGEMENTS)),
    }


def save_clip(out: Path, config: dict, clip: nn.Module) -> None:
    """An open_clip `local-dir:` folder: open_clip_config.json and the weights in half precision."""
    (out / "clip").mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    write_json(out / "clip" / "open_clip_config.json", described)
    state = {name: value.detach().to(torch.float16).contiguous() for name, value in clip.state_dict().items()}
    save_file(state, out / "clip" / "open_clip_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("assets/classroom"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--clip-only", action="store_true", help="keep the OPT that is there and train the CLIP anew")
    parser.add_argument("--lm-steps", type=int, default=700, help="optimizer steps for the OPT (default: %(default)s)")
    parser.add_argument(
        "--clip-steps", type=int, default=1400, help="optimizer steps for the CLIP (default: %(default)s)"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_plain_attention(device)
    torch.manual_seed(SEED)
    args.out.mkdir(parents=True, exist_ok=True)
    report_file = args.out / "report.json"
    if args.clip_only:
        report = json.loads(report_file.read_text(encoding="utf-8"))
    else:
        report = pretrain_lm(args.out, args.lm_steps, device)
        write_json(report_file, report)
    lm, lm_tokenizer = load_language_model(str(args.out / "opt"))
    report |= pretrain_clip(args.out, lm, lm_tokenizer, args.clip_steps, device)
    write_json(report_file, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
