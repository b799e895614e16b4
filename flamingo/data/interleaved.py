"""Interleaved documents in the layouts of MMC4 and OBELICS → pictures and the chunks of one text.

What this file teaches: a web page is text with pictures in it, and Flamingo learned few-shot from such pages. Two data
sets have made theirs a convention:

    MMC4       {"text_list": [sentence, …], "image_info": [{"image_name": …}, …], "similarity_matrix": [[…], …]}
               which sentence a picture belongs to is a guess: the one that CLIP finds most similar to it
    OBELICS    {"texts": ["…", None, "…"], "images": [None, picture, None]}: where it stood on the page

Either way a picture is followed by the text up to the next picture, which is what has a loss; text before the first
picture is a prompt. A picture of which there is only an address is left out: nothing is fetched while training.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flamingo.data.chunks import Chunk
from flamingo.data.places import Unusable

LEAST_SIMILARITY = 0.24  # of picture and sentence by CLIP ViT-L-14; below it OpenFlamingo leaves a picture out


@dataclass(frozen=True)
class Document:
    """pictures: files. chunks: `Chunk.picture` counts from 0 within the document."""

    pictures: list[bytes]
    chunks: list[Chunk]


def is_document(row: Mapping) -> bool:
    return {"text_list", "image_info"} <= row.keys() or (isinstance(row.get("texts"), list) and "images" in row)


def read_document(row: Mapping, beside: Mapping[str, bytes]) -> Document:
    """A row or a JSON object in one of the two layouts.

    beside: files that came with it, by their names. Raises Unusable for a row that is in neither layout, or has no
    picture or no text.
    """
    pieces = _mmc4(row, beside) if "text_list" in row else _obelics(row, beside)
    pictures, chunks = [], []
    for piece in pieces:  # pictures and texts as they are read
        if isinstance(piece, bytes):
            chunks.append(Chunk(len(pictures)))
            pictures.append(piece)
        elif not chunks or chunks[-1].picture is None:
            before = chunks.pop().prompt if chunks else ""
            chunks.append(Chunk(None, f"{before} {piece}".strip()))
        else:
            last = chunks.pop()
            chunks.append(Chunk(last.picture, "", f"{last.caption} {piece}".strip()))
    if not pictures:
        raise Unusable("a document without a picture that is there")
    if not any(chunk.caption for chunk in chunks):
        raise Unusable("a document without a text behind a picture")
    return Document(pictures, chunks)


def _text(value) -> str:
    if not isinstance(value, str):
        raise Unusable("a text that is no text")
    return " ".join(value.split())


def _list(row: Mapping, key: str) -> list:
    if not isinstance(row.get(key), (list, tuple)):
        raise Unusable(f"its {key} is no list")
    return list(row[key])


def _obelics(row: Mapping, beside: Mapping[str, bytes]) -> list[bytes | str]:
    texts, images = _list(row, "texts"), _list(row, "images")
    if len(texts) != len(images) or any((t is None) == (i is None) for t, i in zip(texts, images, strict=True)):
        raise Unusable("texts and images do not take turns: in each place there is one of them, and None in the other")
    found = [_text(text) if image is None else _file(image, beside) for text, image in zip(texts, images, strict=True)]
    return [piece for piece in found if piece]


def _mmc4(row: Mapping, beside: Mapping[str, bytes]) -> list[bytes | str]:
    sentences, infos = [_text(text) for text in _list(row, "text_list")], _list(row, "image_info")
    files = {k: file for k, info in enumerate(infos) if (file := _file(info, beside))}
    places = _best_places(row, infos, list(files), len(sentences))
    pieces: list[bytes | str] = []
    for place, sentence in enumerate(sentences):
        pieces += [files[k] for k in files if places.get(k) == place]
        pieces += [sentence] if sentence else []
    return pieces


def _best_places(row: Mapping, infos: Sequence, pictures: Sequence[int], sentences: int) -> dict[int, int]:
    """Picture → its sentence, each with one of its own: the most similar pair first, and so on. Without a matrix as
    `matched_text_index` says."""
    try:
        if row.get("similarity_matrix") is None:
            return {
                k: infos[k]["matched_text_index"]
                for k in pictures
                if infos[k].get("matched_sim", 1.0) >= LEAST_SIMILARITY
            }
        matrix = row["similarity_matrix"]
        pairs = sorted(((float(matrix[k][s]), k, s) for k in pictures for s in range(sentences)), reverse=True)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise Unusable("its similarity_matrix has no row for each picture, or no number for each sentence") from None
    places: dict[int, int] = {}
    for similarity, k, sentence in pairs:
        if similarity >= LEAST_SIMILARITY and k not in places and sentence not in places.values():
            places[k] = sentence
    return places


def _file(picture, beside: Mapping[str, bytes]) -> bytes | None:
    """The file of a picture: in the row, beside it, or (None) only its address is known."""
    if isinstance(picture, bytes):
        return picture or None
    if isinstance(picture, str):
        return beside.get(picture)
    if not isinstance(picture, Mapping):
        raise Unusable("a picture that is none")
    if isinstance(picture.get("bytes"), bytes):
        return picture["bytes"] or None
    if isinstance(picture.get("image_base64"), str):
        try:
            return base64.b64decode(picture["image_base64"], validate=True)
        except binascii.Error:
            raise Unusable("a picture whose image_base64 is damaged") from None
    return beside.get(picture.get("image_name") or picture.get("path"))
