"""The decoder-only transformer, traced once for each function of the program.

GPT-2 (Radford et al. 2019) where the config says nothing; the switches of `[model]` make it Llama, Mistral, Qwen and others.
"""

import dataclasses
import math
from dataclasses import dataclass

from llmgen import ops
from llmgen.autodiff import differentiate, gradient_of
from llmgen.config import Config, ModelConfig
from llmgen.graph import Builder, Carry, Dim, Function, Graph, Op, Segment, Tensor, check, product

INIT_STD = 0.02  # GPT-2's; projections into the residual stream divide it by sqrt(2 * num_layers)
LONGEST_EVALUATION = 4096  # tokens; models may allow 131,072, but buffers for those would dwarf the model
CACHE_MULTIPLE = 32  # a cache has room for a multiple of this many tokens: two registers of the widest kind
DECODED_TOKENS = 512  # that `decode` takes at once: a piece of a prompt, or the next token of each sequence
DECODED_ROWS = 16  # whose logits it gives at once
PROJECTIONS = ("attprojw", "fcprojw")  # into the residual stream


@dataclass(frozen=True)
class Sizes:
    """The named dimensions of the generated source."""

    B: Dim
    T: Dim
    L: Dim
    NH: Dim
    NKV: Dim  # NH where every query head has its own key and value
    HS: Dim
    C: Dim
    A: Dim  # channels of attention: NH * HS, C where they are equal
    QKV: Dim  # a token's queries, keys and values: 3*C where they are
    F: Dim  # channels of the MLP: 4*C where they are
    V: Dim
    VP: Dim
    MAXT: Dim

    @staticmethod
    def of(config: Config) -> "Sizes":
        m, program = config.model, config.program
        NH, HS, C = Dim(m.num_heads, "NH"), Dim(m.head_size, "HS"), Dim(m.channels, "C")
        NKV = NH if m.num_kv_heads == m.num_heads else Dim(m.num_kv_heads, "NKV")
        A = C if m.num_heads * m.head_size == m.channels else NH * HS
        QKV = 3 * A if NKV == NH else (NH + 2 * NKV) * HS
        return Sizes(
            B=Dim(program.batch_size, "B"),
            T=Dim(program.seq_len, "T"),
            L=Dim(m.num_layers, "L"),
            NH=NH,
            NKV=NKV,
            HS=HS,
            C=C,
            A=A,
            QKV=QKV if A == C and NKV == NH else Dim(QKV.size, "QKV"),
            F=4 * C if m.mlp_channels == 4 * m.channels else Dim(m.mlp_channels, "F"),
            V=Dim(m.vocab_size, "V"),
            VP=Dim(m.padded_vocab_size, "VP"),
            MAXT=Dim(m.max_seq_len, "MAXT"),
        )


def parameters(config: Config) -> dict[str, Tensor]:
    """The parameter table: name -> tensor, in the order of the files."""
    s, m = Sizes.of(config), config.model
    sandwich = m.norm_position == "sandwich"
    rows = [
        ("wte", True, (s.VP, s.C), None),
        ("wpe", m.position == "learned", (s.MAXT, s.C), None),
        ("ln1w", m.norm_weight, (s.C,), s.L),
        ("ln1b", m.norm_bias, (s.C,), s.L),
        ("qkvw", True, (s.QKV, s.C), s.L),
        ("qkvb", m.qkv_bias, (s.QKV,), s.L),
        ("qnormw", m.qk_norm and m.qk_norm_weight, (s.HS,), s.L),
        ("knormw", m.qk_norm and m.qk_norm_weight, (s.HS,), s.L),
        ("attprojw", True, (s.C, s.A), s.L),
        ("attprojb", m.projection_bias, (s.C,), s.L),
        ("ln1postw", sandwich and m.norm_weight, (s.C,), s.L),
        ("ln2w", m.norm_weight, (s.C,), s.L),
        ("ln2b", m.norm_bias, (s.C,), s.L),
        ("gatew", m.mlp == "gated", (s.F, s.C), s.L),
        ("fcw", True, (s.F, s.C), s.L),
        ("fcb", m.mlp_bias, (s.F,), s.L),
        ("fcprojw", True, (s.C, s.F), s.L),
        ("fcprojb", m.mlp_bias, (s.C,), s.L),
        ("ln2postw", sandwich and m.norm_weight, (s.C,), s.L),
        ("lnfw", m.norm_weight, (s.C,), None),
        ("lnfb", m.norm_bias, (s.C,), None),
        ("headw", not m.tie_embeddings, (s.VP, s.C), None),
    ]
    return {name: Tensor(name, shape, role="parameter", layers=layers) for name, there, shape, layers in rows if there}


