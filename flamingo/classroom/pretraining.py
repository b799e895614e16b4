"""Pretrains the two frozen halves of the classroom: a small OPT and a small CLIP.

    python -m flamingo.classroom.pretraining --out assets/classroom        (about half an hour on 2 CPU cores)

What this file teaches: where the "frozen backbones" of a Flamingo come from, at a size one can watch. First the
language model (pretrain_lm.py), on documents that keep one caption style throughout and mostly do not name it, so that
the frozen model *follows its context*: that is the ability Flamingo's few-shot learning rests on. Then the vision
encoder (pretrain_clip.py), which learns what things are called from the language model's embeddings.

Both see all objects, the novel ones too, and only training pairs of them. Both are ordinary: open_clip and
transformers load them through the same code as ViT-L-14 and OPT-125m.
"""

import argparse
import json
from pathlib import Path

import torch

from flamingo.classroom.pretrain_clip import pretrain_clip
from flamingo.classroom.pretrain_lm import SEED, pretrain_lm
from flamingo.fast.device import use_plain_attention
from flamingo.files import write_json
from flamingo.interop.backbones import load_language_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("assets/classroom"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--clip-only", action="store_true", help="keep the OPT that is there and train the CLIP anew")
    parser.add_argument("--lm-steps", type=int, default=900, help="optimizer steps for the OPT (default: %(default)s)")
    parser.add_argument(
        "--clip-steps", type=int, default=1400, help="optimizer steps for the CLIP (default: %(default)s)"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_plain_attention(device)
    torch.manual_seed(SEED)
    args.out.mkdir(parents=True, exist_ok=True)
    report_file = args.out / "report.json"
    if args.clip_only:
        report = json.loads(report_file.read_text(encoding="utf-8"))
    else:
        report = pretrain_lm(args.out, args.lm_steps, device)
        write_json(report_file, report)
    lm, lm_tokenizer = load_language_model(str(args.out / "opt"))
    report |= pretrain_clip(args.out, lm, lm_tokenizer, args.clip_steps, device)
    write_json(report_file, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
