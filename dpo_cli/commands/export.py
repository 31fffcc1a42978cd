"""From a run to a model that others can load: merged, evaluated again, and only then moved to its place.

run -> its figures -> adapter merged into the unquantised base -> files -> figures of the files -> their place -> GGUF
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import join
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from dpo_cli.config.other_tools import fits
from dpo_cli.errors import Exit, Problem, RunFailed, UsageError, invalid
from dpo_cli.evaluation.evaluation import Measured, score
from dpo_cli.evaluation.metrics import Scores, figures
from dpo_cli.evaluation.rounding import without_rounding
from dpo_cli.hardware.machine import GIB
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.providers.loaded_tensors import merged
from dpo_cli.providers.out_of_memory import free_memory
from dpo_cli.providers.policy import TRAINED, Policy
from dpo_cli.providers.precision import in_float32
from dpo_cli.publish import gguf_export, model_folder, serving, upload
from dpo_cli.publish.model_folder import MODELFILE
from dpo_cli.publish.modelfile import modelfile
from dpo_cli.results.codec import JsonObject, to_json
from dpo_cli.results.compared import compared
from dpo_cli.results.intervals import Interval, required
from dpo_cli.results.judgement import Judged
from dpo_cli.results.merge import LARGER_CHANGE, LEAST_PROMPTS, Difference, GgufCheck, Merge, MergeLimit
from dpo_cli.runs.card import export_card, with_gguf
from dpo_cli.runs.open_run import Opened, OpenedRun, load_policy, open_run, require_answers
from dpo_cli.scoring.forward import choose
from dpo_cli.storage.atomic import free_bytes, let_others_read, sync_all, way_out, write_whole
from dpo_cli.storage.log import log_to
from dpo_cli.storage.progress import working
from dpo_cli.storage.redaction import redact
from dpo_cli.storage.run_directory import CARD, PLAN, SUMMARY
from dpo_cli.strategies.figures import FIGURES, Figure
from dpo_cli.ui.console import Console

NO_DIFFERENCE = 0.01  # nats of a response: more than rounding in float32, and too little to matter


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
    """Merge, evaluate, convert and publish: what `export --json` prints, and the exit code.

    A merged model that is worse leaves no file. A merged model that is not stays, whatever fails after it.
    """
    converter = gguf_export.find_converter(request.converter) if request.gguf else None
    is_merged = model_folder.require_free(request.out, may_hold_export=request.gguf is not None)
    if request.push and not fits("hub_model_id", request.push):
        raise UsageError(f"--push {request.push} is not a hub repository", "write owner/name, with your name on the hub")
    opened = open_run(request.run, request.dataset, console)
    require_answers(opened.plan, "merge into a model that answers")
    if not opened.rows:
        message, fix = "the run has no held-out rows, so the merged model cannot be compared with it", "--dataset FILE"
        raise invalid("nothing-to-compare", message, f"evaluate it on other {opened.plan.noun}: {fix}")
    trained = as_trained(opened)
    digests = model_folder.digests_of_run(opened.folder)
    facts = model_folder.facts_of(request.out, opened.run.path, digests) if is_merged else None
    _require_space(request, trained, is_merged)
    with log_to(opened.run.log):
        if request.gguf and converter:
            gguf_export.require_type(converter, request.gguf)
            if not gguf_export.has_sentencepiece():
                fix = "pip install '.[gguf]' in a checkout of dpo"
                console.line(f"note: sentencepiece is not installed, which the converter imports for most models: {fix}")
        if facts is None:
            facts, refused = _merge(request, opened, trained, digests, console)
            if refused:
                console.problems(refused)
                return facts, Exit.MISSED
            if request.gguf:
                console.line(f"the merged model is in {request.out}")
        else:
            console.line(f"{request.out} holds the merged model of this run, unchanged: it is not merged again")
        if request.gguf and converter:
            try:
                check, refused = _add_gguf(request, request.gguf, converter, opened, facts, console)
            except (RunFailed, OSError) as error:
                raise _after_merge(error, request) from error
            facts = {**facts, "gguf": to_json(check)}
            if refused:
                console.problems(refused)
                return {**facts, "out": str(request.out), "address": None}, Exit.MISSED
    console.line(f"exported to {request.out}; to serve it, for example (more in {serving.PAGE}):")
    named = [path.name for path in sorted(request.out.glob("*.gguf"))]
    for line in serving.of_export(request.out, named[0] if named else None):
        console.line(f"  {line}")
    address = upload.push(request.out, request.push) if request.push else None
    if address:
        console.line(f"uploaded to {address}")
    return {**facts, "out": str(request.out), "address": address}, Exit.DONE


def _merge(
    request: Request, opened: OpenedRun, trained: Plan, digests: dict[str, str], console: Console
) -> tuple[JsonObject, list[Problem]]:
    """Write the merged model to its place, unless it is worse: the content of export.json, and the problems."""
    with model_folder.staging(request.out) as place:
        own, plan = _own_scores(opened, console)
        console.line(f"merging into the {trained.dtype} base")
        with working("merging"):
            _write_merged(opened, trained, request.out, place)
        merged = _merged_scores(opened, plan, own, place, console)
        merge, judged = compare(opened, trained, own.log_probs, merged)
        console.comparison(merge)
        facts: JsonObject = {**to_json(merge), **digests, "gguf": None}
        refused = _worse(merge, trained)
        if not refused:
            counts, steps = opened.run.read_json(PLAN)["counts"], opened.run.read_json(SUMMARY)["steps"]
            card = export_card(trained, request.out.name, counts["train_pairs"], steps, judged, merge)
            with model_folder.writing_model(request.out):
                facts = model_folder.finish(place, request.out, facts, (CARD, card))
    return facts, refused


def as_trained(opened: OpenedRun) -> Plan:
    """The plan with the data and precision of the training, its base not quantised, on the CPU, which has the most memory."""
    then = opened.run.read_json(PLAN)["config"]
    same = {name: then[name] for name in ("bf16", "fp16", "dataset", "strategy")}
    config = replace(opened.plan.config, **same)
    return replace(opened.plan, config=replace(config, use_4bit=False, use_8bit=False, device="cpu", cpu_offload=False))


def _require_space(request: Request, plan: Plan, is_merged: bool) -> None:
    """`RunFailed` if the disk has no room for the model's files; a model of unknown shape is not checked."""
    facts = plan.model.facts
    if facts is None:
        return
    bytes_per_value = 0 if is_merged else getattr(torch, plan.dtype).itemsize
    bytes_per_value += gguf_export.BYTES_PER_VALUE[request.gguf] if request.gguf else 0
    needed = facts.parameters * bytes_per_value
    there = next(place for place in request.out.absolute().parents if place.is_dir())
    free = free_bytes(there)
    if needed > free:
        needed_gb, free_gb = compared(needed / GIB, free / GIB)
        lack_gb, _ = compared((needed - free) / GIB, 0.0)
        message = f"the export takes {needed_gb} GB, and the disk of {there} has {free_gb} free"
        raise RunFailed(message, f"free {lack_gb} GB there, or name a folder on another disk with --out")


