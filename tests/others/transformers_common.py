"""transformers' own common tests, run on FlamingoModel and FlamingoConfig.

    python -m pytest tests/others/transformers_common.py

They are not ours to copy: pip fetches the source distribution of the installed version, and what it holds of the common
tests (those of models and of configs) is unpacked into a temporary folder and imported from there. Without an index to
fetch it from, all of this is skipped. It leaves out the tests of `generate`: tests/test_huggingface_generation.py has
ours. Its tests of processors and pipelines are made of transformers' own tables and of models on a hub.

With transformers 5.24, on a machine without a GPU, 102 pass and 63 are skipped, none for want of an ability that a
Flamingo could declare: 31 need a GPU or a library for one, 6 stand in EXCLUDED, 3 resize the vocabulary, and the others
ask for what it is not made of (experts, configs inside the config, a base model without a head, parts kept in float32).
"""

import copy
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from flamingo import FlamingoConfig, FlamingoModel

PACKAGE = "transformers_tests"
# Name of a test → why a Flamingo cannot pass it. Nothing is left out for another reason.
ON_META = "a Flamingo is made around two backbones that are loaded, and nothing is loaded onto the meta device"
NOT_WHOLE = "a checkpoint that lacks what was trained is an error here, and is not filled up with random numbers"
EXCLUDED = {
    "test_cannot_load_with_meta_device_context_manager": "the library's error is an InputError here, in the same words",
    "test_all_tensors_are_parameter_or_buffer": ON_META,
    "test_can_be_initialized_on_meta": ON_META,
    "test_init_weights_can_init_buffers": ON_META,
    "test_can_init_all_missing_weights": NOT_WHOLE,
    "test_model_weights_reload_no_missing_tied_weights": NOT_WHOLE,
}


def fetch(folder: Path) -> None:
    """Unpack the tests of the installed transformers into `folder` as a package. Skips everything where it cannot."""
    wanted = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", wanted]
    done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not archives:
        pytest.skip(f"the source distribution of {wanted} cannot be fetched here", allow_module_level=True)
    with tarfile.open(archives[0]) as archive:
        for member in archive.getmembers():
            inside = Path(member.name).parts[1:]
            if inside[:1] == ("tests",) and member.isfile() and member.name.endswith(".py"):
                target = folder.joinpath(PACKAGE, *inside[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    (folder / PACKAGE / "__init__.py").write_text("")


def stand_in(module: str, **content) -> None:
    """An empty module for one that the source distribution leaves out, so that the others can be imported."""
    try:
        __import__(f"{PACKAGE}.{module}")
    except ImportError:
        package = f"{PACKAGE}.{module.partition('.')[0]}"
        sys.modules.setdefault(package, types.ModuleType(package)).__path__ = []
        sys.modules[f"{PACKAGE}.{module}"] = types.ModuleType(module)
        vars(sys.modules[f"{PACKAGE}.{module}"]).update(content)


pytest.importorskip("parameterized", reason="transformers' common tests need it: pip install parameterized")
FOLDER = tempfile.TemporaryDirectory()
fetch(Path(FOLDER.name))
sys.path.insert(0, FOLDER.name)
stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
stand_in("utils.test_configuration_utils", config_common_kwargs={})

from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402


# ------------------------------------------------------------------------------------------------- a tiny Flamingo
def save_backbones(folder: Path) -> dict[str, str]:
    """A random OPT of two layers with its tokenizer, and a random CLIP, as folders → their names for a config."""
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(60))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "opt")
    OPTForCausalLM(OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128,
    )).save_pretrained(folder / "opt")  # fmt: skip
    CLIPVisionModel(CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
    )).save_pretrained(folder / "clip")  # fmt: skip
    size = {"height": 8, "width": 8}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder / "clip")
    return {"lm": str(folder / "opt"), "clip_model_type": str(folder / "clip")}


class FlamingoTester:
    """What the common tests ask about a model. B = 3 texts of 7 tokens and a picture each."""

    batch_size, seq_length, is_training, num_hidden_layers, num_attention_heads, hidden_size = 3, 7, True, 2, 4, 32

    def __init__(self):
        self.image_size = 8, 8
        self.settings = save_backbones(Path(FOLDER.name)) | {
            "resampler_depth": 1, "resampler_dim_head": 8, "resampler_heads": 2, "resampler_num_latents": 3,
            "xattn_dim_head": 8, "xattn_heads": 2,
        }  # fmt: skip

    def trains_language_model(self) -> None:
        """For tests that look at the first layer that can be checkpointed, or at the gradient of the embeddings: the
        language model's then, which trains, beside an encoder that is none of transformers'."""
        self.settings |= {"clip_model_type": "asset:classroom/clip", "freeze_language_model": False}
        self.image_size = 96, 96

    def get_config(self) -> FlamingoConfig:
        return FlamingoConfig(**self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[FlamingoConfig, dict]:
        ids = torch.randint(4, 60, (self.batch_size, self.seq_length))
        ids[:, 1] = 65  # <image>
        pictures = torch.rand(self.batch_size, 1, 1, 3, *self.image_size)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "media_locations": ids == 65,
                  "pixel_values": pictures}  # fmt: skip
        return self.get_config(), copy.deepcopy(inputs)


class FlamingoCommonTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (FlamingoModel,)
    all_generative_model_classes = ()  # the tests of `generate` are not in the source distribution
    test_resize_embeddings = False  # the vocabulary is the frozen language model's: `resize_token_embeddings` says so

    def setUp(self):
        self.model_tester = FlamingoTester()
        if reason := EXCLUDED.get(self._testMethodName):
            self.skipTest(reason)
        if "gradient_checkpointing" in self._testMethodName:
            self.model_tester.trains_language_model()

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        """Labels go by a table of transformers' own models, where ours is not."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | ({"labels": torch.zeros_like(inputs["input_ids"])} if return_labels else {})

    def test_config(self):
        tester = ConfigTester(self, FlamingoConfig, has_text_modality=False, common_properties=["dim", "lm"])
        tester.run_common_tests()
