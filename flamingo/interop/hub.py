"""Is there a hub? Asked once, before the first name is looked up there.

What this file teaches: without a network every library tries again by itself, some for a minute, and then names a file
of its insides. So the hub is asked for a sign of life first. If there is none, the libraries are put offline: what they
kept from an earlier run loads at once, and what is missing is missing at once.
"""

import functools
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache

from flamingo.errors import InputError

SECONDS = 4.0  # to wait for an answer


@functools.cache
def is_there_a_hub() -> bool:
    """False also if the environment says HF_HUB_OFFLINE=1. After it has been False, nothing in this process tries."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of the network, of a proxy, of either client that huggingface_hub has had
        constants.HF_HUB_OFFLINE = True
        return False
    return True


def must_be_at_hand(language_model: str) -> None:
    """Raises InputError for a language model of the hub that this machine has never loaded, where there is no hub.

    Asked before PyTorch is imported, which takes longer than to ask. (A damaged cache shows when it is read.)
    """
    known = Path(language_model).is_dir() or isinstance(try_to_load_from_cache(language_model, "config.json"), str)
    if not known and not is_there_a_hub():
        raise InputError(f"cannot load the language model {language_model}: {how_to_do_without(language_model)}")


def how_to_do_without(repository: str | None) -> str:
    """What to do when a name cannot be looked up. repository: where its files are on the hub, if that is known."""
    get = f"`hf download {repository}` was called" if repository else "it was loaded once"
    return (
        f"it is not kept on this machine, and {constants.ENDPOINT} does not answer: connect once, or copy "
        f"{constants.HF_HUB_CACHE} from a machine where {get}; --preset photos and --preset classroom need no hub"
    )
