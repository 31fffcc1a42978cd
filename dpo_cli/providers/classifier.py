"""A loaded language model as a reward model: its backbone below a fresh score head, in transformers' class for that.

The language model comes from the provider with all its checks (files, tensors, quantisation, caches), so there is no second way
to load. Its LM head is left behind.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from dpo_cli.errors import InvalidInput
from dpo_cli.models.checks import no_classifier

HEAD = "score"  # its name in the decoders of transformers
# What transformers sets on a model that it has quantised or put on a device, and what TRL, PEFT and Trainer ask for.
OF_LOADING = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_device_map")


def head_of(model: nn.Module) -> nn.Module | None:
    """The score head of a model; None for a model with another head."""
    head: nn.Module | None = getattr(model, HEAD, None)
    return head


def on_meta(config: PretrainedConfig, label: str) -> PreTrainedModel:
    """The sequence classifier with one label of this configuration, without weights.

    `InvalidInput` if transformers has none with a score head; `label` names the model.
    """
    config = copy.deepcopy(config)
    config.num_labels = 1
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise InvalidInput([no_classifier(label, config.model_type)])
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    if not isinstance(head_of(model), nn.Linear):
        raise InvalidInput([no_classifier(label, config.model_type)])
    return cast(PreTrainedModel, model.eval())


def as_classifier(model: PreTrainedModel, seed: int, pad_token_id: int, label: str) -> PreTrainedModel:
    """The classifier on the backbone of a loaded language model, with a score head that depends on `seed` alone.

    The head is float32 for any dtype of the model: its updates are smaller than 16 bits can add.
    """
    classifier = on_meta(model.config, label)
    prefix = classifier.base_model_prefix
    if type(getattr(classifier, prefix)) is not type(model.base_model):
        raise InvalidInput([no_classifier(label, model.config.model_type)])
    setattr(classifier, prefix, model.base_model)
    head = cast(nn.Linear, getattr(classifier, HEAD))
    fresh = nn.Linear(head.in_features, head.out_features, head.bias is not None, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in fresh.parameters():
            weight.zero_()
        fresh.weight.normal_(std=getattr(model.config.get_text_config(), "initializer_range", 0.02), generator=draw)
    setattr(classifier, HEAD, fresh.to(model.device))
    classifier.config = model.config
    model.config.num_labels = 1
    model.config.get_text_config().pad_token_id = pad_token_id  # by which the classifier finds the end of a row
    for name in OF_LOADING:
        if hasattr(model, name):
            setattr(classifier, name, getattr(model, name))
    return classifier
