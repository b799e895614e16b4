"""Other libraries change. What a user relies on: the same captions, or one sentence that names the version."""

import re
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, tiny_flamingo, tiny_lm
from transformers import Cache, OPTForCausalLM
from transformers.utils import ModelOutput

from flamingo.errors import InputError
from flamingo.fast.inference import prepare_to_generate
from flamingo.interop import compat, selfcheck
from flamingo.model import language_model

ROOT = Path(__file__).resolve().parent.parent


class RenamingOPT(OPTForCausalLM):
    """A transformers of another day, in which generate, forward and output call the cache `memory`."""

    def forward(self, input_ids=None, attention_mask=None, memory: Cache | None = None, **options):
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, **compat.cache_argument(super(), memory), **options
        )
        return ModelOutput({("memory" if isinstance(value, Cache) else name): value for name, value in output.items()})

    def prepare_inputs_for_generation(self, *args, **kwargs):  # generate() looks for this name
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        name = next((name for name, value in inputs.items() if isinstance(value, Cache)), None)
        return {("memory" if key == name else key): value for key, value in inputs.items()}


class ForgettingOPT(OPTForCausalLM):
    """A transformers that hands each token to the model alone."""

    def prepare_inputs_for_generation(self, *args, **kwargs):  # generate() looks for this name
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if not isinstance(value, Cache)}


def flamingo_on(kind: type):
    lm = tiny_lm()
    lm.__class__ = kind
    return tiny_flamingo(lm=lm)


def captions(model, texts, pictures):
    return model.generate(texts, torch.ones_like(texts), pixel_values=pictures, max_new_tokens=8, min_new_tokens=8)


def test_a_renamed_cache_gives_the_same_captions(texts, pictures):
    torch.manual_seed(0)
    expected = captions(flamingo_on(OPTForCausalLM), texts, pictures)
    torch.manual_seed(0)
    renamed = flamingo_on(RenamingOPT)
    assert torch.equal(captions(renamed, texts, pictures), expected)
    assert selfcheck.check_decoding(renamed) < 1e-5


def test_candidates_are_scored_whatever_the_cache_is_called(texts, pictures):
    torch.manual_seed(0)
    expected = flamingo_on(OPTForCausalLM).score_sequences(texts, [[4, 5], [6]], pixel_values=pictures)
    torch.manual_seed(0)
    found = flamingo_on(RenamingOPT).score_sequences(texts, [[4, 5], [6]], pixel_values=pictures)
    torch.testing.assert_close(found, expected)


def test_a_cache_that_is_not_handed_over_is_said_with_the_version(texts, pictures):
    model = flamingo_on(ForgettingOPT)
    said = rf"transformers {re.escape(compat.installed('transformers'))} .*without handing over the cache.*>=5\.4,<6"
    with pytest.raises(InputError, match=said):
        captions(model, texts, pictures)
    with pytest.raises(InputError, match=said):
        selfcheck.check_decoding(model)
    # What was going on when it was raised is over: the model is the plain language model again.
    assert model.lang_encoder._images is None


def test_generating_without_a_cache_reads_the_whole_text_each_time(model, texts, pictures):
    with_cache = captions(model, texts, pictures)
    without = model.generate(
        texts, torch.ones_like(texts), pixel_values=pictures, max_new_tokens=8, min_new_tokens=8, use_cache=False
    )
    assert torch.equal(with_cache, without)


def test_steps_that_do_not_see_the_picture_are_found(model, monkeypatch):
    """The self-check compares what is computed, not only what is handed over."""
    real = language_model.mask_of_next_tokens
    blind = lambda images_read, *rest: real(torch.zeros_like(images_read), *rest)  # noqa: E731
    monkeypatch.setattr(language_model, "mask_of_next_tokens", blind)
    with pytest.raises(InputError, match=r"logits of cached steps are \d+% off"):
        selfcheck.check_decoding(model)


def test_the_self_check_changes_no_random_number(model):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert selfcheck.check_decoding(model) < 1e-5
    assert torch.equal(torch.rand(4), expected)


def test_a_version_outside_the_range_is_said(monkeypatch):
    compat.check_versions()
    monkeypatch.setattr(compat.versions, "version", lambda name: "6.0.1" if name == "transformers" else "99")
    with pytest.raises(InputError, match=r"transformers 6\.0\.1 does not work .*>=5\.4,<6 does: pip install"):
        compat.check_versions()
    monkeypatch.setattr(compat.versions, "version", lambda name: "2.5.1+cpu" if name == "torch" else "5.4.0")
    with pytest.raises(InputError, match=r"torch 2\.5\.1\+cpu does not work .*>=2\.6 does"):
        compat.check_versions()


def test_the_ranges_are_those_of_requirements_txt():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    stated = dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in lines if line and line[0] != "#")
    assert {name: compat.range_of(name) for name in compat.WORKING} == {name: stated[name] for name in compat.WORKING}


def test_the_lock_holds_a_version_in_range_of_everything_that_is_required():
    from packaging.requirements import Requirement

    def read(name):
        return [line for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#-"]

    locked = {}
    for pin in map(Requirement, read("constraints.txt")):
        locked.setdefault(pin.name.replace("_", "-"), []).append(pin.specifier)
    for wanted in map(Requirement, [*read("requirements.txt"), *read("requirements-dev.txt")]):
        versions = [str(pin).removeprefix("==") for pin in locked[wanted.name.replace("_", "-")]]
        assert versions and all(wanted.specifier.contains(version) for version in versions), wanted


def test_a_torch_with_other_onednn_operators_is_said(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    with pytest.raises(InputError, match=r"torch .* has no oneDNN operator _reorder_linear_weight"):
        compat.has_onednn(torch.float32)


def test_a_torch_without_onednn_is_said_and_works(monkeypatch, capsys, texts, pictures):
    model = tiny_flamingo()
    expected = captions(model, texts, pictures)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    prepare_to_generate(model, "float32")
    assert re.search(r"torch \S+ has no oneDNN, .* builds >=2\.6 have it", capsys.readouterr().err)
    assert torch.equal(captions(model, texts, pictures), expected)


def test_nothing_else_names_other_libraries_insides():
    names = re.compile(
        r"past_key_values|\b_attn_implementation|AttentionInterface|sdpa_attention_forward|ops\.mkldnn|mkldnn\.enabled"
        r"|forward_intermediates|post_layernorm|embed_scale|get_seq_length"
    )
    files = [*ROOT.glob("flamingo/**/*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
    found = {
        str(file.relative_to(ROOT)): names.findall(file.read_text())
        for file in files
        if file.parent.name != "compat" and names.search(file.read_text())
    }
    # These are models of transformers themselves: their own public signatures have the name, as users write it.
    of_flamingo = ("flamingo/interop/huggingface.py", "flamingo/interop/huggingface_generation.py")
    signatures = {str(Path(name)) for name in (*of_flamingo, "flamingo/model/palm.py")}
    assert set(found) <= signatures, found
    assert {name for names in found.values() for name in names} <= {"past_key_values"}


def test_the_image_token_of_the_check_is_seen(model, pictures):
    """Shown another picture, the check's own prompt has other logits: it does test what a picture changes."""
    ids = torch.tensor([[3, 4, IMAGE, 5, 6, 7]])
    one, other = (model(ids, pixel_values=pictures[i : i + 1, :1]).logits for i in (0, 1))
    assert (one - other).abs().max() > 1e-3
