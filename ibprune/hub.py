"""Whether the Hugging Face Hub can be reached, asked once and quickly."""

import functools
import os

from huggingface_hub import constants, get_session


@functools.cache
def hub_reachable() -> bool:
    """True when the Hub's endpoint answers within three seconds and HF_HUB_OFFLINE is not set.

    The libraries retry for half a minute per file before they say the same.
    """
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # noqa: BLE001 - the client's error classes differ between releases of huggingface_hub
        return False
    return True
