"""A part's input (`Setting`) and output (`Record`), which is saved after every row."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resbackbone.atomic import write_json

ENOUGH = 70e9  # bytes of a GPU's memory with which no batch is made smaller


@dataclass(frozen=True)
class Setting:
    """How a part is run."""

    part: str
    device: str  # "cuda:1" or "cpu"
    scratch: Path  # a folder that is removed at the end
    until: float = float("inf")  # the time (time.time()) at which it is stopped

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def batches(self, *sizes: int) -> list[int]:
        """These batch sizes on a GPU, above 2 smaller if it has little memory; on a CPU only the first, up to 2."""
        if not self.on_gpu:
            return [min(2, sizes[0])]
        share = min(1.0, torch.cuda.get_device_properties(self.device).total_memory / ENOUGH)
        return sorted({max(min(size, 2), int(size * share)) for size in sizes})


class Record:
    """The results of one part. Its file is rewritten with every row, so a part that is stopped keeps its rows."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = {"status": "unfinished", "rows": [], "details": {}}

    def row(self, what: str, value: Any, wanted: str = "", ok: bool | None = None) -> None:
        """Add a line to the part's table. `ok` says whether the value is as it should be, if that can be said."""
        self.content["rows"].append({"what": what, "value": value, "wanted": wanted, "ok": ok})
        self.write()

    def at_most(self, what: str, value: float, limit: float) -> None:
        """Add a row whose value must neither exceed `limit` nor be NaN."""
        self.row(what, value, f"at most {limit:.3g}", bool(value <= limit))

    def detail(self, name: str, value: Any) -> None:
        """Add what is too long for the table."""
        self.content["details"][name] = value
        self.write()

    def write(self) -> None:
        write_json(self.path, self.content, indent=1)

    @property
    def differs(self) -> bool:
        return any(row["ok"] is False for row in self.content["rows"])
