"""No way in, and nothing out: code that comes with files never runs, nothing is written elsewhere, secrets stay secret."""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CHATML
from gguf_files import write_gguf
from jinja2 import Template, TemplateError
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner, Result

from dpo_cli.app import app
from dpo_cli.data import chat_template
from dpo_cli.data.chat_template import ChatTemplate
from dpo_cli.errors import InvalidInput
from dpo_cli.storage.digests import sha256_of_all
from dpo_cli.storage.redaction import MASK, redact, redact_forms, redacted
from dpo_cli.storage.resumable_file import ResumableFile

Pairs = Callable[..., Path]
OPTIONS: dict[str, Any] = {
    **{"device": "cpu", "bf16": False, "fp16": False, "max_steps": 1, "lora_r": 4, "learning_rate": 1e-2},
    **{"kl_prompts": 2, "max_new_tokens": 4, "eval_split": 0.3},
}
AUGMENT = {"rank": "shorter", "max_new_tokens": 4, "responses": 2}


def dpo(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)))


def put(file: Path, value: Any) -> Path:
    """A JSON file, or a text, with the folders that it lies in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return file


def changed(file: Path, **values: Any) -> None:
    """Keys of a JSON file set to these values."""
    put(file, {**json.loads(file.read_text(encoding="utf-8")), **values})


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile code would write; it must not be there at the end."""
    place = tmp_path / "code-was-run"
    yield place
    assert not place.exists()


