"""The commands: parse, call, print, exit. A command imports the heavy modules that it needs.

Longer than other modules: the help of each command is in its signature, and all commands are in one place.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

import dpo_cli
from dpo_cli.commands.recommendation import config_text, gigabytes, rate_line, request_of
from dpo_cli.commands.session import composer_for, session
from dpo_cli.commands.validate import ROWS, validated_file, worst
from dpo_cli.config.config import is_override, load
from dpo_cli.config.schema import options_help, schema_path
from dpo_cli.errors import Exit, UsageError
from dpo_cli.hardware.machine import installed_versions, probe
from dpo_cli.hardware.recommend import recommend as make_recommendation
from dpo_cli.plan.preflight import inspect_prompts
from dpo_cli.results.codec import JsonObject, to_json
from dpo_cli.storage.resumable_file import ResumableFile
from dpo_cli.storage.world import AUTO, require_alone
from dpo_cli.strategies.dpo import DPO
from dpo_cli.strategies.strategies import STRATEGIES
from dpo_cli.ui.chat_entry import prompt_of
from dpo_cli.ui.console import Console

if TYPE_CHECKING:
    from dpo_cli.commands.requests import VoteRequest
    from dpo_cli.evaluation.thresholds import Threshold
    from dpo_cli.results.judgement import Evaluation
    from dpo_cli.results.tally import Tally

VOTED_ON = 20  # prompts: `dpo vote` compares their answers

app = typer.Typer(
    name="dpo",
    help="Preference tuning of language models from a terminal.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output, and everything else on standard error.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
JudgedOn = Annotated[str | None, typer.Option("--dataset", help="Evaluate on this file instead of the held-out rows.")]
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A config (JSON, YAML or TOML); - reads standard input.")]


@app.command()
def validate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE]...", help="Configs (- reads standard input), and values that replace theirs."
        ),
    ] = None,
    vram: Annotated[
        float | None, typer.Option(parser=gigabytes, metavar="GB", help="Plan for a GPU with this much memory, in GB.")
    ] = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Do not read the dataset.")] = False,
    rows: Annotated[
        int, typer.Option("--rows", min=0, help="Render this many rows with the model's chat template and tokenizer.")
    ] = ROWS,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as errors.")] = False,
    show_schema: Annotated[
        bool, typer.Option("--schema", help='Print the path of the JSON schema, for "$schema" in a config.')
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a config, its data and its memory: every problem at once, each with its fix."""
    with session(as_json, debug) as console:
        if show_schema:
            console.json({"schema": str(schema_path())}) if as_json else typer.echo(schema_path())
            return
        overrides = [word for word in words or () if is_override(word)]
        configs = [word for word in words or () if word not in overrides]
        if not configs:
            raise UsageError("no config is given", "dpo validate my-config.json")
        machine = probe()
        validations = [validated_file(console, path, overrides, machine, vram, not no_data, strict, rows) for path in configs]
        if as_json:
            several = [{"file": path, **validation.to_json()} for path, validation in zip(configs, validations, strict=True)]
            console.json(validations[0].to_json() if len(validations) == 1 else several)
        raise typer.Exit(int(worst(validation.exit_code for validation in validations)))


