"""Caption picture files from the shell.

python -m flamingo runs/classroom picture.png more.jpg          a line for each: the file, a tab, the caption
python -m flamingo doctor                                       versions, hardware and a self-check, for bug reports
"""

import sys

from flamingo.errors import OneSentenceParser, run_command


def main(argv: list[str]) -> None:
    if argv == ["doctor"]:
        from flamingo.interop.doctor import doctor

        return doctor()
    parser = OneSentenceParser(prog="python -m flamingo", description="Caption picture files.", allow_abbrev=False)
    parser.add_argument("run", help="run folder that train.py wrote, or a model on the hub")
    parser.add_argument("pictures", nargs="+", help="picture files")
    parser.add_argument("--prompt", default="", help="what the model is told after the picture, such as a style's cue")
    parser.add_argument("--beams", type=int, default=1, help="beams of the search (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest caption (default: %(default)s)")
    args = parser.parse_args(argv)

    from flamingo import FlamingoModel
    from flamingo.fast.inference import prepare_to_generate

    model = FlamingoModel.from_pretrained(args.run)
    prepare_to_generate(model.flamingo, "float32")
    captions = model.generate_captions(
        model.processor, images=args.pictures, prompt=f"<image> {args.prompt}".strip(), num_beams=args.beams,
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    for picture, caption in zip(args.pictures, captions, strict=True):
        print(f"{picture}\t{caption}")


if __name__ == "__main__":
    run_command("python -m flamingo", lambda: main(sys.argv[1:]))
