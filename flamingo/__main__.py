"""Caption picture files from the shell.

python -m flamingo runs/classroom picture.png more.jpg          a line for each: the file, a tab, the caption
python -m flamingo doctor                                       versions, hardware and a self-check, for bug reports

A picture that cannot be read costs the others nothing: it is named, and the command ends with exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Iterator

from flamingo.errors import InputError, OneSentenceParser, run_command
from flamingo.limits import checked, in_range, plain_text

AT_ONCE = 32  # pictures captioned together


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneSentenceParser(prog="python -m flamingo", description="Caption picture files.", allow_abbrev=False)
    parser.add_argument("run", help="run folder that train.py wrote, or a model on the hub")
    parser.add_argument("pictures", nargs="+", help="picture files")
    parser.add_argument("--prompt", default="", help="what the model is told after the picture, such as a style's cue")
    parser.add_argument("--beams", type=int, default=1, help="beams of the search (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest caption (default: %(default)s)")
    args = parser.parse_args(argv)
    checked("the run folder", args.run, str)
    in_range("--beams", args.beams, 1, 64)
    in_range("--max-new-tokens", args.max_new_tokens, 1, 10**6)
    return args


def main(argv: list[str]) -> None:
    if argv == ["doctor"]:
        from flamingo.interop.doctor import doctor

        return doctor()
    args = parse(argv)

    from flamingo import FlamingoModel
    from flamingo.fast.inference import prepare_to_generate

    model = FlamingoModel.from_pretrained(os.path.expanduser(args.run))
    check_prompt(model, args.prompt, args.max_new_tokens)
    prepare_to_generate(model.flamingo, "float32")
    captioned = 0
    for picture, caption in captions(model, args):
        print(f"{picture}\t{caption}", flush=True)
        captioned += 1
    if captioned < len(args.pictures):
        raise InputError(f"{len(args.pictures) - captioned} of {len(args.pictures)} pictures could not be captioned")


def check_prompt(model, prompt: str, new_tokens: int) -> None:
    """Raises InputError for a prompt with special tokens, or too long to leave room for a caption."""
    processor = model.processor
    plain_text("--prompt", prompt, processor.tokenizer)
    text = processor.encode_text(f"<image> {prompt}".strip())
    try:
        model.flamingo.check_room(text, model.flamingo.tokens_per_image + new_tokens)
    except ValueError as error:
        raise InputError(f"--prompt and --max-new-tokens: {error}") from None


def captions(model, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(file, caption) of every picture that can be read; the others are named on stderr."""
    import torch

    for first in range(0, len(args.pictures), AT_ONCE):
        names, pixels = [], []
        for name in args.pictures[first : first + AT_ONCE]:
            try:
                pixels.append(model.processor.preprocess_images(name))  # (1, F=1, C, H, W)
                names.append(name)
            except Exception as error:  # Pillow raises many kinds for a broken file
                ours = isinstance(error, InputError)
                why = error if ours else f"{name} cannot be read as a picture ({type(error).__name__})"
                print(why, file=sys.stderr)
        if names:
            found = model.generate_captions(
                model.processor, pixel_values=torch.cat(pixels), prompt=f"<image> {args.prompt}".strip(),
                num_beams=args.beams, max_new_tokens=args.max_new_tokens,
            )  # fmt: skip
            yield from zip(names, found, strict=True)


if __name__ == "__main__":
    run_command("python -m flamingo", lambda: main(sys.argv[1:]))
