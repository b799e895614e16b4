"""A Flamingo small enough to build in a blink: random weights, real classes."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from flamingo.errors import run_command
from flamingo.fast.enable import enable
from flamingo.files import asset
from flamingo.model.build import build_from_parts
from flamingo.model.vlm import SpecialTokens, VisionLanguageModel
from flamingo.settings import from_flat

IMAGE, EOC, PAD = 51, 50, 1  # ids of the tiny vocabulary: 50 words, then <|endofchunk|> and <image>


class TinyEncoder(nn.Module):
    """(N, 3, 8, 8) → (N, 4, 12): four patches, one linear map."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 12, kernel_size=4, stride=4)
        self.calls = 0  # pictures encoded so far

    def forward(self, pixel_values):
        self.calls += len(pixel_values)
        return self.patch(pixel_values).flatten(2).transpose(1, 2)


def tiny_lm(vocab_size: int = 50, layers: int = 2) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=vocab_size, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=PAD, bos_token_id=2, eos_token_id=2,
        dropout=0.1,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def assemble(encoder: nn.Module, lm: nn.Module, **flat) -> VisionLanguageModel:
    """A model around a tiny encoder of width 12. flat: names of config.json."""
    return build_from_parts(from_flat(flat), encoder, lm, SpecialTokens(IMAGE, EOC, PAD), dim_visual=12)


def open_the_gates(model: VisionLanguageModel) -> VisionLanguageModel:
    """As after training, so that pictures matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.8)
    return model.eval()


def committed_evaluation() -> dict:
    """What evaluate.py found of the committed run."""
    return json.loads((asset("classroom/flamingo") / "evaluation.json").read_text())


def tiny_flamingo(
    *,
    open_gates: bool = True,
    seed: int = 0,
    vocab_size: int = 50,
    lm: OPTForCausalLM | None = None,
    fast: tuple[str, ...] = (),
    **flat,
) -> VisionLanguageModel:
    """open_gates: False as at the start. lm: a given one. fast: pieces of flamingo/fast to install."""
    torch.manual_seed(seed)
    shape = {
        "xattn_dim_head": 8, "xattn_heads": 4, "resampler_depth": 2, "resampler_dim_head": 8, "resampler_heads": 2,
        "resampler_num_latents": 3, "resampler_num_time_embeds": 2,
    } | flat  # fmt: skip
    model = assemble(TinyEncoder(), lm or tiny_lm(vocab_size), **shape)
    if open_gates:
        open_the_gates(model)
    if fast:
        assert set(enable(model, fast)) == set(fast)
    return model.eval()


FAST = ("grouped", "chunked", "packed")  # what a tiny model allows


@pytest.fixture(params=[(), FAST], ids=["plain", "fast"])
def model(request) -> VisionLanguageModel:
    return tiny_flamingo(fast=request.param)


@pytest.fixture
def texts() -> torch.Tensor:
    """(2, 9) token ids: text before the first picture, two pictures, captions closed by EOC."""
    return torch.tensor([[2, 7, IMAGE, 11, 12, EOC, IMAGE, 13, EOC], [2, IMAGE, 21, 22, EOC, 9, IMAGE, 23, EOC]])


@pytest.fixture
def pictures() -> torch.Tensor:
    """(2, 2, 1, 3, 8, 8): two texts, two pictures each, one frame."""
    return torch.randn(2, 2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(5))


# --------------------------------------------------------------------------------------- what an input may cost
MOST = 250 * 2**20  # bytes by which this process may grow during one input of a campaign, what it imports included


def _memory(field: str) -> int:
    """VmRSS, what this process holds now, or VmHWM, the most it has held, in bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


@pytest.fixture
def bounded_memory(record_property):
    """Fails a test that has held MOST more bytes, at any moment, than before it; records its peak (--junit-xml)."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        yield  # no Linux
        return
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # begins anew
    before = _memory("VmRSS")
    yield
    grown = _memory("VmHWM") - before
    record_property("peak_megabytes", round(grown / 2**20))
    assert grown < MOST, f"this input took {grown / 2**20:.0f} MB"


@pytest.fixture
def refused(capsys):
    """`refused(command, *words)`: the command ends with exit code 2 and one sentence that has all the words."""

    def check(command, *words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command("it", command)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1, said
        assert all(word in said for word in words), said
        return said

    return check