def initial(p: Tensor, config: Config) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's initial values."""
    if len(p.shape) == 1:
        return (1.0 if p.name.endswith("w") else 0.0), 0.0
    if p.name in PROJECTIONS:
        return 0.0, 0.0 if config.model.zero_projections else INIT_STD / (2 * config.model.num_layers) ** 0.5
    return 0.0, INIT_STD


@dataclass(frozen=True)
class _Cache:
    """Keys and values of what came before, and where in it each token of a call stands."""

    keys: Tensor
    values: Tensor
    sequences: Tensor
    positions: Tensor


class _Layers(Builder):
    """A builder that knows the config's norm, attention and MLP. With a cache, rows are tokens of any sequences."""

    def __init__(self, config: Config, table: dict[str, Tensor], cache: _Cache | None = None):
        super().__init__()
        self.config, self.model, self.table = config, config.model, table
        self.sizes, self.L = Sizes.of(config), config.model.num_layers
        self.cache, self.positions = cache, cache.positions if cache else None

    def p(self, name: str) -> Tensor | None:
        return self.table.get(name)

    def norm(self, name: str, inp: Tensor, weight: str, bias: str = "") -> Tensor:
        kind = ops.LAYERNORM if self.model.norm == "layernorm" else ops.RMSNORM
        parts = {"weight": self.p(weight)} | ({"bias": self.p(bias)} if kind is ops.LAYERNORM else {})
        return self.apply(kind, name, attrs={"epsilon": self.model.norm_epsilon}, inp=inp, **parts)[0]

    def linear(self, name: str, inp: Tensor, weight: str, bias: str) -> Tensor:
        return self.apply(ops.LINEAR, name, inp=inp, weight=self.p(weight), bias=self.p(bias))

    def scaled(self, name: str, inp: Tensor, factor: float) -> Tensor:
        return inp if factor == 1.0 else self.apply(ops.SCALE, name, attrs={"factor": factor}, inp=inp)

    def add(self, name: str, residual: Tensor, branch: Tensor, post: str) -> Tensor:
        """residual + scale * norm(branch): what a part of a layer adds to the residual stream."""
        if self.model.norm_position == "sandwich":
            branch = self.norm(post, branch, f"{post}w")
        branch = self.scaled(f"{branch.name}_scaled", branch, self.model.residual_scale)
        return self.apply(ops.ADD, name, a=residual, b=branch)

    def attention(self, inp: Tensor) -> Tensor:
        m, s = self.model, self.sizes
        heads = {"num_heads": s.NH, "num_kv_heads": s.NKV, "head_size": s.HS, "channels": s.A}
        qkv = self.linear("qkv", inp, "qkvw", "qkvb")
        if m.qk_norm:
            attrs = {**heads, "epsilon": m.norm_epsilon}
            weights = {"qweight": self.p("qnormw"), "kweight": self.p("knormw")}
            qkv = self.apply(ops.QK_NORM, "qkv_normed", attrs=attrs, inp=qkv, **weights)[0]
        if m.position == "rope":
            half = Dim(int(m.head_size * m.rope_fraction) // 2, "ROPE_HALF")
            longest = Dim(context_tokens(self.config), "CONTEXT") if self.cache else s.MAXT
            cos, sin = (Tensor(f"rope_{x}", (longest, half), role="constant") for x in ("cos", "sin"))
            attrs = {**heads, **rope(m), "half": half}
            qkv = self.apply(ops.ROPE, "qkv_rotated", attrs=attrs, inp=qkv, cos=cos, sin=sin, positions=self.positions)
        window = None
        if any(m.attention_window):
            pattern = tuple(m.attention_window[layer % len(m.attention_window)] for layer in range(self.L))
            window = Tensor("attention_window", (), "i32", "constant", s.L, pattern)
        scale = m.attention_scale or 1 / math.sqrt(m.head_size)
        attrs = {**heads, "scale": scale, "softcap": m.attention_softcap}
        if self.cache is None:
            return self.apply(ops.ATTENTION, "attention", attrs=attrs, qkv=qkv, window=window)[0]
        kept = {f.name: getattr(self.cache, f.name) for f in dataclasses.fields(self.cache)}
        state = {name: kept[name] for name in ("keys", "values")}
        self.ops.append(Op(ops.CACHE_APPEND, {"qkv": qkv, **kept}, state, heads))
        return self.apply(ops.CACHED_ATTENTION, "attention", attrs=attrs, qkv=qkv, window=window, **kept)

    def mlp(self, inp: Tensor) -> Tensor:
        activation = ops.ACTIVATIONS[self.model.activation]
        name = self.model.activation
        if self.model.mlp == "plain":
            return self.apply(activation, name, inp=self.linear("fc", inp, "fcw", "fcb"))
        gate = self.apply(activation, name, inp=self.linear("gate", inp, "gatew", ""))
        return self.apply(ops.MULTIPLY, "gated", a=gate, b=self.linear("fc", inp, "fcw", "fcb"))

    def embedded(self, tokens: Tensor) -> Tensor:
        """The tokens as the first layer gets them."""
        x = self.apply(ops.TOKEN_EMBEDDING, "embedding", tokens=tokens, wte=self.p("wte"))
        x = self.scaled("embedding_scaled", x, self.model.embedding_scale)
        if self.model.position == "learned":
            x = self.apply(ops.POSITION_EMBEDDING, "encoded", inp=x, wpe=self.p("wpe"), positions=self.positions)
        return x

    def layer(self, residual: Tensor) -> Tensor:
        attention = self.attention(self.norm("ln1", residual, "ln1w", "ln1b"))
        residual2 = self.add("residual2", residual, self.linear("attproj", attention, "attprojw", "attprojb"), "ln1post")
        hidden = self.mlp(self.norm("ln2", residual2, "ln2w", "ln2b"))
        return self.add("residual3", residual2, self.linear("fcproj", hidden, "fcprojw", "fcprojb"), "ln2post")

    def logits(self, inp: Tensor) -> Tensor:
        return self.apply(ops.LINEAR, "logits", inp=inp, weight=self.p("headw") or self.p("wte"))


def _up_to_the_last_norm(
    config: Config, tokens: Tensor, cache: _Cache | None = None
) -> tuple[tuple[Segment, ...], _Layers, Tensor]:
    """Embedding and layers; the builder of what follows, and its first tensor: the last norm."""
    s, table = Sizes.of(config), parameters(config)
    g = _Layers(config, table, cache)
    x = g.embedded(tokens)
    prologue = Segment("embedding", tuple(g.ops))

    g = _Layers(config, table, cache)
    residual, final = (Tensor(name, x.shape) for name in ("residual", "final"))
    residual3 = g.layer(residual)
    block = Segment("layers", tuple(g.ops), s.L, (Carry(x, residual, residual3, final),))

    g = _Layers(config, table, cache)
    return (prologue, block), g, g.norm("lnf", final, "lnfw", "lnfb")


def rope(m: ModelConfig) -> dict:
    """What makes the rotary frequencies: see `llmgen.ops.rope.frequencies`."""
    return {
        "theta": m.rope_theta,
        "scaling": m.rope_scaling,
        "factor": m.rope_factor,
        "low_frequency_factor": m.rope_low_frequency_factor,
        "high_frequency_factor": m.rope_high_frequency_factor,
        "original_seq_len": m.rope_original_seq_len,
    }


def forward(config: Config, name: str, b: Dim, t: Dim, first: Dim | None = None) -> Function:
    """tokens, targets (b, t) int32 -> losses (b, t); with `first`, only of the tokens from that one on."""
    s, m = Sizes.of(config), config.model
    tokens = Tensor("tokens", (b, t), "i32", "input")
    targets = Tensor("targets", (b, t), "i32", "input")
    body, g, lnf = _up_to_the_last_norm(config, tokens)
    scored = targets
    if first is not None:
        lnf = g.apply(ops.TAIL, "lnf_tail", attrs={"first": first}, inp=lnf)
        scored = g.apply(ops.TAIL, "targets_tail", attrs={"first": first}, inp=targets)
    attrs = {"vocab_size": s.V, "softcap": m.logit_softcap, "smoothing": m.label_smoothing, "z_loss": m.z_loss}
    losses = g.apply(ops.CROSS_ENTROPY, "losses", attrs=attrs, logits=g.logits(lnf), targets=scored)
    return Function(name, (*body, Segment("head", tuple(g.ops))), (tokens, targets), (losses,))


def decode(config: Config) -> Function:
    """tokens, sequences, positions (n), rows (m) int32 -> logits (m, VP) of those rows, with a cache of keys and values.

    Token i stands at positions[i] of sequence sequences[i]; what stands before it in that sequence was decoded earlier, in
    this call or another. The states `keys` and `values` are those of one sequence.
    """
    s, m = Sizes.of(config), config.model
    n, rows = Dim(min(DECODED_TOKENS, cached_tokens(config)), "n"), Dim(DECODED_ROWS, "m")
    tokens, sequences, positions = (Tensor(name, (n,), "i32", "input") for name in ("tokens", "sequences", "positions"))
    wanted = Tensor("rows", (rows,), "i32", "input")
    shape = (s.NKV, Dim(cached_tokens(config), "CACHE"), s.HS)
    keys, values = (Tensor(name, shape, role="state", layers=s.L) for name in ("keys", "values"))
    body, g, lnf = _up_to_the_last_norm(config, tokens, _Cache(keys, values, sequences, positions))
    logits = g.logits(g.apply(ops.SELECT, "selected", inp=lnf, rows=wanted))
    if m.logit_softcap:
        logits = g.apply(ops.SOFTCAP, "logits_capped", attrs={"cap": m.logit_softcap}, inp=logits)
    return Function("decode", (*body, Segment("head", tuple(g.ops))), (tokens, sequences, positions, wanted), (logits,))


def context_tokens(config: Config) -> int:
    """Tokens of the longest sequence that is generated: as many as the model allows within reason."""
    return min(config.model.max_seq_len, LONGEST_EVALUATION)


def cached_tokens(config: Config) -> int:
    """Tokens that the cache of a sequence has room for."""
    return -(-context_tokens(config) // CACHE_MULTIPLE) * CACHE_MULTIPLE


def update(config: Config) -> Function:
    """Global norm, then AdamW, or Muon for the matrices of the layers; decay on the tensors of rank 2 or more in each layer."""
    built = []
    s = Sizes.of(config)
    table = parameters(config).values()
    for p in table:
        total = Tensor(f"{p.name}_sum", (), role="scratch")
        built.append(Op(ops.SUM_OF_SQUARES, {"x": gradient_of(p)}, {"total": total}))
    for p in table:
        m, v = (Tensor(f"{p.name}_{x}", p.shape, role="state", layers=p.layers) for x in "mv")
        inputs, decay = {"param": p, "m": m, "grad": gradient_of(p)}, len(p.shape) >= 2
        if config.program.optimizer == "muon" and p.layers and len(p.shape) == 2:
            kv = s.NKV.size * s.HS.size
            parts = (s.A.size, kv, kv) if p.name == "qkvw" else (p.shape[0].size,)
            built.append(Op(ops.MUON, inputs, {"param": p, "m": m}, {"decay": decay, "parts": parts}))
        else:
            built.append(Op(ops.ADAMW, {**inputs, "v": v}, {"param": p, "m": m, "v": v}, {"decay": decay}))
    return Function("update", (Segment("update", tuple(built)),))


def evaluation_tokens(config: Config) -> int:
    """The most tokens `evaluate` takes at once: a training micro-batch, or one sequence of the longest length within reason."""
    return max(config.program.batch_size * config.program.seq_len, min(config.model.max_seq_len, LONGEST_EVALUATION))


def build(config: Config) -> Graph:
    """forward_backward (one micro-batch), evaluate (its own rows and length), update."""
    s = Sizes.of(config)
    training = forward(config, "forward_backward", s.B, s.T)
    loss_scale = Tensor("loss_scale", (), role="input")
    training = differentiate(training, {training.outputs[0].name: loss_scale})
    training = training.replace(inputs=(*training.inputs, loss_scale))
    evaluate = forward(config, "evaluate", Dim(1, "b"), Dim(evaluation_tokens(config), "t"), Dim(0, "first"))
    functions = (training, evaluate, update(config))
    for function in functions[:2]:
        check(function)
    return Graph(tuple(parameters(config).values()), functions)


def build_generation(config: Config) -> Graph:
    """The program that generates: decode alone."""
    function = decode(config)
    check(function)
    return Graph(tuple(parameters(config).values()), (function,))


def count(config: Config) -> int:
    """Parameters of the model as papers count them: vocabulary rows without padding."""
    s = Sizes.of(config)
    table = parameters(config).values()
    padding = (s.VP.size - s.V.size) * s.C.size * sum(p.shape[0] == s.VP for p in table)
    return sum(product(p.stacked).size for p in table) - padding
