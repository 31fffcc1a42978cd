"""How far a policy is from its reference on what it writes itself: KL(policy || reference) of whole answers, from samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.tokens import Encoded
from dpo_cli.evaluation.bootstrap import Array
from dpo_cli.evaluation.generation import Sampling, answers, first_of_each_prompt
from dpo_cli.evaluation.metrics import score_rows
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.policy import Policy
from dpo_cli.runs.state_io import random_state_kept
from dpo_cli.scoring.forward import plain_states


def sequence_kl(policy: Policy, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], plan: Plan) -> tuple[Array, int]:
    """log pi(y) - log ref(y) of one answer y to each of the first `kl_prompts` prompts: (n,), nats a sequence.

    And the number of those prompts that leave no room for an answer, and are not among the n.

    y is drawn from the policy itself (temperature 1, top-p 1, at most `max_new_tokens`), so the mean estimates
    KL(policy || reference) = E[log pi(y) - log ref(y)]; a single value may be negative. The same seed draws alike each time,
    and the random state of a training is left as it was.
    """
    config, dtype = plan.config, getattr(torch, plan.dtype)
    asked = first_of_each_prompt(rows, config.kl_prompts)
    if not asked:
        return np.zeros(0), 0
    with random_state_kept():
        torch.manual_seed(config.seed)
        sampling = Sampling(config.max_new_tokens, temperature=1.0)
        made = answers(policy.network, tokenizer, [row.prompt_ids for row in asked], sampling, dtype)
    both = zip(asked, made, strict=True)
    sampled = [replace(row, responses=(list(answer.ids),)) for row, answer in both if not answer.is_missing]
    if not sampled:
        return np.zeros(0), len(asked)
    # A sampled answer ends where the policy ended it: with the end, or without one at the limit.
    scores = score_rows(policy, sampled, plain_states, int(tokenizer.pad_token_id), config.per_device_eval_batch_size, dtype)
    difference: Array = (scores.policy - scores.reference)[:, 0]
    return difference, len(asked) - len(sampled)
