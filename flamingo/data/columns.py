"""Which columns of a table hold the pictures and which the captions.

What this file teaches: nothing has to be named that can be found. A column is known by its type (`datasets.Image`) or
by its name; only what is known by neither has to be named.
"""

import re

from flamingo.data.places import shown
from flamingo.errors import InputError

IMAGE_COLUMNS = ("image", "images", "picture", "pictures", "img", "jpg", "png", "file_name", "filename", "image_path")
CAPTION_COLUMN = re.compile(r"^(captions?|texts?|sentences?|descriptions?)(_?\d+)?$", re.IGNORECASE)

TEXT_OR_BYTES = (
    "string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null",
)  # fmt: skip


def find_columns(split, source: str, image_column: str | None, caption_columns: str | None) -> tuple[str, list[str]]:
    """(picture column, caption columns) of a `datasets.Dataset`: those named, else those found. Raises InputError if
    there is none."""
    import datasets

    have = list(split.column_names)
    listed = ", ".join(map(shown, have[:40]))
    wanted = [] if caption_columns is None else [name.strip() for name in caption_columns.split(",")]
    for name in [image_column, *wanted]:
        if name is not None and name not in have:
            raise InputError(f"{shown(source)} has no column {shown(name)!r}: it has {listed}")
    if image_column is None:
        typed = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
        named = [column for name in IMAGE_COLUMNS for column in have if column.lower() == name]
        image_column = next(iter(typed + named), None)
        if image_column is None:
            raise InputError(f"{shown(source)}: none of {listed} looks like pictures: name it with --image-column")
    wanted = wanted or [name for name in have if CAPTION_COLUMN.match(name) and name != image_column]
    if not wanted:
        raise InputError(f"{shown(source)}: none of {listed} looks like captions: name them with --caption-columns")
    return image_column, wanted


def with_pictures_undecoded(rows, column: str, source: str):
    """Let the picture column hold names, bytes or {"bytes", "path"}, or lists of them. Raises InputError if it holds
    nothing of the kind."""
    import datasets

    feature = rows.features[column]
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    if isinstance(inner, datasets.Image):
        target = datasets.Image(decode=False)
        return rows.cast_column(column, target if inner is feature else datasets.List(target))
    is_text = getattr(inner, "dtype", None) in TEXT_OR_BYTES
    if not is_text and not (isinstance(inner, dict) and {"bytes", "path"} & inner.keys()):
        kind = getattr(inner, "dtype", None) or ("lists in lists" if hasattr(inner, "feature") else "objects")
        raise InputError(
            f"{shown(source)}: column {shown(column)!r} holds no pictures but {kind}: name their column with "
            "--image-column"
        )
    return rows
