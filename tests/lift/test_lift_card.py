"""The model card says what is known, escapes what comes from data, and `lift push` sends folder and card to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_official import lift_state, run_import, save, tiny_run

from lift.common.errors import UserError
from lift.encoder import encoder_hash
from lift.export import export_encoder
from lift.model_card import GENERATED, escape, model_card
from lift.push import push
from lift.settings import PushSettings, TextEncoderSettings, TextTransformSettings
from lift.train import pretrain


class FakeHub:
    """Stands where the network begins: records what would be sent."""

    calls: list[tuple[str, dict[str, Any]]]
    error: Exception | None

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

        class Url(str):
            repo_id = "someone/encoder"

        return Url("hub/someone/encoder")

    def upload_folder(self, **options: Any) -> None:
        card = (Path(options["folder_path"]) / "README.md").read_text()
        self.calls.append(("upload_folder", {**options, "card": card}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    import huggingface_hub

    FakeHub.calls, FakeHub.error = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return run_import(save(tmp_path / "c.pt", lift_state()), tmp_path / "encoder")


def header(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def results_of(folder: Path, path: Path, **changes: Any) -> Path:
    metric = {"n": 40, "value": 0.625, "interval": [0.5, 0.75], "ties": 0, "statistic": "accuracy"}
    path.write_text(json.dumps({"encoder_hash": encoder_hash(folder), "metrics": {"sugarcrepe/swap_obj": metric}} | changes))
    return path


def test_push_writes_the_card_and_uploads_the_folder(encoder: Path, tmp_path: Path, hub: type[FakeHub], capsys) -> None:
    results = results_of(encoder, tmp_path / "results.json")
    push(PushSettings(folder=encoder, repo="encoder", private=True, license="cc-by-nc-4.0", results=results))
    (create, created), (upload, uploaded) = hub.calls
    assert (create, upload) == ("create_repo", "upload_folder")
    assert created == {"repo_id": "encoder", "repo_type": "model", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("someone/encoder", encoder)
    card = uploaded["card"]
    assert header(card)["license"] == "cc-by-nc-4.0" and header(card)["library_name"] == "transformers"
    assert r"| sugarcrepe/swap\_obj | 40 | 62.5 | 50.0 to 75.0 |" in card
    assert r"Text encoder (nvidia/NV\-Embed\-v2): cc\-by\-nc\-4.0" in card
    assert "hub/someone/encoder" in capsys.readouterr().out


def test_card_is_not_part_of_the_encoders_hash_but_weights_are(encoder: Path) -> None:
    before = encoder_hash(encoder)
    (encoder / "README.md").write_text("other")
    assert encoder_hash(encoder) == before
    (encoder / "lift_head.safetensors").write_bytes(b"other")
    assert encoder_hash(encoder) != before


def test_results_of_another_encoder_are_refused(encoder: Path, tmp_path: Path, hub: type[FakeHub]) -> None:
    results = results_of(encoder, tmp_path / "results.json", encoder_hash="0" * 64)
    with pytest.raises(UserError, match="measured with another encoder"):
        push(PushSettings(folder=encoder, repo="encoder", results=results))
    assert hub.calls == []


def test_card_edited_by_hand_stays(encoder: Path, hub: type[FakeHub]) -> None:
    card = encoder / "README.md"
    assert GENERATED in card.read_text()
    card.write_text("mine")
    push(PushSettings(folder=encoder, repo="encoder"))
    assert card.read_text() == "mine" == hub.calls[-1][1]["card"]
    with pytest.raises(UserError, match="edited by hand"):
        push(PushSettings(folder=encoder, repo="encoder", license="mit"))


def test_faults_of_hub_and_folder_are_user_errors(encoder: Path, tmp_path: Path, hub: type[FakeHub]) -> None:
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    for error, message in (
        (HTTPError("no route"), "cannot be reached or refuses: no route"),
        (OfflineModeIsEnabled("offline"), "cannot be reached or refuses: offline"),
        (HFValidationError("bad name"), "not a repository name: bad name"),
    ):
        hub.error = error
        with pytest.raises(UserError, match=message):
            push(PushSettings(folder=encoder, repo="encoder"))
    with pytest.raises(UserError, match="an encoder folder"):
        push(PushSettings(folder=tmp_path, repo="encoder"))


def test_card_of_a_run_has_recipe_and_data_and_no_paths_of_this_machine(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    settings = tiny_run(pairs, tiny_llm, tmp_path / "run", text_transform=TextTransformSettings(kind="whiten"))
    settings.data[0].name = "shapes | <b>\n# more"
    pretrain(settings)
    export_encoder(settings.out, tmp_path / "encoder")
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert r"Data: shapes \| &lt;b&gt; \# more (webdataset)." in card.replace(r"\(", "(").replace(r"\)", ")")
    for row in (r"| learning\_rate | 0.001 |", r"| batch\_size | 8 |", "| samples | 24 |", r"| text\_transform | whiten |"):
        assert row in card
    assert str(tmp_path) not in card and str(tiny_llm.parent) not in card
    assert "is not known to the toolkit" in card and "license" not in header(card)
    assert "Not measured." in card


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ({"kind": "minilm", "path": None}, r"all\-MiniLM\-L6\-v2): apache\-2.0."),
        ({"kind": "sentence_transformer", "path": "nvidia/NV-Embed-v2"}, r"NV\-Embed\-v2): cc\-by\-nc\-4.0. It forbids"),
        ({"kind": "causal_lm", "path": "/home/me/nvidia/NV-Embed-v2"}, r"(NV\-Embed\-v2) is not known to the toolkit"),
    ],
)
def test_licence_of_the_text_encoder_is_stated_only_where_it_is_known(encoder: Path, text: dict, licence: str) -> None:
    config = json.loads((encoder / "lift_config.json").read_text())
    config["text"] = {**config["text"], **text}
    (encoder / "lift_config.json").write_text(json.dumps(config))
    assert licence in model_card(encoder)
    assert "/home/me" not in model_card(encoder)


def test_escaped_text_cannot_begin_markup() -> None:
    assert escape("a|b <script> [x](y)\n# z \x00`k`") == r"a\|b &lt;script&gt; \[x\]\(y\) \# z \`k\`"


def test_imported_text_encoder_appears_by_name(tmp_path: Path, tiny_llm: Path) -> None:
    text = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm), pooling="last")
    folder = run_import(save(tmp_path / "c.pt", lift_state()), tmp_path / "encoder", text_encoder=text)
    card = (folder / "README.md").read_text()
    assert "| pooling | last |" in card and f"| Text encoder | {escape(tiny_llm.name)} |" in card
    assert "| Imported from | c.pt |" in card and "| Epoch | 3 |" in card
