"""The configuration of a training run: one flat YAML file, read into frozen pydantic models.

``load_config("configs/classification/digits_vig_atto.yaml", ["optim.lr=3e-4"])`` returns a RunConfig or raises a
ConfigError of one line that names the file (or override), the dotted key, what was found and the nearest valid key.
There is no inheritance between files; ``type`` selects the schema of a section, ``name`` is a name of a registry.

schema.py says which keys there are, reading.py reads them, checking.py finds and words the mistakes.
"""

from vision_gates.config.checking import nearest
from vision_gates.config.reading import dump_config, find_config, load_config, parse_config, save_config
from vision_gates.config.schema import MONITORS, RunConfig

__all__ = [
    "MONITORS",
    "RunConfig",
    "dump_config",
    "find_config",
    "load_config",
    "nearest",
    "parse_config",
    "save_config",
]
