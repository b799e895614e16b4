"""Adapters behind the Hugging Face API: several LoRAs beside one Flamingo, switched, saved and loaded.

What this file teaches: an adapter is a small guest in a frozen house. Which of the guests speak is a state of the
model, so it is saved with them. (transformers has these methods too; its own freeze what was added to the language
model, and refuse versions of peft that work.)
"""

from pathlib import Path

from torch import Tensor

from flamingo.errors import InputError
from flamingo.interop import compat
from flamingo.interop.adapters import add_adapter, config_of, layers_of, peft, read_adapter


class Adapters:
    """Methods of `FlamingoModel` (huggingface.py). They raise InputError where peft is not installed."""

    def add_adapter(self, adapter_config, adapter_name: str = "default") -> None:
        """A fresh adapter beside frozen matrices, which becomes the active one; what trains goes on training.

        Raises ValueError for a name that is taken, InputError for what peft cannot put into a model that is there.
        """
        known = getattr(self, "peft_config", {})
        if adapter_name in known:
            raise ValueError(f"there is an adapter {adapter_name!r} already: give the new one another name")
        add_adapter(self.flamingo, adapter_name, adapter_config)
        compat.name_adapters(self, known | {adapter_name: adapter_config})

    def load_adapter(self, folder: str | Path, adapter_name: str = "default", is_trainable: bool = False) -> None:
        """The adapter that peft's `save_pretrained` wrote into a folder, for this model or one of the same parts."""
        settings, tensors = read_adapter(Path(folder))
        self.add_adapter(config_of(settings), adapter_name)
        found = peft().functional.set_peft_model_state_dict(self, tensors, adapter_name=adapter_name)
        wanted = self.get_adapter_state_dict(adapter_name).keys()
        if found.unexpected_keys or wanted != tensors.keys():
            self.delete_adapter(adapter_name)
            raise InputError(f"{folder} holds an adapter of another model: its tensors do not fit into this one")
        if not is_trainable:
            peft().functional.set_requires_grad(self, adapter_name, requires_grad=False)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Let this adapter act and train, or these, and no other. Raises ValueError for a name that there is not."""
        names = self._known(adapter_name)
        peft().functional.set_adapter(self, names if len(names) > 1 else names[0])

    def disable_adapters(self) -> None:
        """The model without its adapters, until `enable_adapters`."""
        self._switch(False)

    def enable_adapters(self) -> None:
        self._switch(True)

    def active_adapters(self) -> list[str]:
        """The names of those that act; none while they are disabled."""
        layer = next(layers_of(self), None)
        return [] if layer is None or layer.disable_adapters else list(layer.active_adapters)

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        for name in self._known(adapter_names):
            kind = self.peft_config[name].peft_type
            peft().functional.delete_adapter(self, name, prefix=peft().mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind])
            compat.name_adapters(self, {other: config for other, config in self.peft_config.items() if other != name})

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict | None = None
    ) -> dict[str, Tensor]:
        """Name → tensor of one adapter, as peft saves them; of the first active one if none is named."""
        name = adapter_name or next(iter(self.active_adapters()), None)
        return peft().functional.get_peft_model_state_dict(
            self, state_dict=state_dict, adapter_name=self._known(name)[0]
        )

    def enable_peft_hotswap(self, *_, **__) -> None:
        raise InputError("adapters are not exchanged in place here: delete one and load another")

    def _switch(self, on: bool) -> None:
        self._known([])
        for layer in layers_of(self):
            layer.enable_adapters(enabled=on)

    def _known(self, names: str | list[str] | None) -> list[str]:
        """The names as a list. Raises ValueError for one that there is not."""
        known = list(getattr(self, "peft_config", {}))
        if not known:
            raise ValueError("this model has no adapter: add_adapter gives it one")
        names = [names] if isinstance(names, str) or names is None else list(names)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"this model has no adapter {unknown[0]!r}, but {', '.join(known)}")
        return names
