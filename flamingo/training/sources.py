"""Which examples a run reads: the classroom's scenes, or any captioned set."""

from torch.utils.data import Dataset

from flamingo.classroom.examples import ClassroomScenes
from flamingo.config import TrainingOptions
from flamingo.data.captions import load_captions
from flamingo.errors import InputError

SCENES = 100_000  # of a split
CURRICULUM = (0.2, 0.25)  # shares of a classroom run: its first and its second part (ClassroomScenes)


def uses_classroom(options: TrainingOptions) -> bool:
    """The classroom preset draws its own pictures unless a set is named."""
    return options.data is None


def training_sets(options: TrainingOptions) -> tuple[Dataset, Dataset]:
    """(training examples, validation examples). Raises InputError when the set cannot be read or is too small."""
    if uses_classroom(options):
        if options.preset != "classroom":
            raise InputError(f"the preset {options.preset} needs data: name it with --data")
        examples = options.steps * options.accumulate * options.batch_size
        # At least as many scenes as the run shows: a second epoch would show the curriculum again.
        size = max(SCENES, examples)
        train = ClassroomScenes("train", options.seed, size, tuple(int(share * examples) for share in CURRICULUM))
        return train, ClassroomScenes("validation", options.seed, SCENES)
    splits = load_captions(
        options.data, image_column=options.image_column, caption_columns=options.caption_columns, seed=options.seed
    )
    return splits["train"], splits["validation"]
