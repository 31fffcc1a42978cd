"""The reference of a preference loss: it gives log-probs, computed at the first visit of a pair, and then kept."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.hardware.machine import installed_versions
from dpo_cli.plan.plan import Plan
from dpo_cli.providers.policy import FROZEN, Policy
from dpo_cli.providers.sharding import is_sharded, whole
from dpo_cli.scoring.forward import States
from dpo_cli.scoring.lm_head import LOG_PROBS, Head, score_tokens
from dpo_cli.scoring.packing import taken, units_in
from dpo_cli.scoring.reference_cache import ReferenceCache
from dpo_cli.scoring.shared_prompts import IGNORED
from dpo_cli.storage.digests import sha256_of_package
from dpo_cli.storage.progress import working

PAIR = "pair"  # column of a micro-batch: the place of the pair or row in the training set
NOT_READ = ("completion_mask", "labels", "label", PAIR)  # of a micro-batch: what the model does not take
PAIR_BYTES = 16  # of the digest of a unit
CODE = ("scoring", "providers")  # folders whose code decides a log-prob
# Settings that decide no log-prob: places of files, and what only a training of that adapter used.
IDLE = ("_name_or_path", "base_model_name_or_path", "lora_dropout", "inference_mode", "init_lora_weights")
NOT_COMPUTING = ("dpo", "python", "datasets", "trl")  # packages; `CODE` is dpo's part


class KeptReference:
    """A live reference whose log-probs are computed once for each pair of a training set, in the rows of its first visit.

    The policy runs in the same rows, so rounding cancels there. It does not cancel for a pair from the cache, for its
    neighbours in a row, and for a row that is divided after an out-of-memory error. Later epochs compute nothing. A checkpoint
    holds the log-probs, so a resumed run reads the same bits. A new run starts with what earlier runs shared in the cache.
    """

    def __init__(self, live: LiveReference, units: int, sides: int = 2, noun: str = "pairs") -> None:
        """Of so many units, called `noun`, each with so many sequences: the chosen and the rejected one of a pair."""
        self.live, self.sides, self.noun = live, sides, noun
        self.values = torch.zeros(units, sides * (1 + live.with_shared))
        self.known = torch.zeros(units, dtype=torch.bool)
        self._cache: ReferenceCache | None = None
        self._digests: list[bytes] = []  # of the units
        self._shared = torch.zeros(units, dtype=torch.bool)  # what the cache has

    def log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Summed log-probs of the responses of a micro-batch of TRL, nats, without gradient: (2B,) of B pairs, the chosen
        first, or (B,) of B rows with one response. After them, if asked for, those of the tokens that both of a pair have."""
        places = batch[PAIR].chunk(self.sides)[0].cpu()
        unknown = (~self.known[places]).nonzero()[:, 0].tolist()
        if unknown:
            row = batch if len(unknown) == units_in(batch, self.sides) else taken(batch, unknown, self.sides)
            computed = self.live.log_probs(row).cpu().view(self.values.shape[1], -1).T
            self.values = self.values.to(computed.dtype)
            self.values[places[unknown]] = computed
            self.known[places[unknown]] = True
        return self.values[places].T.reshape(-1).to(batch["input_ids"].device)

    def learn(self, places: Sequence[int], values: Tensor) -> None:
        """Keep the log-probs (n, k) that another process has computed for the units at these places."""
        self.values = self.values.to(values.dtype)
        self.values[places] = values
        self.known[places] = True

    def share_in(self, cache: ReferenceCache, digests: Sequence[bytes]) -> None:
        """From now on `share` adds to this cache, under these digests of the units."""
        self._cache, self._digests = cache, list(digests)

    def recall(self, checked: Sequence[int], computed: np.ndarray, allowed: np.ndarray) -> int:
        """Take the log-probs that the cache has, for a run that starts; returns the number of pairs.

        `computed` (n, 2) are the whole ones of the pairs `checked`, computed now. If the cache differs by more than `allowed`
        (n, 2) nats, nothing of it is taken.
        """
        assert self._cache is not None
        cached = self._cache.read(self._digests)
        pairs = [pair for pair, digest in enumerate(self._digests) if digest in cached]
        if not pairs:
            return 0
        values, known = torch.full_like(self.values, math.nan), torch.zeros_like(self.known)
        values[pairs] = torch.tensor([cached[self._digests[pair]] for pair in pairs], dtype=values.dtype)
        known[pairs] = True
        whole = values[checked].numpy()[:, : self.sides]
        if (np.abs(whole - computed) > allowed).any():  # false for a NaN, which is not cached
            self._cache.distrust()
            return 0
        self.values, self.known, self._shared = values.nan_to_num(), known, known.clone()
        return len(pairs)

    def share(self) -> None:
        """Add to the cache what this run has computed since the last call."""
        if self._cache is None:
            return
        new = (self.known & ~self._shared & self.values.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        values = {
            self._digests[place]: tuple(log_probs) for place, log_probs in zip(new, self.values[new].tolist(), strict=True)
        }
        self._cache.add(values)
        self._shared[new] = True

    def state(self) -> dict[str, Tensor]:
        """A copy of what is known, for a checkpoint."""
        return {"values": self.values.clone(), "known": self.known.clone()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.values, self.known = state["values"], state["known"]


@dataclass(frozen=True)
class LiveReference:
    """The policy's model with its adapter off or a frozen one on, or a separate model: computed at each call.

    It scores as the policy does, so that both give the same bits before the first step, within the same autocast. It uses no
    trained weight, so autocast does not cache a copy without a gradient.
    """

    policy: Policy
    states: States
    with_shared: bool = False  # also the log-probs of as many tokens of each response as both responses of its pair have

    def log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As those of `KeptReference`."""
        with self.policy.as_reference() as network:
            return self._summed(network, batch)

    def of_policy(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The same by the policy as it is now, without gradient."""
        return self._summed(self.policy.network, batch)

    def _summed(self, network: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        inputs = {name: value for name, value in batch.items() if name not in NOT_READ}
        scored = labels[:, 1:] != IGNORED
        with torch.no_grad():
            hidden = self.states(network, labels, **inputs)
            scores = score_tokens(hidden, labels[:, 1:][scored], Head.of(network), [LOG_PROBS])
        of_tokens = scores.log_probs.new_zeros(scored.shape).masked_scatter(scored, scores.log_probs)
        whole = of_tokens.sum(dim=1)
        return torch.cat([whole, (of_tokens * in_both(scored)).sum(dim=1)]) if self.with_shared else whole


def in_both(scored: Tensor) -> Tensor:
    """Which scored tokens of 2B responses are among the first n, where n is the length of the shorter one of their pair.

    arXiv:2409.06411, section 4: the public length. `scored` is (2B, L), the B chosen first.
    """
    lengths = scored.sum(dim=1)
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    return scored & (scored.cumsum(dim=1) <= shorter[:, None])


def digest_of_ids(*pieces: list[int]) -> bytes:
    """The digest of the token ids of a prompt and of its responses."""
    digest = hashlib.blake2b(digest_size=PAIR_BYTES)
    for ids in pieces:
        digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.digest()


def computed_by(policy: Policy, plan: Plan) -> str:
    """The digest of everything that decides the log-probs of a reference: its tensors in memory, and how they are used.

    For a model that is divided over processes, all of them have to ask.

    The tensors are read as they were loaded, quantised and merged, so it does not matter which files they came from. What is
    trained belongs to the policy only.
    """
    network = policy.frozen or policy.network
    tensors = network.state_dict(keep_vars=True)  # with the scales of quantised weights
    tensors |= dict(network.named_buffers())  # also those that are in no file
    if policy.frozen is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not tensor.requires_grad}
    with working("hashing the weights", len(tensors), "tensors") as work, ThreadPoolExecutor() as threads:
        digests = {}
        # Shards one after another: all processes exchange the same one, and only one is whole at a time.
        each = (map if is_sharded(network) else threads.map)(_digest_of_tensor, tensors.values())
        for name, digest in zip(tensors, each, strict=True):
            digests[name] = digest
            work.add()
    adapter = policy.model.peft_config.get(FROZEN) if isinstance(policy.model, PeftModel) else None
    device = torch.cuda.get_device_name() if plan.config.device == "cuda" else plan.config.device
    versions = installed_versions(plan.config.provider)
    how = {
        "tensors": {name.replace(".base_layer.", "."): digest for name, digest in digests.items()},
        "model": _settings(network.config.to_dict()),
        "adapter": _settings(adapter.to_dict()) if adapter else None,
        "attention": network.config._attn_implementation,
        "provider": plan.config.provider,
        "dtype": plan.dtype,
        "device": device,
        "shared": plan.scoring.shared,
        **({"parts": True} if plan.takes("ld_alpha") and plan.config.ld_alpha is not None else {}),
        "versions": {name: text for name, text in versions.items() if name not in NOT_COMPUTING},
        "code": sha256_of_package(*CODE),
    }
    return hashlib.sha256(json.dumps(how, sort_keys=True, default=_written).encode()).hexdigest()


def _settings(settings: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name not in IDLE}


def _written(value: object) -> object:
    """A value that JSON does not have; a set has another order in each process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _digest_of_tensor(tensor: Tensor) -> str:
    raw = whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
