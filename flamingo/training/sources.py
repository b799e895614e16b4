"""Which examples a run reads: the classroom's scenes, or any captioned set."""

import math
from pathlib import Path

from torch.utils.data import Dataset

from flamingo.classroom.examples import ClassroomScenes, mix_for
from flamingo.config import ModelConfig, TrainingOptions
from flamingo.data.batches import Collate
from flamingo.data.captions import describe_splits, load_set
from flamingo.data.streams import Stream, is_stream, load_stream
from flamingo.errors import InputError

SCENES = 100_000  # of a split
CURRICULUM = (0.18, 0.22)  # shares of a classroom run: its first and its second part (ClassroomScenes)
TOKENIZED = 500  # examples whose texts are tokenized before a run begins


def uses_classroom(options: TrainingOptions) -> bool:
    """The classroom preset draws its own pictures unless a set is named."""
    return options.data is None


def training_sets(options: TrainingOptions, config: ModelConfig) -> tuple[Dataset | Stream, Dataset]:
    """(training examples, validation examples). The classroom's are mixed for the way its model joins picture and text.
    Raises InputError when the set cannot be read or is too small."""
    if uses_classroom(options):
        if not options.preset.startswith("classroom"):
            raise InputError(f"the preset {options.preset} needs data: name it with --data")
        if options.image_column is not None or options.caption_columns is not None:
            raise InputError("--image-column and --caption-columns belong to --data: name the set")
        examples = options.steps * options.accumulate * options.batch_size
        # At least as many scenes as the run shows: a second epoch would show the curriculum again.
        size, curriculum = max(SCENES, examples), tuple(int(share * examples) for share in CURRICULUM)
        mix = mix_for(config)
        train = ClassroomScenes("train", options.seed, size, curriculum, mix)
        return train, ClassroomScenes("validation", options.seed, SCENES, mix=mix)
    if is_stream(options):
        stream = load_stream(options)
        print(f"{stream.describe()}; its pictures are encoded as they come (most are read once: there is no cache)")
        return stream, stream.held_out
    _must_not_write_into_the_data(options)
    splits = load_set(options)
    print(describe_splits(splits))
    return tuple(splits[name].with_few_captions(options.captions_per_picture) for name in ("train", "validation"))


def texts_in_a_row(examples: Dataset | Stream) -> int:
    """How many texts of one picture are set end to end at most (data/joined.py). Captioned sets are left as they are:
    one of several captions of a picture would stand in front of the next, which could copy it."""
    return examples.mix.in_a_row if isinstance(examples, ClassroomScenes) else 1


def first_lookup(examples: Dataset | Stream, options: TrainingOptions) -> int | None:
    """The step at which a curriculum comes to what is looked up in examples; None if there is no curriculum."""
    return math.ceil(sum(examples.curriculum) / (options.batch_size * options.accumulate)) or None


def _must_not_write_into_the_data(options: TrainingOptions) -> None:
    """The figures of a run would be pictures of the set the next time it is read."""
    folder = Path(options.resume or options.out or Path("runs") / options.preset).expanduser()
    data = Path(options.data_place or options.data)
    if not options.resume and data.is_dir() and folder.resolve().is_relative_to(data.resolve()):
        raise InputError(
            f"the run folder {folder} would be inside of the data {options.data}, and its figures would be read as "
            "pictures: choose an --out elsewhere"
        )


def described(examples: Dataset | Stream) -> str:
    return examples.describe() if isinstance(examples, Stream) else f"{len(examples)} examples"


def check_targets(train: Dataset, validation: Dataset, collate: Collate) -> None:
    """Print how many texts are cut and how many examples have no token with a loss. Raises InputError if none has one.

    Of a large set this is known of `TOKENIZED` examples, evenly spread.
    """
    limit = f"--max-tokens {collate.max_tokens}"
    if collate.room:
        positions, of_a_picture = collate.room
        limit += f" and the {positions} positions of the language model, of which a picture takes {of_a_picture}"
    for what, examples in (("training", train), ("validation", validation)):
        if isinstance(examples, Stream):  # whose first samples are the validation
            continue
        looked_at = range(0, len(examples), max(1, len(examples) // TOKENIZED))
        texts, cut, without = 0, 0, 0
        for i in looked_at:
            tokens, too_long = collate.tokens(examples.texts(i))
            texts, cut = texts + len(tokens["labels"]), cut + too_long
            without += not (tokens["labels"][:, 1:] != -100).any()
        if without == len(looked_at):
            raise InputError(
                f"no {what} text has a token to predict: a caption must begin, after its <image>, within {limit}"
            )
        if cut or without:
            print(
                f"of {len(looked_at)} {what} examples with {texts} texts, {without} have no token to predict, and "
                f"{cut} texts are cut at {limit}"
            )