def _own_scores(opened: Opened, console: Console) -> tuple[Measured, Plan]:
    """The scores of the rows under the run's own policy, as an evaluation has them, and the plan with the way of scoring."""
    policy, plan = load_policy(opened, console)
    measured = Measured(score(policy, opened.rows, opened.tokenizer, plan), np.zeros(0))
    return without_rounding(policy, opened.rows, opened.tokenizer, plan, measured, console.line), plan


def _write_merged(opened: Opened, trained: Plan, out: Path, place: Path) -> None:
    """Write the whole model with its tokenizer, in the dtype of the training.

    Loaded by transformers and PEFT only, for every provider of the run; a base that is quantised in its own files is made
    float first. Raises `InvalidInput` for an adapter that cannot be merged.
    """
    free_memory()
    model: Any = HuggingFace(trained.model).trained(trained, opened.folder).model
    if isinstance(model, PeftModel):
        model = merged(model, TRAINED, trained.model_label, getattr(torch, trained.dtype))
    with model_folder.writing_model(out):
        model.to(getattr(torch, trained.dtype)).save_pretrained(str(place))
        opened.tokenizer.save_pretrained(place)


def _merged_scores(opened: Opened, plan: Plan, measured: Measured, place: Path, console: Console) -> Scores:
    """The scores of the rows under the model in `place`, read back, with the reference scores of the run; in its dtype."""
    free_memory()
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    config = replace(plan.config, model_name=str(place), reference="base", use_4bit=False, use_8bit=False)
    if plan.config.device == "cuda" and size > 0.8 * torch.cuda.mem_get_info()[0]:
        console.line("note: the merged model is larger than the GPU's free memory, and is scored on the CPU, which is slow")
        config = replace(config, device="cpu")
    model = HuggingFace(ModelSource.of(str(place))).base_model(replace(plan, config=config)).eval()
    scoring = choose(model, opened.rows, int(opened.tokenizer.pad_token_id), plan.config.prompt_sharing)
    # The model takes the place of its reference: the log-probs of the reference are already known.
    dtype = getattr(torch, measured.dtype or plan.dtype)
    with in_float32(model) if measured.dtype == "float32" else nullcontext():
        scores = score(
            Policy(model, model), opened.rows, opened.tokenizer, replace(plan, config=config, scoring=scoring), dtype
        )
    return replace(measured.log_probs, policy=scores.policy, policy_right=scores.policy_right)


