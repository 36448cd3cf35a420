"""What templates/host needs to know: flags, file layouts, names. Everything else in them is plain C."""

import json
from collections.abc import Sequence

from llmgen import flags, generation, models
from llmgen.config import BYTE_VOCABULARY, Config
from llmgen.formats import debug_state, evaluation, files, tokenizer, tokens, training_state, weights

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
    """Template variables of the program that trains. Raises UserError where a default does not fit its flag."""
    layout = weights.layout(config.model)
    return {
        "program": f"train_{config.family}",
        "trains": True,
        "version": json.dumps(f"{config.name}, configuration {config.hash}"),  # as a C string
        "rebuild": "build one for it with llmgen build --config",
        **_shared(config, flags.program_flags(config)),
        "token_versions": {kind: version for kind, (version, _) in tokens.LAYOUTS.items()},
        "examples_version": evaluation.VERSION,
        "example_begin": evaluation.BEGIN,
        "debug_state_version": debug_state.VERSIONS[layout],
        "state_version": training_state.VERSION,
        "state_entries": training_state.ENTRIES,
    }


def generation_context(config: Config, target: str) -> dict:
    """Template variables of the program that generates."""
    return {
        "program": f"generate_{config.family}",
        "trains": False,
        "version": json.dumps(f"{config.name}, configuration {generation.hash_of(config, target)}"),
        "rebuild": "build one for it with llmgen generate --model",
        **_shared(config, flags.GENERATION_FLAGS),
    }


def _shared(config: Config, table: Sequence[flags.Flag]) -> dict:
    shapes = models.parameter_shapes(config)
    return {
        "flag_members": flags.c_members(table),
        "flag_defaults": flags.c_defaults(table),
        "flag_rows": flags.c_rows(table),
        "vocabulary_is_bytes": config.model.vocab_size == BYTE_VOCABULARY,
        "magic": files.MAGIC,
        "llmc_weights": weights.layout(config.model) == weights.LLMC,
        "weights_versions": weights.VERSIONS,
        "weights_own_version": weights.OWN_VERSION,
        "weights_text": [
            f"{{ {json.dumps(key)}, {json.dumps(value)}, {int(fixed)} }},"
            for key, value, fixed in weights.described(config, shapes, config.program.precision)
        ],
        "weights_text_bytes": weights.described_bytes(config, shapes),
        "weights_text_limit": weights.TEXT_LIMIT,
        "weights_header": flags.wrapped([f'{{ "{name}", {_SIZES[name]} }},' for name in weights.HEADER_FIELDS]),
        "tokenizer_1": tokenizer.VERSION_1,
    }
