import pytest

from resbackbone.checks import UserError
from resbackbone.engine.metrics import read_metrics


def test_the_lines_of_one_kind_or_of_all(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "eval", "step": 1, "AP": 0.5}\n')
    assert read_metrics(tmp_path, "eval") == [{"kind": "eval", "step": 1, "AP": 0.5}]
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["train", "eval"]


@pytest.mark.parametrize("line", ["", "null", "[]", "{}", '{"step": "3"}', "\x00\x00", '{"kind": "train", "st', "é"])
def test_a_line_that_is_cut_short_or_strange_is_skipped(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line.encode("latin-1"))
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_missing_or_unreadable_file_is_named(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read \("):
        read_metrics(tmp_path)
