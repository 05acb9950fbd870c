"""Finds the folder of ``hf:PATH_OR_NAME``: a local one, or a download."""

from __future__ import annotations

import re
from pathlib import Path

from ultrathink.core.errors import CheckpointError, MissingDependencyError

PREFIX = "hf:"
_DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_NAME = re.compile(r"^[\w.\-]+/[\w.\-]+$|^[\w.\-]+$")


def is_pretrained(init_from: str | None) -> bool:
    """Whether ``training.init_from`` names a checkpoint of Hugging Face."""
    return init_from is not None and init_from.startswith(PREFIX)


def find_folder(text: str, *, with_weights: bool) -> Path:
    """The folder of ``hf:PATH``, or of the download that ``hf:NAME[@REVISION]`` names.

    A download goes to the cache of ``huggingface_hub``, and only missing files are fetched;
    without ``with_weights`` these are a few small ones. Pickled files are never fetched.
    Raises CheckpointError, or MissingDependencyError if a download needs the extra ``hf``.
    """
    place = text.removeprefix(PREFIX)
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    name, _, revision = place.partition("@")
    if path.exists() or not _NAME.match(name):
        what = "a file" if path.exists() else "not there"
        raise CheckpointError(
            f"{text}: the folder {path} is {what}; name a folder with config.json and "
            f"safetensors files, or a model of Hugging Face: hf:OWNER/NAME."
        )
    return _download(text, name, revision or None, with_weights)


def _download(text: str, name: str, revision: str | None, with_weights: bool) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise MissingDependencyError(
            f"{text}: there is no folder {name}, and a download needs the package "
            f'huggingface_hub; install it with: pip install "ultrathink[hf]"'
        ) from None
    patterns = [*_DESCRIPTION_FILES, *(_WEIGHT_FILES if with_weights else ())]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        problem = (
            f"access is restricted: request it at https://huggingface.co/{name}, then log in "
            f"with: hf auth login"
        )
    except errors.RepositoryNotFoundError:
        problem = (
            f"there is no folder and no model of Hugging Face called {name}; a private one needs "
            f"a login: hf auth login"
        )
    except errors.RevisionNotFoundError:
        problem = f"the model has no revision {revision!r}; look at its branches and tags"
    except errors.LocalEntryNotFoundError:
        problem = (
            "it is not on this machine, and Hugging Face cannot be reached; give the path of a "
            "folder, or try again with a connection"
        )
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
        problem = f"the download failed ({reason}); try again, or give the path of a folder"
    raise CheckpointError(f"{text}: {problem}.")
