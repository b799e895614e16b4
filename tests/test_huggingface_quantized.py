"""A language model of 8 or 4 bits a weight, by torchao or bitsandbytes, where one is installed."""

import sys

import pytest
import torch
from transformers import BitsAndBytesConfig

from flamingo import FlamingoModel, FlamingoProcessor, InputError
from flamingo.classroom import scenes
from flamingo.files import asset
from flamingo.interop import compat

FOLDER = asset("classroom/flamingo")
PROCESSOR = FlamingoProcessor.from_pretrained(FOLDER)
INPUTS = PROCESSOR(images=scenes.make_scene(0, "test", 0).draw(), text="<image> As a list:")


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization", reason="8 bits by torchao: pip install torchao")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes", reason="8 and 4 bits by bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(**options)


KINDS = {
    "torchao, 8 bits": (torchao_int8, 0.05),
    "bitsandbytes, 8 bits": (lambda: bitsandbytes(load_in_8bit=True), 0.05),
    "bitsandbytes, 4 bits": (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_language_model_sees_nearly_the_same(kind, tmp_path):
    """Near the logits of the whole one, and saved as it was loaded: what was added, and names of the rest."""
    make, tolerance = KINDS[kind]
    whole, model = (
        FlamingoModel.from_pretrained(FOLDER),
        FlamingoModel.from_pretrained(FOLDER, quantization_config=make()),
    )
    lm = model.flamingo.lang_encoder
    assert len(list(compat.unquantized_parameters(lm))) <= len(list(lm.parameters())) - 24  # 6 matrices a layer
    expected, logits = whole(**INPUTS).logits, model(**INPUTS).logits
    assert 0 < (logits - expected).norm() / expected.norm() < tolerance
    model.save_pretrained(tmp_path)
    again = FlamingoModel.from_pretrained(tmp_path)
    assert torch.equal(again(**INPUTS).logits, expected)
    with pytest.raises(InputError, match="quantized language model has changed"):
        next(p for n, p in lm.named_parameters() if n.endswith("final_layer_norm.weight")).data.add_(1.0)
        model.save_pretrained(tmp_path)
    assert model.generate(**INPUTS, max_new_tokens=3).shape == whole.generate(**INPUTS, max_new_tokens=3).shape


def test_what_was_added_trains_beside_a_quantized_language_model():
    model = FlamingoModel.from_pretrained(FOLDER, quantization_config=torchao_int8()).train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters_trainable())


def test_a_missing_package_is_one_sentence(monkeypatch):
    if "bitsandbytes" in sys.modules:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(InputError, match=r"cannot load the language model asset:classroom/opt: .*bitsandbytes"):
        FlamingoModel.from_pretrained(FOLDER, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
