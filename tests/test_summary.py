import json

import pytest

from resbackbone.report.summary import summary


def write(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def trained(step, seconds, data_seconds, **values):
    line = {"kind": "train", "step": step, "seconds": seconds, "data_seconds": data_seconds, "loss": 1.5}
    return {**line, "images_per_second": 4 / seconds, "memory_mib": 2000.0, **values}


def rows(said):
    return dict(line.strip().split("  ", 1) for line in said.splitlines() if line.startswith("  "))


def test_a_summary_weights_the_metrics_by_their_number_of_updates(tmp_path):
    run = tmp_path / "a-folder-of-a-name-so-long-that-no-table-of-eighty-columns-would-hold-it"
    write(
        run,
        trained(10, 2.0, 0.5, memory_mib=2500.0),
        {"kind": "eval", "step": 10, "AP": 0.1, "seconds": 30.0},
        trained(30, 1.0, 0.0, loss=0.25),
        {"kind": "eval", "step": 30, "AP": 0.2, "seconds": 35.0},
    )
    (run / "model.safetensors").touch()
    said = summary(run, {"AP": "20.0"}, {"detector": "model.safetensors", "report": "report.html"})
    assert {name: value.strip() for name, value in rows(said).items()} == {
        "updates": "30",
        "images": "120",
        "time": "40 s of updates, 1:05 min of evaluation",
        "images per second": "3.0",
        "waiting for data": "12% of the updates' time",
        "memory": "2,500 MiB at most",
        "loss": "0.250 in the last 20 updates",
        "AP": "20.0",
    }
    assert said.endswith(f"detector: {run}/model.safetensors") and "report" not in said


@pytest.mark.parametrize(
    "lines",
    [(), ({"kind": "eval", "step": 0, "AP": 0.1, "seconds": 3.0},), ({"kind": "train", "step": 1, "loss": 2.0},)],
)
def test_a_run_without_updates_has_a_summary_too(lines, tmp_path):
    write(tmp_path, *lines)
    assert summary(tmp_path, {"AP": "n/a"}, {}) == "Summary\n  updates  none in this run's metrics\n  AP       n/a"
