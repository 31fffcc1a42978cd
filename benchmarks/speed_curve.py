"""How the time of a step grows with its pairs, with their length, and with the rank of the adapter: one of them at a time.

The pairs are multi-turn conversations, as in benchmarks/speed.py, and the reference is computed in each run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import baseline
import floor
import speed
import torch
from baseline import Column, Table
from builders import conversation_pairs
from transformers import AutoTokenizer

from dpo_cli.data.rows import to_pair
from dpo_cli.data.tokens import encode
from dpo_cli.models.model_files import ModelFiles
from dpo_cli.providers.model_cache import dequantised


@dataclass(frozen=True)
class Point:
    """A training: pairs of a step, words of a turn and of an answer, rank of the adapter."""

    pairs: int = 8
    words: int = 40
    rank: int = 16


BASE = Point()
CURVES = {
    "pairs": [replace(BASE, pairs=pairs) for pairs in (2, 4, 8, 16)],
    "length": [replace(BASE, words=words) for words in (10, 20, 40, 80)],
    "rank": [replace(BASE, rank=rank) for rank in (4, 16, 64)],
}
STEPS, MICRO_BATCH = 2, 2
COLUMNS = (
    Column("changed"),
    Column("dtype"),
    Column("pairs of a step", "", "{}"),
    Column("tokens of a pair", "", "{:.0f}"),
    Column("rank", "", "{}"),
    Column("a step", "s", "{:.2f}"),
    Column("tokens a second", "tokens/s", "{:.0f}", (0.25, 0)),
    Column("of the floor", "ratio", "{:.2f}", (0.25, 0)),
)


def measure(table: Table, options: argparse.Namespace) -> None:
    model = dequantised(ModelFiles(speed.MODEL))
    tokenizer = AutoTokenizer.from_pretrained(model)
    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rates: dict[torch.dtype, float] = {}
    for changed, points in CURVES.items():
        for point in points[:1] if options.small else points:
            rows = conversation_pairs(STEPS * point.pairs, turn_words=point.words, answer_words=point.words)
            encoded = encode([to_pair(row, i + 1) for i, row in enumerate(rows)], tokenizer)
            pairs = [floor.Pair(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in encoded]
            config = {
                "gradient_accumulation_steps": point.pairs // MICRO_BATCH,
                "per_device_train_batch_size": MICRO_BATCH,
                "lora_r": point.rank,
                "lora_alpha": 2 * point.rank,
            }
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                data = place / "pairs.jsonl"
                data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                result = speed.run_dpo(place, data, config, place / "cache")
            dtype = torch.bfloat16 if result["config"]["bf16"] else torch.float32
            if dtype not in rates:
                rates[dtype] = floor.rate(dtype)
            tokens = sum(pair.tokens for pair in pairs)
            fastest = floor.operations(floor.Model.of(shape, point.rank), pairs, 1, with_reference=True) / rates[dtype]
            seconds = result["seconds"]
            name = str(dtype).removeprefix("torch.")
            table.add(
                changed,
                name,
                point.pairs,
                tokens / len(pairs),
                point.rank,
                seconds / STEPS,
                tokens / seconds,
                fastest / seconds,
            )
    table.note("{steps} steps of each; tokens count a prompt once for both responses.", (Column("steps", "steps"), STEPS))


if __name__ == "__main__":
    sys.exit(baseline.main("speed-curve", COLUMNS, measure))
