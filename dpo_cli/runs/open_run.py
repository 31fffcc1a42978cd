"""A finished run, or any adapter on a model, opened on this machine: its plan, the rows to evaluate, what was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from dpo_cli.config.config import load
from dpo_cli.config.rules import fuses_adapter
from dpo_cli.config.schema import defaults
from dpo_cli.data.dataset import holds_pairs, is_held_out_prompt, read, unreadable
from dpo_cli.data.encoded import EncodedRows, Growing
from dpo_cli.data.findings import Overlap
from dpo_cli.data.rows import Row
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.errors import InvalidInput, Problem, invalid
from dpo_cli.hardware.machine import probe
from dpo_cli.models.adapter_config import ADAPTER_CONFIG, CAUSAL, CLASSIFIER, Adapter, is_on_head
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.plan import ON_DEVICE, Decided, Plan, Scoring
from dpo_cli.plan.preflight import inspect
from dpo_cli.plan.tokenized import prepare_judged, require_padding, tell_scoring
from dpo_cli.providers.base import Provider
from dpo_cli.providers.policy import Policy
from dpo_cli.providers.precision import with_bf16_speed
from dpo_cli.providers.registry import PROVIDERS
from dpo_cli.scoring.forward import choose
from dpo_cli.scoring.lora_linear import fuse
from dpo_cli.storage.digests import sha256_of_all, sha256_of_settings
from dpo_cli.storage.jsonio import read_json
from dpo_cli.storage.log import log_to
from dpo_cli.storage.run_directory import ADAPTER, MANIFEST, PLAN, RunDirectory
from dpo_cli.strategies.row_kinds import PAIRS
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.strategies.strategy import Strategy
from dpo_cli.ui.console import Console


@dataclass(frozen=True)
class Opened:
    """The folder of what was trained, its plan on this machine, and the rows to evaluate."""

    folder: Path
    plan: Plan
    provider: Provider
    tokenizer: PreTrainedTokenizerBase
    rows: EncodedRows
    scoring: Scoring | None  # the decision of the run, if the rows are the run's


@dataclass(frozen=True)
class OpenedRun(Opened):
    run: RunDirectory


def open_run(
    run_path: str, dataset: str | None, console: Console, changes: Sequence[str] = (), with_rows: bool = True
) -> OpenedRun:
    """Open a finished run with its held-out rows, or with all rows of another file. No model is loaded.

    `changes` are overrides for the evaluation. Without rows no dataset is read.
    """
    run = RunDirectory.open(Path(run_path))
    require_same_below(run)
    with log_to(run.log):
        opened = _opened(str(run.path / PLAN), changes, run.trained, dataset, console, with_rows)
    if dataset and Path(dataset).absolute() in map(Path, run.trained_on()):
        console.line(f"note: the run was trained on {dataset}, so these figures show what it memorised, not what it learned")
    elif dataset:
        console.problems([*_trained_rows(run, [row.row for row in opened.rows])])
    return OpenedRun(**vars(opened), run=run)


def require_answers(plan: Plan, what: str) -> None:
    """`InvalidInput` for a reward model, which scores responses and writes none; `what` needs them, in words."""
    if plan.strategy.gives_rewards:
        message = f"{plan.run_dir} holds a reward model, which gives scores and writes no answers: it has nothing to {what}"
        fix = f"`dpo eval {plan.run_dir}` evaluates it; a config names it as reward_model"
        raise invalid("run-of-rewards", message, fix)


def _trained_rows(run: RunDirectory, rows: Sequence[Row]) -> Iterator[Problem]:
    """The rows whose prompts a run was trained on, as far as its data is still here."""
    config = run.read_json(PLAN)["config"]
    overlap = Overlap(lambda prompt_key: not is_held_out_prompt(prompt_key, config["eval_split"], config["split_seed"]))
    kind = STRATEGIES[config["strategy"]].rows
    read(config["dataset"], True, columns=config["columns"], observers=[overlap], kind=kind)
    for row in rows:
        overlap.eval_side.see(row, row.prompt_key)
    return overlap.problems(None)


def open_adapter(
    config: str, adapter: Path, dataset: str | None, overrides: Sequence[str], console: Console, with_rows: bool = True
) -> Opened:
    """Open any PEFT adapter on the model of a config, with the held-out rows of the config, or with all rows of another file.

    Without rows no dataset is read. `config` and `adapter` may be run directories: then the plan and the adapter of the run
    are used.
    """
    path, folder = Path(config), adapter / ADAPTER if (adapter / PLAN).is_file() else adapter
    file = str(path / PLAN if path.is_dir() else path)
    strategy = _strategy_of(file, overrides)
    made_on = _base_of(folder, CLASSIFIER if strategy and strategy.gives_rewards else CAUSAL)
    opened = _opened(file, overrides, folder, dataset, console, with_rows)
    model = opened.plan.model
    name = model.name
    if made_on and Path(made_on).name != Path(name).name and ModelSource.of(made_on).foundation != model.foundation:
        console.line(f"note: the adapter names {made_on} as its base, and is used on {name}")
    return opened


def open_trained(config: str, run: RunDirectory, console: Console) -> Opened:
    """Open what a finished run trained, by any strategy, on the model of a config and with the held-out rows of that config."""
    require_same_below(run)
    whole = [f"lora_r={run.read_json(PLAN)['config']['lora_r']}"]  # 0: every weight was trained
    return _opened(config, whole, run.trained, None, console)


def _opened(
    config: str, overrides: Sequence[str], folder: Path, dataset: str | None, console: Console, with_rows: bool = True
) -> Opened:
    # The adapter of any provider is a PEFT adapter, and needs no other provider. One process evaluates it.
    changes = [*overrides, "provider=huggingface", "num_processes=1", "fsdp=false"]
    if dataset:
        changes += [f"dataset={dataset}", "eval_split=0", "eval_dataset=null"]
        strategy = _strategy_of(config, overrides)
        is_other = strategy is not None and strategy.rows is not PAIRS
        if is_other and not unreadable(dataset, "dataset") and holds_pairs(dataset):
            changes.append("strategy=dpo")  # pairs give more figures
    is_plan, decided = Path(config).name == PLAN, _decided(config)
    loaded = load(config, [*(_not_here(config, changes) if is_plan else ()), *changes])
    loaded = loaded if with_rows else loaded.draft()
    machine = probe()
    inspection = inspect(loaded, machine, with_data=with_rows, with_fit=False, is_begun=is_plan)
    data, plan = inspection.require() if with_rows else (None, inspection.require_plan())
    machine = with_bf16_speed(machine, loaded.require(), plan.model.facts)
    plan = resolve(loaded, machine, longest=data.longest if data else None, is_resumed=is_plan, model=plan.model)
    warnings = [problem for problem in inspection.problems if problem.severity == "warning"]
    console.problems([problem for problem in warnings if problem.key != "augment"])  # here a judge needs no rank
    provider = PROVIDERS[plan.config.provider](plan.model)
    tokenizer = provider.tokenizer()
    rows = Growing().done()
    if data is None:
        require_padding(Tokenizer.loaded(tokenizer, plan.day, plan.model.generation), tokenizer, provider.token_rows())
    else:
        rows, about_rows = prepare_judged(data, tokenizer, plan, provider.token_rows(), bool(dataset), console.line)
        console.problems(about_rows)
    plan = replace(plan, freed_gb=decided.freed_gb if decided else None)
    plan = plan.with_rounding(decided.rounding if decided else None)
    return Opened(folder, plan, provider, tokenizer, rows, decided.scoring if decided and not dataset else None)


def _strategy_of(config: str, overrides: Sequence[str]) -> Strategy | None:
    """The strategy of a config; None for a config that names none, or that cannot be read."""
    return STRATEGIES.get(str(load(config, overrides).values.get("strategy")))


def _decided(config: str) -> Decided | None:
    """The decisions of the run of a plan.json; None for another config."""
    try:
        return Decided.of(read_json(Path(config))) if Path(config).name == PLAN else None
    except (OSError, ValueError):  # missing, or written by hand: it is read as a config
        return None


def _not_here(plan: str, changes: Sequence[str]) -> list[str]:
    """Overrides for the device and precision of a run, if this machine does not have them, or another device is requested.

    This machine then decides them: a run from a GPU is evaluated on a CPU.
    """
    then, values, machine = load(plan).values.get("device"), load(plan, changes).values, probe()
    is_here = then == values.get("device") and then in ("cpu", machine.device)
    if is_here and not (then == "cuda" and values.get("bf16") and not machine.has_bf16):
        return []
    return [f"{key}={json.dumps(defaults()[key])}" for key in ON_DEVICE]


def _base_of(folder: Path, task: str) -> str:
    """The model that an adapter names as its base; `InvalidInput` for a folder without an adapter that can be evaluated.

    `task` is that of the model, by PEFT's names.
    """
    if (adapter := Adapter.in_folder(folder)) is None:
        fix = "name the folder of an adapter, or of a run that trained one"
        raise _no_adapter(f"{folder} is not a PEFT adapter: it has no {ADAPTER_CONFIG}", fix)
    try:
        if fault := adapter.fault_for(task):
            raise _no_adapter(f"the adapter in {folder} {fault.message}", fault.fix)
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:  # a type unknown to PEFT, or a damaged file
        message = f"PEFT cannot read {folder / ADAPTER_CONFIG}: {error}"
        raise _no_adapter(message, "save it again with PEFT") from error
    if is_on_head(config.to_dict()):
        message = f"the adapter in {folder} also changes lm_head, which is not supported: log-probs need its plain weight"
        fix = "train an adapter without lm_head in target_modules, or merge this one with PEFT and name the merged model"
        raise _no_adapter(message, fix)
    if config.peft_type == "XLORA":
        raise _no_adapter(f"{folder / ADAPTER_CONFIG} names other adapters, which is not supported", "name one of them")
    if config.is_prompt_learning:
        message = f"the adapter in {folder} puts virtual tokens before a prompt, which is not supported"
        raise _no_adapter(message, "name an adapter of weights, such as LoRA")
    if config.peft_type is None:
        raise _no_adapter(f"{folder / ADAPTER_CONFIG} has no peft_type", "save it again with PEFT")
    return config.base_model_name_or_path or ""


def _no_adapter(message: str, fix: str) -> InvalidInput:
    return invalid("not-an-adapter", message, fix)


def require_same_below(run: RunDirectory) -> None:
    """`InvalidInput` if a run or an adapter below this run is missing or has changed: its figures would differ."""
    model = run.read_json(MANIFEST)["model"]
    for folder, digest in model.get("below", {}).items():
        place, settings = Path(folder), model.get("settings", {}).get(folder)  # older runs do not have it
        is_same = place.is_dir() and sha256_of_all(place) == digest and settings in (None, sha256_of_settings(place))
        if not is_same:
            message = f"{run.path} was trained on {folder}, which has changed or is missing"
            raise invalid("adapter-changed", message, "restore that folder, or train both again")


def load_policy(opened: Opened, console: Console) -> tuple[Policy, Plan]:
    """What was trained, with its reference, and the plan with the way of scoring on this machine."""
    plan, rows, pad_token_id = opened.plan, opened.rows, int(opened.tokenizer.pad_token_id)
    policy = opened.provider.trained(plan, opened.folder)
    if fuses_adapter(plan.config.provider):  # as in training, so that both round in the same way
        fuse(policy.model)
    if rows:
        is_apart = opened.scoring is not None and not opened.scoring.shared
        scoring = choose(policy.network, rows, pad_token_id, False if is_apart else plan.config.prompt_sharing)
        if opened.scoring is not None and opened.scoring.shared == scoring.shared:
            scoring = opened.scoring
        if policy.frozen is not None:
            choose(policy.frozen, rows, pad_token_id, scoring.shared)
        plan = replace(plan, scoring=scoring)
        tell_scoring(plan, console)
    return policy, plan
