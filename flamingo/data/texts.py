"""What a row of a captioned set has to say → the chunks that a model is trained on.

What this file teaches: a text and its pictures must agree, or a model learns from the next example's picture. A caption
needs no tags; a text about several pictures has an <image> for each, and may close its captions with <|endofchunk|>.
"""

from collections.abc import Sequence

from flamingo.data.chunks import EOC_TOKEN, MEDIA_TOKEN, Chunk
from flamingo.data.places import Unusable


def parse_interleaved(text: str) -> list[Chunk]:
    """`<image>a cat<|endofchunk|> and <image>a dog<|endofchunk|>` → chunks; text outside a caption is a prompt."""
    before, *parts = text.split(MEDIA_TOKEN)
    chunks = [Chunk(None, before.strip())] if before.strip() else []
    for picture, part in enumerate(parts):
        caption, _, after = part.partition(EOC_TOKEN)
        chunks.append(Chunk(picture, "", caption.strip()))
        if after.strip():
            chunks.append(Chunk(None, after.strip()))
    return chunks


def parse_text(text: str, pictures: int) -> list[Chunk]:
    """A text about so many pictures → chunks. About one picture it may be just the caption.

    Raises Unusable if its <image> tags are not as many as the pictures, an <|endofchunk|> ends nothing, or there is no
    caption in it.
    """
    if MEDIA_TOKEN not in text and pictures == 1:
        text = MEDIA_TOKEN + text
    if text.count(MEDIA_TOKEN) != pictures:
        raise Unusable(f"{text.count(MEDIA_TOKEN)} {MEDIA_TOKEN} tags for {pictures} pictures")
    chunks = parse_interleaved(text)
    if any(EOC_TOKEN in chunk.prompt for chunk in chunks):
        raise Unusable(f"an {EOC_TOKEN} that ends no caption")
    if not any(chunk.caption for chunk in chunks):
        raise Unusable("no caption in the text")
    return chunks


def _is_visible(text: str) -> bool:
    """Is there more in it than spaces, those of no width included, and control characters?"""
    return any(letter.isprintable() and not letter.isspace() for letter in text)


def texts_of_row(row: dict, columns: Sequence[str]) -> tuple[list[str], int]:
    """The usable captions of a row, and how many were not: empty or no text; missing, if the row has no other."""
    values = [row[column] for column in columns]
    values = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    good = [" ".join(value.split()) for value in values if isinstance(value, str) and _is_visible(value)]
    there = [value for value in values if value is not None]
    return good, len(there) - len(good) if there else len(values)
