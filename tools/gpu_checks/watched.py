"""tools/train_coco.py that records the images of each update, and can kill itself after one.

python watched.py FILE KILL_AFTER [OPTIONS of train_coco.py]     KILL_AFTER 0: never
"""

import json
import os
import signal
import sys
from pathlib import Path

import resbackbone

resbackbone.__path__.append(str(Path(__file__).parents[2]))  # resbackbone.tools, where this package is not installed

from resbackbone.cli.command import main_of  # noqa: E402

from resbackbone.engine.state import TrainState  # noqa: E402
from resbackbone.tools import train_coco  # noqa: E402


def watch(file: Path, kill_after: int) -> None:
    update = TrainState.update

    def watched(state, losses_of, parts, **options):
        values = update(state, losses_of, parts, **options)
        ids = [target["image_id"] for part in parts for target in part[1]]
        with open(file, "a") as lines:
            lines.write(json.dumps([state.step, ids]) + "\n")
        if state.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return values

    TrainState.update = watched  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]))
    main_of(lambda: train_coco.main(sys.argv[3:]))
