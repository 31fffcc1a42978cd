"""Token ids against those of TRL's own preparation, and what the loss covers."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_cli.data.rows import Pair
from dpo_cli.data.tokens import encode
from dpo_cli.data.transcripts import as_messages
from dpo_cli.errors import InvalidInput

PAIRS = [
    Pair("the cat", "sat on the mat", "the", 1),
    Pair(
        [{"role": "system", "content": "answer"}, {"role": "user", "content": "the mat?\n"}],
        [{"role": "assistant", "content": "é the answer is <b>"}],
        [{"role": "assistant", "content": "é the cat"}],
        2,
    ),
    Pair("two\nlines ", " leading space", "trailing space ", 3),
]


def by_trl(rows: list[dict[str, object]], tokenizer: PreTrainedTokenizerFast, tmp_path: object) -> Dataset:
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = DPOConfig(str(tmp_path), max_length=None, use_cpu=True, bf16=False)
    return DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")


@pytest.mark.parametrize("chat", [True, False])
def test_ids_are_trls(tokenizer: PreTrainedTokenizerFast, tmp_path: object, chat: bool) -> None:
    template = tokenizer.chat_template
    pairs = PAIRS if chat else [PAIRS[0], PAIRS[2]]
    try:
        tokenizer.chat_template = template if chat else None
        ours = encode(pairs, tokenizer)
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [
            {key: as_messages(getattr(pair, key), role) if chat else getattr(pair, key) for key, role in roles.items()}
            for pair in pairs
        ]
        theirs = by_trl(rows, tokenizer, tmp_path)
    finally:
        tokenizer.chat_template = template
    for mine, row in zip(ours, theirs, strict=True):
        assert (mine.prompt_ids, mine.chosen_ids, mine.rejected_ids) == (
            row["prompt_ids"],
            row["chosen_ids"],
            row["rejected_ids"],
        )


def test_loss_covers_the_response_and_its_eos_only(tokenizer: PreTrainedTokenizerFast) -> None:
    """pad = eos here, so a mask made from ids instead of lengths would lose the EOS."""
    encoded = encode(PAIRS, tokenizer)
    rows = [{"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in encoded]
    batch = DataCollatorForPreference(tokenizer.pad_token_id)(rows)
    for index, pair in enumerate(encoded):
        for row, response in ((index, pair.chosen_ids), (index + len(encoded), pair.rejected_ids)):
            scored = batch["input_ids"][row][batch["completion_mask"][row] == 1].tolist()
            assert scored == response
            assert response.count(tokenizer.eos_token_id) == 1
            text = tokenizer.decode(scored)
            assert text.endswith("<|im_end|>\n")
            assert "<|im_start|>" not in text


def test_the_prompt_ends_with_the_generation_prompt_and_has_one_start(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer.decode(encode(PAIRS[:1], tokenizer)[0].prompt_ids)
    assert prompt == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"


def conversation(turns: int, words: int, system: bool) -> Pair:
    roles = ["user" if turn % 2 == 0 else "assistant" for turn in range(2 * turns - 1)]
    prompt = [{"role": role, "content": f"{turn} " + "the cat " * words} for turn, role in enumerate(roles)]
    start = [{"role": "system", "content": "answer the cat"}] if system else []
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("the mat it is", "no"))
    return Pair([*start, *prompt], chosen, rejected, 1)


@settings(max_examples=60, deadline=None)
@given(turns=st.integers(1, 4), words=st.integers(0, 12), system=st.booleans(), room=st.integers(30, 160))
def test_a_long_pair_loses_the_oldest_of_its_prompt(
    tokenizer: PreTrainedTokenizerFast, turns: int, words: int, system: bool, room: int
) -> None:
    pair = conversation(turns, words, system)
    (whole,), (made,) = encode([pair], tokenizer), encode([pair], tokenizer, "auto", room)
    assert (made.chosen_ids, made.rejected_ids, made.row) == (whole.chosen_ids, whole.rejected_ids, pair)
    if whole.length <= room:
        assert made == whole
        return
    text, before = tokenizer.decode(made.prompt_ids), tokenizer.decode(whole.prompt_ids)
    if made.length > room:  # not even one character of the last message has a place: the pair is left out
        assert not made.is_cut
        return
    assert made.is_cut
    assert text.startswith(("<|im_start|>system\nanswer the cat<|im_end|>\n<|im_start|>user\n", "<|im_start|>user\n"))
    assert before.endswith(
        text[text.rindex("<|im_start|>user\n") + len("<|im_start|>user\n") :]
    )  # the end of the prompt is whole
    contents = [part.split("\n", 1)[1] for part in text.split("<|im_start|>")[1:]]
    kept = [int(content.split()[0]) for content in contents if content[:1].isdigit()]
    assert kept == list(range(2 * turns - 1))[-len(kept) :] if kept else True


def test_a_plain_prompt_keeps_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = Pair("the cat sat on the mat " * 20 + "and then?", "yes", "no", 1)
    for wish in (True, False):
        (whole,), (made,) = encode([pair], tokenizer, wish), encode([pair], tokenizer, wish, 40)
        assert made.is_cut and whole.length > made.length > 25 and made.length <= 40
        assert "and then?" in tokenizer.decode(made.prompt_ids)
        assert (made.chosen_ids, made.rejected_ids) == (whole.chosen_ids, whole.rejected_ids)


def test_tools_reach_the_template(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ tools[0].name if tools }}" + str(tokenizer.chat_template))
    made = encode([Pair("the cat", "yes", "no", 1, "", ({"name": "mat"},)), PAIRS[0]], tokenizer)
    assert [tokenizer.decode(pair.prompt_ids).startswith("mat<|im_start|>") for pair in made] == [True, False]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not finish within"),
        ("{{ 'x' * 20000000000 }}", "needs more than"),
        ("{{ 'ab cd ' * 3000000 }}", "characters into"),
        ("{% for i in range(99999) %}{{ 'abcdefgh ' * 100 }}{% endfor %}", "characters into"),
    ],
)
def test_a_template_without_end_is_stopped(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, template: str, says: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    started = time.monotonic()
    with pytest.raises(InvalidInput, match=says) as caught:
        encode(PAIRS[:1], tokenizer)
    assert caught.value.problems[0].code == "template-unbounded"
    assert time.monotonic() - started < 5  # the issue's own bound, far above MAX_SECONDS
    monkeypatch.undo()
    assert encode(PAIRS[:1], tokenizer)  # clock and memory are as they were


def test_a_template_that_renders_a_prompt_alone_otherwise_is_counted(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (made,) = encode(PAIRS[:1], tokenizer)
    assert made.parts_early and tokenizer.decode(made.chosen_ids) == "sat on the mat"


DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful<|im_end|>\n{% endif %}"


def test_a_system_message_stays_where_the_users_text_can_be_cut(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template with a system prompt of its own puts that in the place of one that was cut away."""
    monkeypatch.setattr(tokenizer, "chat_template", DEFAULT_SYSTEM + str(tokenizer.chat_template))
    pair = conversation(1, 60, system=True)
    (whole,) = encode([pair], tokenizer)
    for room in range(70, whole.length, 20):
        (made,) = encode([pair], tokenizer, "auto", room)
        assert made.is_cut and made.length <= room
        assert tokenizer.decode(made.prompt_ids).startswith("<|im_start|>system\nanswer the cat<|im_end|>")


