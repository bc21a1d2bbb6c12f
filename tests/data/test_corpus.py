"""Documents of a source: real files through the real readers, and the place of whatever is wrong."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrok.config.schema import SourceConfig
from megagrok.data.corpus import find_sources, read_documents
from megagrok.errors import DataError

TEXTS = ["First.\nTwo lines.", "Zweiter Text: schön.", "日本語", "a\u2028b\u0085c"]


def read(kind, path, **settings) -> list[str]:
    config = SourceConfig(kind=kind, path=None if path is None else str(path), **settings)
    return [document.text for source in find_sources((config,)) for document in read_documents(source)]


def refusal(kind, path, **settings) -> str:
    with pytest.raises(DataError) as caught:
        read(kind, path, **settings)
    return str(caught.value)


def write_jsonl(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def test_text_files_are_documents_whole(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "other.rst").write_text("not asked for")
    assert read("text", tmp_path) == TEXTS
    assert read("text", tmp_path / "*.rst") == ["not asked for"]
    assert read("text", tmp_path / "0.txt") == TEXTS[:1]


def test_names_that_look_like_globs_are_read(tmp_path):
    (tmp_path / "a[1]*.txt").write_text("bracket")
    assert read("text", tmp_path / "a[1]*.txt") == read("text", tmp_path) == ["bracket"]


def test_json_lines_are_documents(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text, "id": i} for i, text in enumerate(TEXTS)])
    assert read("jsonl", path) == TEXTS
    with gzip.open(tmp_path / "y.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    assert read("jsonl", tmp_path / "y.jsonl.gz") == TEXTS
    assert read("jsonl", tmp_path) == TEXTS * 2


def test_json_lines_may_change_the_types_of_other_keys(tmp_path):
    lines = [{"text": "a", "meta": 1}, {"meta": {"x": "y"}, "text": "b"}, {"text": "c", "meta": None, "more": [1, "2"]}]
    assert read("jsonl", write_jsonl(tmp_path / "x.jsonl", lines)) == ["a", "b", "c"]


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip),
        min_size=1,
        max_size=8,
    )
)
def test_every_text_survives_json_and_parquet(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("x")
    assert read("jsonl", write_jsonl(folder / "x.jsonl", [{"body": t} for t in texts]), text_field="body") == texts
    pq.write_table(pa.table({"n": range(len(texts)), "body": texts}), folder / "x.parquet", row_group_size=3)
    assert read("parquet", folder / "x.parquet", text_field="body") == texts


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "x.txt").write_bytes("\ufeffhello".encode())
    (tmp_path / "x.jsonl").write_bytes('\ufeff{"text": "hello"}'.encode())
    assert read("text", tmp_path / "x.txt") == read("jsonl", tmp_path / "x.jsonl") == ["hello"]


def test_the_document_that_reaches_max_bytes_is_the_last(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "ä" * 50} for _ in range(10)])
    assert len(read("jsonl", path, max_bytes=300)) == 3
    assert len(read("jsonl", path, max_bytes=301)) == 4
    assert len(read("jsonl", path, max_bytes=1)) == 1


def test_the_stdlib_has_code_and_prose_in_a_fixed_order():
    (source,) = find_sources((SourceConfig(kind="python_stdlib", max_bytes=2_000_000),))
    documents = list(read_documents(source))
    assert documents == list(read_documents(source))
    prose = [d for d in documents if d.place.startswith("pydoc_data.topics/")]
    assert len(prose) >= 3 and len(documents) - len(prose) >= 50
    size = sum(len(d.text.encode()) for d in documents)
    assert 2_000_000 <= size < 3_000_000
    places = {d.place for d in read_documents(find_sources((SourceConfig(kind="python_stdlib"),))[0])}
    assert "enum.py" in places and "json/decoder.py" in places and "pydoc_data.topics/assert" in places
    assert not any(part in ("test", "tests", "site-packages") for place in places for part in place.split("/"))


def test_paths_that_lead_nowhere_are_all_named(tmp_path):
    (tmp_path / "empty").mkdir()
    configs = [
        SourceConfig(kind="text", path=str(tmp_path / "gone.txt")),
        SourceConfig(kind="jsonl", path=str(tmp_path / "x_*.jsonl")),
        SourceConfig(kind="parquet", path=str(tmp_path / "empty")),
        SourceConfig(kind="text"),
        SourceConfig(kind="python_stdlib", path="x"),
    ]
    with pytest.raises(DataError) as caught:
        find_sources(tuple(configs))
    lines = str(caught.value).splitlines()
    assert "data.sources[0].path" in lines[0] and "no such file or folder" in lines[0]
    assert "data.sources[1].path" in lines[1] and lines[1].endswith("x_*.jsonl matches no file")
    assert "data.sources[2].path" in lines[2] and "the folder holds no .parquet file" in lines[2]
    assert "data.sources[3].path is not given; kind text needs a file, a folder or a glob" in lines[3]
    assert "data.sources[4].path = x: python_stdlib takes no path" in lines[4]


def test_a_file_read_twice_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"data\.sources\[1\]: .*x\.jsonl is already read by data\.sources\[0\]"):
        find_sources((SourceConfig(kind="jsonl", path=str(path)), SourceConfig(kind="jsonl", path=str(tmp_path))))
    stdlib = SourceConfig(kind="python_stdlib")
    with pytest.raises(DataError, match=r"is already read by data\.sources\[0\]"):
        find_sources((stdlib, stdlib))


@pytest.mark.parametrize("content", ["", "\n\n  \n", '{"text": " "}\n'])
def test_a_source_without_documents_is_refused(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    assert "x.jsonl: no documents" in refusal("jsonl", tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "a", "id": 3}', "x.jsonl line 3: no 'text' key (keys: 'txt', 'id')"),
        ("{}", "x.jsonl line 3: no 'text' key (keys: none)"),
        ('{"text": "a"', "x.jsonl line 3: not JSON"),
        ("[" * 100_000, "x.jsonl line 3: not JSON"),
        ('{"text": "a\0"}', "x.jsonl line 3: not JSON"),
        ('["a"]', "x.jsonl line 3: a list, needs an object with the key 'text'"),
        ('"text"', "x.jsonl line 3: a text, needs an object"),
        ('{"text": null}', "x.jsonl line 3: 'text' is null, needs text"),
        ('{"text": 7}', "x.jsonl line 3: 'text' is 7, needs text"),
        ('{"text": {"a": 1}}', "x.jsonl line 3: 'text' is an object, needs text"),
        ('{"text": "ab\\u0000"}', "x.jsonl line 3: NUL at character 2"),
        ('{"text": "abc\\ud800d"}', "x.jsonl line 3: lone surrogate U+D800 at character 3"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    assert message in refusal("jsonl", tmp_path / "x.jsonl")


def test_what_is_not_utf8_is_named_with_its_byte(tmp_path):
    path = tmp_path / "x.jsonl"
    good = b'{"text": "good"}\n' * 100_000
    path.write_bytes(good + b'{"text": "caf\xe9"}\n')
    assert f"x.jsonl byte {len(good) + 13:,}: not UTF-8 (0xe9)" in refusal("jsonl", path)
    path.write_text('{"text": "a"}\n', encoding="utf-16")
    assert "x.jsonl byte 0: not UTF-8 (0xff 0xfe = UTF-16; convert with: iconv" in refusal("jsonl", path)
    path.write_bytes(gzip.compress(good))
    assert "x.jsonl byte 1: not UTF-8 (0x1f 0x8b = gzip; name it .gz or unpack it)" in refusal("jsonl", path)
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    assert "b.txt byte 3: not UTF-8 (0xe9)" in refusal("text", tmp_path)


def test_a_damaged_archive_is_named(tmp_path):
    packed = gzip.compress(b'{"text": "good"}\n' * 5000)
    (tmp_path / "x.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert "x.jsonl.gz: cannot be unpacked or read" in refusal("jsonl", tmp_path / "x.jsonl.gz")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b"caf\xe9"))
    assert "x.jsonl.gz: what it unpacks to is not UTF-8" in refusal("jsonl", tmp_path / "x.jsonl.gz")


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"body": ["a", None], "n": [1, 2]}), path)
    assert "x.parquet: no 'text' column (columns: 'body', 'n')" in refusal("parquet", path)
    assert "x.parquet row 2: 'body' is null, needs text" in refusal("parquet", path, text_field="body")
    assert "x.parquet: column 'n' is int64, needs string" in refusal("parquet", path, text_field="n")
    path.write_bytes(path.read_bytes()[:-10])
    assert "x.parquet: not a parquet file" in refusal("parquet", path, text_field="body")
    path.write_bytes(gzip.compress(b"x" * 1000))
    assert "x.parquet: not a parquet file (0x1f 0x8b = gzip" in refusal("parquet", path)
    path.write_bytes(b"")
    assert "x.parquet: not a parquet file" in refusal("parquet", path)


def test_parquet_damaged_in_the_middle_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    texts = [f"{i} " * 200 for i in range(200)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, row_group_size=50, compression="snappy")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    message = refusal("parquet", path)
    assert "x.parquet after row" in message and "damaged" in message


def test_reading_local_files_asks_no_server(tmp_path, monkeypatch):
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "x.parquet")
    (tmp_path / "x.txt").write_text("c")
    assert [read(kind, tmp_path) for kind in ("jsonl", "parquet", "text")] == [["a"], ["b"], ["c"]]
