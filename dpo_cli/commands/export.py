"""From a run to a model that others can load: merged, evaluated again, and only then moved to its place.

run -> its figures -> adapter merged into the unquantised base -> files -> figures of the files -> GGUF
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from dpo_cli.config.other_tools import fits
from dpo_cli.errors import Exit, Problem, RunFailed, UsageError, invalid
from dpo_cli.evaluation.evaluation import score
from dpo_cli.evaluation.metrics import Scores, figures
from dpo_cli.hardware.machine import GIB
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.providers.loaded_tensors import merged
from dpo_cli.providers.policy import TRAINED, Policy
from dpo_cli.publish import gguf_export, upload
from dpo_cli.publish.modelfile import modelfile
from dpo_cli.results.codec import JsonObject, to_json
from dpo_cli.results.intervals import Interval, required
from dpo_cli.results.judgement import Judged
from dpo_cli.results.merge import Difference, GgufCheck, Merge, MergeLimit
from dpo_cli.runs.card import export_card
from dpo_cli.runs.open_run import Opened, OpenedRun, load_policy, open_run
from dpo_cli.scoring.forward import choose
from dpo_cli.scoring.oom import free_memory
from dpo_cli.storage.atomic import free_bytes
from dpo_cli.storage.jsonio import json_text
from dpo_cli.storage.log import log_to
from dpo_cli.storage.redaction import redact, redacted
from dpo_cli.storage.run_directory import CARD, PLAN, SUMMARY
from dpo_cli.strategies.figures import FIGURES, Figure
from dpo_cli.ui.console import Console

FACTS, MODELFILE = "export.json", "Modelfile"


@dataclass(frozen=True)
class Request:
    """The request of `dpo export`."""

    run: str
    out: Path
    dataset: str | None = None
    gguf: gguf_export.Type | None = None
    converter: Path | None = None
    push: str | None = None


def export(request: Request, console: Console) -> tuple[JsonObject, Exit]:
    """Merge, evaluate, convert and publish: what `export --json` prints, and the exit code. A rejected model leaves no file."""
    converter = gguf_export.find_converter(request.converter) if request.gguf else None
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise UsageError(f"{request.out} exists already", "name a new folder with --out, or delete it")
    if request.push and not fits("hub_model_id", request.push):
        raise UsageError(f"--push {request.push} is not a hub repository", "write owner/name, with your name on the hub")
    opened = open_run(request.run, request.dataset, console)
    if not opened.rows:
        message, fix = "the run has no held-out rows, so the merged model cannot be compared with it", "--dataset FILE"
        raise invalid("nothing-to-compare", message, f"evaluate it on other {opened.plan.noun}: {fix}")
    trained = as_trained(opened)
    _require_space(request, trained)
    with log_to(opened.run.log), _staged(request.out) as place:
        if request.gguf and converter:
            gguf_export.require_type(converter, request.gguf)
        own, plan = _own_scores(opened, console)
        console.line(f"merging into the {trained.dtype} base")
        _write_merged(opened, trained, place)
        merged = _merged_scores(opened, plan, own, place, console)
        merge, judged = compare(opened, trained, own, merged)
        console.comparison(merge)
        refused = [_worse(limit, trained) for limit in merge.limits if not limit.ok]
        if request.gguf and converter and not refused:
            check, refused = _gguf(request, request.gguf, converter, opened, place, console)
            merge = replace(merge, gguf=check)
        if refused:
            console.problems(refused)
            return to_json(merge), Exit.MISSED
        counts, steps = opened.run.read_json(PLAN)["counts"], opened.run.read_json(SUMMARY)["steps"]
        text = export_card(trained, request.out.name, counts["train_pairs"], steps, judged, merge)
        (place / CARD).write_text(redact(text), encoding="utf-8")
        (place / FACTS).write_text(json_text(redacted(to_json(merge)), indent=2) + "\n", encoding="utf-8")
    console.line(f"exported to {request.out}")
    address = upload.push(request.out, request.push) if request.push else None
    if address:
        console.line(f"uploaded to {address}")
    return {**to_json(merge), "out": str(request.out), "address": address}, Exit.DONE


def as_trained(opened: OpenedRun) -> Plan:
    """The plan with the data and precision of the training, its base not quantised, on the CPU, which has the most memory."""
    then = opened.run.read_json(PLAN)["config"]
    same = {name: then[name] for name in ("bf16", "fp16", "dataset", "strategy")}
    config = replace(opened.plan.config, **same)
    return replace(opened.plan, config=replace(config, use_4bit=False, use_8bit=False, device="cpu"))


def _require_space(request: Request, plan: Plan) -> None:
    """`RunFailed` if the disk has no room for the model's files; a model of unknown shape is not checked."""
    facts = plan.model.facts
    if facts is None:
        return
    bytes_per_value = getattr(torch, plan.dtype).itemsize + (gguf_export.BYTES_PER_VALUE[request.gguf] if request.gguf else 0)
    needed = facts.parameters * bytes_per_value
    there = next(place for place in request.out.absolute().parents if place.is_dir())
    free = free_bytes(there)
    if needed > free:
        message = f"the export takes {needed / GIB:.1f} GB, and the disk of {there} has {free / GIB:.1f} free"
        raise RunFailed(message, f"free {(needed - free) / GIB:.1f} GB there, or name a folder on another disk with --out")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A hidden folder next to `out`. It becomes `out` if it holds export.json, the last file; otherwise it is removed."""
    place = out.with_name(f".{out.name}.part")
    shutil.rmtree(place, ignore_errors=True)  # of an export that was killed
    try:
        place.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}", "name another folder with --out") from error
    try:
        yield place
        if (place / FACTS).is_file():
            place.replace(out)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _own_scores(opened: Opened, console: Console) -> tuple[Scores, Plan]:
    """The scores of the rows under the run's own policy, and the plan with the way of scoring."""
    policy, plan = load_policy(opened, console)
    return score(policy, opened.rows, opened.tokenizer, plan), plan