@pytest.fixture
def model(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def config(tmp_path: Path, model: Path, pairs_file: Pairs) -> Path:
    values = {**OPTIONS, "model_name": str(model), "dataset": str(pairs_file()), "output_dir": str(tmp_path / "run")}
    return put(tmp_path / "config.json", values)


class Pickled:
    """Unpickled, it writes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def codes(result: Result) -> list[str]:
    """The codes of the errors that `--json` told."""
    return [problem["code"] for problem in json.loads(result.stdout)["problems"] if problem["severity"] == "error"]


# Code in the files of a model


def own_config(model: Path) -> None:
    auto_map = {"AutoConfig": "hostile.HostileConfig", "AutoModelForCausalLM": "hostile.HostileModel"}
    changed(model / "config.json", auto_map=auto_map, model_type="hostile")


def own_tokenizer(model: Path) -> None:
    changed(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["hostile.HostileTokenizer", None]},
        tokenizer_class="HostileTokenizer",
    )


def old_tokenizer(model: Path) -> None:
    changed(
        model / "tokenizer_config.json",
        auto_map=["owner/other--hostile.HostileTokenizer", None],
        tokenizer_class="HostileTokenizer",
    )


def own_kernels(model: Path) -> None:
    changed(model / "config.json", attn_implementation="owner/kernels")


SPOILT = [own_config, own_tokenizer, old_tokenizer, own_kernels]


def hostile(marker: Path) -> str:
    """A module that writes the marker, whatever is then asked of it."""
    return (
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as HostileConfig, LlamaForCausalLM as HostileModel\n"
        "from transformers import PreTrainedTokenizerFast as HostileTokenizer\n"
    )


def test_the_hostile_module_would_run(model: Path, tmp_path: Path) -> None:
    """What these tests rest on: where it is trusted, transformers runs it."""
    put(model / "hostile.py", hostile(tmp_path / "was-run"))
    own_config(model)
    trusting = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(model)!r}, trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", trusting], env={**os.environ, "HF_HOME": str(tmp_path)}, check=True)
    assert (tmp_path / "was-run").exists()


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_model_that_needs_its_own_code_is_refused(
    spoil: Callable[[Path], None], model: Path, config: Path, marker: Path, tmp_path: Path
) -> None:
    put(model / "hostile.py", hostile(marker))
    spoil(model)
    for command in ("validate", "train"):
        result = dpo(command, config, "--json")
        assert (result.exit_code, codes(result)) == (3, ["model-code"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_reward_model_that_needs_its_own_code_is_refused(
    spoil: Callable[[Path], None], model: Path, config: Path, marker: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    put(model / "hostile.py", hostile(marker))
    spoil(model)
    changed(config, model_name=str(tiny_model_dir), augment={**AUGMENT, "rank": "reward", "reward_model": str(model)})
    result = dpo("augment", put(tmp_path / "p.txt", "hello\n"), config, "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 1 and ("needs its own code" in result.stderr or "kernels from a repository" in result.stderr)


def test_code_that_is_not_needed_is_told_of_and_not_run(model: Path, config: Path, marker: Path, tmp_path: Path) -> None:
    """As many models of the hub have it: transformers has their classes by now. What is written names that code no more."""
    put(model / "hostile.py", hostile(marker))
    put(model / "custom_generate" / "generate.py", hostile(marker))
    auto_map = {"AutoConfig": "hostile.HostileConfig", "AutoModelForCausalLM": "hostile.HostileModel"}
    changed(model / "config.json", auto_map=auto_map)
    changed(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["hostile.HostileTokenizer", None]})
    found = json.loads(dpo("validate", config, "--json").stdout)["problems"]
    assert [problem["severity"] for problem in found if problem["code"] == "model-code-unused"] == ["hint"]
    assert dpo("train", config).exit_code == 0
    assert dpo("eval", tmp_path / "run").exit_code == 0
    assert dpo("train", config, "lora_r=0", f"output_dir={tmp_path / 'whole'}").exit_code == 0
    written = [file for place in ("run", "whole") for file in (tmp_path / place).rglob("*.json")]
    assert len(written) > 10
    assert [file for file in written if "hostile" in file.read_text(encoding="utf-8") and file.name != "plan.json"] == []


def test_weights_that_are_no_safetensors_are_never_unpickled(model: Path, config: Path, marker: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(marker)))
    assert codes(dpo("validate", config, "--json")) == ["model-no-weights"]
    assert codes(dpo("train", config, "--json")) == ["model-no-weights"]
    # Safetensors next to them, and an index that names the others.
    save_file({"x": torch.zeros(1)}, str(model / "other.safetensors"))
    put(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}})
    assert codes(dpo("train", config, "--json")) == ["model-no-weights"]
    put(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": {"lm_head.weight": "../x.safetensors"}})
    assert codes(dpo("train", config, "--json")) == ["model-no-weights"]


# Adapters and runs


@pytest.fixture
def adapter(config: Path, tmp_path: Path) -> Path:
    """The adapter of a finished run, which lies in a folder of its own too."""
    result = dpo("train", config)
    assert result.exit_code == 0, result.output
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_is_no_safetensors_is_never_unpickled(
    config: Path, adapter: Path, marker: Path, tmp_path: Path
) -> None:
    for place in (adapter, tmp_path / "run" / "adapter"):
        (place / "adapter_model.safetensors").unlink()
        (place / "adapter_model.bin").write_bytes(pickle.dumps(Pickled(marker)))
    assert codes(dpo("eval", config, "--adapter", adapter, "--json")) == ["not-an-adapter"]
    assert codes(dpo("train", config, f"model_name={adapter}", "output_dir=next", "--json")) == ["adapter-unusable"]
    for command in (["eval", tmp_path / "run"], ["export", tmp_path / "run", "--out", tmp_path / "out"]):
        assert codes(dpo(*command, "--json")) == ["not-a-run"]
    # With other safetensors next to it that have the digest of the run.
    save_file({"x": torch.zeros(1)}, str(tmp_path / "run" / "adapter" / "other.safetensors"))
    changed(tmp_path / "run" / "metrics.json", adapter_sha256=sha256_of_all(tmp_path / "run" / "adapter"))
    assert dpo("eval", tmp_path / "run").exit_code == 1


@pytest.mark.parametrize(
    "named",
    [
        {"megatron_config": {}, "megatron_core": "hostile"},
        {"megatron_config": {"a": 1}, "megatron_core": "hostile"},
        {"auto_mapping": {"base_model_class": "HostileModel", "parent_library": "hostile"}},
    ],
)
def test_an_adapter_imports_nothing(
    named: dict[str, Any], config: Path, adapter: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(put(tmp_path / "way" / "hostile.py", hostile(marker)).parent))
    for place in (adapter, tmp_path / "run" / "adapter"):
        changed(place / "adapter_config.json", **named)
    if named.get("megatron_config") == {}:  # of no effect in PEFT
        assert dpo("eval", tmp_path / "run").exit_code == 0
        return
    assert codes(dpo("train", config, f"model_name={adapter}", "output_dir=next", "--json")) == ["adapter-unusable"]
    assert codes(dpo("eval", config, "--adapter", adapter, "--json")) == ["not-an-adapter"]
    for command in (["eval", tmp_path / "run"], ["export", tmp_path / "run", "--out", tmp_path / "out"]):
        result = dpo(*command)
        assert result.exit_code == 1 and "code of an adapter is never run" in result.stderr


def test_the_tokenizer_of_an_adapter_runs_no_code(config: Path, adapter: Path, marker: Path, tmp_path: Path) -> None:
    put(adapter / "hostile.py", hostile(marker))
    own_tokenizer(adapter)
    assert codes(dpo("train", config, f"model_name={adapter}", "output_dir=next", "--json")) == ["model-code"]
    put(tmp_path / "run" / "adapter" / "hostile.py", hostile(marker))
    own_tokenizer(tmp_path / "run" / "adapter")
    assert dpo("eval", config, f"model_name={tmp_path / 'run'}", "--adapter", tmp_path / "run").exit_code in (1, 3)


def test_a_gguf_file_is_read_alone(
    model: Path, config: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers looks for a tokenizer_config.json next to the file, and asks on the terminal whether to run its code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put(model / "hostile.py", hostile(marker))
    own_config(model)
    own_tokenizer(model)
    write_gguf(model / "tiny.gguf", {"general.architecture": "llama"})
    result = dpo("train", config, f"model_name={model / 'tiny.gguf'}")
    assert result.exit_code in (1, 3) and "custom code" not in result.output


def test_a_plan_is_a_config_like_any_other(config: Path, adapter: Path, tmp_path: Path) -> None:
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    plan["config"]["trust_remote_code"] = True
    result = dpo("train", put(tmp_path / "plan.json", plan), f"output_dir={tmp_path / 'again'}", "--json")
    (problem,) = [problem for problem in json.loads(result.stdout)["problems"] if problem["severity"] == "error"]
    assert (result.exit_code, problem["code"]) == (3, "unknown-key") and "runs no code of a model" in problem["fix"]


# Chat templates

SAID = [{"role": "user", "content": "hello"}]
HOSTILE_TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'x' * 20000000000 }}",
    "{{ '%020000000000d' % 1 }}",
    "{{ ('ab' * 1000000)|replace('a', 'b' * 100000) }}",
    "{{ 'x'|center(20000000000) }}",
    "{% set held = namespace(text='x') %}{% for i in range(99999) %}{% set held.text = held.text * 2 %}{% endfor %}",
    "{% macro again() %}{{ again() }}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ [[1] * 99999] * 99999 }}",
    "{% for i in range(99) %}" * 99 + "{% endfor %}" * 99,
    "{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}",
    "{{ " + "-" * 99999 + "1 }}",
    "{{ 1 }}" * 7_000_000,  # 49 MB
    "x" * 50_000_000,
    "{{ 1 // 0 }}",
    "{{ messages.nothing.more }}",
    "{{ messages[0]['content'].__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
]


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES, ids=lambda template: template[:40])
def test_a_hostile_template_ends_as_a_problem(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    with pytest.raises((InvalidInput, TemplateError)):
        ChatTemplate(template, {}).render(SAID)
    assert ChatTemplate(CHATML, {}).render(SAID) == "<|im_start|>user\nhello<|im_end|>\n"  # and the next is rendered


def test_no_template_is_rendered_outside_the_bound(
    config: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rendering in a sandbox, by us or by a library, in all commands that load a tokenizer."""
    renderings: list[bool] = []

    def seen(template: Template, *arguments: Any, **options: Any) -> str:
        if template.environment.sandboxed:
            renderings.append(signal.getitimer(signal.ITIMER_REAL)[0] > 0)
        return real(template, *arguments, **options)

    real = Template.render
    monkeypatch.setattr(Template, "render", seen)
    reward = tmp_path / "reward"
    shutil.copytree(model, reward)
    scored = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    scored.save_pretrained(reward)
    changed(config, augment={**AUGMENT, "rank": "reward", "reward_model": str(reward)})
    out = tmp_path / "made.jsonl"
    for command in (
        ["train", config],
        ["train", config, "strategy=sft", f"output_dir={tmp_path / 'sft'}"],
        ["eval", tmp_path / "run", "--again"],
        ["export", tmp_path / "run", "--out", tmp_path / "out"],
        ["augment", put(tmp_path / "p.txt", "hello\n"), config, "--out", out],
    ):
        before = len(renderings)
        result = dpo(*command)
        assert result.exit_code == 0, result.output
        assert len(renderings) > before
    assert all(renderings)


# Nothing written elsewhere


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with a file, to which links lead, and which must stay as it is."""
    return put(tmp_path / "outside" / "file.txt", "keep").parent


PLACES = (
    *("adapter", "model", "checkpoints", "tensorboard", "run.lock", "train.log", "metrics.jsonl", "plan.json", "report.html"),
    *(".plan.json.part", ".adapter.part", ".report.html.part", "adapter/README.md", "checkpoints/.part"),
)


@pytest.mark.parametrize("name", PLACES)
def test_no_link_leads_out_of_a_run(name: str, config: Path, outside: Path, tmp_path: Path) -> None:
    """With --overwrite, and with a link to a folder as well as to a file."""
    place = tmp_path / "run" / name
    place.parent.mkdir(parents=True)
    for target in (outside, outside / "file.txt"):
        place.symlink_to(target)
        result = dpo("train", config, "--overwrite", "--json")
        assert (result.exit_code, codes(result)) == (3, ["run-link"])
        place.unlink()
    assert [file.name for file in outside.iterdir()] == ["file.txt"]
    assert (outside / "file.txt").read_text(encoding="utf-8") == "keep"


def test_what_judges_a_run_writes_through_no_link(config: Path, adapter: Path, outside: Path, tmp_path: Path) -> None:
    run, kept = tmp_path / "run", outside / "file.txt"
    for name in ("train.log", ".report.html.part", ".side-by-side.html.part"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(kept)
        for command in (["eval", run], ["export", run, "--out", tmp_path / "out"]):
            assert codes(dpo(*command, "--json")) == ["run-link"]
        assert dpo("report", run).exit_code == 0
        (run / name).unlink(missing_ok=True)
        assert kept.read_text(encoding="utf-8") == "keep"


def test_names_from_data_are_no_paths(config: Path, outside: Path, tmp_path: Path) -> None:
    """A category, the texts of a pair, and the name of a file in a dataset's folder, which is quoted in a card."""
    texts = {"chosen": "/etc/passwd and more", "rejected": "../../outside/file.txt", "category": "../../outside"}
    rows = [{"prompt": f"../../{i}", **texts} for i in range(12)]
    name = "`]<img src=x>(..)\n---\nbase_model: x.jsonl"
    data = put(tmp_path / "folder" / name, "".join(json.dumps(row) + "\n" for row in rows))
    before = {path for path in tmp_path.rglob("*")}
    assert dpo("train", config, f"dataset={data.parent}").exit_code == 0
    made = {path for path in tmp_path.rglob("*")} - before
    assert made and all(path.is_relative_to(tmp_path / "run") for path in made)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert ".jsonl`" in card and card.count("\n---\n") == 1 and "<img" not in card and "\nbase_model" not in card
    # As little is the name of a run, and the dataset's, anything but text on a page.
    (tmp_path / "run").rename(named := tmp_path / "<img src=x onerror=alert(1)>")
    shutil.copytree(named, tmp_path / "'\"><script>alert(2)<")
    page = tmp_path / "page.html"
    assert dpo("report", named, tmp_path / "'\"><script>alert(2)<", "--out", page).exit_code == 0
    assert dpo("report", named).exit_code == 0
    for text in (page.read_text(encoding="utf-8"), (named / "report.html").read_text(encoding="utf-8")):
        assert "<img" not in text and text.count("<script") == 1 and "&lt;img src=x" in text


# Secrets

TOKEN = "hf_CanaryCanaryCanaryCanary0123"
SECRETS = {
    "HF_TOKEN": TOKEN,
    "HUGGING_FACE_HUB_TOKEN": 'canary "quoted" & <marked>',
    "OPENAI_API_KEY": "canary-of-openai-0123",
    "WANDB_API_KEY": "canary0of0wandb0123",
}
IN_TEXT = ("sk-proj-canaryCanary0123canary", "canary:secret", "canaryInAQuery")
URL = f"http://{IN_TEXT[1]}@localhost:1/v1?api_key={IN_TEXT[2]}"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"a {TOKEN}, b", f"a {MASK}, b"),
        (URL, f"http://{MASK}@localhost:1/v1?api_key={MASK}"),
        (f'{{"key": "{IN_TEXT[0]}"}}', f'{{"key": "{MASK}"}}'),
        ("Authorization: Bearer abcdef.0123456789", f"Authorization: Bearer {MASK}"),
        ("hf_model and sk-learn-like-estimators: sorted(a, key=len), me@here.org", None),
        ("https://huggingface.co/owner/model?revision=main", None),
    ],
)
def test_secrets_are_known_by_their_form(text: str, left: str | None) -> None:
    assert redact(text) == redact_forms(text) == (text if left is None else left)
    assert redacted({"a": [text]}) == {"a": [redact(text)]}


