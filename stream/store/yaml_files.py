"""Reading a configuration: a YAML file that holds a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stream.records.errors import ConfigurationError


def read_mapping(path: Path) -> Mapping[str, Any]:
    """Return the mapping in a YAML file.

    Raises
    ------
    ConfigurationError
        The file cannot be read, is not YAML, or holds something else; names the file.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(path, f"the configuration must be readable: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            path, f"the configuration must be YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(document, Mapping):
        raise ConfigurationError(path, "the configuration must be a mapping of keys", type(document).__name__)
    return document
