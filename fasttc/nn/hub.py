"""References to folders: a local path, or ``user/repo[/subfolder][@revision]`` on the Hugging Face hub."""

from pathlib import Path


def resolve(reference: str | Path) -> Path:
    """A local folder for ``reference``, downloaded to the hub's cache if it is not a local path.

    Raises:
        ValueError: neither an existing path nor a hub reference that can be fetched.
    """
    path = Path(reference).expanduser()
    text = str(reference).removeprefix("hf://")
    if path.exists() or not _looks_like_hub(text):
        return path
    from huggingface_hub import snapshot_download

    name, _, revision = text.partition("@")
    user, repo, *subfolder = name.split("/")
    inside = "/".join(subfolder)
    try:
        root = snapshot_download(
            f"{user}/{repo}", revision=revision or None, allow_patterns=f"{inside}/*" if inside else None
        )
    except Exception as error:  # the hub raises many kinds; all mean that nothing was fetched
        raise ValueError(
            f"{reference}: no such folder here, and the hub could not provide it ({error})"
        ) from error
    return Path(root) / inside


def _looks_like_hub(text: str) -> bool:
    return (
        text.count("/") >= 1
        and not text.startswith(("/", ".", "~"))
        and all(text.partition("@")[0].split("/"))
    )
