"""A folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from tokenpo import __version__
from tokenpo.commands.loading import first_line
from tokenpo.commands.runs import say
from tokenpo.errors import InputError, TokenpoError


def check_push(repository: str) -> None:
    """Refuse a name the hub would refuse, and a push without a token, before any work."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as reason:
        raise InputError(f"push '{repository}' is no name of a repository: OWNER/NAME") from reason
    if get_token() is None:
        raise InputError("there is no token for the hub: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the folder in one commit, through huggingface_hub's own mixin; returns the commit's address."""
    from huggingface_hub import ModelHubMixin
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    class Exported(ModelHubMixin):
        """Files that are there already: linked, not written once more."""

        def _save_pretrained(self, save_directory: Path) -> None:
            for file in sorted(folder.resolve().iterdir()):
                (save_directory / file.name).symlink_to(file)

    try:
        address = Exported().push_to_hub(
            repository, private=private, commit_message=f"Upload a model trained with tokenpo {__version__}"
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as reason:
        raise TokenpoError(
            f"could not push to {repository}: {first_line(reason)}; the export itself is whole, in {folder}"
        ) from reason
    say(f"pushed: {address}")
    return str(address)
