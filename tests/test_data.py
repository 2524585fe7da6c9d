"""Reading data: every format gives the same rows; bad files say what is wrong and where."""

import json
import os
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import train_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from schemas.base import BadInput
from schemas.curriculum import DataSource
from sdft.data import data_hash, eval_table, train_table
from sdft.sources import read_rows

ROWS = [
    {"id": "007", "prompt": "Say NA", "response": "NA"},
    {"id": "008", "prompt": "Line\nbreak, and a comma", "response": "42"},
]


def read(source: DataSource | Path, tmp_path: Path, kind: str = "train") -> list[dict]:
    if isinstance(source, Path):
        source = DataSource(path=str(source))
    return read_rows(source, kind, tmp_path / "cache")


def test_the_same_rows_in_any_format_are_the_same_data(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.JSON").write_text(json.dumps(ROWS))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "directory")
    split = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    split.save_to_disk(tmp_path / "splits")
    names = ["rows.csv", "rows.parquet", "rows.jsonl", "rows.JSON", "directory", "splits"]
    hashes = {name: data_hash(train_table(read(tmp_path / name, tmp_path))) for name in names}
    assert len(set(hashes.values())) == 1, hashes
    assert train_table(ROWS)["response"].to_pylist() == ["NA", "42"]


def test_columns_are_mapped_and_messages_kept(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"q": turns, "a": "Hi", "other": 1}])
    source = DataSource(path=str(path), columns={"prompt": "q", "response": "a"})
    table = train_table(read(source, tmp_path))
    assert table["messages"].to_pylist() == [turns]
    assert table["response"].to_pylist() == ["Hi"]


def test_anchors_need_no_answer(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "asked.jsonl", [{"q": "Hello", "other": 1}])
    rows = read(DataSource(path=str(path), columns={"prompt": "q"}), tmp_path, "anchors")
    assert train_table(rows)["response"].to_pylist() == [None]
    with pytest.raises(BadInput, match=r"has no column 'response' \(for response\)"):
        read(DataSource(path=str(path), columns={"prompt": "q"}), tmp_path)
    with pytest.raises(BadInput, match="maps response, which is none of ours"):
        read(DataSource(path=str(path), columns={"response": "q"}), tmp_path, "anchors")


def test_a_change_in_any_row_or_their_order_changes_the_hash() -> None:
    base = data_hash(train_table(ROWS))
    assert data_hash(train_table(ROWS[::-1])) != base
    for field in ("id", "prompt", "response"):
        changed = [{**ROWS[0], field: "other"}, ROWS[1]]
        assert data_hash(train_table(changed)) != base