def _write_merged(opened: Opened, trained: Plan, place: Path) -> None:
    """Write the whole model with its tokenizer, in the dtype of the training.

    Loaded by transformers and PEFT only, for every provider of the run; a base that is quantised in its own files is made
    float first. Raises `InvalidInput` for an adapter that cannot be merged.
    """
    free_memory()
    model: Any = HuggingFace(trained.model).trained(trained, opened.folder).model
    if isinstance(model, PeftModel):
        model = merged(model, TRAINED, trained.model_label, getattr(torch, trained.dtype))
    model.to(getattr(torch, trained.dtype)).save_pretrained(str(place))
    opened.tokenizer.save_pretrained(place)


def _merged_scores(opened: Opened, plan: Plan, own: Scores, place: Path, console: Console) -> Scores:
    """The scores of the rows under the model in `place`, read back, with the reference scores of the run."""
    free_memory()
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    config = replace(plan.config, model_name=str(place), reference="base", use_4bit=False, use_8bit=False)
    if plan.config.device == "cuda" and size > 0.8 * torch.cuda.mem_get_info()[0]:
        console.line("note: the merged model is larger than the GPU's free memory, and is scored on the CPU, which is slow")
        config = replace(config, device="cpu")
    model = HuggingFace(ModelSource.of(str(place))).base_model(replace(plan, config=config)).eval()
    scoring = choose(model, opened.rows, int(opened.tokenizer.pad_token_id), plan.config.prompt_sharing)
    # The model takes the place of its reference: the log-probs of the reference are already known.
    scores = score(Policy(model, model), opened.rows, opened.tokenizer, replace(plan, config=config, scoring=scoring))
    return replace(own, policy=scores.policy, policy_right=scores.policy_right)


def compare(opened: Opened, trained: Plan, own: Scores, merged: Scores) -> tuple[Merge, Judged]:
    """The merge as export.json has it, and the figures of the merged model for its card.

    A watched figure may not leave the 95 % interval of the run's figure on the worse side.
    """
    config, prompts = opened.plan.config, [row.row.prompt_key for row in opened.rows]
    before, after = (figures(scores, prompts, config.beta) for scores in (own, merged))
    for sides in before, after:
        del sides.policy["kl_token"]  # unknown for the merged model
    apart = np.abs(merged.policy - own.policy)
    judged = Judged(opened.plan.noun, len(opened.rows), len(set(prompts)), after)
    merge = Merge(
        run=str(opened.folder.parent.absolute()),
        model=trained.config.model_name,
        dtype=trained.dtype,
        trained_on="4-bit" if config.use_4bit else "8-bit" if config.use_8bit else trained.dtype,
        noun=judged.noun,
        count=judged.count,
        prompts=judged.prompts,
        before=before.policy,
        after=after.policy,
        difference=Difference(float(apart.mean()), float(apart.max())),
        limits=[
            limit(FIGURES[name], required(before.policy, name), required(after.policy, name), judged.prompts)
            for name in opened.plan.strategy.watched
        ],
    )
    return merge, judged


def limit(figure: Figure, before: Interval, after: Interval, prompts: int) -> MergeLimit:
    """A figure of the merged model and its limit."""
    worse = -1 if figure.is_better_large else 1  # the sign of a change to the worse
    limit = before.high if worse > 0 else before.low
    if figure.is_share and before.low == before.value:
        # If every pair is right, so is every resample. With none wrong of n, 3/n is the end of a 95 % interval.
        limit -= 3 / prompts
    return MergeLimit(figure.name, before.value, limit, after.value, ok=bool(worse * (after.value - limit) <= 0))


def _worse(limit: MergeLimit, trained: Plan) -> Problem:
    bound = "below" if FIGURES[limit.metric].is_better_large else "above"
    message = f"the merged model's {limit.metric} is {limit.value:.3f}, {bound} the limit {limit.limit:.3f},"
    message += f" the end of the interval around the run's {limit.before:.3f}"
    fix = f"nothing was exported: train on {trained.dtype} weights, without use_4bit and use_8bit, or keep the adapter unmerged"
    return Problem("error", "export-worse", message, fix)


def _gguf(
    request: Request, kind: gguf_export.Type, converter: Path, opened: Opened, place: Path, console: Console
) -> tuple[GgufCheck, list[Problem]]:
    """Write the GGUF file and its Modelfile: the comparison with the model, and the problems."""
    file = place / f"{request.out.name}.{kind.upper()}.gguf"
    console.line(f"writing {file.name}")
    free_memory()
    gguf_export.convert(converter, place, file, kind, request.out.name)
    check = gguf_export.check(place, file, kind, opened.rows, opened.tokenizer)
    text, has_template = modelfile(file.name, opened.tokenizer, opened.plan.day)
    (place / MODELFILE).write_text(text, encoding="utf-8")
    same = f"{check.same_argmax:.2%} of {check.positions} positions have the same most likely token"
    console.line(f"{file.name}: {same} (minimum {check.least_same:.1%}); logits differ by {check.max_difference:.3g} at most")
    if not has_template:
        console.line("note: the Modelfile has no TEMPLATE; Ollama uses the one in the GGUF file")
    message = f"{file.name} answers differently from the merged model: {same}, and the minimum is {check.least_same:.1%}"
    fix = "nothing was exported: use a more precise type, or a newer converter"
    refused = [] if check.ok else [Problem("error", "gguf-differs", message, fix)]
    return replace(check, modelfile_template=has_template), refused