def test_secrets_are_known_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, "TOKENIZERS_PARALLELISM": "true-and-longer", "SSL_KEY": "/etc/ssl/keys/my.key"}.items():
        monkeypatch.setenv(name, value)
    told = {"values": list(SECRETS.values()), "others": ["true-and-longer", "/etc/ssl/keys/my.key"]}
    assert redacted(told) == {"values": [MASK] * 4, "others": ["true-and-longer", "/etc/ssl/keys/my.key"]}
    assert html.escape(SECRETS["HUGGING_FACE_HUB_TOKEN"]) not in redact(html.escape(json.dumps(told)))


def test_no_secret_is_in_any_file_or_output(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment, in pairs and prompts, in a config, and in what a library raises or logs or prints."""
    canaries = (*SECRETS.values(), *IN_TEXT)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    leaks = " ".join([*SECRETS.values(), IN_TEXT[0], URL])
    rows = [{"prompt": f"q {i}", "chosen": f"{leaks} yes {i}", "rejected": f"no {i} {TOKEN}"} for i in range(12)]
    # Texts of this folder are the input: all that is made of them lies in the other.
    data = put(tmp_path / "input" / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    prompts = put(tmp_path / "input" / "prompts.jsonl", json.dumps({"prompt": f"{leaks}?"}) + "\n")
    made = tmp_path / "made"
    made.mkdir()
    changed(config, dataset=str(data), output_dir=str(made / "run"), augment=AUGMENT, max_seq_length=1024)
    config = config.rename(tmp_path / "input" / "config.json")
    said: list[str] = []

    def command(*words: object, code: int = 0) -> None:
        result = dpo(*words)
        assert (words, result.exit_code) == (words, code), result.output
        said.append(result.stdout + result.stderr)

    command("train", config, "--debug")
    command("eval", made / "run", "--json")
    command("eval", made / "run", "--side-by-side", 3)
    command("report", made / "run")
    command("export", made / "run", "--out", made / "whole")
    command("augment", prompts, config, "--out", made / "pairs.jsonl")
    judge = {**AUGMENT, "rank": "judge", "judge_url": URL, "judge_model": "m"}
    command("validate", config, f"augment={json.dumps(judge)}", "--json", code=3)
    command("augment", prompts, config, f"augment={json.dumps(judge)}", "--out", made / "judged.jsonl", code=3)

    def leaking(*_: Any, **__: Any) -> None:
        print(leaks)
        logging.getLogger("some.library").warning(leaks)
        raise RuntimeError(leaks)

    monkeypatch.setattr("trl.DPOTrainer.train", leaking)
    for more in ([], ["--debug"], ["--json"]):
        command("train", config, f"output_dir={made / 'failed'}", "--overwrite", *more, code=1)
    assert "RuntimeError" in said[-2] and MASK in said[-2]

    files = [file for file in made.rglob("*") if file.is_file()]
    assert len(files) > 25 and MASK in (made / "failed" / "train.log").read_text(encoding="utf-8")
    texts = {str(file): file.read_bytes().decode("utf-8", errors="replace") for file in files} | dict(enumerate(said))
    page = (made / "run" / "side-by-side.html").read_text(encoding="utf-8")
    sealed = json.loads(page.split('id="data">')[1].split("</script>")[0])["sealed"]
    texts["sealed"] = base64.b64decode(sealed).decode()
    escaped = [form for canary in canaries for form in (canary, json.dumps(canary)[1:-1], html.escape(canary))]
    assert [(name, canary) for name, text in texts.items() for canary in escaped if canary in text] == []


@pytest.mark.long
def test_no_kernels_are_fetched(marker: Path, tmp_path: Path) -> None:
    """bitsandbytes runs what the package `kernels` fetches, while it is imported: the package is as if it were not there."""
    put(tmp_path / "way" / "kernels" / "__init__.py", hostile(marker))
    guarded = "from dpo_cli.storage.hub import ask_nobody; ask_nobody(); import bitsandbytes"
    for first, is_run in (("import kernels", True), (guarded, False)):
        code = f"import sys; sys.path.insert(0, {str(tmp_path / 'way')!r}); {first}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0 or is_run, done.stderr
        assert marker.exists() == is_run
        marker.unlink(missing_ok=True)


def test_a_number_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a figure with the same digits would be none any more, and its line no JSON."""
    monkeypatch.setenv("SOME_API_KEY", "314159265358")
    assert redact('{"loss": 0.314159265358}') == '{"loss": 0.314159265358}'
    assert redact("/data/sk-learn-preferences-v2.jsonl") == "/data/sk-learn-preferences-v2.jsonl"


OUR_WORDS = (
    *("learning_rate", "per_device_train_batch_size", "adamw_torch_fused", "normalized_logp_accuracy", "adapter_sha256"),
    "reward_rejected",
)


def test_redaction_leaves_the_keys_of_a_document(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables with the name of a secret that hold a word of the schema, or the run's place: the run is resumed and judged."""
    for number, word in enumerate(OUR_WORDS):
        monkeypatch.setenv(f"SORT_{number}_KEY", word)
        assert redacted({word: [f"my {word}", 1.5, None, {word: True}]}).keys() == {word}
    monkeypatch.setenv("PARTITION_KEY", tmp_path.name)
    run = tmp_path / "run"
    changed(config, output_dir=str(run), max_steps=1, optim="adamw_torch_fused")
    for more in ((), ("max_steps=2",)):
        done = dpo("train", config, "--resume", "--json", *more)
        assert done.exit_code == 0, done.output
        assert {"adapter_sha256", "health"} <= json.loads(done.stdout).keys()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    assert [line["learning_rate"] > 0 and line["reward_rejected"] is not None for line in trained] == [True, True]
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))["config"]
    assert (plan["optim"], plan["output_dir"], Path(plan["model_name"]).is_dir()) == ("adamw_torch_fused", str(run), True)
    assert dpo("eval", run).exit_code == 0