@given(st.lists(st.text(), min_size=1, max_size=5, unique=True))
def test_any_text_survives_canonicalisation(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    table = eval_table([{"prompt": text, "references": [text]} for text in texts])
    assert table["references"].to_pylist() == [[text] for text in texts]
    assert len(set(table["row_hash"].to_pylist())) == len(set(texts))


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    good = write_jsonl(folder / "good.jsonl", train_rows(3))
    pd.DataFrame(ROWS).to_parquet(folder / "cut.parquet")
    content = (folder / "cut.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(content[: len(content) // 2])
    (folder / "empty.jsonl").touch()
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "response": "x"}\n')
    (folder / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    (folder / "nan.jsonl").write_text('{"prompt": "a", "response": "b", "metadata": NaN}\n')
    (folder / "large.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "metadata": [1e999]}\n')
    (folder / "half.jsonl").write_text('{"prompt": "\\ud83d", "response": "b"}\n')
    (folder / "rows.txt").write_text("hello")
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "shifted.csv").write_text("prompt,response\na,b\nc,d, e\n")
    (folder / "twice.csv").write_text("prompt,response,prompt\na,b,c\n")
    (folder / "semicolons.csv").write_text("prompt;response\na;b\n")
    write_jsonl(folder / "chats.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    (folder / "mark.csv").write_bytes(b"\xef\xbb\xbf")
    (folder / "deep.jsonl").write_text('{"prompt": ' + "[" * 10**5 + "]" * 10**5 + "}\n")
    write_jsonl(folder / "columns.jsonl", [{"question": "a", "answer": "b"}])
    assert good.is_file()
    return {
        "missing": (folder / "nowhere.jsonl", "there is no such file"),
        "empty": (folder / "empty.jsonl", "is empty"),
        "truncated": (folder / "cut.parquet", "cannot be read"),
        "not UTF-8": (
            folder / "latin.jsonl",
            r"no UTF-8 text \(byte 0xe9 at 15\); save it as UTF-8",
        ),
        "no dataset": (folder, r"none that datasets\.save_to_disk has written"),
        "semicolons": (folder / "semicolons.csv", "separated by something else than commas"),
        "chats": (folder / "chats.jsonl", "has no column 'prompt'.*prompt is the messages before"),
        "broken JSON": (folder / "broken.jsonl", r"broken\.jsonl:2: is no JSON"),
        "NaN": (folder / "nan.jsonl", r"nan\.jsonl:1: holds what is no text or number: NaN"),
        "infinity": (folder / "large.jsonl", r"large\.jsonl:2: .*1e999 is no number"),
        "half a character": (folder / "half.jsonl", r"half\.jsonl:1: .*surrogates not allowed"),
        "no object": (folder / "list.jsonl", r"list\.jsonl:1: holds something else"),
        "no rows": (folder / "blank.jsonl", "has no rows"),
        "shifted CSV": (folder / "shifted.csv", r"shifted\.csv:3: has 3 fields, the header 2"),
        "column twice": (folder / "twice.csv", r"twice\.csv:1: has two columns 'prompt'"),
        "CSV without a header": (folder / "mark.csv", "has no rows"),
        "deep JSON": (folder / "deep.jsonl", r"deep\.jsonl:1: is nested too deeply"),
        "unknown kind": (folder / "rows.txt", r"is none of \.jsonl"),
        "columns": (folder / "columns.jsonl", "has no column 'prompt'.*question, answer"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "empty",
        "truncated",
        "not UTF-8",
        "no dataset",
        "semicolons",
        "chats",
        "broken JSON",
        "NaN",
        "infinity",
        "half a character",
        "no object",
        "no rows",
        "shifted CSV",
        "column twice",
        "CSV without a header",
        "deep JSON",
        "unknown kind",
        "columns",
    ],
)
def test_bad_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path, message = bad_files(tmp_path)[name]
    with pytest.raises(BadInput, match=message) as error:
        read(path, tmp_path)
    assert str(path) in str(error.value)


def test_line_ends_of_other_alphabets_are_text(tmp_path: Path) -> None:
    said = "a\u2028b\u2029c\u0085d \U0001f600"
    row = json.dumps({"prompt": said, "response": "\U0001f600"})
    raw = json.dumps({"prompt": said, "response": "e"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(f"{row}\r\n{raw}\r\n".encode())
    first, second = read(tmp_path / "rows.jsonl", tmp_path)
    assert first == {"prompt": said, "response": "\U0001f600"}
    assert second == {"prompt": said, "response": "e"}


def test_what_pandas_calls_missing_is_null(tmp_path: Path) -> None:
    scores = [{"metadata": {"score": score}} for score in (0.5, float("nan"))]
    rows = [row | score for row, score in zip(train_rows(2), scores, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    table = train_table(read(tmp_path / "rows.parquet", tmp_path))
    assert table["metadata"].to_pylist() == ['{"score":0.5}', '{"score":null}']


def test_texts_stay_texts(tmp_path: Path) -> None:
    rows = [{"id": "2024-01-01", "prompt": "2024-01-01", "response": "2024-01-02T00:00:00"}]
    assert read(write_jsonl(tmp_path / "dates.jsonl", rows), tmp_path) == rows
    (tmp_path / "dates.csv").write_text(
        "\ufeffid,prompt,response\n2024-01-01,2024-01-01,2024-01-02T00:00:00\n", encoding="utf-8"
    )
    assert read(tmp_path / "dates.csv", tmp_path) == rows


def test_a_field_of_csv_may_be_a_whole_document(tmp_path: Path) -> None:
    document = 'He said "no",\r\nthen left.\n' * 10**4
    row = {"prompt": "Sum up", "response": "", "context": document}
    quoted = document.replace('"', '""')
    (tmp_path / "long.csv").write_text(
        f'prompt,response,context\n\nSum up,,"{quoted}"\n\n', encoding="utf-8", newline=""
    )
    assert read(tmp_path / "long.csv", tmp_path) == [row]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_rows_with_the_same_name_and_time_are_other_rows(kind: str, tmp_path: Path) -> None:
    """As archives and copies that keep times leave them."""
    path = tmp_path / f"rows.{kind}"
    for rows in (ROWS, ROWS[::-1]):
        frame = pd.DataFrame(rows)
        frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
        os.utime(path, (10**9, 10**9))
        assert read(path, tmp_path) == rows
    assert not (tmp_path / "cache").exists()


def test_columns_that_are_none_of_ours_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    source = DataSource(path=str(path), columns={"answer": "response"})
    with pytest.raises(BadInput, match="columns maps answer"):
        read(source, tmp_path)
