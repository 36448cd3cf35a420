"""The ops: one module each, with shapes, backward rule, cost and numpy float64 reference side by side.

Shapes in the docstrings: n rows of tokens (B*T or rows*length), c channels, oc output channels, v vocabulary rows.
"""

from llmgen.ops.activation import ACTIVATIONS, GELU, GELU_EXACT, RELU, RELU_SQUARED, SILU
from llmgen.ops.adamw import ADAMW, SUM_OF_SQUARES
from llmgen.ops.add import ADD, COPY, ZERO
from llmgen.ops.attention import ATTENTION, ATTENTION_BACKWARD
from llmgen.ops.cache import CACHE_APPEND, CACHED_ATTENTION
from llmgen.ops.classifier import CLASSIFIER, CLASSIFIER_BACKWARD
from llmgen.ops.cross_entropy import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD
from llmgen.ops.layernorm import LAYERNORM, LAYERNORM_BACKWARD
from llmgen.ops.linear import (
    LINEAR,
    LINEAR_BACKWARD_INPUT,
    LINEAR_BACKWARD_INPUT_GELU,
    LINEAR_BACKWARD_INPUT_SLOPE,
    LINEAR_BACKWARD_WEIGHT,
    LINEAR_GELU,
    LINEAR_GELU_SLOPE,
)
from llmgen.ops.multiply import MULTIPLY, SCALE
from llmgen.ops.muon import MUON
from llmgen.ops.position_embedding import POSITION_EMBEDDING, POSITION_EMBEDDING_BACKWARD
from llmgen.ops.qk_norm import QK_NORM, QK_NORM_BACKWARD
from llmgen.ops.rmsnorm import RMSNORM, RMSNORM_BACKWARD
from llmgen.ops.rope import ROPE, ROPE_BACKWARD
from llmgen.ops.select import SELECT
from llmgen.ops.softcap import SOFTCAP
from llmgen.ops.tail import TAIL
from llmgen.ops.token_embedding import TOKEN_EMBEDDING, TOKEN_EMBEDDING_BACKWARD

__all__ = [
    "ACTIVATIONS",
    "ADAMW",
    "ADD",
    "ATTENTION",
    "ATTENTION_BACKWARD",
    "CACHED_ATTENTION",
    "CACHE_APPEND",
    "CLASSIFIER",
    "CLASSIFIER_BACKWARD",
    "COPY",
    "CROSS_ENTROPY",
    "CROSS_ENTROPY_BACKWARD",
    "GELU",
    "GELU_EXACT",
    "LAYERNORM",
    "LAYERNORM_BACKWARD",
    "LINEAR",
    "LINEAR_BACKWARD_INPUT",
    "LINEAR_BACKWARD_INPUT_GELU",
    "LINEAR_BACKWARD_INPUT_SLOPE",
    "LINEAR_BACKWARD_WEIGHT",
    "LINEAR_GELU",
    "LINEAR_GELU_SLOPE",
    "MULTIPLY",
    "MUON",
    "POSITION_EMBEDDING",
    "POSITION_EMBEDDING_BACKWARD",
    "QK_NORM",
    "QK_NORM_BACKWARD",
    "RELU",
    "RELU_SQUARED",
    "RMSNORM",
    "RMSNORM_BACKWARD",
    "ROPE",
    "ROPE_BACKWARD",
    "SCALE",
    "SELECT",
    "SILU",
    "SOFTCAP",
    "SUM_OF_SQUARES",
    "TAIL",
    "TOKEN_EMBEDDING",
    "TOKEN_EMBEDDING_BACKWARD",
    "ZERO",
]