@app.command()
def recommend(
    vram: Annotated[
        float | None, typer.Option(parser=gigabytes, metavar="GB", help="GPU memory in GB; default: this machine's.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to train; default: the profile's.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="The dataset of the config; the memory bill then uses its lengths.")
    ] = None,
    strategy: Annotated[str, typer.Option(metavar="|".join(STRATEGIES), help="How to train.")] = DPO.name,
    gpus: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="Cards of this kind in a machine.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="Machines with so many cards.")] = 1,
    write: Annotated[Path | None, typer.Option(help="Write the config to this file.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print a config for this hardware, with its memory bill."""
    with session(as_json, debug) as console:
        if write is not None and write.exists():
            raise UsageError(f"{write} exists already", "name a new file")
        recommendation = make_recommendation(request_of(console, vram, model, dataset, strategy, gpus, nodes))
        for reason in recommendation.reasons:
            console.line(reason)
        if not STRATEGIES[strategy].is_trained:
            console.line(f"this version cannot train {strategy} yet: the config is for a later version")
        console.bill(recommendation.memory.to_json())
        if write is not None:
            try:
                write.write_text(config_text(recommendation, str(write)), encoding="utf-8")
            except OSError as error:  # the folder does not exist or is not writable: the user can fix it
                raise UsageError(f"cannot write {write}: {error.strerror}", "name a file in a folder that exists") from error
        console.line(f"wrote {write}" if write else json.dumps(recommendation.config, indent=2))
        if line := rate_line(recommendation, write):
            console.line(line)
        if as_json:
            console.json(recommendation.to_json())


class _TrainCommand(TyperCommand):
    """`dpo train --help` ends with the options of a config, which only the schema declares."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        typer.echo(options_help(shutil.get_terminal_size().columns))


@app.command(cls=_TrainCommand)
def train(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest complete checkpoint; without one, start.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan; train nothing, and write to the cache only.")
    ] = False,
    processes: Annotated[
        str | None, typer.Option(metavar="N|auto", help="Train in N processes, one per GPU; auto: on all visible GPUs.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train an adapter; CONFIG may be the plan.json of an earlier run."""
    with session(as_json, debug, is_shared=True) as console:
        from dpo_cli.commands.launch import processes_of, train_in_processes
        from dpo_cli.commands.train_stages import train_stages

        changes = [*(overrides or ()), *([f"num_processes={processes}"] if processes else [])]
        count = 1 if dry_run else processes_of(config, changes)
        if count > 1:
            named = {"--overwrite": overwrite, "--resume": resume, "--json": as_json, "--debug": debug}
            words = ["train", config, *changes, *(name for name, is_named in named.items() if is_named)]
            raise typer.Exit(int(train_in_processes(words, count, console)))
        if processes == AUTO and not dry_run:
            console.line("note: there are no two GPUs, so one process trains")
        result, code = train_stages(config, changes, console, overwrite=overwrite, resume=resume, dry_run=dry_run)
        if as_json:
            console.json(result)
        raise typer.Exit(int(code))


@app.command("eval")
def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RUN_DIR|CONFIG", help="The output_dir of a finished run, or a config with --adapter."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the run's or the file's.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Evaluate this PEFT adapter (made by any tool) on CONFIG's model.")
    ] = None,
    dataset: JudgedOn = None,
    fail_under: Annotated[
        str | None,
        typer.Option(metavar="LIMITS", help="accuracy=0.6,kl_sequence<10: exit code 5 if a figure misses its limit."),
    ] = None,
    side_by_side: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Same as `dpo vote RUN_DIR --prompts N`.")
    ] = None,
    by_judge: Annotated[bool, typer.Option("--judge", help="Same as `dpo vote RUN_DIR --judge`.")] = False,
    tally: Annotated[Path | None, typer.Option(metavar="FILE", help="Same as `dpo vote --tally FILE`.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Compute the figures again, also if nothing has changed.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Evaluate an adapter against its base model on held-out pairs."""
    with session(as_json, debug) as console:
        from dpo_cli.commands.requests import Request, VoteRequest

        name, values = target or "", tuple(overrides or ())
        if tally is not None:
            if adapter:
                raise UsageError("--tally only counts the votes in a file", f"dpo vote --tally {tally}")
            console.line(f"note: this command is now `dpo vote --tally {tally}`")
            _vote(VoteRequest(name, side_by_side or 0, by_judge, dataset, values, tally, fail_under), console, as_json)
            return
        if by_judge and not side_by_side:
            raise UsageError("--judge needs --side-by-side", f"dpo vote {name or 'RUN_DIR'} --judge")
        if adapter and side_by_side:
            raise UsageError("--side-by-side needs a run directory", "dpo vote RUN_DIR")
        votes = VoteRequest(name, side_by_side, by_judge) if side_by_side else None
        request = Request(name, adapter, dataset, values, fail_under, votes, again)
        if side_by_side:
            console.line(f"note: `dpo vote {name} --prompts {side_by_side}` compares answers without evaluating the run again")
        from dpo_cli.commands.known_evaluation import show_known

        if (known := show_known(request, console)) is not None:
            judged, compared = known, None
        else:
            composer_for()
            from dpo_cli.commands.eval import evaluate as evaluate_it

            judged, compared = evaluate_it(request, console)
        result = {**judged.shown, "side_by_side": to_json(compared) if compared else None}
        _end(request.thresholds, judged, result, console, as_json)


@app.command()
def vote(
    run_dir: Annotated[str | None, typer.Argument(metavar="RUN_DIR", help="The output_dir of a finished run.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the run's.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help=f"Compare the answers to this many prompts; default: {VOTED_ON}.")
    ] = None,
    by_judge: Annotated[bool, typer.Option("--judge", help='Ask the judge that "augment" names, and count its votes.')] = False,
    dataset: JudgedOn = None,
    tally: Annotated[Path | None, typer.Option(metavar="FILE", help="Count the votes in a votes.json.")] = None,
    pairs: Annotated[
        Path | None, typer.Option(metavar="OUT", help="With --tally: write the votes as preference pairs to this .jsonl file.")
    ] = None,
    fail_under: Annotated[
        str | None, typer.Option(metavar="LIMITS", help="win_rate=0.5: exit code 5 if the adapter wins less often.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare the answers of an adapter and its base: write a page for voters, ask a judge, or count votes."""
    with session(as_json, debug) as console:
        from dpo_cli.commands.requests import VoteRequest

        count = prompts or (0 if tally else VOTED_ON)
        request = VoteRequest(run_dir or "", count, by_judge, dataset, tuple(overrides or ()), tally, fail_under, pairs)
        _vote(request, console, as_json)


def _vote(request: VoteRequest, console: Console, as_json: bool) -> None:
    if request.tally is not None:
        from dpo_cli.preferences.voted_pairs import require_free, write_pairs
        from dpo_cli.preferences.votes import count, read

        if request.pairs is not None:
            require_free(request.pairs, may_exist=False)
        tally = count(request.tally)
        console.tally(tally)
        result = to_json(tally)
        if request.pairs is not None:
            written = write_pairs(read(request.tally), request.pairs)
            console.voted_pairs(request.pairs, written)
            result = {**result, "pairs": {"out": str(request.pairs), **written}}
        _end(request.thresholds, tally, result, console, as_json)
    else:
        composer_for()
        from dpo_cli.commands.vote import vote as hold

        compared = hold(request, console)
        _end(request.thresholds, compared.tally, to_json(compared), console, as_json)


def _end(
    thresholds: Sequence[Threshold], judged: Evaluation | Tally | None, result: JsonObject, console: Console, as_json: bool
) -> None:
    """Print the result with its limits, and exit with 5 if one is missed."""
    from dpo_cli.evaluation.thresholds import judged_by

    limits = judged_by(thresholds, judged)
    console.thresholds([(threshold.sign, limit) for threshold, limit in zip(thresholds, limits, strict=True)])
    if as_json:
        console.json({**result, "thresholds": [to_json(limit) for limit in limits]})
    if not all(limit.ok for limit in limits):
        raise typer.Exit(int(Exit.MISSED))


@app.command()
def chat(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RUN_DIR|CONFIG", help="The output_dir of a finished run, or a config with --adapter."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the run's or the file's.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Chat with this PEFT adapter (made by any tool) on CONFIG's model.")
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Also show the base model's answer; a vote becomes a preference pair.")
    ] = False,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answer this message and end; - reads standard input.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message; default: none.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Maximum tokens of an answer; default: 512, or half of a small context."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=100, metavar="T", help="Draw tokens; default: the most likely ones, as dpo eval.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="The seed of drawn tokens; default: the run's.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append the pairs of votes to this .jsonl file; default: in the run.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Talk to an adapter, also next to its base; serve an exported model with another program (docs/guides/serving.md)."""
    with session(as_json, debug) as console:
        from dpo_cli.commands.requests import ChatRequest

        console.keep_results_apart()
        values = tuple(overrides or ())
        words = prompt_of(prompt, as_json)
        request = ChatRequest(
            target or "", adapter, values, side_by_side, words, system, max_new_tokens, temperature, seed, out
        )
        composer_for()
        from dpo_cli.commands.chat import chat as hold

        result = hold(request, console)
        if as_json:
            console.json(result)


@app.command(hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """Name the programs that serve what `dpo` trains."""
    with session("--json" in context.args, False):
        from dpo_cli.publish.serving import no_server

        raise no_server([word for word in context.args if not word.startswith("-")])


@app.command()
def report(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR ...", help="The output_dir of a run, or of several.")],
    out: Annotated[Path | None, typer.Option(help="The page about several runs; default: comparison.html.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the report.html of a run again, or one page that compares several runs."""
    with session(as_json, debug) as console:
        from dpo_cli.report.render import write_comparison, write_report

        paths = [Path(name) for name in run_dirs]
        if len(paths) == 1 and out is not None:
            raise UsageError("--out is for several runs", "remove --out: the report of one run is written into its directory")
        page = write_report(paths[0]) if len(paths) == 1 else write_comparison(paths, out or Path("comparison.html"))
        console.line(f"report: {page}")
        if as_json:
            console.json({"reports": [str(page)]})


@app.command()
def augment(
    prompts: Annotated[
        str,
        typer.Argument(metavar="PROMPTS", help="A .txt file with one prompt per line, or rows with a prompt (.jsonl, ...)."),
    ],
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A config; - reads standard input. Not with --from-logs.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's.")
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="The .jsonl file of pairs to write; an unfinished file is continued.")],
    from_logs: Annotated[
        bool, typer.Option("--from-logs", help="PROMPTS is a log of requests with feedback: write rated answers for kto.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make preference pairs from the model's own answers to prompts, ranked by "augment" in CONFIG."""
    with session(as_json, debug) as console:
        if out.suffix != ".jsonl":
            raise UsageError(f"{out} does not end in .jsonl", "name a .jsonl file: it gets one row per line")
        if from_logs:
            from dpo_cli.commands.log_ratings import ratings_of_log

            told = ratings_of_log(Path(prompts), out, [*([config] if config else []), *(overrides or ())], console)
            if as_json:
                console.json(told)
            return
        if config is None:
            raise UsageError("CONFIG is missing", "name the config of the model that answers, after the prompts")
        ResumableFile.check(out)
        plan, asked, warnings = inspect_prompts(load(config, overrides or ()), probe(), prompts)
        console.problems(warnings)
        composer_for([plan.config])  # sets up the libraries
        from dpo_cli.commands.augment import augment as make_pairs

        try:
            result = make_pairs(plan, asked, out, console)
        except KeyboardInterrupt:
            console.line(f"stopped: run the same command again to continue {out}")
            raise
        if as_json:
            console.json(result)


@app.command()
def lint(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A dataset (file, folder or hub id), or a config that names one.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values of a config, such as strategy=kto."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Write the sound rows to this .jsonl file.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a dataset; with --write, write it without bad and doubtful rows, and these with their reasons into another file."""
    with session(as_json, debug) as console:
        from dpo_cli.commands.dataset_lint import lint as lint_data

        result, code = lint_data(data, overrides or (), out, console)
        if as_json:
            console.json(result)
        raise typer.Exit(int(code))


@app.command("import")
def import_config(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A config (YAML, TOML, JSON), a script that trains, a program or a notebook."),
    ],
    out: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Write the config to this .json, .yaml or .toml file.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Turn a config of Axolotl, LLaMA-Factory, TRL, ms-swift, Unsloth or ModelForge into one of dpo; name what is not in it."""
    with session(as_json, debug) as console:
        from dpo_cli.commands.imported_config import import_config as translate

        result, code = translate(file, out, console)
        if as_json:
            console.json(result)
        raise typer.Exit(int(code))


@app.command()
def compare(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's, not a method's own.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train every method again.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train the methods of "compare" in CONFIG with several seeds, and compare them; the same call continues after a stop."""
    with session(as_json, debug) as console:
        require_alone("dpo compare")
        from dpo_cli.commands.compare import compare as compare_methods

        result, code = compare_methods(config, overrides or (), console, overwrite=overwrite)
        if as_json:
            console.json(to_json(result))
        raise typer.Exit(int(code))


@app.command()
def sweep(
    config: ConfigFile,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=V1,V2|KEY=LOW..HIGH[@N]|KEY=VALUE]...",
            help="Values to try: a list, or N values of a range; a single value replaces the file's.",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Draw this many settings with Optuna instead of a whole grid.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="How many settings train at once.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train every setting again.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train CONFIG with several settings, and choose the best on held-out rows; the same call continues after a stop."""
    with session(as_json, debug) as console:
        require_alone("dpo sweep")
        from dpo_cli.commands.sweep import sweep as sweep_settings

        result, code = sweep_settings(config, words or (), console, trials=trials, processes=processes, overwrite=overwrite)
        if as_json:
            console.json(to_json(result))
        raise typer.Exit(int(code))


@app.command("export")
def export_run(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The output_dir of a finished run.")],
    out: Annotated[Path, typer.Option(help="The folder to create for the model.")],
    gguf: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None, typer.Option(help="Also write a GGUF file of this type, and a Modelfile.")
    ] = None,
    converter: Annotated[
        Path | None, typer.Option(envvar="DPO_GGUF_CONVERTER", help="llama.cpp's convert_hf_to_gguf.py, if not on PATH.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Evaluate on this file instead of the run's held-out rows.")] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder to this hub repository.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Merge a run's adapter into its base, evaluate the result, and reject it if it is worse."""
    with session(as_json, debug) as console:
        composer_for()
        from dpo_cli.commands.export import Request as Export
        from dpo_cli.commands.export import export

        result, code = export(Export(run_dir, out.resolve(), dataset, gguf, converter, push), console)
        if as_json:
            console.json(result)
        raise typer.Exit(int(code))


@app.command()
def cache(
    prune: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Remove what was not used for this many days; 0: everything.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List what is kept for later runs (converted models, reference log-probs, tokens of large data), or remove what is old."""
    with session(as_json, debug) as console:
        from dpo_cli.commands.cache import cache as look

        result = look(prune, console)
        if as_json:
            console.json(result)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --version: as JSON, with the versions that matter for a bug report.")
    ] = False,
) -> None:
    """Preference tuning of language models from a terminal."""
    if version and as_json:
        typer.echo(json.dumps({**installed_versions(), "platform": platform.platform()}, indent=2))
    elif version:
        typer.echo(f"dpo {dpo_cli.__version__}")
    elif context.invoked_subcommand is None:
        context.fail("Missing command.")
