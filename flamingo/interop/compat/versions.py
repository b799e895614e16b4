"""Which versions of the libraries work, and what to say of one that does not."""

from importlib.metadata import PackageNotFoundError, version

from flamingo.errors import InputError

# Package, the versions that work: from this one on, before that one. (As in requirements.txt; a test compares.)
WORKING = {
    "torch": ("2.6", None),
    "transformers": ("5.4", "6"),
    "open_clip_torch": ("3.2", None),
    "datasets": ("4.4", None),
}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def range_of(package: str) -> str:
    """Such as ">=5.4,<6"."""
    oldest, too_new = WORKING[package]
    return f">={oldest}" + (f",<{too_new}" if too_new else "")


def check_versions() -> None:
    """Raises InputError for a library outside the range that works."""
    for package, (oldest, too_new) in WORKING.items():
        found = installed(package)
        key = _number(found)
        if key < _number(oldest) or (too_new and key >= _number(too_new)):
            raise InputError(
                f"{package} {found} does not work with this repository, {range_of(package)} does: "
                "pip install -r requirements.txt -c constraints.txt"
            )


def _number(text: str) -> tuple[int, ...]:
    """`2.14.1+cpu` → (2, 14, 1)."""
    digits = text.partition("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in digits)


def with_version(package: str) -> str:
    """Such as "transformers 5.24.0"."""
    return f"{package} {installed(package)}"


def unlike(package: str, what: str) -> InputError:
    """The error for a library that is not as we know it."""
    return InputError(
        f"{package} {installed(package)} {what}; versions {range_of(package)} were made to work: install the tested "
        "ones with pip install -r requirements.txt -c constraints.txt"
    )
