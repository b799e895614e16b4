"""Which examples a run reads: the classroom's scenes, or any captioned set."""

from torch.utils.data import Dataset

from flamingo.data.captions import load_captions
from flamingo.data.classroom import ClassroomScenes
from flamingo.errors import InputError
from flamingo.options import TrainingOptions

FIRST_WORDS = 0.6  # share of a classroom run that is first lessons


def uses_classroom(options: TrainingOptions) -> bool:
    """The classroom preset draws its own pictures unless a set is named."""
    return options.data is None


def training_sets(options: TrainingOptions) -> tuple[Dataset, Dataset]:
    """(training examples, validation examples). Raises InputError when the set cannot be read or is too small."""
    if uses_classroom(options):
        if options.preset != "classroom":
            raise InputError(f"the preset {options.preset} needs data: name it with --data")
        lessons = FIRST_WORDS * options.steps * options.accumulate * options.batch_size
        train = ClassroomScenes("train", options.seed, first_lessons=int(lessons))
        return train, ClassroomScenes("validation", options.seed)
    splits = load_captions(
        options.data, image_column=options.image_column, caption_columns=options.caption_columns, seed=options.seed
    )
    return splits["train"], splits["validation"]
