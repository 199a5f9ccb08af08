"""What a model is made of: frozen, validated dataclasses, block presets and the paper's sizes.

Letters, the same in the whole package: B batch, T bytes of a sequence, P bytes of a patch,
K = T / P patches, D width (D_G of one byte in the global model, D_L of the local model),
L layers, H heads, V = 256 byte values. The global model is P * D_G wide (paper, section 2.1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from megabyte_jax.errors import UserError, shown

VOCAB_SIZE = 256

NORMS = ("layernorm", "rmsnorm")
ACTIVATIONS = ("relu", "relu2", "gelu", "swiglu")
REMATS = ("none", "dots", "full")
INITS = ("paper", "scaled")
DTYPES = ("float32", "bfloat16")


def _require(ok: bool, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise UserError(f"{name}={shown(value)}: accepted is {accepted}")


def _require_int(name: str, value: object, minimum: int, bits: int = 31) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and minimum <= value < 2**bits
    _require(ok, name, value, f"a whole number of at least {minimum} and below 2**{bits}")


def _require_bool(name: str, value: object) -> None:
    _require(isinstance(value, bool), name, value, "True or False")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    ok = isinstance(value, str) and value in choices
    _require(ok, name, value, "one of " + ", ".join(choices))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One stack of pre-norm blocks: the global or the local model.

    Attributes:
        dim: width D of the residual stream.
        num_layers: number of blocks L.
        num_heads: query heads H.
        head_dim: width of a head; 0 means dim / num_heads.
        num_kv_heads: key and value heads (grouped-query attention); 0 means num_heads.
        mlp_dim: hidden width of the feed-forward layer; 0 means 4 * dim, and for the gated
            swiglu 8 / 3 * dim rounded up to a multiple of 8, which has as many parameters.
        norm: layernorm or rmsnorm.
        activation: relu, relu2 (squared), gelu or swiglu.
        bias: whether linear layers and layernorms have biases.
        qk_norm: RMS normalisation of queries and keys per head.
        rope: rotary positions on queries and keys.
        dropout: probability of dropping attention weights and residual branches in training.
        remat: what the backward pass recomputes: none, dots (all but matrix products) or full.
        scan_unroll: blocks compiled per iteration of the scan over layers; more runs faster on
            CPU and compiles longer.

    Raises:
        UserError: a field is out of range; the message names it.
    """

    dim: int
    num_layers: int
    num_heads: int
    head_dim: int = 0
    num_kv_heads: int = 0
    mlp_dim: int = 0
    norm: str = "layernorm"
    activation: str = "relu"
    bias: bool = True
    qk_norm: bool = False
    rope: bool = False
    dropout: float = 0.0
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads"):
            _require_int(name, getattr(self, name), 1, bits=20)
        for name in ("num_layers", "scan_unroll"):
            _require_int(name, getattr(self, name), 1, bits=12)
        for name in ("head_dim", "num_kv_heads", "mlp_dim"):
            _require_int(name, getattr(self, name), 0, bits=22)
        _require_choice("norm", self.norm, NORMS)
        _require_choice("activation", self.activation, ACTIVATIONS)
        _require_choice("remat", self.remat, REMATS)
        for name in ("bias", "qk_norm", "rope"):
            _require_bool(name, getattr(self, name))
        # What is kept is divided by its probability, which in float32 must not round to 0.
        ok = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        _require(
            ok and 0 <= self.dropout <= 0.99, "dropout", self.dropout, "a number from 0 to 0.99"
        )
        if not self.head_dim:
            _require(
                self.dim % self.num_heads == 0,
                "dim",
                self.dim,
                f"a multiple of num_heads={self.num_heads}, or head_dim set",
            )
        _require(
            self.num_heads % self.kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        if self.rope:
            _require(self.head_width % 2 == 0, "head_dim", self.head_width, "an even width (rope)")

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward layer."""
        if self.mlp_dim:
            return self.mlp_dim
        return 8 * math.ceil(self.dim / 3) if self.activation == "swiglu" else 4 * self.dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class MegabyteConfig:
    """A MEGABYTE model (paper, section 2).

    Attributes:
        seq_len: longest sequence T in bytes; a multiple of patch_size.
        patch_size: bytes P of a patch.
        global_model: transformer over patches; its dim is P * D_G, so P must divide it.
        local_model: transformer over the bytes of a patch, D_L wide.
        cross_patch: how many last elements r of the previous patch the local attention also
            sees (section 2.3.2); 0 turns that off and -1 means the whole patch.
        conv_kernels: widths of the causal convolutions of the patch encoder (section 2.3.1: 3, 5
            and 7); none by default.
        byte_positions: learned absolute position of every byte, E_pos (equation 1).
        local_positions: learned position inside the patch (confirmed by the authors in review).
        init: paper (truncated normal of 0.006, residual outputs divided by sqrt(2 L)) or scaled
            (weights of 1 / sqrt(fan_in), residual streams that start at a scale of 0.3, so that
            Adam soon changes them, and logits that start at a scale of 1).
        dtype: type of the computation; softmax and loss are float32 always.
        param_dtype: type of the parameters; in bfloat16 an update much smaller than a weight is
            lost in rounding.
        group_size: how many patches the local model and the loss take at a time in training and
            evaluation, recomputed in the backward pass: memory then does not grow with T. A
            divisor of the K patches of seq_len; 0 takes them all at once.

    Raises:
        UserError: a field is out of range; the message names it.
    """

    seq_len: int
    patch_size: int
    global_model: TransformerConfig
    local_model: TransformerConfig
    cross_patch: int = -1
    conv_kernels: tuple[int, ...] = ()
    byte_positions: bool = True
    local_positions: bool = True
    init: str = "paper"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    group_size: int = 0

    def __post_init__(self) -> None:
        _require_int("patch_size", self.patch_size, 1)
        _require_int("seq_len", self.seq_len, 1)
        _require(
            self.seq_len % self.patch_size == 0,
            "seq_len",
            self.seq_len,
            f"a multiple of patch_size={self.patch_size}",
        )
        _require_int("cross_patch", self.cross_patch, -1)
        _require(
            self.cross_patch <= self.patch_size,
            "cross_patch",
            self.cross_patch,
            f"at most patch_size={self.patch_size}",
        )
        kernels = self.conv_kernels
        ok = isinstance(kernels, tuple) and all(
            isinstance(kernel, int) and not isinstance(kernel, bool) and 1 <= kernel <= self.seq_len
            for kernel in kernels[:17]
        )
        _require(
            ok and len(kernels) <= 16,
            "conv_kernels",
            kernels,
            "a tuple of at most 16 widths up to seq_len, such as (3, 5, 7)",
        )
        for name in ("byte_positions", "local_positions"):
            _require_bool(name, getattr(self, name))
        _require_choice("init", self.init, INITS)
        for name in ("dtype", "param_dtype"):
            _require_choice(name, getattr(self, name), DTYPES)
        _require_int("group_size", self.group_size, 0)
        K = self.seq_len // self.patch_size
        _require(
            not self.group_size or K % self.group_size == 0,
            "group_size",
            self.group_size,
            f"0 or a divisor of the {K} patches of seq_len={self.seq_len}",
        )
        if self.global_model.dim % self.patch_size:
            raise UserError(
                f"global_model.dim={self.global_model.dim}: accepted is a multiple of "
                f"patch_size={self.patch_size}; nearest that work: "
                + ", ".join(map(str, _nearest_widths(self.global_model, self.patch_size)))
            )

    @property
    def byte_dim(self) -> int:
        """Width D_G of one byte in the global model."""
        return self.global_model.dim // self.patch_size

    @property
    def previous(self) -> int:
        """How many elements r of the previous patch the local attention sees."""
        return self.patch_size if self.cross_patch < 0 else self.cross_patch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTransformerConfig:
    """The baseline of the paper: one decoder over bytes (section 4, "Transformer").

    Attributes:
        seq_len: longest sequence T in bytes.
        transformer: the stack.
        window: how many last bytes, its own included, a byte attends to in each layer; 0 for all.
        byte_positions: learned absolute position of every byte.
        init: as in `MegabyteConfig`.
        dtype: as in `MegabyteConfig`.
        param_dtype: as in `MegabyteConfig`.

    Raises:
        UserError: a field is out of range; the message names it.
    """

    seq_len: int
    transformer: TransformerConfig
    window: int = 0
    byte_positions: bool = True
    init: str = "paper"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        _require_int("seq_len", self.seq_len, 1)
        _require_int("window", self.window, 0)
        _require(
            self.window < self.seq_len,
            "window",
            self.window,
            f"below seq_len={self.seq_len}; 0 for no window",
        )
        _require_bool("byte_positions", self.byte_positions)
        _require_choice("init", self.init, INITS)
        for name in ("dtype", "param_dtype"):
            _require_choice(name, getattr(self, name), DTYPES)

    @property
    def patch_size(self) -> int:
        """One byte: what is done per patch, this model does per byte."""
        return 1


ModelConfig = MegabyteConfig | ByteTransformerConfig


def _nearest_widths(config: TransformerConfig, patch_size: int) -> list[int]:
    heads = 1 if config.head_dim else config.num_heads * (2 if config.rope else 1)
    step = math.lcm(patch_size, heads)
    below = config.dim // step * step
    return [below, below + step] if below else [step]


def from_mapping(model: Mapping[str, Any]) -> ModelConfig:
    """Builds the model's config from `config.model` or from its stored JSON.

    Args:
        model: the fields of `ByteTransformerConfig`, if `transformer` is one of them, else those
            of `MegabyteConfig`; the transformers as nested mappings.

    Returns:
        The validated config.

    Raises:
        UserError: a field is unknown, missing or out of range; named as `model.FIELD`.
    """
    _require(isinstance(model, Mapping), "model", model, "a mapping of fields to values")
    fields = dict(model)
    baseline = "transformer" in fields
    for name in ("transformer",) if baseline else ("global_model", "local_model"):
        fields[name] = _build(TransformerConfig, f"model.{name}", fields.get(name, {}))
    if isinstance(fields.get("conv_kernels"), list):  # as JSON has it
        fields["conv_kernels"] = tuple(fields["conv_kernels"])
    return _build(ByteTransformerConfig if baseline else MegabyteConfig, "model", fields)


def _build(cls: type, path: str, fields: Mapping[str, Any]) -> Any:
    known = {field.name: field.default for field in dataclasses.fields(cls)}
    names = ", ".join(known)
    _require(isinstance(fields, Mapping), path, fields, f"the fields {names}")
    for name in fields:
        if name not in known:
            raise UserError(f"{path}.{shown(name)[1:-1]}: unknown; accepted are {names}")
    for name, default in known.items():
        if default is dataclasses.MISSING and name not in fields:
            raise UserError(f"{path}: {name} is missing; accepted are {names}")
    try:
        return cls(**fields)
    except UserError as error:
        raise UserError(f"{path}.{error}") from None
