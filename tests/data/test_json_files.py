import itertools
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moddistill.data import json_files
from moddistill.data.json_files import JsonFile
from moddistill.errors import UserError

BOUNDED = settings(max_examples=100, derandomize=True, deadline=None)
TEXT = st.text(st.characters(codec="utf-8")) | st.text('{}[]",:\\ \n')
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes bytes or text to a new file of a suffix and returns its reader."""
    folder, numbers = tmp_path_factory.mktemp("json"), itertools.count()

    def write(content, suffix=".json"):
        path = folder / f"{next(numbers)}{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return JsonFile(str(path))

    return write


def read_all(file):
    """Returns (line, fields or reason) of all records."""
    records = []
    for block in file.blocks():
        assert block.places.offset[-1] + block.places.size[-1] == block.end <= file.extent()
        for line, fields in zip(block.places.line.tolist(), block.read(), strict=True):
            records.append((line, str(fields) if isinstance(fields, UserError) else fields))
    return records


@pytest.mark.slow
@BOUNDED
@given(st.lists(JSON, max_size=5), st.sampled_from([None, 0, 3, "\t\r\n"]), st.booleans())
def test_elements_of_a_list_are_those_of_a_json_parser(write, records, indent, ascii_only):
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    assert read_all(write(text)) == list(enumerate(records, 1))


@pytest.mark.slow
@BOUNDED
@given(st.lists(JSON, max_size=5), st.booleans())
def test_lines_are_those_of_a_json_parser(write, records, ascii_only):
    lines = [json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records]
    assert read_all(write("".join(lines), ".jsonl")) == list(enumerate(records, 1))


@pytest.mark.slow
@settings(BOUNDED, max_examples=300)
@given(
    st.lists(JSON, max_size=3).map(lambda records: json.dumps(records, ensure_ascii=False)),
    st.data(),
)
def test_a_damaged_list_has_a_rejected_record_or_is_an_error(write, text, data):
    """The same texts are free of errors to a parser of the whole text."""
    content = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 3)))
        content[start:end] = data.draw(st.sampled_from(b'[]{}",:\\ 1a\n\xff').map(lambda x: [x]))
    try:
        records = [fields for _, fields in read_all(write(bytes(content)))]
    except UserError as error:
        assert ".json: expected a JSON list of records" in str(error)
        records = None
    try:
        expected = json.loads(bytes(content))
    except ValueError:
        expected = None
    if isinstance(expected, list) and not has_repeated_names(bytes(content)):
        assert records == expected
    else:
        assert records is None or any("expected" in str(record) for record in records)


def has_repeated_names(content):
    lengths = []

    def compare(pairs):
        lengths.append(len(pairs) != len(dict(pairs)))

    json.loads(content, object_pairs_hook=compare)
    return any(lengths)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "(a file with a record on each line ends with .jsonl), got ''"),
        ("\ufeff", "got ''"),
        (" \n", r"got ' \n'"),
        ('{"a": 1}\n{"a": 2}\n', r"""got '{"a": 1}\n{"a": 2}\n'"""),
        ("{" + "x" * 10**6, "got '{" + "x" * 39 + "'"),
        ('"text"', """got '"text"'"""),
        ("]", "got ']'"),
        ("null", "got 'null'"),
        ("[", "got no element, or one that does not end, at byte 1"),
        ("[1", "got neither a comma nor the end of the list at byte 2"),
        ("[1,", "got no element, or one that does not end, at byte 3"),
        ("[1,]", "got no element, or one that does not end, at byte 3"),
        ("[,1]", "got no element, or one that does not end, at byte 1"),
        ("[1,,2]", "got no element, or one that does not end, at byte 3"),
        ("[1 2]", "got neither a comma nor the end of the list at byte 2"),
        ("[{}{}]", "got neither a comma nor the end of the list at byte 3"),
        ('["a"1]', "got neither a comma nor the end of the list at byte 4"),
        ("[[1}", "got neither a comma nor the end of the list at byte 4"),
        ('[{}, {"a": "]', "got no element, or one that does not end, at byte 5"),
        (r'["\"]', "got no element, or one that does not end, at byte 1"),
        ("[1] x", "got more text after the list, at byte 4"),
        ("[][]", "got more text after the list, at byte 2"),
        ("[1]".encode("utf-16"), "got '\ufffd\ufffd[\\x001\\x00]\\x00'"),
    ],
)
def test_a_file_that_is_no_list_is_an_error_that_names_it(write, content, reason):
    file = write(content)
    with pytest.raises(UserError) as error:
        read_all(file)
    assert str(error.value).startswith(f"{file.path}: expected a JSON list of records")
    assert reason in str(error.value)


def test_a_list_may_be_empty_and_so_may_a_file_of_lines(write):
    assert read_all(write(" [ ]\n")) == []
    assert read_all(write("", ".jsonl")) == []
    assert read_all(write("\n \r\n\n", ".jsonl")) == []


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_byte_order_mark_costs_no_record(write, suffix):
    content = b'\xef\xbb\xbf[{"a": 1}]' if suffix == ".json" else b'\xef\xbb\xbf{"a": 1}\n{"b": 2}'
    assert read_all(write(content, suffix))[0] == (1, {"a": 1})


def test_lines_are_numbered_as_editors_do_and_may_end_as_in_windows(write):
    file = write('1\r\n\r\n "a\u2028b\x85c" \n\n\n4', ".jsonl")
    assert read_all(file) == [(1, 1), (3, "a\u2028b\x85c"), (6, 4)]


def one_bad_record(write, bad, suffix):
    """Writes a bad record between good ones, and returns what is read of it."""
    content = [b'{"id": 1}', bad, b'{"id": 3}']
    file = write(
        b"\n".join(content) if suffix == ".jsonl" else b"[" + b",\n".join(content) + b"]", suffix
    )
    first, (line, reason), last = read_all(file)
    assert (first, line, last) == ((1, {"id": 1}), 2, (3, {"id": 3}))
    assert len(reason) < 600
    assert reason.isprintable()
    return reason


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"a": "\xff"}', "record: expected UTF-8 text, got invalid start byte at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "record: expected UTF-8 text, got invalid continuation byte"),
        (
            b'{"a" "b"}',
            "record: expected JSON, got an error: Expecting ':' delimiter: line 1 column 6",
        ),
        (
            b'{"a": "\x00"}',
            "record: expected JSON, got an error: Invalid control character at: line 1",
        ),
        (b"[1, ]", "record: expected JSON, got an error: "),
        (
            b'{"id": ' + b"1" * 5000 + b"}",
            "record: expected JSON, got an error: Exceeds the limit (4300",
        ),
        (b'{"a": 1, "b": 2, "a": 3}', "name in a JSON object: expected one that occurs once, got"),
        (
            b"[" * 10**5 + b"]" * 10**5,
            "record: expected JSON, got an error: maximum recursion depth exceeded",
        ),
        (
            b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
            "expected JSON, got an error: maximum recursion depth",
        ),
    ],
    ids=["utf8", "surrogate", "colon", "control", "comma", "digits", "name", "lists", "objects"],
)
def test_a_record_that_is_no_json_is_rejected_by_itself(write, bad, reason, suffix):
    assert reason in one_bad_record(write, bad, suffix)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_record_beyond_the_largest_size_is_rejected_without_being_read(
    write, suffix, monkeypatch
):
    monkeypatch.setattr(json_files, "LARGEST_RECORD", 1000)
    reason = one_bad_record(write, b'"' + b"x" * 999 + b'"', suffix)
    assert reason == "record: expected at most 1000 bytes, got 1001"
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("the record was read"))
    with pytest.raises(UserError, match="expected at most 1000 bytes"):
        write(b"", suffix).read(0, 1001)


def test_deeply_nested_records_are_rejected_in_threads_too(write):
    file = write("[" * 10**5 + "]" * 10**5 + "\n1\n", ".jsonl")
    [block] = file.blocks()
    with ThreadPoolExecutor(2) as pool:
        for bad, good in pool.map(lambda _: block.read(), range(4)):
            assert isinstance(bad, UserError)
            assert good == 1


def test_not_a_number_is_read_since_python_writes_it_in_metadata(write):
    [(_, fields)] = read_all(write('{"score": NaN, "loss": -Infinity}', ".jsonl"))
    assert fields["score"] != fields["score"]
    assert fields["loss"] == float("-inf")


def resident_bytes(path):
    """Returns how much of a mapped file is in this process's memory."""
    with open("/proc/self/smaps") as lines:
        mapping = itertools.dropwhile(lambda line: not line.rstrip().endswith(path), lines)
        size = next(line for line in mapping if line.startswith("Rss:"))
    return int(size.split()[1]) * 1024


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_blocks_are_bounded_and_so_is_the_part_of_the_file_in_memory(write, suffix, monkeypatch):
    monkeypatch.setattr(json_files, "BLOCK_BYTES", 2**16)
    records = [{"id": number, "text": "x" * (number % 3989)} for number in range(10_000)]
    text = "\n".join(map(json.dumps, records)) if suffix == ".jsonl" else json.dumps(records)
    file, blocks, resident = write(text, suffix), [], []
    for block in file.blocks():
        blocks.append(block)
        resident.append(resident_bytes(file.path))
    assert file.extent() > 18_000_000
    assert 0 < max(resident) < 8_000_000
    assert [len(block.places) for block in blocks] == [2048] * 4 + [1808]
    assert [fields for block in blocks for fields in block.read()] == records


