"""What the files of a model's folder may name: nothing outside of it, and no code.

transformers follows such names without asking. Reads JSON alone and imports none of its code.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spd.config import UserError, shown
from spd.run_files import read_json

CODE_ON_THE_HUB = ("attn_implementation", "experts_implementation")
"""ends of the settings by which a config.json may name kernels: code that would be fetched and run"""


def check_folder(directory: Path) -> None:
    """`UserError` if what a folder of transformers holds leads out of it, or to code on the hub."""
    for path in sorted(directory.glob("*.index.json")):
        index = read_json(path)
        places = index.get("weight_map") if isinstance(index, dict) else None
        for name in places.values() if isinstance(places, dict) else [places]:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(
                    f"{path}: weight_map: {shown(name)}: the name of a file beside it is needed"
                )
    adapter = directory / "adapter_config.json"
    if adapter.is_file():
        raise UserError(
            f"{adapter}: an adapter, which leads to another model; save the model with the adapter merged"
            " into it"
        )
    settings = directory / "config.json"
    for key, value in _named(read_json(settings)) if settings.is_file() else ():
        if key.endswith(CODE_ON_THE_HUB) and "/" in value:
            raise UserError(
                f"{settings}: {key}: {shown(value)} is code on the hub, which is not run"
            )


def _named(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text below a value, with the key that it belongs to: of a group that of the group, too."""
    if isinstance(value, str):
        yield key, value
    for name, below in value.items() if isinstance(value, dict) else ():
        yield from _named(below, key if key.endswith(CODE_ON_THE_HUB) else str(name))
    for below in value if isinstance(value, list) else ():
        yield from _named(below, key)
