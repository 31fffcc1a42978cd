"""The reward model of a finished run, loaded to score answers: the same token ids and the same scores as in its evaluation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dpo_cli.config.config import load
from dpo_cli.config.rules import fuses_adapter
from dpo_cli.data.encoded import Encoded
from dpo_cli.data.messages import Text
from dpo_cli.data.rows import Demonstration, Question
from dpo_cli.data.tokenizer import Tokenizer
from dpo_cli.data.tokens import Encoder, encode_all, encode_questions
from dpo_cli.data.transcripts import answer_to
from dpo_cli.errors import InvalidInput
from dpo_cli.hardware.machine import probe
from dpo_cli.plan.decisions import resolve
from dpo_cli.providers.huggingface import HuggingFace
from dpo_cli.runs.open_run import require_same_below
from dpo_cli.scoring.forward import collate
from dpo_cli.scoring.lora_linear import fuse
from dpo_cli.scoring.score_head import rewards
from dpo_cli.storage.run_directory import PLAN, RunDirectory, config_of_run, run_of
from dpo_cli.strategies.strategies import STRATEGIES


def reward_run(name: str) -> Path | None:
    """The run directory that `name` is, or whose adapter folder it is, if the run trains a reward model; else None."""
    config = config_of_run(name)
    strategy = STRATEGIES.get(str(config.get("strategy"))) if config else None
    return run_of(name) if strategy is not None and strategy.gives_rewards else None


@dataclass(frozen=True)
class RewardModel:
    """A reward model, and how its training made token ids."""

    network: PreTrainedModel
    encoder: Encoder
    dtype: torch.dtype

    @classmethod
    def of_run(cls, path: Path, device: str, dtype: torch.dtype) -> RewardModel:
        """The reward model of a finished run, on this device; `InvalidInput` for a run that is not finished, or has changed."""
        run = RunDirectory.open(path)
        require_same_below(run)
        changes = [f"device={device}", f"bf16={_json(dtype == torch.bfloat16)}", f"fp16={_json(dtype == torch.float16)}"]
        changes += ["num_processes=1", "fsdp=false", "cpu_offload=false"]  # its weights are in the bill of rlhf
        plan = resolve(load(str(run.path / PLAN), changes), probe(), is_resumed=True)
        provider = HuggingFace(plan.model)
        tokenizer = Tokenizer.loaded(provider.tokenizer(), plan.day, plan.model.generation)
        policy = provider.trained(plan, run.trained)
        if fuses_adapter(plan.config.provider):  # as in its evaluation
            fuse(policy.model)
        policy.model.eval()
        config = plan.config
        encoder = Encoder.of(tokenizer, config.use_chat_template, config.max_seq_length, provider.token_rows())
        return cls(policy.network, encoder, dtype)

    def __call__(self, question: Question, texts: Sequence[str]) -> list[float]:
        """The rewards of answers. One forward pass for each, so that no reward depends on the other answers."""
        return [self._reward(self._encoded(question, text)) for text in texts]

    def _encoded(self, question: Question, text: str) -> Encoded:
        """An answer with its prompt, as a row of the training is.

        A sampled answer may be what no row is: empty, or nothing that the template renders. Its tokens then follow those of the
        prompt, with EOS at the end.
        """
        prompt, encoder = question.prompt, self.encoder
        answer: Text = answer_to(prompt, text) if isinstance(prompt, list) else text
        row = Demonstration(prompt, answer, question.line, question.file, question.tools)
        ways = (encoder.tokenizer, encoder.as_chat)
        try:
            if text.strip():
                return encode_all([[row]], *ways, encoder.max_length, encoder.token_rows).require().sides[0][0]
        except InvalidInput:  # the row is put together here instead
            pass
        ids = encoder.tokenizer.encode(text, False) + encoder.tokenizer.encode(encoder.tokenizer.eos, False)
        room = max(1, (encoder.max_length or sys.maxsize) - len(ids))
        asked, _ = encode_questions([question], *ways, room, encoder.token_rows)
        return Encoded(row, asked[0][1] if asked else [], (ids,))

    def _reward(self, row: Encoded) -> float:
        network = self.network
        batch = collate([row], int(network.config.get_text_config().pad_token_id), network.device)
        with torch.no_grad(), torch.autocast(network.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return float(rewards(network, False, **batch)[0])


def _json(value: bool) -> str:
    return "true" if value else "false"
