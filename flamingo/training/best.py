"""The weights of the best validation, and when to stop.

What this file teaches: a small set is learned by heart. The training loss goes on falling, and from some step on the
loss on pictures held out rises: every further step makes the model worse (training.png shows it). So with the option
`patience` the weights with the least validation loss, with the picture, are kept in a file of the run folder, training
stops when that many validations in a row were no better, and the file is what the run ends with.

Which validation is the best is read off the log, so a resumed run decides as one that was never stopped.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flamingo import ranks
from flamingo.errors import InputError
from flamingo.files import one_line, write_atomically
from flamingo.model.vlm import VisionLanguageModel
from flamingo.run_folder import BEST
from flamingo.training.checkpoint import load_trained
from flamingo.training.log import RunLog


class Best:
    """With patience 0 it does nothing: a run trains all its steps and keeps the last weights."""

    def __init__(self, folder: Path, model: VisionLanguageModel, log: RunLog, patience: int):
        self.file, self.model, self.log, self.patience = folder / BEST, model, log, patience

    def should_stop(self) -> bool:
        """After a validation: keep the weights if it is the best so far; True if there was none better for too long."""
        if not self.patience:
            return False
        since = len(self.log.validations) - 1 - self.log.validations.index(self.log.kept())
        if since == 0 and ranks.is_first():
            tensors = {name: tensor.cpu() for name, tensor in self.model.trainable_state_dict().items()}
            step = {"step": str(self.log.kept()["step"])}
            write_atomically(self.file, lambda path: save_file(tensors, path, metadata=step))
        return since >= self.patience

    def restore(self) -> None:
        """At the end: the best weights. (Their file goes when the run is finished.) Raises InputError if it is gone."""
        if not self.patience:
            return
        ranks.total(0)  # now the first has written it
        try:
            load_trained(self.model, load_file(self.file), str(self.file))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.file}, the best weights, cannot be read: {one_line(error)}") from error
        ranks.total(0)  # now all have read it
