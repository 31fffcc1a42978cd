"""Uploads, by the hub's own client to a local server that speaks its protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from test_export import of_kind, trained  # noqa: F401 - a fixture
from typer.testing import CliRunner

from dpo_cli.app import app
from dpo_cli.errors import Exit, RunFailed
from dpo_cli.publish.upload import push

TOKEN = "hf_a_token_that_is_nowhere_written"


@dataclass
class Hub:
    """What the server was asked, and the files of its repositories. `refuses` is a path that is answered with a status."""

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    refuses: dict[str, int] = field(default_factory=dict)

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Repository, upload by size or by LFS, and one commit of both: huggingface_hub 1.33, hf_api.py and _commit_api.py."""
        for part, status in self.refuses.items():
            if part in path:
                return status, {"error": "not for you"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.created.append(asked)
            known = name in self.files
            self.files.setdefault(name, {})
            return (409 if known else 200), {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return 200, {
                "files": [
                    {**f, "shouldIgnore": False, "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in files
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [{**o, "actions": {"upload": {"href": f"{self.address}/blob/{o['oid']}"}}} for o in objects],
            }
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        name = "/".join(path.split("/")[3:5])
        if path.endswith("/tree/main"):
            files = self.files[name].items()
            return 200, [{"type": "file", "path": file, "size": len(content), "oid": "0" * 40} for file, content in files]
        assert path.endswith("/commit/main"), path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[name][value["path"]]
        return 200, {"commitUrl": f"{self.address}/{name}/commit/0", "commitOid": "0", "success": True}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, to which the client is logged in."""
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            made.tokens.add(self.headers.get("Authorization"))
            status, document = made.answer(self.path.partition("?")[0], body)
            text = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_PUT = do_GET = answer  # noqa: N815 - the names that http.server looks for

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # which speaks to another server, in another language
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    server.shutdown()
    server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def train_with(place: Path, run: Path, **options: object) -> Any:
    """`dpo train` of the plan of a run, uploading to me/mine."""
    words = [f"output_dir={place}", "push_to_hub=true", "hub_model_id=me/mine", *(f"{k}={v}" for k, v in options.items())]
    return CliRunner().invoke(app, ["train", str(run / "plan.json"), *words, "--json"])


def test_a_finished_run_is_uploaded_with_its_card(
    hub: Hub,
    trained: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Every file of adapter/, byte for byte, into a private repository; the card has the figures of metrics.json."""
    done = train_with(tmp_path / "run", of_kind(trained, "adapter"))
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert hub.files == {"me/mine": contents(tmp_path / "run" / "adapter")}
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= hub.files["me/mine"].keys()
    assert hashlib.sha256(hub.files["me/mine"]["adapter_model.safetensors"]).hexdigest() == summary["adapter_sha256"]
    card = hub.files["me/mine"]["README.md"].decode()
    for words, name in (("reward accuracy", "accuracy"), ("margin", "margin"), ("loss", "loss")):
        figure = summary["eval"][name]
        assert f"| {words} | {figure['value']:.3f} | {figure['low']:.3f} to {figure['high']:.3f} |" in card
    assert [entry["visibility"] for entry in hub.created] == ["private"]
    assert f"uploaded to {hub.address}/me/mine" in done.stderr
    assert hub.tokens == {f"Bearer {TOKEN}"} or hub.tokens == {f"Bearer {TOKEN}", None}  # blobs are asked for without one
    assert not [name for name, data in contents(tmp_path).items() if TOKEN.encode() in data]


@pytest.mark.parametrize(
    ("part", "status", "says"), [("/blob/", 400, "try again"), ("/commit/", 400, "try again"), ("create", 403, "hf auth login")]
)
def test_a_failed_upload_loses_nothing(
    hub: Hub,
    trained: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    part: str,
    status: int,
    says: str,
) -> None:
    """Exit 1 with the command that tries again; the run is the same as one that uploads nothing."""
    hub.refuses[part] = hub.refuses["/api/models/me/mine"] = status
    place, run = tmp_path / "run", of_kind(trained, "adapter")
    done = train_with(place, run)
    assert done.exit_code == Exit.FAILED, done.stderr
    told = json.loads(done.stdout)
    assert says in told["fix"] and f"`hf upload me/mine {place / 'adapter'} . --private`" in told["fix"]
    assert "me/mine failed" in told["error"] and TOKEN not in done.stdout + done.stderr
    summary, before = (json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (place, run))
    assert (summary["status"], summary["adapter_sha256"]) == ("completed", before["adapter_sha256"])
    assert summary["eval"] == before["eval"] is not None
    assert contents(place / "adapter").keys() == contents(run / "adapter").keys()
    hub.refuses.clear()
    push(place / "adapter", "me/mine")
    assert hub.files["me/mine"] == contents(place / "adapter")


def test_an_export_is_uploaded_and_deletes_nothing(
    hub: Hub,
    trained: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Other weights, which would be loaded with or instead of the new ones, are named and kept: it is refused until they go."""
    before = {
        "notes.txt": b"mine",
        "training_args.bin": b"no weights",
        "old/model.safetensors": b"kept",
        "model.safetensors": b"replaced",
    }
    others = {"adapter_config.json": b"{}", "model-00002-of-00002.safetensors": b"", "pytorch_model.bin": b""}
    hub.files["me/merged"] = {**before, **others}
    words = ["export", str(of_kind(trained, "adapter")), "--out", str(tmp_path / "out"), "--push", "me/merged", "--json"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == Exit.FAILED and hub.files["me/merged"] == {**before, **others}
    told = json.loads(refused.stdout)
    assert all(name in told["error"] and name in told["fix"] for name in others)
    assert "notes.txt" not in told["error"] and "nothing was uploaded" in told["error"]
    shutil.rmtree(tmp_path / "out")
    hub.files["me/merged"] = dict(before)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["address"] == f"{hub.address}/me/merged"
    assert hub.files == {"me/merged": {**before, **contents(tmp_path / "out")}}
    assert "model.safetensors" in hub.files["me/merged"] and "export.json" in hub.files["me/merged"]


def test_without_a_network_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("card", encoding="utf-8")
    with pytest.raises(RunFailed, match="is complete") as caught:  # HF_HUB_OFFLINE, as conftest.py sets it
        push(tmp_path, "me/mine")
    assert caught.value.fix == f"try again: `hf upload me/mine {tmp_path} . --private`"
    assert contents(tmp_path) == {"README.md": b"card"}
