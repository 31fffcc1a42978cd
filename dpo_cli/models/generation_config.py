"""Invalid settings of a generation_config.json, with which transformers cannot load or save a model. No torch.

They have a wrong type or size, name tokens that the model does not have, or have no effect with the other settings
(transformers 5.17 checks that when it saves). They are omitted when the model is loaded; providers/huggingface.py finds those
that only transformers knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeGuard

CACHES = (
    *("static", "offloaded_static", "dynamic", "offloaded", "quantized", "paged"),
    *("sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
)
FORCED = ("forced_bos_token_id", "forced_eos_token_id")
DECIDING = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")  # they decide whether others have an effect
# Settings that need do_sample, and the values of each that have no effect.
SAMPLING: Mapping[str, tuple[object, ...]] = {
    "temperature": (None, 1.0),
    "top_p": (None, 1.0),
    "top_k": (None, 50),
    "min_p": (None,),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}
SEARCHING: Mapping[str, tuple[object, ...]] = {
    "early_stopping": (None, False),
    "length_penalty": (None, 1.0),
}  # with several beams
# Settings with tokens whose scores generation changes; an id outside the model's embedding fails there.
ON_TOKENS = (*FORCED, "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias")
OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")  # need return_dict_in_generate


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_above_0(value: object) -> TypeGuard[int]:
    return _is_whole(value) and value > 0


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


# The type of a setting, and the settings with that type: None is always allowed.
KINDS: tuple[tuple[str, Callable[[object], bool], tuple[str, ...]], ...] = (
    ("a number above 0", _is_positive, ("temperature", "repetition_penalty", "encoder_repetition_penalty")),
    ("a number from 0 to 1", _is_share, ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")),
    ("a number", _is_number, ("length_penalty", "guidance_scale", "max_time")),
    ("a whole number", _is_whole, ("top_k", "max_length", "min_length", "min_new_tokens", "no_repeat_ngram_size")),
    ("a whole number above 0", _is_above_0, ("max_new_tokens", "num_beams", "num_return_sequences")),
    ("true or false", _is_switch, ("do_sample", "use_cache", "return_dict_in_generate", "renormalize_logits", *OUTPUTS)),
    ("the id of a token", _is_whole, ("pad_token_id", "bos_token_id", "decoder_start_token_id")),
    ("a list of ids of tokens", _is_list, ("suppress_tokens", "begin_suppress_tokens")),
    ("an id of a token, or a list", lambda value: _is_whole(value) or _is_list(value), ("eos_token_id", *FORCED)),
    ("true, false or never", lambda value: _is_switch(value) or value == "never", ("early_stopping",)),
    (f"one of {', '.join(CACHES)}", lambda value: value in CACHES, ("cache_implementation",)),
)


def invalid(settings: Mapping[str, object], rows: int | None = None) -> dict[str, str]:
    """The settings to omit, each with the reason, in words that follow its name and value.

    `rows` is the number of rows of the model's embedding; None if unknown.
    """
    wrong = {
        name: f"is not {kind}"
        for kind, fits, names in KINDS
        for name in names
        if settings.get(name) is not None and not fits(settings[name])
    }
    for name in ON_TOKENS if rows is not None else ():
        if name not in wrong and (outside := [token for token in _tokens(settings.get(name)) if token >= (rows or 0)]):
            wrong[name] = f"names token {outside[0]}, but the model has only {rows}"
    return wrong | dict(_without_effect({name: value for name, value in settings.items() if name not in wrong}))


def _tokens(value: object) -> Iterator[int]:
    """The ids in a setting: one, a list, a list of lists, or a list of [ids, bias]."""
    if _is_whole(value):
        yield value
    elif isinstance(value, list):
        has_biases = all(isinstance(part, list) and len(part) == 2 and isinstance(part[0], list) for part in value)
        for part in value:
            yield from _tokens(part[0] if has_biases else part)


def _count(settings: Mapping[str, object], name: str) -> int:
    """A setting that is a count; 1 if it is not given."""
    value = settings.get(name)
    return value if _is_above_0(value) else 1


def _without_effect(settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Settings that have no effect with the other ones."""
    samples, beams = settings.get("do_sample") is True, _count(settings, "num_beams")
    returned = _count(settings, "num_return_sequences")
    for name in () if samples else SAMPLING:
        if settings.get(name) not in SAMPLING[name]:
            yield name, "needs do_sample true"
    for name in () if beams > 1 else SEARCHING:
        if settings.get(name) not in SEARCHING[name]:
            yield name, "needs num_beams above 1"
    for name in () if settings.get("return_dict_in_generate") else OUTPUTS:
        if settings.get(name):
            yield name, "needs return_dict_in_generate true"
    if returned > beams and (beams > 1 or not samples):
        yield "num_return_sequences", f"needs num_beams {returned}" + ("" if beams > 1 else ", or do_sample true")
    if settings.get("use_cache") is False and settings.get("cache_implementation") is not None:
        yield "cache_implementation", "needs use_cache true"
