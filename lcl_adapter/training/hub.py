"""``train.push_to_hub``: a complete run's adapter, card and figures as a repository of the Hugging Face hub.

Pictures and predictions of the data stay here.
"""

from __future__ import annotations

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lcl_adapter.base.adapter import FILES, MANIFEST
from lcl_adapter.errors import RecipeError, RunError
from lcl_adapter.recipe import Recipe

PUSHED = (*FILES, MANIFEST, "recipe.yaml", "README.md", "metrics.jsonl", "loss.png", "accuracy.png", "roc.png", "report.json")


def open_repository(recipe: Recipe) -> str | None:
    """The repository that a run will be pushed to, created where it does not exist; None without ``push_to_hub``.

    Called before training, so that a wrong name or token does not wait until its end. Raises RecipeError.
    """
    options = recipe.train
    if not options.push_to_hub:
        return None
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(["train.push_to_hub: HF_HUB_OFFLINE is set; unset it, or remove push_to_hub"])
    if get_token() is None:
        raise RecipeError(["train.push_to_hub: no token; log in with `hf auth login`, or set HF_TOKEN"])
    name = options.hub_model_id or recipe.output.resolve().name
    try:
        return str(HfApi().create_repo(name, private=options.hub_private_repo, exist_ok=True).repo_id)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise RecipeError([f"train.push_to_hub: the repository {name!r} cannot be opened ({str(error).splitlines()[0]})"]) from error


def push(recipe: Recipe, repository: str) -> str:
    """Push a complete run; returns the address of the commit. Raises RunError, which leaves the run as it is."""
    folder = recipe.output
    try:
        commit = HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(PUSHED),
            revision=recipe.train.hub_revision,
            commit_message=f"{folder.name}, trained by lcl-adapter",
        )
    except (HfHubHTTPError, OSError) as error:
        include = " ".join(f"--include {name}" for name in PUSHED if (folder / name).exists())
        raise RunError(
            f"{folder}: the run is complete, but could not be pushed ({str(error).splitlines()[0]}). Push it with "
            f"`hf upload {repository} {folder} {include}`."
        ) from error
    return str(commit)