def test_redaction_leaves_what_a_config_names(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column, a model by a relative path: the run is judged, and goes on."""
    rows = [{"instruction_text": f"q {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]
    data = put(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").rename(tmp_path / "SmolLM2-135M-Instruct")
    monkeypatch.setenv("SORT_KEY", "instruction_text")
    monkeypatch.setenv("MODEL_KEY", "SmolLM2-135M-Instruct")
    columns = {"prompt": "instruction_text"}
    changed(config, dataset=str(data), columns=columns, model_name="SmolLM2-135M-Instruct")
    for more in ((), ("max_steps=2",)):
        done = dpo("train", config, "--resume", *more)
        assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))["config"]
    assert plan["columns"] == columns and plan["model_name"].endswith("SmolLM2-135M-Instruct")
    assert dpo("eval", tmp_path / "run").exit_code == 0


def test_a_secret_in_a_row_of_pairs_is_redacted_and_its_keys_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "rejected_finished")
    monkeypatch.setenv("OPENAI_API_KEY", SECRETS["OPENAI_API_KEY"])
    file = ResumableFile(tmp_path / "pairs.jsonl", {"seed": 1})
    file.append([{"rejected_finished": [SECRETS["OPENAI_API_KEY"], TOKEN]}], {})
    file.finish()
    assert json.loads((tmp_path / "pairs.jsonl").read_text(encoding="utf-8")) == {"rejected_finished": [MASK, MASK]}