def test_what_a_template_refuses_is_named_by_its_rows(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template + str(tokenizer.chat_template))
    with pytest.raises(InvalidInput, match="System role not supported") as caught:
        encode([PAIRS[0], PAIRS[1], PAIRS[1]], tokenizer)
    assert (caught.value.problems[0].code, caught.value.problems[0].lines) == ("template-refuses", None)


def test_a_long_conversation_is_no_endless_template(tokenizer: PreTrainedTokenizerFast) -> None:
    (made,) = encode([Pair("the cat sat " * 100_000, "yes", "no", 1)], tokenizer)
    assert made.length > 300_000


def test_tools_that_a_template_leaves_out_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Else the model would learn to answer with nothing."""
    call = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": {}}}]}]
    prompt, no = [{"role": "user", "content": "weather?"}], [{"role": "assistant", "content": "no"}]
    for pair in (
        Pair(prompt, call, no, 4),
        Pair(prompt, no, call, 5),
        Pair(prompt, no, [{**no[0], "content": "yes"}], 6, "", ({"name": "w"},)),
    ):
        with pytest.raises(InvalidInput, match="does not support tool") as caught:
            encode([PAIRS[0], pair], tokenizer)
        assert caught.value.problems[0].line == pair.line


def test_a_transcript_that_is_too_long_loses_its_oldest_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    said = "".join(f"\n\nHuman: question {i} is long\n\nAssistant: answer {i}" for i in range(9))
    pair = Pair(f"{said}\n\nHuman: and now?\n\nAssistant:", " yes", " no", 1)
    (whole,), (cut,) = encode([pair], tokenizer), encode([pair], tokenizer, "auto", 120)
    text = tokenizer.decode(cut.prompt_ids)
    assert cut.is_cut and cut.length <= 120 and (cut.responses, cut.row) == (whole.responses, pair)
    assert "Human:" not in text and text.startswith("<|im_start|>user\nquestion") and text.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(cut.chosen_ids).startswith("yes")
