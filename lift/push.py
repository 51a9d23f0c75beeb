"""`lift push`: an encoder folder in, its model card in the folder and a repository on the Hugging Face Hub out."""

from __future__ import annotations

from pathlib import Path

from lift.common.errors import UserError, first_line
from lift.common.files import require_file, write_text
from lift.encoder import CARD, encoder_hash
from lift.model_card import GENERATED, model_card, read_results
from lift.settings import PushSettings


def push(settings: PushSettings) -> None:
    """Command `lift push`: writes the card, then uploads the whole folder in one commit.

    Raises:
        UserError: not an encoder folder, results of another encoder, or the Hub cannot be reached or refuses.
    """
    folder = settings.folder
    require_file(folder / "lift_config.json", "an encoder folder (lift export, lift import)")
    write_card(settings)
    url = _upload(folder, str(settings.repo), settings.private)
    print(f"{url}: {folder}")


def write_card(settings: PushSettings) -> None:
    """Writes README.md anew; one that was edited by hand (its last line removed) stays.

    Raises:
        UserError: results or a licence are given for a card that was edited by hand.
    """
    card = settings.folder / CARD
    if card.is_file() and GENERATED not in card.read_text(encoding="utf-8", errors="replace"):
        if settings.results is not None or settings.license is not None:
            raise UserError(
                f"{card}: was edited by hand, so --results and --license cannot be put in. Leave them out, or remove the file."
            )
        return
    results = read_results(settings.results, encoder_hash(settings.folder)) if settings.results is not None else None
    write_text(card, model_card(settings.folder, results, settings.license))


def _upload(folder: Path, repo: str, private: bool) -> str:
    from huggingface_hub import HfApi  # a second to import, and the only part that needs a network
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        api = HfApi()
        url = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type="model",
            folder_path=folder,
            commit_message="Upload encoder",
            ignore_patterns="*.partial",
        )
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: not a repository name: {first_line(error)}") from error
    except (HTTPError, OSError) as error:
        raise UserError(
            f"--repo {repo}: the Hub cannot be reached or refuses: {first_line(error)}. "
            "Check the network, the name and your login (hf auth login, or HF_TOKEN), then push again."
        ) from error
    return str(url)
