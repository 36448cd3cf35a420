"""What templates/host needs to know: flags, file layouts, names. Everything else in them is plain C."""

import json

from llmgen import flags
from llmgen.config import Config
from llmgen.formats import debug_state, files, tokenizer, tokens, weights

BYTE_VOCABULARY = 257  # every byte, and end-of-text

# a field of a weights header -> the constant of the generated program that it must equal
_SIZES = {
    "max_seq_len": "MAXT",
    "vocab_size": "V",
    "num_layers": "L",
    "num_heads": "NH",
    "channels": "C",
    "padded_vocab_size": "VP",
}


def context(config: Config) -> dict:
    """Template variables for one config. Raises UserError where a default does not fit its flag."""
    table = flags.program_flags(config)
    return {
        "program": f"train_{config.family}",
        "version": json.dumps(f"{config.name}, configuration {config.hash}"),  # as a C string
        "flag_members": flags.c_members(table),
        "flag_defaults": flags.c_defaults(table),
        "flag_rows": flags.c_rows(table),
        "vocabulary_is_bytes": config.model.vocab_size == BYTE_VOCABULARY,
        "magic": files.MAGIC,
        "weights_versions": weights.VERSIONS,
        "weights_header": flags.wrapped([f'{{ "{name}", {_SIZES[name]} }},' for name in weights.HEADER_FIELDS]),
        "token_versions": {kind: version for kind, (version, _) in tokens.LAYOUTS.items()},
        "tokenizer_1": tokenizer.VERSION_1,
        "debug_state_version": debug_state.VERSION,
    }
