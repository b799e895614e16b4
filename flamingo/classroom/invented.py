"""Invented names: words that mean nothing until an example shows what they name.

What this file teaches: to test whether a model *binds* a name to a thing, the name must be new. A fixed list of a dozen
would become twelve ordinary words. So names are made of syllables, thousands of them, and a quarter is held out: no
training, of the backbones or of a Flamingo, ever reads one of those. (Every syllable of a held-out name is known.)
"""

import hashlib
import random

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprtvz" for vowel in "aeiou")  # 65


def is_held_out(name: str) -> bool:
    """Is this one of the names that only tests use? A fact about the name, not about a seed."""
    return hashlib.sha256(f"invented {name}".encode()).digest()[0] < 64


def invented_names(rng: random.Random, count: int, *, held_out: bool = False) -> list[str]:
    """`count` different names of two syllables: `["zuki", "tavo"]`."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.sample(SYLLABLES, 2))
        if is_held_out(name) == held_out and name not in names:
            names.append(name)
    return names
