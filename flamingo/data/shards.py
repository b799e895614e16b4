"""Any captioned set → tar files for training as a stream.

    python -m flamingo.data.shards my_pictures shards                      shards/train-00000.tar, …
    python -m flamingo.data.shards my_pictures shards --size 256           pictures no larger than their encoder needs

What this file teaches: a disk, and a network even more, reads one large file many times faster than a thousand small
ones. So samples are written one behind the other, a thousand to a file; and a training reads each file from its
beginning to its end. (Shuffled once here, for within a file a training shuffles only a little.)
"""

import argparse
import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flamingo.data.captions import CaptionedPictures, describe_splits, load_captions
from flamingo.data.pictures import open_picture, picture_bytes
from flamingo.data.texts import texts_of_row
from flamingo.errors import InputError, OneSentenceParser, run_command
from flamingo.files import UNFINISHED, writing
from flamingo.limits import in_range

QUALITY = 95  # of a JPEG that is written anew


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OneSentenceParser(prog="python -m flamingo.data.shards", description=__doc__.splitlines()[0],
                               allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("data", help="any set that train.py --data takes, but a stream")
    add("out", type=Path, help="folder to write, which must not hold any shards yet")
    add("--samples", type=int, default=1000, help="in a shard (default: %(default)s)")
    add("--size", type=int, default=0, help="shorter side of a picture in pixels, at most; 0 leaves it as it is")
    add("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    add("--image-column", help="the data's picture column, if it cannot be found")
    add("--caption-columns", help="its caption columns, comma separated, if they cannot be found")
    add("--allow-outside", action="store_true", help="let the data name files outside of its own folder")
    args = parser.parse_args(argv)
    in_range("--samples", args.samples, 1, 10**7)
    in_range("--size", args.size, 0, 10**5)
    return args


def resized(file: bytes, size: int) -> tuple[bytes, str]:
    """A picture file and its suffix; written anew as a JPEG if it is larger than `size`, or in a format of many."""
    picture = open_picture(file)
    if size and min(picture.size) > size:
        scale = size / min(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    elif file.startswith(b"\xff\xd8"):
        return file, "jpg"
    elif file.startswith(b"\x89PNG"):
        return file, "png"
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=QUALITY)
    return written.getvalue(), "jpg"


def sample_of(examples: CaptionedPictures, index: int, key: str, size: int) -> dict:
    """An example as webdataset writes it: its pictures, and a json with its captions."""
    row, base = examples.row(index), examples.bases[examples.kept[index]]
    pictures = [resized(picture_bytes(picture, base, examples.place), size) for picture in examples.files_of(row)]
    captions, _ = texts_of_row(row, examples.caption_columns)
    sample = {"__key__": key, "json": json.dumps({"captions": captions}).encode()}
    if len(pictures) == 1:
        ((file, suffix),) = pictures
        return sample | {suffix: file}
    return sample | {f"{k}.{suffix}": file for k, (file, suffix) in enumerate(pictures)}


def write_shards(examples: CaptionedPictures, out: Path, name: str, samples: int, size: int, seed: int) -> list[Path]:
    """NAME-00000.tar, … in the folder `out`; each is whole or absent. Raises InputError if it cannot be written."""
    import webdataset

    order = random.Random(seed).sample(range(len(examples)), len(examples))
    written = []
    for first in range(0, len(order), samples):
        shard = out / f"{name}-{len(written):05}.tar"
        with writing(shard), tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=out) as folder:
            temporary = Path(folder) / shard.name
            with webdataset.TarWriter(str(temporary)) as tar:
                for number, index in enumerate(order[first : first + samples], start=first):
                    tar.write(sample_of(examples, index, f"{number:09}", size))
            os.replace(temporary, shard)
        written.append(shard)
    return written


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    sets = load_captions(args.data, image_column=args.image_column, caption_columns=args.caption_columns,
                         seed=args.seed, allow_outside=args.allow_outside)  # fmt: skip
    print(describe_splits(sets))
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.glob("*.tar")):
        raise InputError(f"{args.out} holds shards already: choose another folder")
    for name, examples in sets.items():
        shards = write_shards(examples, args.out, name, args.samples, args.size, args.seed)
        pattern = shards[0] if len(shards) == 1 else args.out / f"{name}-{{00000..{len(shards) - 1:05}}}.tar"
        print(f"{name}: {len(examples)} examples in {len(shards)} shard(s): --data '{pattern}'")


if __name__ == "__main__":
    run_command("python -m flamingo.data.shards", lambda: main(sys.argv[1:]))
