"""The folder of an exported model: complete or absent, and known again by the digests of its files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dpo_cli.errors import RunFailed, UsageError
from dpo_cli.results.codec import JsonObject
from dpo_cli.storage.atomic import let_others_read, sync, sync_all, way_out, write_whole, writing
from dpo_cli.storage.digests import sha256, sha256_of_all, sha256_of_settings
from dpo_cli.storage.jsonio import json_text, read_object
from dpo_cli.storage.redaction import redact, redacted

FACTS, MODELFILE = "export.json", "Modelfile"


def require_free(out: Path, may_hold_export: bool) -> bool:
    """Whether `out` holds an export; `UsageError` if it holds anything else, or if an export may not be there."""
    if out.is_mount():
        raise UsageError(f"{out} is a mount point, and a finished export is renamed to its place", f"--out {out / 'model'}")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / FACTS).is_file():
        raise UsageError(f"{out} exists already, and is not an export", "name a new folder with --out, or delete it")
    if not may_hold_export:
        message = f"{out} exists already: it holds an export"
        raise UsageError(message, "name a new folder with --out, or delete it; --gguf TYPE adds a GGUF file to it")
    return True


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A hidden folder next to `out`, on the same disk. What is still in it at the end is removed."""
    place = out.with_name(f".{out.name}.part")
    shutil.rmtree(place, ignore_errors=True)  # of an export that was killed
    try:
        place.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}", "name another folder with --out") from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def writing_model(out: Path) -> Iterator[None]:
    """Within, the files of a model are written: `RunFailed` if that fails, with nothing in `out`."""
    try:
        with writing(out.parent):
            yield
    except OSError as error:
        message = f"the model cannot be written to {out}: {error.strerror or error}; nothing was exported"
        raise RunFailed(message, way_out(error, out)) from error


def digests_of_run(trained: Path) -> dict[str, str]:
    """The digests of the weights that a run trained, and of their settings, as export.json has them."""
    return {"adapter_sha256": sha256_of_all(trained), "settings_sha256": sha256_of_settings(trained)}


def finish(place: Path, out: Path, facts: JsonObject, card: tuple[str, str]) -> JsonObject:
    """Add the card (name, text) and export.json, with the digests of the model's files, and move the folder to `out`."""
    files = sorted(file for file in place.rglob("*") if file.is_file())
    complete = {**facts, "files": {file.relative_to(place).as_posix(): sha256(file) for file in files}}
    (place / card[0]).write_text(redact(card[1]), encoding="utf-8")
    write_facts(place, complete)
    let_others_read(place)
    sync_all(place)
    place.replace(out)
    sync(out.parent)
    return complete


def write_facts(folder: Path, facts: JsonObject) -> None:
    text = json_text(redacted(facts), indent=2) + "\n"
    write_whole(folder / FACTS, lambda part: part.write_text(text, encoding="utf-8"))


def facts_of(out: Path, run: Path, digests: Mapping[str, str]) -> JsonObject:
    """The content of export.json in `out`; `UsageError` unless it is the export of this run, unchanged, without a GGUF file."""
    fix = "name a new folder with --out, or delete it"
    try:
        facts = read_object(out / FACTS)
        files = {str(name): str(digest) for name, digest in dict(facts["files"]).items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{out} exists already, and its {FACTS} cannot be read or has no digests", fix) from error
    if any(facts.get(name) != digest for name, digest in digests.items()):
        raise UsageError(f"{out} exists already, and is the export of another run than {run}", fix)
    changed = [name for name, digest in files.items() if not (out / name).is_file() or sha256(out / name) != digest]
    if changed:
        raise UsageError(f"{out} exists already, and is incomplete or has changed: {', '.join(changed)}", fix)
    if facts.get("gguf"):
        raise UsageError(f"{out} exists already, with its GGUF file {facts['gguf']['file']}", fix)
    return facts
