"""A language model of 8 or 4 bits a weight, by torchao or bitsandbytes, where one is installed."""

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from flamingo import FlamingoModel, FlamingoProcessor, InputError
from flamingo.classroom import scenes
from flamingo.files import asset
from flamingo.interop import compat

FOLDER = asset("classroom/flamingo")
PROCESSOR = FlamingoProcessor.from_pretrained(FOLDER)
INPUTS = PROCESSOR(images=scenes.make_scene(0, "test", 0).draw(), text="<image> As a list:")


def torchao(kind: str, **options):
    quantization = pytest.importorskip("torchao.quantization", reason="8 and 4 bits by torchao: pip install torchao")
    return TorchAoConfig(getattr(quantization, kind)(**options))


def torchao_int8():
    return torchao("Int8WeightOnlyConfig")


def torchao_int4():
    quantization = pytest.importorskip("torchao.quantization", reason="8 and 4 bits by torchao: pip install torchao")
    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=quantization.PerGroup(32))


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes", reason="8 and 4 bits by bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(**options)


KINDS = {
    "torchao, 8 bits": (torchao_int8, 0.05),
    "torchao, 4 bits": (torchao_int4, 0.1),
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


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_language_model_computes_in_the_dtype_that_is_asked_for(kind):
    """Its scales and all that is not quantized have it too, so that it can be multiplied by the rest."""
    make, tolerance = KINDS[kind]
    model = FlamingoModel.from_pretrained(FOLDER, quantization_config=make(), dtype="bfloat16")
    inputs = INPUTS | {"pixel_values": INPUTS["pixel_values"].bfloat16()}
    expected, logits = FlamingoModel.from_pretrained(FOLDER)(**INPUTS).logits, model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert 0 < (logits - expected).norm() / expected.norm() < tolerance + 0.02


def test_what_torchao_cannot_do_on_this_machine_is_one_sentence():
    """Of 4 bits, its kernels for GPUs."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for options in ({}, {"int4_packing_format": "plain_int32"}, {"int4_packing_format": "opaque"}):
        with pytest.raises(InputError, match=r"cannot do Int4WeightOnlyConfig here .*IntxWeightOnlyConfig"):
            bits = torchao("Int4WeightOnlyConfig", group_size=32, **options)
            FlamingoModel.from_pretrained(FOLDER, quantization_config=bits)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_added_trains_beside_a_quantized_language_model(kind):
    model = FlamingoModel.from_pretrained(FOLDER, quantization_config=KINDS[kind][0]()).train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters_trainable())


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_8bit.is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(InputError, match=r"cannot load the language model asset:classroom/opt: .*bitsandbytes"):
        FlamingoModel.from_pretrained(FOLDER, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
