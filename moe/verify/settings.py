"""The settings of a decoder in a file; needs pyyaml, which ``moe-torch[train]`` brings."""

from pathlib import Path
from typing import Any

from moe.errors import ConfigError

try:
    import yaml
except ImportError as error:
    raise ImportError("python -m moe.verify needs the package pyyaml: pip install 'moe-torch[train]'") from error


def read_settings(path: Path) -> dict[str, Any]:
    """Keyword arguments of ``moe.models.DecoderConfig``.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"model={path} cannot be read: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"model={path} must be a mapping of DecoderConfig's settings, such as `dim: 64`")
    return settings
