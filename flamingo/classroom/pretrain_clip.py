"""Pretrains the classroom's vision encoder: a small CLIP whose patch tokens know what they show, and where.

What this file teaches: pictures and captions meet in one space (the contrastive loss of Radford et al. 2021). A
contrastive loss on whole captions does not need *where* things are, and the patch tokens then do not hold it. So four
dense terms predict from every patch token what it shows, where it stands, where in the picture there is something at
all, and how the scene is arranged. Without the second the tokens lose their places, and a Flamingo on top sees a bag of
objects; without the last two no patch compares itself with others, and "two tomatoes" looks like "a tomato and a bus".
*What* is predicted in the language model's own token embeddings (as in DeViSE, Frome et al. 2013): then one map, the
same for all objects, turns what a patch shows into the embedding of its name, and a Flamingo that learns it on some
objects has learned it for the others. Most of it is learned on crowded scenes: nine objects for the price of one
picture.
"""

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
from torch import Tensor, nn
from tqdm import tqdm
from transformers import OPTForCausalLM

from flamingo.classroom import probes, scenes
from flamingo.classroom.pretrain_lm import SEED, WIDTH, make_optimizer
from flamingo.classroom.probes import PATCH
from flamingo.files import write_json
from flamingo.interop import compat
from flamingo.training.optimizer import warmup_cosine

CLIP_CONFIG = {
    "embed_dim": WIDTH,  # pictures, captions and the language model's token embeddings in one space
    "vision_cfg": {"image_size": scenes.IMAGE_SIZE, "patch_size": PATCH, "width": 192, "layers": 4, "head_width": 32},
    # vocab_size is filled in
    "text_cfg": {"context_length": 32, "width": 128, "heads": 4, "layers": 2, "pool_type": "eos", "eos_id": 2,
                 "pad_id": 1},
}  # fmt: skip
# Of cosines: small, so that a patch must come near the name it shows, not just nearer than to others.
DENSE_SCALE = 16.0
# How a scene may be arranged, the classes of a dense term: (layout, how many things).
ARRANGEMENTS = [("one", 1), ("count", 2), ("count", 3), ("row", 2), ("column", 2), ("three", 3)]
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


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
