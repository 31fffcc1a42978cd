"""The Modelfile's template renders as the model's chat template does: in Python here, in Go with `make check-modelfile`."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_cli.data.chat_template import ChatTemplate
from dpo_cli.publish.modelfile import CHECKED, conversation, modelfile, rendered, turns_of

DAY = date(2026, 3, 4)

# Chat templates: of SmolLM2 and Phi 3 as these models come with them, of the others what theirs render, in short.
TEMPLATES = {
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "llama3.1": (
        "{{- bos_token }}{% if messages[0]['role'] == 'system' %}{% set rules = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% else %}{% set rules = '' %}{% endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n' + rules + '<|eot_id|>' }}"
        "{% for m in messages %}"
        "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rules = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set rules = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}"
        "{% for m in turns %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + (rules if loop.first else '') + m['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
    ),
    "gemma2": (  # which knows no system message
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
        "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
}
PLACE = ROOT / "models" / "tokenizers"
FETCHED = ("llama3_1", "qwen3", "gemma3", "mistral")
# Where the system message stands, and the end of a turn.
EXPECTED = {
    "smollm2": ("turn", "<|im_end|>"),
    "phi3": ("turn", "<|end|>"),
    "llama3.1": ("turn", "<|eot_id|>"),
    "llama2": ("first", "</s>"),
    "gemma2": ("turn", "<end_of_turn>"),
    "llama3_1": ("turn", "<|eot_id|>"),
    "qwen3": ("turn", "<|im_end|>"),
    "gemma3": ("first", "<end_of_turn>"),
    "mistral": ("last", "</s>"),
}


def template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    template = ChatTemplate.of(tokenizer, DAY)
    assert template is not None
    return template


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


def named(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerBase:
    if name in TEMPLATES:
        return with_template(tokenizer, TEMPLATES[name])
    if not (PLACE / name / "tokenizer.json").is_file():
        pytest.skip("`make tokenizers` fetches the tokenizers of Llama 3.1, Qwen 3, Gemma 3 and Mistral")
    return AutoTokenizer.from_pretrained(PLACE / name)


@pytest.mark.parametrize("name", EXPECTED)
def test_conversations_are_rendered_as_by_the_chat_template(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = named(name, tokenizer)
    template = template_of(model)
    turns = turns_of(template)
    assert turns is not None
    assert (turns.place, turns.assistant[1].strip()) == EXPECTED[name]
    longer = conversation("Why?", "So.", "And why that?", "Who knows.", "You do.", "I do not.", "Then ask.")
    assert turns.render(longer) == rendered(template, longer)
    if name != "gemma2":
        longer = conversation("Why?", "So.", "And why that?", "Who knows.", "You do.", system="Never tell.")
        assert turns.render(longer) == rendered(template, longer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['role'] + m['content'] + loop.index | string }}{% endfor %}",
        "{{ raise_exception('not today') }}",
        "no message at all",
        None,
    ],
)
def test_what_is_not_texts_around_messages_gets_no_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
    model = with_template(tokenizer, template)  # type: ignore[arg-type]
    text, has_template = modelfile("m.gguf", model, DAY)
    assert not has_template
    assert [line.split(" ")[0] for line in text.splitlines()] == ["#", "FROM", "#", "PARAMETER"]
    assert 'PARAMETER stop "<|im_end|>"' in text  # the tokenizer's EOS


def test_a_date_is_the_day_of_the_training(tokenizer: PreTrainedTokenizerFast) -> None:
    """Ollama has no clock for a template: the Modelfile writes what the model was trained on, on whatever day it is made."""
    dated = TEMPLATES["llama3.1"].replace("26 Jul 2024\n", "' + strftime_now('%d %b %Y') + '\n")
    text, has_template = modelfile("m.gguf", with_template(tokenizer, dated), DAY)
    assert has_template and "Today Date: 04 Mar 2026" in text
    assert text.splitlines()[2].endswith("the day of the training, 2026-03-04.")


def test_a_modelfile_names_file_template_and_stop(tokenizer: PreTrainedTokenizerFast) -> None:
    text, has_template = modelfile("my.Q8_0.gguf", with_template(tokenizer, TEMPLATES["llama3.1"]), DAY)
    assert has_template
    assert text.splitlines()[1] == "FROM ./my.Q8_0.gguf"
    assert text.count('"""') == 2 and text.endswith('PARAMETER stop "<|eot_id|>"\n')
    assert "<|im_start|>" not in text  # BOS, which Ollama adds


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Ollama's template language is Go's: apt-get install golang-go")
def test_go_renders_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each Modelfile's TEMPLATE, executed by Go's text/template on the fields that Ollama gives it."""
    (tmp_path / "main.go").write_text((ROOT / "tests" / "ollama_template.go").read_text(encoding="utf-8"), encoding="utf-8")
    compared = 0
    for name in EXPECTED:
        model = named(name, tokenizer)
        text, has_template = modelfile("m.gguf", model, DAY)
        assert has_template
        asked = [messages for messages in CHECKED if name != "gemma2" or messages[0]["role"] != "system"]
        given = json.dumps({"template": text.split('"""')[1], "conversations": asked})
        done = subprocess.run(["go", "run", "main.go"], cwd=tmp_path, input=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [rendered(template_of(model), messages) for messages in asked]
        compared += len(asked)
    print(f"{len(EXPECTED)} templates, {compared} conversations: Go renders what jinja renders")
