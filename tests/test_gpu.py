"""The code for a GPU, exercised without one: a fake `cuda` device carries shapes and no values. A tensor left on the
CPU is an error there, and so is every look at a tensor's value, which on a GPU is a wait for all its work. (Backward
does not run on a fake device.) Where there is a GPU, a real training step must wait once: for the log."""

import pytest
import torch
from conftest import EOC, FAST, IMAGE, PAD, TinyEncoder, assemble, tiny_flamingo, tiny_lm
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo.config import TrainingOptions
from flamingo.data.batches import Batch
from flamingo.fast.enable import install
from flamingo.fast.packing import TextLayout
from flamingo.interop import compat
from flamingo.training.optimizer import make_optimizer

IDS = torch.tensor([[2, IMAGE, 11, 12, EOC, PAD], [2, IMAGE, 13, 14, 15, EOC]])
MASK = (IDS != PAD).long()
LABELS = IDS.masked_fill((IDS < 10) | (IDS == IMAGE), -100)
SHAPE = {"xattn_dim_head": 8, "xattn_heads": 4, "resampler_depth": 1, "resampler_dim_head": 8, "resampler_heads": 2,
         "resampler_num_latents": 3}  # fmt: skip
KINDS = {"one picture, two texts": 1, "a picture each, by index": 2, "a video": 2}


def can_fake_a_gpu() -> bool:
    """Older versions of torch ask the driver even for a fake one."""
    try:
        with FakeTensorMode():
            torch.nn.Linear(2, 2, device="cuda")
    except RuntimeError:
        return False
    return True


needs_a_fake_gpu = pytest.mark.skipif(not can_fake_a_gpu(), reason="this torch has no fake GPU without a driver")


def batch_of(kind: str, fast: tuple[str, ...]) -> Batch:
    pointed_at = {"texts_per_image": 2} if KINDS[kind] == 1 else {"image_index": torch.tensor([[0], [1]])}
    frames = 3 if kind == "a video" else 1
    layout = TextLayout.of(LABELS, MASK) if fast else None
    pixels = torch.randn(KINDS[kind], frames, 3, 8, 8)
    return Batch(IDS, MASK, LABELS, pixel_values=pixels, layout=layout, **pointed_at)


@pytest.fixture(params=[(), FAST], ids=["plain", "fast"])
def fast(request):
    return request.param


@needs_a_fake_gpu
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_forward_loss_and_a_decode_step_look_at_no_value_and_leave_nothing_on_the_cpu(fast, kind):
    real = batch_of(kind, fast)
    with FakeTensorMode() as mode:
        with torch.device("cuda"):
            model = assemble(TinyEncoder(), tiny_lm(), **SHAPE)
        install(model.train(), list(fast))
        batch = real._apply(lambda tensor: mode.from_tensor(tensor).to("cuda")).inputs()
        assert model(**batch).loss.device.type == "cuda"
        blind = {name: batch[name] for name in batch if name in ("input_ids", "attention_mask", "labels", "layout")}
        assert model(**blind, blind=True).loss.shape == ()
        texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        pictures = {name: batch[name] for name in batch if name in ("pixel_values", "image_index", "texts_per_image")}
        assert model(**texts, **pictures).logits.shape == (2, 6, 52)
        with model.reading(model.prepare_images(**pictures), **texts, generating=True) as text:
            lm = model.lang_encoder
            read = lm(**text.inputs(), use_cache=True)
            cache = compat.cache_argument(lm, compat.cache_of(read))
            step = lm(input_ids=read.logits[:, -1:].argmax(-1), **cache)
        assert step.logits.shape == (2, 1, 52) and step.logits.device.type == "cuda"


@needs_a_fake_gpu
def test_such_a_test_can_fail():
    with FakeTensorMode() as mode, pytest.raises(Exception, match=r"_local_scalar_dense|nonzero"):
        labels = mode.from_tensor(LABELS).to("cuda")
        TextLayout.of(labels, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_waits_once_for_the_log(fast, kind):
    model = tiny_flamingo(fast=(), resampler_num_time_embeds=3).to("cuda").train()
    install(model, list(fast))
    optimizer = make_optimizer(model, TrainingOptions())
    batch = batch_of(kind, fast).to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = model(**batch.inputs()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() > 0
