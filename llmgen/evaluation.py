"""`llmgen export-eval`: multiple-choice questions as JSON lines to an evaluation file.

A line is an object as HellaSwag's (Zellers et al. 2019, arXiv:1905.07830): `ctx`, a text; `endings`, several that may follow
it; `label`, the number of the right one, from 0. An ending is encoded with a space before it.
"""

import json
import os

from llmgen import tokenization
from llmgen.errors import UserError
from llmgen.formats import evaluation, files
from llmgen.formats.evaluation import Example
from llmgen.tokenization import Tokenizer


def export_eval(source: str, tokenizer: str, out: str | os.PathLike, examples: int | None = None) -> str:
    """Converts the lines of a file, the first `examples` of them. Returns a line that says what was written.

    Raises UserError, naming the line, for one that is not a question.
    """
    made = tokenization.load_tokenizer(tokenizer)
    with files.reading(source) as file:
        data = file.readall()
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()][:examples]
    if not lines:
        raise UserError(f"{source}: there is no question in it; write one a line, with ctx, endings and label")
    encoded = []
    for number, line in lines:
        try:
            encoded.append(evaluation.encode(_example(json.loads(line), made), len(encoded)))
        except (ValueError, RecursionError) as error:  # of json, of UTF-8, of what the line says
            raise UserError(f"{source}: line {number}: {str(error).splitlines()[0]}") from None
    evaluation.write(out, encoded)
    size = sum(example.nbytes for example in encoded) + files.HEADER_BYTES
    return f"{out}: {len(encoded)} examples, {size} bytes"


def _example(said: object, tokenizer: Tokenizer) -> Example:
    """Raises ValueError for what is no question."""
    if not isinstance(said, dict):
        raise ValueError("it is not a JSON object with ctx, endings and label")
    context, endings, label = (said.get(key) for key in ("ctx", "endings", "label"))
    if not isinstance(context, str) or not isinstance(endings, list) or not all(isinstance(e, str) for e in endings):
        raise ValueError("it needs ctx, a text, and endings, a list of texts")
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)  # as datasets' copy of HellaSwag has it
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError("it needs label, the number of the right ending, from 0")
    return Example(tokenizer.encode(context).tolist(), [tokenizer.encode(f" {e}").tolist() for e in endings], label)
