"""One call of attention for all sequences of a row. torch's kernel needs a GPU: here its documentation is written out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_shared_prompts import BATCHES, FAMILIES, assert_equal_paths, collate
from torch import Tensor

from dpo_cli.scoring import forward, row_attention, shared_prompts
from dpo_cli.scoring.row_attention import Cuts


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    is_late: bool = False,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn by its documentation, and FlashAttention's rule for windows.

    The last query of a sequence meets its last key; with `is_late` its first query the first key, as before FlashAttention 2.1.
    """
    assert query_starts.dtype == key_starts.dtype == torch.int32 and query.dim() == 3 and window_size[1] == 0
    outputs = []
    group = query.shape[1] // key.shape[1]
    for (start, stop), (first, end) in zip(pairwise(query_starts.tolist()), pairwise(key_starts.tolist()), strict=True):
        assert 0 < stop - start <= longest_query and 0 < end - first <= longest_key
        k, v = (states[first:end].repeat_interleave(group, dim=1) for states in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[start:stop], k) * (scale or query.shape[-1] ** -0.5)
        own = torch.arange(stop - start)[:, None] + (0 if is_late else (end - first) - (stop - start))
        place = torch.arange(end - first)[None]
        is_seen = (place <= own) & ((window_size[0] < 0) | (place >= own - window_size[0]))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~is_seen, -torch.inf).softmax(dim=-1), v))
    assert (query_starts[-1], key_starts[-1]) == (len(query), len(key))
    return torch.cat(outputs)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], list[int]]:
    """Lets every device have a kernel, this one; the list gets the number of sequences of each call."""

    def patched(kernel: Callable[..., Tensor]) -> list[int]:
        calls: list[int] = []

        def counted(*args: Any, **options: Any) -> Tensor:
            calls.append(len(args[3]) - 1)
            return kernel(*args, **options)

        monkeypatch.setattr(row_attention, "_has_kernel", lambda *_: True)
        monkeypatch.setattr(row_attention, "_kernel", lambda: counted)
        return calls

    return patched


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_equals_the_padded_rows(family: str, name: str, use: Callable[..., list[int]]) -> None:
    calls = use(documented)
    assert_equal_paths(family, collate(BATCHES[name]), 1e-9, exact_norms=True)
    layers = 2
    sequences = sum(bool(size) for p, c, r in BATCHES[name] for size in (len(p) + len(c), len(r)))
    # One comparison for layers with a window that hides something, and one for those without.
    compared = len(calls) - layers
    assert calls.count(sequences) >= layers and 1 <= compared <= 2, calls


def test_a_kernel_that_aligns_the_other_way_is_not_used(
    use: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    use(lambda *args, **options: documented(*args, **options, is_late=True))
    with caplog.at_level(logging.WARNING, "dpo"):
        assert_equal_paths("llama", collate(BATCHES["three of different lengths"]), 1e-9, exact_norms=True)
    assert "run one by one" in caplog.text


def test_a_kernel_without_windows_serves_layers_without(
    use: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    def without_windows(*args: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
        return documented(*args, window_size=(-1, 0), **options)

    use(without_windows)
    with caplog.at_level(logging.WARNING, "dpo"):
        assert_equal_paths("gemma3", collate(BATCHES["longer than every window"]), 1e-9, exact_norms=True)
    assert "compute something else" in caplog.text


def test_a_kernel_that_fails_is_not_used(use: Callable[..., list[int]], caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    calls = use(fails)
    with caplog.at_level(logging.ERROR, "dpo"):
        assert_equal_paths("llama", collate(BATCHES["three of different lengths"]), 1e-9, exact_norms=True)
    assert len(calls) == 1 and "Ampere" in caplog.text  # it is tried once, not in each layer


def test_out_of_memory_is_not_taken_for_a_missing_kernel(use: Callable[..., list[int]]) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    use(full)
    with pytest.raises(torch.OutOfMemoryError):
        assert_equal_paths("llama", collate(BATCHES["one pair"]), 1e-9, exact_norms=True)


def test_sequences_by_hand() -> None:
    cuts = Cuts(((3, 2, 3), (0, 1, 2), (4, 0, 0)), torch.device("cpu"))
    assert cuts.sizes == ((5, 5), (3, 6), (1, 1), (2, 2), (4, 4))
    assert [starts.tolist() for starts in cuts.starts] == [[0, 5, 8, 9, 11, 15], [0, 5, 11, 12, 14, 18]]
    assert cuts.longest == (5, 6)


def test_the_kernel_of_this_torch_has_the_options() -> None:
    """Its signature is what can be checked without a GPU."""
    import inspect

    bound = inspect.signature(row_attention._kernel()).bind(*range(7), scale=None, window_size=(-1, 0))
    assert list(bound.arguments)[3:7] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_a_window_of_real_size_that_is_ignored_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a window closes, a token sees the same with and without it: most of the tokens of a sample."""
    window = 1024
    cuts = Cuts((*row_attention.SAMPLE, (window, 40, 60)), torch.device("cpu"))

    def output(kernel: Callable[..., Tensor], *states: Tensor) -> Tensor:
        monkeypatch.setattr(row_attention, "_kernel", lambda: kernel)
        return row_attention._together(None, cuts, window, *states)

    def ignores(*args: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
        return documented(*args, window_size=(-1, 0), **options)

    like = [torch.empty(1, heads, 1, 16) for heads in (2, 1, 1)]
    right, wrong = (partial(output, kernel) for kernel in (documented, ignores))
    assert row_attention._is_same(right, right, like, cuts.tokens, 100)
    assert not row_attention._is_same(right, wrong, like, cuts.tokens, 100)
    assert row_attention._is_same(right, wrong, like, cuts.tokens, cuts.tokens)  # why only the last tokens are compared


def test_the_comparison_within_a_checkpointed_layer(use: Callable[..., list[int]]) -> None:
    """Its own forward and backward leave no trace in the tensors that the layer saves."""
    use(documented)
    model = tiny_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    shared_prompts.enable(model)
    batch = collate(BATCHES["three of different lengths"])
    forward.shared_states(model, **batch).sum().backward()
    checkpointed = model.get_input_embeddings().weight.grad
    plain = tiny_model("llama")
    shared_prompts.enable(plain)
    forward.shared_states(plain, **batch).sum().backward()
    torch.testing.assert_close(checkpointed, plain.get_input_embeddings().weight.grad)