def test_a_line_far_beyond_the_largest_size_is_not_held_in_memory(write, monkeypatch):
    monkeypatch.setattr(json_files, "BLOCK_BYTES", 2**20)
    monkeypatch.setattr(json_files, "LARGEST_RECORD", 1000)
    file = write(b'"' + b"x" * 10**8 + b'"\n1\n', ".jsonl")
    reasons, resident = [], []
    for block in file.blocks():
        resident.append(resident_bytes(file.path))
        reasons += map(str, block.read())
    assert reasons == ["record: expected at most 1000 bytes, got 100000002", "1"]
    assert max(resident) < 8_000_000
    file.close()


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_readers_can_be_closed_pickled_dropped_and_shared_by_threads(write):
    before = open_files()
    records = [{"id": number} for number in range(1000)]
    file = write(json.dumps(records))
    [block] = file.blocks()
    with ThreadPoolExecutor(4) as pool:
        read = [pool.submit(block.read) for _ in range(20)]
        assert all(each.result() == records for each in read)
    copy = pickle.loads(pickle.dumps(file))
    place = int(block.places.offset[7]), int(block.places.size[7])
    assert copy.read(*place) == file.read(*place) == {"id": 7}
    assert open_files() == before + 2
    file.close()
    assert open_files() == before + 1
    assert file.read(*place) == {"id": 7}
    del file, copy, block
    assert open_files() == before


def test_a_scan_that_is_given_up_closes_its_file(write):
    before = open_files()
    blocks = write(json.dumps([1] * 5000)).blocks()
    next(blocks)
    assert open_files() == before + 2  # the file, and its mapping
    blocks.close()
    assert open_files() == before
