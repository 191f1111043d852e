"""From what a user calls a model to its folder: a local one as it is, a repository id through the hub's cache.

Of a repository first the few files are fetched that say whether it runs, then its tokenizer, then the weights that its
index names, all of one commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import final

from agentspeed import errors
from agentspeed._base.wording import counted
from agentspeed.transport.error_map import public_error

_CONFIGS = ("config.json", "generation_config.json", "hf_quant_config.json", "quantize_config.json",
            "quant_config.json")  # fmt: skip
"""What tells whether a model runs."""
_TEXT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
         "additional_chat_templates/*.jinja")  # fmt: skip
_TIKTOKEN = "tiktoken.model"
"""The tokenizer of models that have no tokenizer.json."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(model: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model, absolute and with all links followed, so that it stays the same after `chdir`.

    `revision` is a branch, a tag or a commit of a repository; None is its main branch. Without `weights` only what
    tells of a repository's model and its text is fetched. Blocks, for as long as a
    download takes. Raises `ModelBroken`, `ModelUnsupported`, `InvalidRequest` or `ExtraMissing`, with what to do.
    """
    text = os.fspath(model)
    try:
        folder = Path(text).expanduser()
    except RuntimeError as error:  # `~name` of a user that does not exist
        raise errors.ModelBroken(
            f"{text} is not a folder: {str(error).rstrip('.')}.", remedy="Give a model folder."
        ) from error
    if folder.is_dir():
        if revision is not None:
            raise errors.InvalidRequest(
                f"revision is {revision!r}, but {text} is a folder, which has no revisions.",
                remedy="Leave revision out, or give a repository id.",
            )
        return folder.resolve()
    if text.startswith(("http://", "https://")):
        raise errors.InvalidRequest(
            f"{text} is a server's address, where the model's files are needed.",
            remedy="Give a model folder or a repository id.",
        )
    if folder.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise errors.ModelBroken(f"{text} is not a folder.", remedy="Give a Hugging Face model folder or owner/name.")
    return _fetched(_Repository(text, revision), weights=weights)


@final
class _Repository:
    """One repository of the hub; once its first files are there, all others come from the same commit."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name = name
        self._revision = revision

    def get(self, names: Iterable[str]) -> Path:
        """The snapshot's folder, with those of the files that the repository has."""
        # Imported late: a folder needs none of these.
        import httpx

        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
        except ImportError as error:
            raise errors.ExtraMissing(
                "Repository ids need the huggingface-hub package.", remedy="Install agentspeed[engine]."
            ) from error
        try:
            folder = Path(snapshot_download(self.name, revision=self._revision, allow_patterns=list(names)))
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError, ValueError) as error:
            reason, remedy = self._told(error)
            raise errors.ModelBroken(f"{self.name} could not be fetched: {reason}.", remedy=remedy) from error
        if _COMMIT.fullmatch(folder.name):
            self._revision = folder.name
        return folder

    def _told(self, error: Exception) -> tuple[str, str]:
        """(Why a download failed, what to do). The hub says that a repository is not there where a token may not see
        it, and who has none is answered likewise."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        told = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, RevisionNotFoundError):
            return f"it has no revision {self._revision or 'main'!r}", "Give a branch, a tag or a commit that it has."
        if isinstance(error, GatedRepoError):
            return (
                f"its owner gives it to those only who have agreed to the terms on its page ({told})",
                "Agree to them there, then log in with `hf auth login`, or set HF_TOKEN.",
            )
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            return (
                f"there is none of this name, or none that you may read ({told})",
                "Check the name. For a private or gated one log in with `hf auth login`, or set HF_TOKEN.",
            )
        return told, "Check the name, the revision and the network, or give a local folder."


def _fetched(repository: _Repository, *, weights: bool) -> Path:
    folder = repository.get(_CONFIGS)
    if not (folder / "config.json").is_file():
        raise errors.ModelBroken(
            f"{repository.name} has no config.json, so it is no model in the format of transformers.",
            remedy="Give the repository that the model was published in as safetensors.",
        )
    _check(folder)
    folder = repository.get((*_TEXT, _index_name()))
    if not (folder / "tokenizer.json").is_file():
        folder = repository.get((_TIKTOKEN,))
        if not (folder / _TIKTOKEN).is_file():
            raise errors.ModelBroken(
                f"{repository.name} has neither a tokenizer.json nor a {_TIKTOKEN}.",
                remedy="Give a repository that has its tokenizer.",
            )
    if not weights:
        return folder.resolve()
    names = _weight_names(folder)
    folder = repository.get(names)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise errors.ModelBroken(
            f"{repository.name} lacks {counted(len(missing), 'file')} of weights, first {missing[0]}.",
            remedy="Weights must be safetensors; give a repository that has them.",
        )
    return folder.resolve()


def _check(folder: Path) -> None:
    """Refuses, as the engine would, what does not run. Reads configurations only."""
    from agentspeed_engine.errors import EngineFault
    from agentspeed_engine.models.catalog import describe

    try:
        _ = describe(folder)
    except EngineFault as fault:
        raise public_error(fault.code, fault.message, fault.remedy) from fault


def _index_name() -> str:
    from agentspeed_engine.models.shards import INDEX

    return INDEX


def _weight_names(folder: Path) -> list[str]:
    from agentspeed_engine.errors import EngineFault
    from agentspeed_engine.models.shards import shard_paths

    try:
        return [path.relative_to(folder).as_posix() for path in shard_paths(folder)]
    except EngineFault as fault:
        raise public_error(fault.code, fault.message, fault.remedy) from fault