def compare(opened: Opened, trained: Plan, own: Scores, merged: Scores) -> tuple[Merge, Judged]:
    """The merge as export.json has it, and the figures of the merged model for its card.

    A watched figure may not leave the 95 % interval of the run's figure on the worse side. Too few prompts give no interval;
    then the log-probs themselves may not move by more than half of what training moved them, or by 0.01 nats.
    """
    config, prompts = opened.plan.config, [row.row.prompt_key for row in opened.rows]
    before, after = (figures(scores, prompts, config.beta) for scores in (own, merged))
    for sides in before, after:
        del sides.policy["kl_token"]  # unknown for the merged model
    apart = np.abs(merged.policy - own.policy)
    moved = float(np.abs(own.policy - own.reference).mean())
    most = max(moved / 2, NO_DIFFERENCE) if len(set(prompts)) < LEAST_PROMPTS else None
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
        difference=Difference(float(apart.mean()), float(apart.max()), moved, most),
        limits=[
            limit(FIGURES[name], required(before.policy, name), required(after.policy, name), judged.prompts)
            for name in opened.plan.strategy.watched
        ],
    )
    return merge, judged


def limit(figure: Figure, before: Interval, after: Interval, prompts: int) -> MergeLimit:
    """A figure of the merged model and its limit."""
    if prompts < LEAST_PROMPTS:
        return MergeLimit(figure.name, before.value, None, after.value, None)
    worse = -1 if figure.is_better_large else 1  # the sign of a change to the worse
    limit = before.high if worse > 0 else before.low
    if figure.is_share and before.low == before.value:
        # If every pair is right, so is every resample. With none wrong of n, 3/n is the end of a 95 % interval.
        limit = max(limit - 3 / prompts, 0)
    return MergeLimit(figure.name, before.value, limit, after.value, ok=bool(worse * (after.value - limit) <= 0))


