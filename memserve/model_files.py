"""From `--model` and `--tokenizer` to files on disk: a folder, a name on the Hugging Face hub, or the bundled
model. What is in the files is for others to judge; only safetensors, JSON and text are ever fetched.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from memserve.config import LoadFormat
from memserve.errors import ModelError

logger = logging.getLogger(__name__)

BUNDLED_MODEL = Path(__file__).parent / "tiny_model"
BUNDLED_MODEL_NAME = "memserve-tiny"

_TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model")
# Folders inside a repository, and the "consolidated" files, hold the same weights in other formats.
_IGNORED_FILES = ("*/*", "consolidated*")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

Download = Callable[[str, str | None, tuple[str, ...]], Path]


def resolve_model(
    model: str | None,
    revision: str | None = None,
    load_format: LoadFormat = "auto",
    *,
    download: Download | None = None,
) -> Path:
    """The folder of the model, downloaded if it must be (not its weights for `load_format` "dummy").

    None is the bundled model. `download(name, revision, patterns)` replaces the hub. Raises ModelError.
    """
    if model is None:
        return BUNDLED_MODEL
    patterns = _TEXT_FILES if load_format == "dummy" else (*_TEXT_FILES, "*.safetensors")
    path = _local(model)
    if path is None:
        return (download or _download)(model, revision, patterns)
    if not path.is_dir():
        raise ModelError(f"{model} is not a folder: a model is a folder with config.json and *.safetensors")
    return path


def resolve_tokenizer(
    tokenizer: str, revision: str | None = None, *, download: Download | None = None
) -> Path:
    """The folder or file of a tokenizer that is not the model's. Raises ModelError."""
    return _local(tokenizer) or (download or _download)(tokenizer, revision, _TEXT_FILES)


def served_model_name(model: str | None) -> str:
    """The name clients use unless `--served-model-name` says otherwise: the hub's, or the folder's own."""
    if model is None:
        return BUNDLED_MODEL_NAME
    path = _local(model)
    return model if path is None else path.resolve().name


def _local(name: str) -> Path | None:
    """The path that `name` means, None if it is a name on the hub. Raises ModelError if it can be neither."""
    if not name.strip():
        raise ModelError("an empty name is no model or tokenizer: give a folder, or a name on the hub")
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # not allowed to look, a name too long, an unknown ~user
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{name[:200]}: {reason}") from error
    if name.startswith((".", "/", "~")) or _HUB_NAME.fullmatch(name) is None:
        raise ModelError(f"{name}: no such folder")
    return None


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Fetch from the hub into its cache, or take what the cache has when the hub is out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    logger.info("looking for %s on the Hugging Face hub", name)
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED_FILES)
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its licence on huggingface.co, then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name} is neither a folder here nor a public model on the Hugging Face hub"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{name} is no folder here, and the Hugging Face hub cannot be reached to fetch it"
        ) from error
    except Exception as error:
        # The hub's library passes on what its HTTP client raises, another one in every major version.
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"{name} cannot be fetched from the Hugging Face hub: {first_line}") from error
    return Path(folder)
