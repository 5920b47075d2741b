"""What the models take from transformers, imported by one thread at a time.

transformers looks its names up when they are first asked for. Two threads that ask for different ones at once, a page
and the load of a model, can be told that a name is not there; Python lets only one of them import this module.
"""

from __future__ import annotations

from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "BaseModelOutputWithPast",
    "Cache",
    "CausalLMOutputWithPast",
    "DynamicCache",
    "GenerationMixin",
    "Glm4ForCausalLM",
    "GlmConfig",
    "GlmForCausalLM",
    "GradientCheckpointingLayer",
    "PreTrainedConfig",
    "PreTrainedModel",
    "Split",
    "WeightConverter",
    "WeightRenaming",
    "can_return_tuple",
    "capture_outputs",
    "init",
    "merge_with_config_defaults",
    "register_checkpoint_conversion_mapping",
]
