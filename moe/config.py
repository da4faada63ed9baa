"""Options that a layer understands, each member explained, and how a name in a config becomes an object."""

import inspect
import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, TypeVar

from moe.errors import ConfigError

Made = TypeVar("Made")
Option = TypeVar("Option", bound=StrEnum)


class Activation(StrEnum):
    """What stands between an expert's two products."""

    SWIGLU = "swiglu"
    """silu(gate) * up, two products of ``hidden_dim`` wide (Shazeer 2020, arXiv 2002.05202)."""
    GELU = "gelu"
    """Exact Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    RELU = "relu"
    """max(0, up)."""
    RELU_SQUARED = "relu_squared"
    """max(0, up)^2 (So et al. 2021, arXiv 2109.08668)."""

    @property
    def is_gated(self) -> bool:
        """Whether the first product yields a gate beside its values."""
        return self is Activation.SWIGLU


class DropPolicy(StrEnum):
    """Which assignments an expert keeps when more arrive than its capacity."""

    POSITION = "position"
    """The earliest tokens of the batch. Causal within a sequence, blind to how much each token wants the expert."""
    PROBABILITY = "probability"
    """The highest scores, earlier tokens first among equals. A later token can push out an earlier one."""


class NullOutput(StrEnum):
    """What a null expert, one that computes nothing, gives back for a token."""

    ZERO = "zero"
    """Nothing: the token gets less of the others (AdaMoE, arXiv 2406.13233)."""
    IDENTITY = "identity"
    """The token itself, times its weight (LongCat-Flash, arXiv 2509.01322)."""


class Recompute(StrEnum):
    """What the experts compute again in backward instead of keeping it, to the same bits."""

    NONE = "none"
    """Nothing: the up projection's output is kept, top_k * U numbers a token (U = 2 * hidden_dim where gated)."""
    UP = "up"
    """The up projection: one product of six more, and only the layer's input and the routing are kept."""


def option(kind: type[Option], name: str, value: str) -> Option:
    """Return the member of an enum that a user named.

    Raises:
        ConfigError: ``value`` is no member; the message lists them.
    """
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} is unknown; choose one of {', '.join(kind)}") from None


def make(name: str, spec: str | Mapping[str, Any], registry: Mapping[str, Callable[..., Made]], **fixed: Any) -> Made:
    """Build what a config names.

    Args:
        name: the argument this is for, named in errors.
        spec: a key of ``registry``, or a mapping ``{"name": key, option: value, ...}``.
        registry: what can be built, by name.
        fixed: keyword arguments that the caller decides, not the config.

    Raises:
        ConfigError: an unknown name or an option that the chosen one does not have.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    key = str(options.pop("name", None))
    if key not in registry:
        near = get_close_matches(key, registry, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}={key!r} is unknown; choose one of {', '.join(registry)}{hint}")
    return construct(f"{name}={key!r}", registry[key], {**fixed, **options})


def construct(name: str, builder: Callable[..., Made], options: Mapping[str, Any]) -> Made:
    """Call a builder with the options of a config.

    Args:
        name: what the options are of, named in errors.
        builder: a class or function with named parameters.
        options: its arguments by name.

    Raises:
        ConfigError: an option that the builder does not have, or one that it needs and that is missing.
    """
    try:
        _signature(builder).bind(**options)
    except TypeError as error:
        raise ConfigError(f"{name} does not take these options: {error}") from None
    return builder(**options)


def _signature(builder: Callable[..., Any]) -> inspect.Signature:
    """What a builder takes by name; of a class that hands ``**options`` on to its base, the base's parameters too."""
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters: dict[str, inspect.Parameter] = {}
    if not isinstance(builder, type):
        return inspect.signature(builder)
    for part in builder.__mro__:
        theirs = inspect.signature(part).parameters.values()
        named = {p.name: p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in theirs if p.kind not in kinds}
        parameters = named | parameters
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in theirs):
            break
    return inspect.Signature(list(parameters.values()))


def require_positive(**values: Any) -> None:
    """Raise a ConfigError that names the first argument that is not a finite number above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name}={value!r} must be a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value} must be finite")
        if not value > 0:
            raise ConfigError(f"{name}={value} must be positive")


def require_positive_integer(**values: Any) -> None:
    """Raise a ConfigError that names the first argument that is not a whole number above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}={value!r} must be a whole number")
    require_positive(**values)


def require_top_k(top_k: Any, num_experts: Any) -> None:
    """Raise a ConfigError unless 1 <= top_k <= num_experts."""
    require_positive_integer(num_experts=num_experts)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise ConfigError(f"top_k={top_k!r} must be a whole number")
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