def _worse(merge: Merge, trained: Plan) -> list[Problem]:
    """The limits that the merged model misses."""
    other = ""
    if merge.is_rounded_away:
        other = f"{trained.dtype} weights keep little of so small a change: {LARGER_CHANGE}, or "
    elif merge.trained_on != trained.dtype:
        other = f"train on {trained.dtype} weights, without use_4bit and use_8bit, or "
    fix = f"nothing was exported: {other}keep the adapter unmerged"
    problems = []
    for limit in merge.limits:
        if limit.limit is not None and not limit.ok:
            bound = "below" if FIGURES[limit.metric].is_better_large else "above"
            message = f"the merged model's {limit.metric} is {limit.value:.3f}, {bound} the limit {limit.limit:.3f},"
            message += f" the end of the interval around the run's {limit.before:.3f}"
            problems.append(Problem("error", "export-worse", message, fix))
    apart = merge.difference
    if not apart.ok:
        message = f"the merged model's log-probs differ from the run's by {apart.mean:.3g} nats on average, above the limit"
        message += f" {apart.limit:.3g}; training changed them by {apart.trained:.3g}"
        more = f"; or compare the figures, on at least {LEAST_PROMPTS} prompts: --dataset FILE"
        problems.append(Problem("error", "export-worse", message, fix + more))
    return problems


def _add_gguf(
    request: Request, kind: gguf_export.Type, converter: Path, opened: Opened, facts: JsonObject, console: Console
) -> tuple[GgufCheck, list[Problem]]:
    """Add a GGUF file and its Modelfile to the merged model: the comparison of both, and the problems.

    export.json is written last: until it names the file, the step is repeated.
    """
    out = request.out
    with model_folder.staging(out) as place:
        file = place / f"{out.name}.{kind.upper()}.gguf"
        console.line(f"writing {file.name}")
        free_memory()
        gguf_export.convert(converter, out, file, kind, out.name)
        check = gguf_export.check(out, file, kind, opened.rows, opened.tokenizer)
        text, has_template = modelfile(file.name, opened.tokenizer, opened.plan.day)
        check = replace(check, modelfile_template=has_template)
        same = f"{check.same_argmax:.2%} of {check.positions} positions have the same most likely token"
        console.line(
            f"{file.name}: {same} (minimum {check.least_same:.1%}); logits differ by {check.max_difference:.3g} at most"
        )
        if not check.ok:
            message = (
                f"{file.name} answers differently from the merged model: {same}, and the minimum is {check.least_same:.1%}"
            )
            fix = f"use a more precise type, or a newer converter, and repeat only the GGUF step: {_command(request)}"
            return check, [Problem("error", "gguf-differs", f"{message}; {_complete(request)}", fix)]
        if not has_template:
            console.line("note: the Modelfile has no TEMPLATE; Ollama uses the one in the GGUF file")
        let_others_read(place)
        sync_all(place)
        file.replace(out / file.name)
    write_whole(out / MODELFILE, lambda part: part.write_text(text, encoding="utf-8"))
    card = with_gguf((out / CARD).read_text(encoding="utf-8"), check)
    write_whole(out / CARD, lambda part: part.write_text(redact(card), encoding="utf-8"))
    model_folder.write_facts(out, {**facts, "gguf": to_json(check)})
    return check, []


def _after_merge(error: RunFailed | OSError, request: Request) -> RunFailed:
    """The failure of the GGUF step, with what is kept and how to repeat it."""
    if isinstance(error, OSError):
        error = RunFailed(f"the GGUF file was not written: {error.strerror or error}", way_out(error, request.out))
    again = f"repeat only the GGUF step: {_command(request)}"
    return RunFailed(f"{error.message}; {_complete(request)}", f"{error.fix}, and {again}" if error.fix else again)


def _complete(request: Request) -> str:
    return f"the merged model in {request.out} is complete and has no GGUF file"


def _command(request: Request) -> str:
    """The command line of a request. With the merged model in its place it makes only the GGUF file."""
    options = {
        "--out": request.out,
        "--gguf": request.gguf,
        "--converter": request.converter,
        "--dataset": request.dataset,
        "--push": request.push,
    }
    words = [word for name, value in options.items() if value for word in (name, str(value))]
    return f"`{join(['dpo', 'export', request.run, *words])}`"
