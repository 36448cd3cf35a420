"""The decoder-only transformer, traced once for each function of the program.

GPT-2 (Radford et al. 2019): learned positions, layer norm before attention and before the MLP, tanh GELU, tied head.
"""

from dataclasses import dataclass

from llmgen import ops
from llmgen.autodiff import differentiate, gradient_of
from llmgen.config import Config
from llmgen.graph import Builder, Carry, Dim, Function, Graph, Op, Segment, Tensor, check, product

INIT_STD = 0.02  # GPT-2's; projections into the residual stream divide it by sqrt(2 * num_layers)
LAYERNORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Sizes:
    """The named dimensions of the generated source."""

    B: Dim
    T: Dim
    L: Dim
    NH: Dim
    C: Dim
    V: Dim
    VP: Dim
    MAXT: Dim

    @staticmethod
    def of(config: Config) -> "Sizes":
        model, program = config.model, config.program
        return Sizes(
            B=Dim(program.batch_size, "B"),
            T=Dim(program.seq_len, "T"),
            L=Dim(model.num_layers, "L"),
            NH=Dim(model.num_heads, "NH"),
            C=Dim(model.channels, "C"),
            V=Dim(model.vocab_size, "V"),
            VP=Dim(model.padded_vocab_size, "VP"),
            MAXT=Dim(model.max_seq_len, "MAXT"),
        )


def parameters(config: Config) -> dict[str, Tensor]:
    """The parameter table: name -> tensor, in the order of the files."""
    s = Sizes.of(config)
    table: dict[str, Tensor] = {}

    def add(name: str, *shape: Dim, layers: Dim | None = None):
        table[name] = Tensor(name, shape, role="parameter", layers=layers)

    add("wte", s.VP, s.C)
    add("wpe", s.MAXT, s.C)
    for name, shape in (
        ("ln1w", (s.C,)),
        ("ln1b", (s.C,)),
        ("qkvw", (3 * s.C, s.C)),
        ("qkvb", (3 * s.C,)),
        ("attprojw", (s.C, s.C)),
        ("attprojb", (s.C,)),
        ("ln2w", (s.C,)),
        ("ln2b", (s.C,)),
        ("fcw", (4 * s.C, s.C)),
        ("fcb", (4 * s.C,)),
        ("fcprojw", (s.C, 4 * s.C)),
        ("fcprojb", (s.C,)),
    ):
        add(name, *shape, layers=s.L)
    add("lnfw", s.C)
    add("lnfb", s.C)
    return table


def initial(name: str, config: Config) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's initial values."""
    if name in ("ln1w", "ln2w", "lnfw"):
        return 1.0, 0.0
    if name.endswith("b"):
        return 0.0, 0.0
    if name in ("attprojw", "fcprojw"):
        return 0.0, INIT_STD / (2 * config.model.num_layers) ** 0.5
    return 0.0, INIT_STD


def forward(config: Config, name: str, b: Dim, t: Dim, first: Dim | None = None) -> Function:
    """tokens, targets (b, t) int32 -> losses (b, t); with `first`, only of the tokens from that one on."""
    s, p = Sizes.of(config), parameters(config)
    norm = {"epsilon": LAYERNORM_EPSILON}
    tokens = Tensor("tokens", (b, t), "i32", "input")
    targets = Tensor("targets", (b, t), "i32", "input")

    g = Builder()
    x = g.apply(ops.TOKEN_EMBEDDING, "embedding", tokens=tokens, wte=p["wte"])
    x = g.apply(ops.POSITION_EMBEDDING, "encoded", inp=x, wpe=p["wpe"])
    prologue = Segment("embedding", tuple(g.ops))

    g = Builder()
    residual = Tensor("residual", (b, t, s.C))
    ln1, _, _ = g.apply(ops.LAYERNORM, "ln1", attrs=norm, inp=residual, weight=p["ln1w"], bias=p["ln1b"])
    qkv = g.apply(ops.LINEAR, "qkv", inp=ln1, weight=p["qkvw"], bias=p["qkvb"])
    heads = {"num_heads": s.NH, "channels": s.C}
    attention, _ = g.apply(ops.ATTENTION, "attention", attrs=heads, qkv=qkv)
    attproj = g.apply(ops.LINEAR, "attproj", inp=attention, weight=p["attprojw"], bias=p["attprojb"])
    residual2 = g.apply(ops.ADD, "residual2", a=residual, b=attproj)
    ln2, _, _ = g.apply(ops.LAYERNORM, "ln2", attrs=norm, inp=residual2, weight=p["ln2w"], bias=p["ln2b"])
    fc = g.apply(ops.LINEAR, "fc", inp=ln2, weight=p["fcw"], bias=p["fcb"])
    gelu = g.apply(ops.GELU, "gelu", inp=fc)
    fcproj = g.apply(ops.LINEAR, "fcproj", inp=gelu, weight=p["fcprojw"], bias=p["fcprojb"])
    residual3 = g.apply(ops.ADD, "residual3", a=residual2, b=fcproj)
    final = Tensor("final", residual.shape)
    block = Segment("layers", tuple(g.ops), s.L, (Carry(x, residual, residual3, final),))

    g = Builder()
    lnf, _, _ = g.apply(ops.LAYERNORM, "lnf", attrs=norm, inp=final, weight=p["lnfw"], bias=p["lnfb"])
    scored = targets
    if first is not None:
        lnf = g.apply(ops.TAIL, "lnf_tail", attrs={"first": first}, inp=lnf)
        scored = g.apply(ops.TAIL, "targets_tail", attrs={"first": first}, inp=targets)
    logits = g.apply(ops.LINEAR, "logits", inp=lnf, weight=p["wte"])
    losses = g.apply(ops.CROSS_ENTROPY, "losses", attrs={"vocab_size": s.V}, logits=logits, targets=scored)
    epilogue = Segment("head", tuple(g.ops))
    return Function(name, (prologue, block, epilogue), (tokens, targets), (losses,))


def update(config: Config) -> Function:
    """Global norm and AdamW; decay on the tensors of rank 2 or more in each layer."""
    built = []
    table = parameters(config).values()
    for p in table:
        total = Tensor(f"{p.name}_sum", (), role="scratch")
        built.append(Op(ops.SUM_OF_SQUARES, {"x": gradient_of(p)}, {"total": total}))
    for p in table:
        m, v = (Tensor(f"{p.name}_{x}", p.shape, role="state", layers=p.layers) for x in "mv")
        inputs = {"param": p, "m": m, "v": v, "grad": gradient_of(p)}
        built.append(Op(ops.ADAMW, inputs, {"param": p, "m": m, "v": v}, {"decay": len(p.shape) >= 2}))
    return Function("update", (Segment("update", tuple(built)),))


def evaluation_tokens(config: Config) -> int:
    """The most tokens `evaluate` takes at once: a training micro-batch, or one sequence of the longest length."""
    return max(config.program.batch_size * config.program.seq_len, config.model.max_seq_len)


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


def count(config: Config) -> int:
    """Parameters of the model as papers count them: vocabulary rows without padding."""
    s = Sizes.of(config)
    stored = sum(product(p.stacked).size for p in parameters(config).values())
    return stored - (s.VP.size - s.V.size) * s.C.size
