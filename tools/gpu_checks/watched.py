"""tools/train_coco.py that notes which images each update had, and may kill itself behind one.

python watched.py NOTES KILL_AFTER [OPTIONS of train_coco.py]     KILL_AFTER 0: not at all
"""

import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import resbackbone  # noqa: E402

resbackbone.__path__.append(str(ROOT))  # resbackbone.tools, where this package is not installed

from resbackbone.cli.command import main_of  # noqa: E402

from resbackbone.engine import loop  # noqa: E402
from resbackbone.tools import train_coco  # noqa: E402


def watch(notes: Path, kill_after: int) -> None:
    train = loop.train

    def watched(state, *arguments, after_update, **options) -> None:
        def noted(batch: tuple[list, list[dict]]) -> None:
            with open(notes, "a") as file:
                file.write(json.dumps([state.step, [target["image_id"] for target in batch[1]]]) + "\n")
            if state.step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            after_update(batch)

        train(state, *arguments, after_update=noted, **options)

    loop.train = watched


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]))
    main_of(lambda: train_coco.main(sys.argv[3:]))
