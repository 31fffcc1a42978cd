"""The cases of ../shared/cases, by their commands: each has the value in the last column of its README. `make cases`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT
from typer.testing import CliRunner, Result

from dpo_cli.app import app
from dpo_cli.config.config import load
from dpo_cli.data import dataset
from dpo_cli.data.encoded import Encoded
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.tokens import encode_all
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.models.tokenizer_files import tokenizer_of
from dpo_cli.strategies.strategies import STRATEGIES

CASES = ROOT.parent / "shared" / "cases"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the folder with its models made; commands run in it."""
    place = tmp_path_factory.mktemp("cases") / "cases"
    shutil.copytree(CASES, place)
    for path in (place, *place.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    subprocess.run([sys.executable, "make_models.py", "made"], cwd=place, check=True)
    before = Path.cwd()
    os.chdir(place)
    yield place
    os.chdir(before)


def by_hand(cases: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("by_hand", cases / "by_hand.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dpo(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def train(name: str, *words: str) -> Result:
    return dpo("train", f"models/{name}.json", "--overwrite", *words)


def first_line(name: str) -> tuple[float, float]:
    """Log-probs of chosen and rejected at the first step."""
    line = json.loads(Path(f"runs/{name}/metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return line["logp_chosen"], line["logp_rejected"]


def margin(result: Result) -> float:
    assert result.exit_code == 0, result.stderr
    return float(json.loads(result.stdout)["policy"]["margin"]["value"])


REFUSED = {  # by training, with words that the message has
    "01-prefixed": ["module."],
    "01-lost-tensor": ["model.layers.1.self_attn.q_proj.weight"],
    "02-renamed": ["model.language_model.layers.0.self_attn.q_proj"],
    "06-use-8bit": ["4-bit already"],
    "10-expert-dropout": ["lora_dropout"],
    "14-pad-outside": ["513", "512", "<extra_pad>"],
    "15-new-tokens": ["5 tokens were added"],
    "16-token-adapter": ["trainable_token_indices"],
    "17-nan": ["model.layers.0.mlp.down_proj.weight", "NaN"],
    "18-vision": ["qwen2_5_vl"],
    "19-bad-pattern": ["target_modules"],
}
IN_VALIDATE = REFUSED.keys() - {"17-nan"}  # which only the weights tell


@pytest.mark.parametrize("name", REFUSED)
def test_refused(cases: Path, name: str) -> None:
    result = train(name)
    assert result.exit_code == 3, result.stderr
    assert all(word in result.stderr for word in REFUSED[name]), result.stderr
    assert "Traceback" not in result.stderr and "please report" not in result.stderr
    if name in IN_VALIDATE:
        assert dpo("validate", f"models/{name}.json").exit_code == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("02-renamed", ["reference=base"]),
        ("10-expert-dropout", ["lora_dropout=0", "use_dora=true"]),
        ("19-bad-pattern", ["target_modules=.*(q_proj|norm)"]),
        ("19-bad-pattern", ["target_modules=.*(q_proj|lm_head)"]),
    ],
)
def test_refused_with_other_options(cases: Path, name: str, words: list[str]) -> None:
    assert train(name, *words).exit_code == 3


@pytest.mark.parametrize("name", ["03-own-run", "07-export", "ok-run", "ok-tied-export", "ok-gpt2"])
def test_a_run_is_judged_and_exported_as_by_hand(cases: Path, name: str) -> None:
    assert train(name).exit_code == 0
    model = json.loads(Path(f"models/{name}.json").read_text(encoding="utf-8"))["model_name"]
    right = by_hand(cases).margin(model, f"runs/{name}/adapter")["margin"]
    assert margin(dpo("eval", f"runs/{name}", "--json")) == pytest.approx(right, abs=1e-4)
    kept = json.loads(Path(f"runs/{name}/metrics.json").read_text(encoding="utf-8"))
    assert kept["eval"]["margin"]["value"] == pytest.approx(right, abs=1e-4)
    done = dpo("export", f"runs/{name}", "--out", f"exported/{name}")
    assert done.exit_code == 0, done.stderr
    one, other = by_hand(cases).pair(f"exported/{name}"), by_hand(cases).pair(model, f"runs/{name}/adapter")
    assert one == pytest.approx(other, abs=1e-2)


@pytest.mark.parametrize(
    ("config", "adapter", "words", "right"),
    [
        ("ok-run", "ad_plain", [], 0.0854),
        ("ok-run", "ad_dora", [], -0.1015),
        ("ok-run", "ad_ranks", [], -0.0492),
        ("ok-tied-export", "ad_whole_tied", [], 0.0637),
        ("ok-run", "ad_renamed", [], "model.language_model.layers.0.self_attn.q_proj"),
        ("ok-run", "ad_half", [], "model.layers.1.self_attn.q_proj"),
        ("ok-run", "ad_compiled", [], "_orig_mod."),
        ("ok-run", "ad_tokens", [], "trainable_token_indices"),
        ("04-head-adapter", "ad_head_small", [], "lm_head"),
        ("04-head-adapter", "ad_head", ["bf16=false"], "lm_head"),
        ("04-head-adapter", "ad_new_tokens", ["bf16=false"], "5 tokens were added"),
        ("16-bias-adapter", "ad_bias", [], "bias"),
    ],
)
def test_an_adapter_is_judged_or_refused(cases: Path, config: str, adapter: str, words: list[str], right: float | str) -> None:
    result = dpo("eval", f"models/{config}.json", "--adapter", f"made/{adapter}", "--json", *words)
    if isinstance(right, str):
        assert result.exit_code == 3 and right in result.stderr
    else:
        assert margin(result) == pytest.approx(right, abs=2e-4)


@pytest.mark.parametrize(("name", "right"), [("06-merge-4bit", (-453.81, -63.74)), ("ok-goes-on", (-459.01, -63.77))])
def test_the_first_step_starts_there(cases: Path, name: str, right: tuple[float, float]) -> None:
    assert train(name).exit_code == 0
    assert first_line(name) == pytest.approx(right, abs=0.01)


@pytest.mark.parametrize("name", ["07-generation-config", "08-conv1d-targets", "09-expert-targets", "11-mamba"])
def test_trains(cases: Path, name: str) -> None:
    result = train(name)
    assert result.exit_code == 0, result.stderr
    if name == "07-generation-config":
        assert "temperature" in result.stderr and (cases / f"runs/{name}/model/model.safetensors").is_file()
    if name == "09-expert-targets":
        assert {"experts", "self_attn"} <= {part for tensor in tensors_of(name) for part in tensor.split(".")}


def tensors_of(name: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(f"runs/{name}/adapter/adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_routers_are_left_out(cases: Path) -> None:
    assert train("03-own-run").exit_code == 0
    assert not [name for name in tensors_of("03-own-run") if ".gate.lora" in name]


def test_uneven_micro_batches_make_the_same_step(cases: Path) -> None:
    assert train("12-uneven-a").exit_code == train("12-uneven-b").exit_code == 0
    assert by_hand(cases).steps("runs/12-uneven-a", "runs/12-uneven-b") < 1e-3


def test_a_warm_up_of_every_step_is_told(cases: Path) -> None:
    result = train("13-warmup")
    summary: dict[str, Any] = json.loads(Path("runs/13-warmup/metrics.json").read_text(encoding="utf-8"))
    moved = summary["train"]["learning_rate"] > 0
    assert moved or ("warmup" in result.stderr and [event for event in summary["health"] if event["rule"] == "no-movement"])


def test_a_cache_that_cannot_be_made_is_named(cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cases / "models" / "21-cache.json"))
    result = train("21-cache")
    assert result.exit_code in (1, 3) and "XDG_CACHE_HOME" in result.stderr and "--resume" not in result.stderr


def test_a_token_outside_is_named_with_its_row(cases: Path) -> None:
    result = dpo("train", "data/08-outside.json", "--overwrite")
    assert result.exit_code == 3 and ":4: <|image|>" in result.stderr


START = "<|im_start|>assistant\n"
# Of data/: the row, whether there is a chat template, what the prompt ends with and what the chosen response is.
RENDERED = {
    ("02-null", 1): ("assistant<|end_header_id|>\n\n", "The Rhine.<|eot_id|>"),
    ("03-arguments", 1): ("assistant\n", '{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'),
    ("03-arguments-glm", 1): ("<|assistant|>", "<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>"),
    ("06-system-column", 1): ("pirate.<|im_end|>\n<|im_start|>user\nName a river.<|im_end|>\n" + START, ""),
    ("06-input-column", 1): ("user\nTranslate to German.\nGood morning.<|im_end|>\n<|im_start|>assistant\n", ""),
    ("07-list-as-text", 1): ("user\nName a river.<|im_end|>\n<|im_start|>assistant\n", "The Rhine.<|im_end|>\n"),
    ("07-cell", 1): ("user\nName a river.<|im_end|>\n<|im_start|>assistant\n", "The Rhine.<|im_end|>\n"),
    ("09-rendered", 1): ("assistant<|end_header_id|>\n\n", "The Rhine.<|eot_id|>"),
    ("10-human-assistant", 1): ("user\nName a river.<|im_end|>\n<|im_start|>assistant\n", "One is the Rhine.<|im_end|>\n"),
    ("10-human-assistant", 2): ("user\nName a lake.<|im_end|>\n<|im_start|>assistant\n", "Como.<|im_end|>\n"),
    ("15-parts", 1): ("user\nName a river.<|im_end|>\n<|im_start|>assistant\n", "The Rhine.<|im_end|>\n"),
    ("15-one-response", 1): ("user\nName a river.<|im_end|>\n<|im_start|>assistant\n", "The Rhine.<|im_end|>\n"),
    ("16-packed", 1): ("assistant\n", ""),
    ("16-bom", 1): ("assistant\n", ""),
    ("17-no-system", 1): ("user\nName a lake.<end_of_turn>\n<start_of_turn>model\n", "Como.<end_of_turn>\n"),
    ("ok-arguments-text", 1): ("<｜Assistant｜>", '```json\n{"city": "Oslo"}\n```'),
    ("ok-reasoning", 1): ("assistant\n", "<think>\nSeven eights are 56.\n</think>\n\n56<|im_end|>\n"),
    ("ok-schema-null", 1): ('{"type": ["string", "null"], "enum": ["C", null], "default": null}', ""),
    ("ok-instruction-input", 1): ("assistant\n", ""),
    ("ok-list-cell", 1): ("user\nName a river.<|im_end|>\n<|im_start|>assistant\n", "The Rhine.<|im_end|>\n"),
}  # fmt: skip
# What `validate` says of data/: codes with the rows or the key that they name, or words of the fix.
SAID = {
    "04-think": ["row-identical:2", "template-leaves-out:1,2"],
    "06-images": ["media-unread:1,2"],
    "06-unwanted": ["label-unwanted:2"],
    "08-outside": ["tokens-outside:4"],
    "12-one-line": ["row-empty:2"],
    "13-pref-beta": ['here it is called "beta"'],
    "13-target-all": ['"all-linear"'],
    "13-precompute": ["the reference is the adapter switched off"],
    "14-folder": ["folder-files"],
    "15-picture": ["row-part:1"],
    "16-pointer": ["git lfs pull"],
    "17-no-system": ["template-refuses:1"],
    "ok-utf16": ["dataset-utf16"],
}


def encoded(name: str, *words: str) -> tuple[list[Encoded], Tokenizer]:
    config = load(f"data/{name}.json", words).require()
    assert isinstance(config.dataset, str)
    data = dataset.read(config.dataset, True, columns=config.columns, kind=STRATEGIES[config.strategy].rows)
    tokenizer = tokenizer_of(ModelFiles(Path(config.model_name)))
    assert tokenizer is not None
    return encode_all([data.load()], tokenizer, config.use_chat_template, skip=True).sides[0], tokenizer


@pytest.mark.parametrize(("name", "number"), RENDERED)
def test_rows_are_rendered_as_they_are_meant(cases: Path, name: str, number: int) -> None:
    rows, tokenizer = encoded(name)
    prompt, chosen = RENDERED[name, number]
    row = rows[number - 1]
    text = tokenizer.decode(row.prompt_ids)
    assert prompt in text and (prompt.startswith("{") or text.endswith(prompt)), text
    assert chosen in tokenizer.decode(row.chosen_ids)
    assert text.count("<|begin_of_text|>") == ("llama" in str(load(f"data/{name}.json").values["model_name"]))


def test_parquet_and_json_lines_give_the_same_tokens(cases: Path) -> None:
    (rows, tokenizer), (others, _) = encoded("01-jsonl"), encoded("01-parquet")
    assert [(row.prompt_ids, row.responses) for row in rows] == [(row.prompt_ids, row.responses) for row in others]
    assert '"arguments": {"city": "Oslo"}' in tokenizer.decode(others[0].chosen_ids)


def test_without_a_template_the_prompt_ends_at_the_last_assistant(cases: Path) -> None:
    rows, tokenizer = encoded("10-human-assistant", "use_chat_template=false")
    assert all(tokenizer.decode(row.prompt_ids).endswith("\n\nAssistant:") for row in rows)


@pytest.mark.parametrize("name", SAID)
def test_validate_says_it(cases: Path, name: str) -> None:
    said = json.loads(dpo("validate", f"data/{name}.json", "--json").stdout)["problems"]
    places = [f"{one['code']}:{','.join(map(str, one['lines'] or [one['line']]))}" for one in said]
    text = "\n".join([*places, *(str(one["fix"]) for one in said)])
    assert all(words in text for words in SAID[name]), text


def test_no_key_of_another_tool_is_guessed(cases: Path) -> None:
    said = json.loads(dpo("validate", "data/13-no-guess.json", "--json").stdout)["problems"]
    assert len([one for one in said if one["code"] == "unknown-key"]) == 4
    assert not [one for one in said if "did you mean" in str(one["fix"])]
    yaml = json.loads(dpo("validate", "data/13-other-tool.yaml", "--json").stdout)["problems"]
    assert any("YAML" in one["message"] + str(one["fix"]) for one in yaml)


def test_a_run_goes_on_after_midnight(cases: Path) -> None:
    def on(day: str, *words: str) -> str:
        command = [sys.executable, "day.py", day, "train", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "Today Date: 01 Mar 2026" in on("2026-03-01", "data/05-date.json", "--overwrite")
    said = on("2026-03-02", "data/05-date.json", "--resume", "max_steps=6")
    assert "Today Date: 01 Mar 2026" in said and "the chat template writes the date" in said
    assert json.loads(Path("runs/05-date/metrics.json").read_text(encoding="utf-8"))["steps"] == 6
    assert "01 Mar 2026" in on("2026-03-04", "runs/05-date/plan.json", "output_dir=runs/again", "--dry-run")
