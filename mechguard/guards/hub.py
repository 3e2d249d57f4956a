"""Guards on the Hugging Face hub: two files and a card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mechguard.guards.guard import Guard
from mechguard.storage import write_text

STEM = "guard"


def push_guard(guard: Guard, repo: str, **options: Any) -> str:
    """Upload a guard to a model repository on the hub, making it if need be.

    Args:
        repo: "owner/name".
        options: for `HfApi.create_repo`, such as `private=True`.

    Returns:
        The address of the repository.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo, exist_ok=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        guard.save(Path(folder) / STEM)
        write_text(Path(folder) / "README.md", _card(guard))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Guard {guard.name}")
    return str(url)


def load_guard_from_hub(repo: str, *, revision: str | None = None) -> Guard:
    """Download a guard.

    Raises:
        MechguardError: what lies there is not a guard, or was altered.
    """
    from huggingface_hub import hf_hub_download

    names = (f"{STEM}.json", f"{STEM}.safetensors")
    places = [hf_hub_download(repo, name, revision=revision) for name in names]
    return Guard.load(places[0])


def _card(guard: Guard) -> str:
    return (
        f"---\nlibrary_name: mechguard\ntags: [mechguard, safety, steering]\n---\n\n# {guard.name}\n\n"
        f"A guard for `{guard.about.get('model', 'a vision-language model')}`:\n\n```\n{guard!r}\n```\n\n"
        "```python\nimport mechguard as mg\n\nguard = mg.Guard.from_hub(...)\n"
        "mg.generate(vlm, prompts, guard=guard)\n```\n"
    )
