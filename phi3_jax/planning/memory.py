"""Bytes a training step needs on each device, by category, and whether the attached devices have them.

What lives at once is looked at in four moments of a step: while the loss and its gradient are made, in the backward pass
through a layer, while the embedding's gradient is made, and while the optimiser makes its directions of gradients. The
largest moment is the prediction. Every tensor is one named term, so that a compiler's numbers can correct it.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from phi3_jax.chips import CHIPS
from phi3_jax.configs import LoraConfig, ModelConfig
from phi3_jax.models.spec import ParamSpec
from phi3_jax.planning import tiles
from phi3_jax.planning.setup import Setup, on_one_device, row_ways, tensors
from phi3_jax.training.optimizers import optimizer

MASTER = 4  # bytes of a parameter: fp32
GRADIENT = 4  # bytes of its gradient once reduced
BATCH_ARRAYS = 5  # int32 arrays of a batch: tokens, targets, segments, positions, domains
# Bytes an element of a chunk's logits: fp32 logits and probabilities, bf16 gradient; and elements a chunk, which is
# training.losses.LIMIT: a plan does without what that file imports, and a test holds the two together.
LOGIT_BYTES, LOGIT_CHUNK = 4 + 4 + 2, 64 * 2**20
# Gathered weights of a layer at a time: the layer's and, fetched ahead, the next one's.
LAYERS_GATHERED = 2
LANES = 128  # a TPU pads the last dimension of attention's arrays to it
# Resident set of a process before it holds any array: Python, jax, orbax, the compiled program and XLA's own
# compile-time peak, as measured on CPU with jax 0.10.2.
CPU_RUNTIME_BYTES = 650e6
SHARE = 0.85  # of a device's memory that a plan may fill; the rest is for fragmentation and errors of these formulas
# What a remat policy keeps of each layer besides the residual stream (decoder.REMAT), in the words of `layer_values`.
KEPT: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {
        "none": (
            "attention_norm", "qkv", "rotated", "attention", "middle", "mlp_norm", "gate_up", "activated", "wide_norms",
            "gates",
        ),
        "dots": ("qkv", "middle", "gate_up"),
        "names": ("qkv", "attention", "gate_up"),
        "full": (),
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Predicted bytes per device.

    Attributes:
      parameters: fp32 master weights; of adapters, and the frozen weights beside them.
      optimizer: its state, two Adam moments for example.
      batch: the step's data.
      gradients: reduced gradients, and the sum over microbatches under accumulation.
      activations: what the forward pass keeps, and one layer's work in the backward pass.
      logits: of one chunk of positions.
      collectives: gathered weights, their pieces in the compute dtype, and gradients before they are reduced.
      runtime: the process itself, on a CPU.
      moment: when a device is fullest; categories that do not live then are 0.
    """

    parameters: float
    optimizer: float
    batch: float
    gradients: float
    activations: float
    logits: float
    collectives: float
    runtime: float = 0.0
    moment: str = ""

    @property
    def state(self) -> float:
        """Training state: fp32 master weights and the optimiser's state."""
        return self.parameters + self.optimizer

    @property
    def argument_bytes(self) -> float:
        """What a compiled step takes in: state and batch."""
        return self.state + self.batch

    @property
    def temporaries(self) -> float:
        """What lives besides the arguments at the fullest moment."""
        return self.gradients + self.activations + self.logits + self.collectives

    @property
    def total(self) -> float:
        return sum(self.categories().values())

    def categories(self) -> dict[str, float]:
        """Bytes by category."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "moment"}


def predict(setup: Setup) -> Memory:
    """Memory of one training step per device, at the fullest moment of the step."""
    gradients = GRADIENT * trained_params(setup)
    carried = gradients if setup.accumulation > 1 else 0.0
    work, logits, seen = work_bytes(setup), logit_bytes(setup), tiles.kept_bytes(setup)
    kept = kept_bytes(setup) + seen
    table = float(setup.model.vocab * setup.model.embed)
    hidden = setup.residual_tokens() * setup.model.embed * setup.value_bytes
    # The output matrix and, where it is trained, its gradient, whole on every device.
    head = (1 if setup.lora else 2) * table * setup.value_bytes
    of_table = 0.0 if setup.lora else MASTER * table
    weights, always = gathered_bytes(setup)
    if setup.layout.gathers and setup.value_bytes < (setup.frozen_bytes if setup.lora else MASTER):
        always += setup.value_bytes * stored_params(setup)  # XLA casts all layers' pieces before the loops
    moments = {  # gradients, activations, logits, collectives
        "the loss": (carried, kept + 2 * hidden, logits, head + always),
        "a layer's backward pass": (carried + gradients, kept + work, 0.0, weights + always),
        "the embedding's gradient": (carried + gradients, hidden + seen, 0.0, of_table),
        "the optimiser's update": (carried + gradients, 0.0, 0.0, update_bytes(setup)),
    }
    if setup.tiles:
        moments["the tower's backward pass"] = (carried + gradients, seen + tiles.work_bytes(setup), 0.0, always)
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, activations, logits, collectives = moments[moment]
    tokens = setup.sequences * setup.sequence_length / (row_ways(setup.degrees) * setup.ways(setup.layout.time))
    return Memory(
        parameters=stored_padded(setup, lambda spec: MASTER)
        + (setup.frozen_bytes * stored_params(setup) if setup.lora else MASTER * _left_out(setup)),
        optimizer=stored_padded(setup, optimizer(setup.optimizer).state_bytes),
        batch=(BATCH_ARRAYS + setup.pairs) * 4 * tokens + tiles.batch_bytes(setup),
        gradients=gradients,
        activations=activations,
        logits=logits,
        collectives=collectives,
        runtime=CPU_RUNTIME_BYTES if setup.topology.chip.platform == "cpu" else 0.0,
        moment=moment,
    )


def temp_bytes(setup: Setup) -> float:
    """`memory_analysis().temp_size_in_bytes` of a compiled step, a device.

    The TPU compiler reports there what the bodies of the forward and of the backward loop need in turn as if both lived at
    once: it compiles steps whose arguments and temporaries together exceed a chip's memory, when the total does not.
    """
    found, kept = predict(setup).temporaries, kept_bytes(setup)
    return kept + 2 * (found - kept) if setup.topology.chip.platform == "tpu" and found > kept else found


# ------------------------------------------------------------------------------------------------ activations


def layer_values(setup: Setup) -> Mapping[str, float]:
    """Values a device of every tensor of one layer's forward pass, for one microbatch.

    The residual stream may be split over time more finely than the inside of a layer, where heads and mlp are split
    instead; what enters the matrices is whole in embed.
    """
    model, inner, residual = setup.model, setup.inner_tokens(), setup.residual_tokens()
    heads = setup.ways(setup.layout.heads)
    d, q, kv, f = model.embed, model.inner, model.kv_heads * model.head_dim, model.mlp
    return {
        "residual": residual * d,
        "attention_norm": inner * d,
        "qkv": inner * (q + 2 * kv) / heads,
        "rotated": inner * (q + kv) / heads,
        "attention": inner * q / heads,
        "middle": residual * d,  # the residual stream between attention and MLP
        "mlp_norm": inner * d,
        "gate_up": inner * 2 * f / heads,
        "activated": inner * f / heads,
        # Inside of norms and activation, which only a backward pass without remat finds again in memory: two fp32 arrays
        # a norm, and the gate's sigmoid and its product.
        "wide_norms": residual * 2 * 2 * d * 4 / setup.value_bytes,
        "gates": inner * 2 * f / heads,
    }


def kept_bytes(setup: Setup) -> float:
    """Bytes that the forward pass keeps for the backward: the residual stream, and what the remat policy names."""
    values, layers = layer_values(setup), setup.model.layers
    streams = layers if setup.remat == "none" else math.ceil(layers / setup.model.period)
    kept = streams * values["residual"] + layers * sum(values[name] for name in KEPT[setup.remat])
    statistics = layers * _statistics(setup) if setup.remat == "none" else 0.0
    return kept * setup.value_bytes + statistics


def work_bytes(setup: Setup) -> float:
    """Bytes of one layer's work in the backward pass: what is made again, and gradients, at the worse of two places.

    In the MLP: what comes before it, its input, and four arrays of its width at once (gate, the gradient of the activation,
    and the gradients that become; the linear part is made inside of products, as XLA's schedule for TPU shows). In
    attention: what attention needs in the kernel's own layout, its gradients, and the kernel's own memory.
    """
    values, kept = layer_values(setup), KEPT[setup.remat]
    again = {name: n for name, n in values.items() if name not in (*kept, "residual", "wide_norms", "gates")}
    before = sum(n for name, n in again.items() if name not in ("mlp_norm", "gate_up", "activated"))
    streams = 2 * values["residual"]  # the layer's input, and the gradient that comes in
    mlp = again.get("mlp_norm", 0.0) + values["gate_up"] + again.get("gate_up", 0.0)
    attention = 2 * _kernel_values(setup)
    # Of the other layers made again with it, XLA's schedule holds no array of the MLP's width.
    return (streams + setup.model.period * before + max(mlp, attention)) * setup.value_bytes + _kernel_scratch(setup)


def _padded_head(setup: Setup) -> float:
    """How much longer a TPU makes the head dimension."""
    k = setup.model.head_dim
    return math.ceil(k / LANES) * LANES / k if setup.topology.chip.platform == "tpu" else 1.0


def _kernel_values(setup: Setup) -> float:
    """Values of queries, keys, values and output in a kernel's layout; under context parallelism all keys and values."""
    model, heads, inner = setup.model, setup.ways(setup.layout.heads), setup.inner_tokens()
    kv = model.kv_heads * model.head_dim
    keys = setup.rows * setup.sequence_length
    return (inner * 2 * model.inner + keys * 2 * kv) / heads * _padded_head(setup)


def _statistics(setup: Setup) -> float:
    """Bytes of attention's log normalisers of one layer."""
    return 4.0 * setup.inner_tokens() * setup.model.heads / setup.ways(setup.layout.heads)


def _kernel_scratch(setup: Setup) -> float:
    """Bytes of attention itself: statistics; on a CPU also the scores of a block of queries, three times (XLA's copies)."""
    scratch = 2 * _statistics(setup)
    if setup.topology.chip.platform == "cpu":
        block = min(setup.sequence_length, max(128, -(-setup.sequence_length // 16)))  # models/kernels/chunked.py
        scratch += 3 * 4.0 * setup.rows * setup.model.heads * block * setup.sequence_length
    return scratch


# ------------------------------------------------------------------------------------------------ the rest


def stored_params(setup: Setup) -> float:
    """Parameters of the model that a device stores."""
    return float(sum(math.prod(setup.stored_shape(spec)) for _, spec in tensors(setup.model)))


def _left_out(setup: Setup) -> float:
    """Parameters that a device stores and that stay as they are, where no adapters are trained."""
    if setup.model.vision is None:
        return 0.0
    taken = {name for name, _ in setup.trained}
    return float(sum(math.prod(setup.stored_shape(spec)) for name, spec in tensors(setup.model) if name not in taken))


def trained_params(setup: Setup) -> float:
    """Parameters with a gradient that a device stores."""
    return _stored_bytes(setup, lambda spec: 1)


def state_bytes(setup: Setup) -> float:
    """Bytes of the optimiser's state that a device stores."""
    return _stored_bytes(setup, optimizer(setup.optimizer).state_bytes)


def update_bytes(setup: Setup) -> float:
    """Bytes that an optimiser needs to make its directions, besides gradients and state."""
    rule = optimizer(setup.optimizer)
    layer = sum(spec.size for _, spec in tensors(setup.model) if spec.role == "hidden") / setup.model.layers
    return _stored_bytes(setup, rule.update_bytes) + rule.layer_bytes * layer


def _stored_bytes(setup: Setup, bytes_of: Callable[[ParamSpec], int]) -> float:
    return float(sum(bytes_of(spec) * math.prod(setup.stored_shape(spec)) for _, spec in setup.trained))


def stored_padded(setup: Setup, bytes_of: Callable[[ParamSpec], int]) -> float:
    """Bytes a device stores of arrays of the trained parameters' shapes, `bytes_of` each value, with what a TPU pads.

    It rounds one dimension of every array up to its 128 lanes; the compiler takes the dimension that loses least
    (phi-3-mini's attention matrices, with no multiple of 128 left when embed is cut to pieces, grow by a third).
    """

    def padded(shape: tuple[int, ...]) -> float:
        tpu = setup.topology.chip.platform == "tpu"
        return math.prod(shape) * (min(math.ceil(d / LANES) * LANES / d for d in shape) if tpu else 1.0)

    return sum(bytes_of(spec) * padded(setup.stored_shape(spec)) for _, spec in setup.trained)


def logit_bytes(setup: Setup) -> float:
    """Bytes of one chunk's logits; positions are split over all mesh axes."""
    elements = setup.sequences * setup.sequence_length / setup.accumulation / setup.devices * setup.model.vocab
    return LOGIT_BYTES * min(elements, float(LOGIT_CHUNK))


def layer_params(setup: Setup) -> float:
    """Parameters of one layer as a device uses them: whole but for the split over heads and mlp."""
    blocks = [spec for path, spec in tensors(setup.model) if path.startswith("blocks")]
    return sum(spec.size / setup.kept_split(spec) for spec in blocks) / setup.model.layers


def gathered_bytes(setup: Setup) -> tuple[float, float]:
    """(bytes of gathered layers and the gradient of one, bytes held through the whole step).

    Without remat the backward pass keeps every gathered layer instead of gathering it again.
    """
    if not setup.layout.gathers:
        return setup.model.period * layer_params(setup) * setup.value_bytes, 0.0
    layer = setup.model.period * layer_params(setup) * setup.value_bytes
    keys = 0.0
    if setup.ways(setup.layout.time) > 1:  # keys and values of the whole sequence, and their gradients
        keys = (
            2 * setup.rows * setup.sequence_length * 2 * setup.model.kv_heads * setup.model.head_dim * setup.value_bytes
        )
    whole = setup.model.layers * layer_params(setup) * setup.value_bytes if setup.remat == "none" else 0.0
    return (LAYERS_GATHERED + 1) * layer + keys, whole


def limit(setup: Setup) -> float:
    """Bytes a device that a plan may fill."""
    return SHARE * setup.topology.chip.memory


# ------------------------------------------------------------------------------------------------ attached devices


def needed_on_one_device(
    model: ModelConfig,
    rows: int,
    length: int,
    *,
    remat: str,
    value_bytes: int,
    on_cpu: bool,
    optimizer: str = "adamw",
    lora: LoraConfig | None = None,
    frozen_bytes: int = 2,
) -> Memory:
    """Memory of a step whose `rows` sequences a microbatch and parameters are all on one device."""
    platform = "cpu" if on_cpu else "gpu"
    setup = on_one_device(
        model, rows, length, remat=remat, value_bytes=value_bytes, platform=platform, optimizer=optimizer
    )
    return predict(dataclasses.replace(setup, lora=lora, frozen_bytes=frozen_bytes))


def host_bytes() -> float:
    """Memory this process may use: the machine's, or its control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        if path.exists() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return float(total)


def device_bytes() -> tuple[str, int, float]:
    """(kind, count, total bytes) of the attached devices. Starts jax's backend."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return "CPU", len(devices), host_bytes()
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    per_device = min((s.get("bytes_limit", 0) for s in stats), default=0)
    return devices[0].device_kind, len(devices), float(per_device * len(devices))


def mesh_that_holds(needed: float) -> str:
    """Smallest power-of-two fsdp meshes of common chips that hold `needed` bytes, as text."""
    parts = []
    for name, chip in (("H200", CHIPS["h200"]), ("TPU v5p", CHIPS["v5p"])):
        count = 2 ** math.ceil(math.log2(max(1.0, needed / (chip.memory * SHARE))))
        parts.append(f"data={count} on {count} x {name}")
    return " or ".join(parts)
