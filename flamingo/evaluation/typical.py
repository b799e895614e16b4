"""The caption that has most in common with all: for neighbours' captions, and for several of a model's own."""

from collections.abc import Sequence

from flamingo.evaluation.ptb import ptb_tokens


def most_typical(captions: Sequence[str]) -> str:
    """The caption that shares most words with all (the first of equals): the mean share of common words."""
    words = [set(ptb_tokens(caption)) for caption in captions]
    alike = [sum(len(own & other) / max(1, len(own | other)) for other in words) for own in words]
    return captions[max(range(len(captions)), key=alike.__getitem__)]
