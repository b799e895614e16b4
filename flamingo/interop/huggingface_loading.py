"""Loading and saving behind the Hugging Face API: every option is honoured, or refused by its name.

What this file teaches: most of transformers' loading is for models whose weights are all in one checkpoint. Ours names
its two backbones and holds the rest, so it has its own `from_pretrained` and `save_pretrained`; what a user passes to
them out of habit must then have the usual effect, or say that it has none.

Names of tensors: a checkpoint has those of the `Flamingo` (`perceiver.latents`), in a `FlamingoModel` they stand behind
`flamingo.`. `load_state_dict` takes both, so the Trainer, which calls it on its own checkpoints, finds what was saved.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

from flamingo.errors import InputError
from flamingo.files import OF_A_HUB, PASSED_ALONG, find_folder, fingerprint, write_json
from flamingo.interop import compat
from flamingo.interop.adapters import config_of, settings_of
from flamingo.interop.backbones import Quantization
from flamingo.interop.huggingface_config import FlamingoConfig
from flamingo.settings import FLAT
from flamingo.training.card import CARD, card_text, write_card_text
from flamingo.training.checkpoint import ACTIVE, ADAPTERS, GENERAL, load_model, own_tensors, read_config, save_model

PREFIX = "flamingo."
WITHOUT_EFFECT = PASSED_ALONG | {"low_cpu_mem_usage", "weights_only", "adapter_kwargs"}  # in transformers neither
WITHOUT_EFFECT_IN_SAVING = {"save_function", "save_peft_format", "save_original_format"}


class LoadAndSave:
    """Methods of `FlamingoModel` (huggingface.py)."""

    _card: tuple[str, str] | None = None  # the card it was loaded with, and `_trained()` at that time

    # --------------------------------------------------------------------------------------------------- loading
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None, *_, config: FlamingoConfig | str | Path | None = None,
        dtype: torch.dtype | str | None = None, torch_dtype: torch.dtype | str | None = None, device_map=None,
        attn_implementation: str | None = None, quantization_config=None,
        generation_config: GenerationConfig | None = None, output_loading_info: bool = False, subfolder: str = "",
        **options,
    ):  # fmt: skip
        """The model of a run folder, or of a repository on the hub; of a config and a state_dict if no name is given.

        Args:
            config: in place of the folder's own.
            dtype (torch_dtype is its old name): of all weights; float32 if not given, "auto" as they were saved.
            device_map: one device, such as "cuda"; a model this small is not spread over several.
            attn_implementation: of the language model.
            quantization_config: of the language model, for 4 or 8 bits a weight by bitsandbytes or torchao.
            generation_config: in place of the folder's own.
            output_loading_info: return (model, what was found) in place of the model.
            options: revision, token, cache_dir, local_files_only and force_download of a hub; any field of the config.

        Raises InputError when there is no such folder, a file is damaged, a backbone is not the right one, or an option
        has no meaning here.
        """
        device = one_device(device_map)
        if pretrained_model_name_or_path is None:
            model = cls(config).to(device=device, dtype=_dtype(dtype, config)).eval()
            model.load_state_dict(options.pop("state_dict", {}))
            return model
        folder = find_folder(pretrained_model_name_or_path, options) / subfolder
        config = _config(folder, config, options)
        wanted = _dtype(dtype if dtype is not None else torch_dtype, config)
        bits = quantization_config and Quantization(quantization_config, wanted, device)
        built = load_model(folder, config.model_config(), bits)
        model = cls(config, built).eval()
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        if adapters := getattr(config, ADAPTERS, None):
            compat.name_adapters(model, {name: config_of(settings) for name, settings in adapters.items()})
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        if generation_config is not None:
            model.generation_config = generation_config
        elif (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        if compat.is_quantized(model.flamingo.lang_encoder):  # it stays where its library has put it
            device = device or model.flamingo.lang_encoder.device
            for _, parameter in compat.unquantized_parameters(model.flamingo.lang_encoder):
                parameter.data = parameter.data.to(wanted)
        for part in model.parts_in_floating_point():
            part.to(device=device, dtype=wanted)
        if (folder / CARD).is_file():
            model._card = (folder / CARD).read_text(encoding="utf-8", errors="replace"), model._trained()
        if not output_loading_info:
            return model
        nothing = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return model, nothing  # anything else would have been an InputError

    def parts_in_floating_point(self) -> list[torch.nn.Module]:
        """The model; if its language model is quantized, what is not of it."""
        if not compat.is_quantized(self.flamingo.lang_encoder):
            return [self]
        return [self.flamingo.vision_encoder, self.flamingo.vision_tokenizer, *self.flamingo.added_parts()]

    def take_checkpoints_by_either_name(self) -> None:
        """Let `load_state_dict` take names with and without PREFIX, and do without the named backbones."""
        self.register_load_state_dict_pre_hook(_add_prefix)
        self.register_load_state_dict_post_hook(_backbones_are_not_missing)

    # ---------------------------------------------------------------------------------------------------- saving
    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False, max_shard_size: int | str = "50GB", **options,
    ) -> None:  # fmt: skip
        """Write config, tensors beside the named backbones, tokenizer and preprocessing: what `from_pretrained` reads.

        Args:
            is_main_process: False writes nothing.
            state_dict: in place of the model's own, under either name; it must hold all that the folder needs.
            push_to_hub: upload the folder too; options are then those of `push_to_hub`.
            max_shard_size: of one file.

        Raises InputError, before anything is written, for an incomplete state_dict or an option without a meaning here.
        """
        pushed = options if push_to_hub else {"token": options.pop("token", None)}
        for name in list(options):
            value = options[name]
            if name in WITHOUT_EFFECT_IN_SAVING or value is None or (name, value) == ("safe_serialization", True):
                options.pop(name)
            elif not push_to_hub or name in ("variant", "distributed_checkpoint", "safe_serialization"):
                raise InputError(f"save_pretrained of FlamingoModel has no option {name}={value!r}")
        if not is_main_process:
            return
        tensors = own_tensors(self.flamingo, None if state_dict is None else self._complete(state_dict))
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(
            folder, self.flamingo, self.processor, self.config.model_config(), tensors=tensors,
            general=self._general_settings(), max_shard_size=max_shard_size,
        )  # fmt: skip
        write_json(folder / "generation_config.json", json.loads(self.generation_config.to_json_string()))
        write_card_text(folder, self.card(folder.name))
        if push_to_hub:
            self.push_to_hub(pushed.pop("repo_id", folder.name), **pushed)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, max_shard_size: int | str = "50GB", **of_the_commit
    ) -> str:
        """Upload what `save_pretrained` writes, the card included (transformers' own method writes an empty one).

        of_the_commit: commit_message, commit_description, token, revision, create_pr. → the commit's address.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=of_the_commit.pop("token", None))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) / repo_id.rpartition("/")[2]  # the card calls the model by its folder's name
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            message = {"commit_message": "Upload FlamingoModel"} | of_the_commit
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **message).commit_url

    def card(self, name: str) -> str:
        """The card it was loaded with, for it has the scores; one without scores if the model has changed since."""
        if self._card and self._card[1] == self._trained():
            return self._card[0]
        return card_text(name, self.config.model_config())

    def _trained(self) -> str:
        """A fingerprint of what can train, the language model and adapters in it included (a quantized one cannot)."""
        lm = self.flamingo.lang_encoder
        parts = self.flamingo.added_parts() if compat.is_quantized(lm) else [lm]
        return fingerprint(torch.nn.ModuleList([self.flamingo.vision_tokenizer, *parts]))

    def _complete(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict under the names of a checkpoint. Raises InputError if it lacks what a folder needs."""
        given = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
        missing = sorted(own_tensors(self.flamingo).keys() - given.keys())
        if missing:
            raise InputError(
                f"the state_dict lacks {len(missing)} tensors that the folder needs (such as {missing[0]}): give all "
                "of model.state_dict(), or none"
            )
        return given

    def _general_settings(self) -> dict:
        """What stands in config.json beside the architecture. Prints the names that nothing would read again."""
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        settings = json.loads(self.config.to_json_string())
        unknown = sorted(settings.keys() - FLAT.keys() - GENERAL)
        if unknown:
            print(f"config.{', config.'.join(unknown)}: not saved, for a Flamingo has no such setting", file=sys.stderr)
        general = {
            name: value for name, value in settings.items() if name in GENERAL - {"model_type", ADAPTERS, ACTIVE}
        }
        if adapters := getattr(self, "peft_config", None):
            general[ADAPTERS] = {name: settings_of(config) for name, config in adapters.items()}
            general[ACTIVE] = self.active_adapters()
        return general


# --------------------------------------------------------------------------------------------------------- options
def one_device(device_map) -> torch.device | None:
    """Raises InputError for a map that would spread the model."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise InputError(f"device_map={device_map!r}: name one device, such as 'cuda'")
    try:
        return None if device_map is None else torch.device(device_map)
    except RuntimeError as error:
        raise InputError(f"device_map={device_map!r} is no device: {error}") from None


def _config(folder: Path, given: FlamingoConfig | str | Path | None, options: dict) -> FlamingoConfig:
    """The config given, or the folder's, with the fields that are among the options. Raises InputError for an option
    that is neither a field nor known."""
    if isinstance(given, PreTrainedConfig):
        config = copy.deepcopy(given)
    else:
        source = folder if given is None else Path(given)
        read_config(source)  # names what is wrong with it
        config = FlamingoConfig.from_pretrained(source)
    for name, value in options.items():
        if name in FLAT or name in GENERAL:
            setattr(config, name, value)
        elif not (value is None or name in WITHOUT_EFFECT or name in OF_A_HUB
                  or (name, value) in (("use_safetensors", True), ("ignore_mismatched_sizes", False))):  # fmt: skip
            raise InputError(f"from_pretrained of FlamingoModel has no option {name}={value!r:.60}")
    return config


def _dtype(wanted: torch.dtype | str | None, config: FlamingoConfig) -> torch.dtype:
    """Raises InputError for what is no dtype of weights."""
    if wanted == "auto":
        wanted = config.dtype
    found = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted or torch.float32
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(f"dtype={wanted!r} is no dtype of weights: give float32, bfloat16 or float16")
    return found


# ----------------------------------------------------------------------------------------------------------- names
def _add_prefix(model, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Before `load_state_dict`: every name gets PREFIX that has it not. In place."""
    for name in list(state_dict):
        if name.startswith(prefix) and not name.startswith(prefix + PREFIX):
            state_dict[prefix + PREFIX + name.removeprefix(prefix)] = state_dict.pop(name)


def _backbones_are_not_missing(model, incompatible_keys) -> None:
    """After `load_state_dict`: what a checkpoint leaves out on purpose is not missing. In place."""
    own = own_tensors(model.flamingo)
    keys = incompatible_keys.missing_keys
    keys[:] = [key for key in keys if PREFIX not in key or key.partition(PREFIX)[2] in own]
