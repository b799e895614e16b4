"""Makes metrics.json: what pycocoevalcap says about the captions below. tests/test_metrics.py wants the same of ours.

Needs Java and two packages that this project does not use otherwise; run once, in an environment of its own:

    python -m venv goldens && goldens/bin/pip install pycocoevalcap==1.2 pycocotools
    goldens/bin/python tests/goldens/make_metric_goldens.py

pycocoevalcap 1.2 brings the Stanford tokenizer (CoreNLP 3.4.1) along. Our captions are written to be awkward.
"""

import json
import os
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

# One candidate, then the references, of each picture.
PICTURES = [
    ["A man's dog doesn't like the rain.", "The man's dog does not like rain.", "A dog hides from the rain."],
    ["a red ball on a blue ground", "A red ball on a blue ground.", "There is a red ball on blue."],
    ["", "A cat sleeps on the sofa.", "A sleeping cat"],
    ["Two kids play; one laughs, the other doesn't!", "Two children are playing and laughing.", "TWO KIDS PLAY"],
    ['A sign says "STOP" in white letters', "A stop sign that says 'stop'", 'The sign reads "Stop!"'],
    ["a well-dressed man in a T-shirt and blue-green trousers", "A well dressed man wears a t-shirt."],
    ["there are 3,000 people at 10:30 a.m. in the U.S.", "3,000 people in the U.S. at 10:30", "About 3000 people."],
    ["it costs $5 or £4.50 (about €5)", "It costs $5.", "The price is 5 dollars (not 6)."],
    ["a café with   double  spaces", "A café", "The café's terrace, with naïve paintings – and flowers"],
    ["wait... what is this?!", "What is this…", "What is this?", "Wait, what's this?!?"],
    ["a black and white/grey cat", "A black/white cat", "a black & white cat and/or a dog", "The cat is black"],
    ["He can't, won't and shouldn't've; they'll say it's ours.", "They'd say he can't.", "I'm sure it isn't theirs."],
    ["the dogs' bowls and the women's shoes", "The dogs' bowls.", "Women's shoes, dogs' bowls, James's hat"],
    ["a 4-year-old boy rides a 3.5-inch toy", "A four-year old boy", "The 4-year-old rides a toy-car up the 1/2 mile"],
    ["it is 6 o'clock on the 21st of Dec. 2014", "6 o'clock", "It's 12/25/2014, 6 o'clock p.m."],
    ["Mr. and Mrs. O'Neil at St. Mary's Ave.", "Mr. O'Neil etc., with Dr. J. Smith", "A couple: Mr. and Mrs. O'Neil"],
    ["a a a a a a a a", "A dog runs.", "a dog"],
    ["a dog runs through the tall green grass with a stick in its mouth and a ball", "A dog runs.", "Dog in grass"],
    ["the team won 3-2 on 9/11 at 24/7 gym #5", "#5 of the team wins 3 - 2", "The team (red) beats them, 3 to 2"],
    ["rock 'n' roll in the '90s - a band plays", "A '90s rock'n'roll band", "The band plays rock & roll at AT&T Park"],
    ["two--three people [left] {right}", "two -- three people", "Two to three people (left) [right]"],
    ["you cannot see; I'm gonna look, gotta go, wanna come", "You can not see", "I am going to look. Cannot see"],
    ["the end.Start again", "The end. Start again.", "Yes/no?", "50% of 100% is * a lot + more = fine @home"],
    ["a smiling dog 😀 on a <unk> beach :)", "A dog smiles at the beach.", "Beach dog ♥ ball ©"],
    ["d'angelo said, \"'tis 5'9\" tall\"", "'Quoted' words aren't “curly” ones", "It’s ‘curly’, isn’t it?"],
    ["a Miss. in a V-neck", "A girl's V-neck: a miss."],
    ["what?no he isn't 'really' a 'retro' fan","'Small' dogs, 'very' small", "It's 'the' dog; they're 'red'"],
    ["a child is ill. no. 5 is here, with J. Smith; B. The end", "The child is ill", "No. 5, not no.6"],
]  # fmt: skip


def main() -> None:
    candidates = {i: [{"caption": texts[0]}] for i, texts in enumerate(PICTURES)}
    references = {i: [{"caption": text} for text in texts[1:]] for i, texts in enumerate(PICTURES)}
    os.environ["JAVA_TOOL_OPTIONS"] = "-Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8"  # whatever the system's locale
    tokenizer = PTBTokenizer()
    said, right = tokenizer.tokenize(candidates), tokenizer.tokenize(references)
    cider, ciders = Cider().compute_score(right, said)
    rouge, rouges = Rouge().compute_score(right, said)
    goldens = {
        "candidates": [texts[0] for texts in PICTURES],
        "references": [texts[1:] for texts in PICTURES],
        "candidate_tokens": [said[i][0] for i in said],
        "reference_tokens": [right[i] for i in right],
        "bleu": [float(value) for value in Bleu(4).compute_score(right, said, verbose=0)[0]],
        "cider_d": float(cider),
        "cider_d_per_picture": [float(value) for value in ciders],
        "rouge_l": float(rouge),
        "rouge_l_per_picture": [float(value) for value in rouges],
    }
    path = Path(__file__).with_name("metrics.json")
    path.write_text(json.dumps(goldens, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path}: {len(PICTURES)} pictures, {sum(map(len, PICTURES))} captions")


if __name__ == "__main__":
    main()
