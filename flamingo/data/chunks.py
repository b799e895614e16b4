"""What a text is made of: chunks, and the two tokens that announce a picture and close a caption.

    <image>{prompt} {caption}<|endofchunk|><image>{prompt} {caption}<|endofchunk|>…

(Imports nothing heavy: who only writes texts needs no model.)
"""

from dataclasses import dataclass

MEDIA_TOKEN, EOC_TOKEN = "<image>", "<|endofchunk|>"


@dataclass(frozen=True)
class Chunk:
    """A piece of a text: a picture (its number among the example's pictures, or None), the prompt that the model is
    given, and the caption that it should predict. closed: <|endofchunk|> ends it, as it always does after a picture."""

    picture: int | None
    prompt: str = ""
    caption: str = ""
    closed: bool = False
