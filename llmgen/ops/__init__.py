"""The ops: one module each, with shapes, backward rule, cost and numpy float64 reference side by side.

Shapes in the docstrings: n rows of tokens (B*T or rows*length), c channels, oc output channels, v vocabulary rows.
"""

from llmgen.ops.adamw import ADAMW, SUM_OF_SQUARES
from llmgen.ops.add import ADD, COPY, ZERO
from llmgen.ops.attention import ATTENTION, ATTENTION_BACKWARD
from llmgen.ops.classifier import CLASSIFIER, CLASSIFIER_BACKWARD
from llmgen.ops.cross_entropy import CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD
from llmgen.ops.gelu import GELU, GELU_BACKWARD
from llmgen.ops.layernorm import LAYERNORM, LAYERNORM_BACKWARD
from llmgen.ops.linear import LINEAR, LINEAR_BACKWARD_INPUT, LINEAR_BACKWARD_WEIGHT, LINEAR_GELU
from llmgen.ops.position_embedding import POSITION_EMBEDDING, POSITION_EMBEDDING_BACKWARD
from llmgen.ops.tail import TAIL
from llmgen.ops.token_embedding import TOKEN_EMBEDDING, TOKEN_EMBEDDING_BACKWARD

__all__ = [
    "ADAMW",
    "ADD",
    "ATTENTION",
    "ATTENTION_BACKWARD",
    "CLASSIFIER",
    "CLASSIFIER_BACKWARD",
    "COPY",
    "CROSS_ENTROPY",
    "CROSS_ENTROPY_BACKWARD",
    "GELU",
    "GELU_BACKWARD",
    "LAYERNORM",
    "LAYERNORM_BACKWARD",
    "LINEAR",
    "LINEAR_BACKWARD_INPUT",
    "LINEAR_BACKWARD_WEIGHT",
    "LINEAR_GELU",
    "POSITION_EMBEDDING",
    "POSITION_EMBEDDING_BACKWARD",
    "SUM_OF_SQUARES",
    "TAIL",
    "TOKEN_EMBEDDING",
    "TOKEN_EMBEDDING_BACKWARD",
    "ZERO",
]
