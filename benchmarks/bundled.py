"""What does a run say of photographs that everybody has, and what does it answer to a question about them?

    pip install scikit-image scikit-learn
    python -m benchmarks.bundled runs/mine [--beams 3] [--figure FILE]

The pictures are the photographs of everyday things that these two packages bring with them and say the licence of
(README). Each gets a caption, and one question: the model was trained on captions alone, so what it answers shows what
is left of the language model's own knowledge of questions, and how little of it looks at the picture.
"""

import importlib.util
import sys
import textwrap
from pathlib import Path

from PIL import Image

from benchmarks.common import ASSETS
from flamingo.data.pictures import open_picture
from flamingo.errors import InputError, OneSentenceParser, run_command
from flamingo.figures.run_figures import plt
from flamingo.files import write_atomically
from flamingo.limits import in_range

PICTURES = {  # (package, file in it) → a question
    ("skimage", "data/chelsea.png"): "What animal is it?",
    ("skimage", "data/coffee.png"): "What is in the cup?",
    ("skimage", "data/astronaut.png"): "What is the woman wearing?",
    ("skimage", "data/camera.png"): "What is the man doing?",
    ("sklearn", "datasets/images/china.jpg"): "What colour is the roof?",
    ("sklearn", "datasets/images/flower.jpg"): "What colour is the flower?",
}
INSTALL = "pip install scikit-image scikit-learn"
COLUMNS = 3


def open_bundled(package: str, file: str) -> Image.Image:
    """A photograph out of an installed package, which is not imported. Raises InputError if it is not there."""
    found = importlib.util.find_spec(package)
    path = found and Path(found.origin).parent / file
    if not path or not path.is_file():
        raise InputError(f"{file} of {package} is not there: {INSTALL}")
    return open_picture(path)


def main(argv: list[str]) -> None:
    parser = OneSentenceParser(prog="python -m benchmarks.bundled", description=__doc__.splitlines()[0],
                               allow_abbrev=False)  # fmt: skip
    parser.add_argument("run", help="run folder that train.py wrote")
    parser.add_argument("--beams", type=int, default=3, help="beams of the search (default: %(default)s)")
    parser.add_argument("--figure", type=Path, default=ASSETS / "photos" / "bundled.png", metavar="FILE")
    args = parser.parse_args(argv)
    in_range("--beams", args.beams, 1, 64)
    pictures = [open_bundled(*name) for name in PICTURES]

    from flamingo import FlamingoModel
    from flamingo.fast.inference import prepare_to_generate

    model = FlamingoModel.from_pretrained(args.run)
    prepare_to_generate(model.flamingo, "float32")
    how = {"num_beams": args.beams, "max_new_tokens": 32}
    captions = model.generate_captions(model.processor, images=pictures, **how)
    answers = [
        model.generate_captions(
            model.processor, images=[picture], prompt=f"<image> Question: {question} Answer:", **how
        )[0]
        for picture, question in zip(pictures, PICTURES.values(), strict=True)
    ]  # fmt: skip
    for (_, file), question, caption, answer in zip(PICTURES, PICTURES.values(), captions, answers, strict=True):
        print(f"{Path(file).stem:16} {caption}\n{'':16} {question} {answer}")
    write_atomically(args.figure, lambda path: draw(path, pictures, captions, answers))
    print(f"look at {args.figure}")


def draw(path: Path, pictures: list[Image.Image], captions: list[str], answers: list[str]) -> None:
    rows = -(-len(pictures) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(3.2 * COLUMNS, 3.4 * rows), layout="constrained")
    for axes, picture, caption, question, answer in zip(
        grid.flat, pictures, captions, PICTURES.values(), answers, strict=True
    ):
        axes.imshow(picture)
        axes.axis("off")
        axes.set_title(textwrap.fill(caption or "(nothing)", 40), fontsize=9)
        said = textwrap.fill(f"{question} {answer or '(nothing)'}", 44)
        axes.text(0.5, -0.04, said, transform=axes.transAxes, ha="center", va="top", fontsize=8, color="#5b6270")
    figure.savefig(path, dpi=90, facecolor="white", format="png")
    plt.close(figure)


if __name__ == "__main__":
    run_command("python -m benchmarks.bundled", lambda: main(sys.argv[1:]))
