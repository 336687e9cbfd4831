from __future__ import annotations

import csv
import gzip
import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from producer.dataset.selection import cut, order_by_image, select
from producer.dataset.table import read_table
from storage.errors import UserError
from storage.hdf5.part import QUESTION_ATTRIBUTES
from storage.probing.labels import read_labels
from storage.question import Question

NAME_IT = "name the dataset's table (.csv, .tsv, .json or .jsonl, with .gz or without, .parquet, .tar, or a folder)"
HEADER = "question_id,image_id,question,answer\n"


def table(tmp_path: Path, content: str | bytes, name: str = "vqa.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_questions(path: Path) -> list[Question]:
    return read_table(path).questions


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_questions(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def rows_refusal(tmp_path: Path, rows: str | bytes) -> str:
    return refusal(table(tmp_path, HEADER.encode() + (rows.encode() if isinstance(rows, str) else rows)))


# What is read


def test_reads_the_documented_table(tmp_path):
    rows = '1,image1.jpg,"What color is the sky?","blue"\n2,image2.jpg,"How many people are visible?","3"\n'
    assert read_questions(table(tmp_path, HEADER + rows)) == [
        Question("1", "image1.jpg", "What color is the sky?", "blue", 1, {}),
        Question("2", "image2.jpg", "How many people are visible?", "3", 2, {}),
    ]


@pytest.mark.parametrize("text", ["001", "NA", "nan", " ", "", "None", "1e5", "TRUE", " padded ", "日本 🦆", "a,b", "x\ty"])
def test_answer_stays_as_it_is(tmp_path, text):
    [question] = read_questions(table(tmp_path, f'{HEADER}001, i 1.jpg ," What? ","{text}"\n'))
    assert question == Question("001", " i 1.jpg ", " What? ", text, 1, {})


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_breaks_and_quotes_inside_quotes_stay(tmp_path, newline):
    rows = f'1,a.jpg,"What{newline}""is"", this?",x{newline}2,a.jpg,And?,y{newline}'
    first, second = read_questions(table(tmp_path, HEADER.replace("\n", newline) + rows))
    assert first.question == f'What{newline}"is", this?'
    assert (second.question, second.csv_row) == ("And?", 2)


def test_last_line_needs_no_line_break(tmp_path):
    assert [q.ground_truth_answer for q in read_questions(table(tmp_path, HEADER + "1,a.jpg,What?,x"))] == ["x"]


def test_byte_order_mark_and_gzip(tmp_path):
    content = (HEADER + "1,é.jpg,Où?,là\n").encode()
    expected = [Question("1", "é.jpg", "Où?", "là", 1, {})]
    for number, data in enumerate((content, b"\xef\xbb\xbf" + content)):
        assert read_questions(table(tmp_path, data, f"{number}.csv")) == expected
        assert read_questions(table(tmp_path, gzip.compress(data), f"{number}.csv.gz")) == expected
        assert read_questions(table(tmp_path, gzip.compress(data), f"{number}.CSV.GZ")) == expected


def test_empty_lines_are_skipped_and_have_no_row_number(tmp_path):
    questions = read_questions(table(tmp_path, f"\n{HEADER}\n1,a.jpg,A?,x\r\n\n\n2,a.jpg,B?,y\n\n"))
    assert [(q.question_id, q.csv_row) for q in questions] == [("1", 1), ("2", 2)]


def test_other_names_of_the_columns_in_any_order(tmp_path):
    path = table(tmp_path, " gt_answer , question,image_name ,\tquestion_id\nx,What?,a.jpg,1\n")
    assert read_questions(path) == [Question("1", "a.jpg", "What?", "x", 1, {})]


def test_answer_column_may_be_absent(tmp_path):
    path = table(tmp_path, "question_id,image_id,question\n1,a.jpg,What?\n")
    assert read_questions(path) == [Question("1", "a.jpg", "What?", "", 1, {})]


def test_preferred_names_win_and_the_others_are_carried(tmp_path):
    path = table(tmp_path, "image_name,gt_answer,question_id,image_id,question,answer\nb.jpg,y,1,a.jpg,What?,x\n")
    assert read_questions(path) == [Question("1", "a.jpg", "What?", "x", 1, {"image_name": "b.jpg", "gt_answer": "y"})]


def test_other_columns_are_carried_under_their_names(tmp_path):
    path = table(tmp_path, ",question_id,image_id,question,answer, Type ,Unnamed: 9,\n0,1,a.jpg,What?,x,007,NA,\n")
    [question] = read_questions(path)
    assert question.extra == {"Unnamed: 0": "0", "Type": "007", "Unnamed: 9": "NA", "Unnamed: 7": ""}


def test_long_field_is_read_and_the_process_wide_limit_is_put_back(tmp_path):
    before = csv.field_size_limit()
    [question] = read_questions(table(tmp_path, f"{HEADER}1,a.jpg,{'w' * 500_000}?,x\n"))
    assert len(question.question) == 500_001
    rows_refusal(tmp_path, f"1,a.jpg,{'w' * (1 << 20)}?,x\n")
    assert csv.field_size_limit() == before


def test_repeated_texts_are_one_object(tmp_path):
    first, second = read_questions(table(tmp_path, HEADER + "1,long-name.jpg,A?,some answer\n2,long-name.jpg,B?,some answer\n"))
    assert first.image_id is second.image_id
    assert first.ground_truth_answer is second.ground_truth_answer
    assert first.extra is second.extra


@pytest.mark.parametrize("question", ["3 dogs?", "Nan?", "None of these?", "null?", "NA", "inf", "1,5", "1/2", "٣", "-", "."])
def test_text_that_only_looks_like_a_broken_export(tmp_path, question):
    assert read_questions(table(tmp_path, f'{HEADER}1,a.jpg,"{question}",x\n'))[0].question == question


# What is refused: the file


def test_absent_file(tmp_path):
    assert refusal(tmp_path / "no.csv") == f" does not exist: {NAME_IT}"


def test_name_that_no_file_can_have(tmp_path):
    assert refusal(tmp_path / ("x" * 300)) == f" does not exist: {NAME_IT}"


def test_directory(tmp_path):
    assert refusal(tmp_path) == f" is a directory without .parquet files: {NAME_IT}; with images, give --question too"


def test_special_file():
    assert refusal(Path("/dev/null")) == f" is not a regular file: {NAME_IT}"


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("producer.dataset.forms.delimited.as_utf8", refuse)
    assert refusal(table(tmp_path, HEADER)) == " cannot be read: Permission denied"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no gzip", "trailing"])
def test_damaged_gzip(tmp_path, damage):
    text = HEADER + "".join(f"{i},{random.random()}.jpg,What?,{random.random()}\n" for i in range(2000))
    data = gzip.compress(text.encode())
    middle = len(data) // 2
    data = {
        "truncated": data[:middle],
        "flipped": data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 40]) + data[middle + 40 :],
        "no gzip": text.encode(),
        "trailing": data + b"garbage",
    }[damage]
    message = refusal(table(tmp_path, data, "vqa.csv.gz"))
    assert message.startswith(" is damaged gzip (")
    assert message.endswith("): copy or make it again; `gzip -t` checks it")


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_no_header(tmp_path, content):
    expected = " is empty: its first line must name the columns, as in question_id,image_id,question,answer"
    assert refusal(table(tmp_path, content)) == expected


def test_no_rows(tmp_path):
    expected = " has no rows: its first line names the columns, a question a line must follow"
    assert refusal(table(tmp_path, HEADER + "\n")) == expected


@pytest.mark.parametrize("data", [HEADER.encode("utf-16"), HEADER.encode("utf-16-le"), gzip.compress(HEADER.encode(), mtime=0)])
def test_header_that_is_no_utf8_text(tmp_path, data):
    expected = ", line 1: the columns' names are not UTF-8 text: save the table as CSV in UTF-8 (gzip only as .csv.gz)"
    assert refusal(table(tmp_path, data)) == expected


# What is refused: the columns


def test_missing_columns(tmp_path):
    expected = (
        ", line 1: no column image_id or image_name or image or image_path; no column question or text or query or txt; "
        "the columns are 'key', 'photo', 'asked', 'Unnamed: 3'; "
        "--columns says which is which, as in --columns image=photo,question=text"
    )
    assert refusal(table(tmp_path, "key,photo,asked,\n1,a.jpg,What?,\n")) == expected


def test_missing_header_line(tmp_path):
    assert "the columns are '1', 'a.jpg', 'What?', 'x'" in refusal(table(tmp_path, "1,a.jpg,What?,x\n"))


@pytest.mark.parametrize(("delimiter", "problem"), [(";", "semicolons: save it with commas"), ("\t", "tabs: name it .tsv")])
def test_other_delimiter(tmp_path, delimiter, problem):
    message = refusal(table(tmp_path, f"{HEADER}1,a.jpg,What?,x\n".replace(",", delimiter)))
    assert message.endswith(f"; it looks separated by {problem}")


def test_many_columns_are_not_all_named(tmp_path):
    message = refusal(table(tmp_path, ",".join(f"c{i}" for i in range(500))))
    assert "'c18', 'c19', …; --columns says" in message


@pytest.mark.parametrize("name", ["question_id", "image_id", "question", "answer", "kind"])
def test_column_there_twice(tmp_path, name):
    message = refusal(table(tmp_path, f"question_id,image_id,question,answer,kind, {name} \n1,a,b,c,d,e\n"))
    assert message == f", line 1: 2 columns are named '{name}': rename or remove all but one"


@pytest.mark.parametrize("name", sorted(QUESTION_ATTRIBUTES - {"question_id"}))
def test_reserved_column(tmp_path, name):
    message = refusal(table(tmp_path, f"\nquestion_id,image_id,question,{name}\n1,a,b,c\n"))
    assert message == f", line 2: column '{name}' has a name that the output itself uses: rename it"


def test_overlong_column_name(tmp_path):
    message = refusal(table(tmp_path, f"question_id,image_id,question,{'n' * 513}\n1,a,b,c\n"))
    assert message == f", line 1: column '{'n' * 60}'… has a name of more than 512 characters: shorten it"


def test_every_fault_of_the_columns_is_listed(tmp_path):
    message = refusal(table(tmp_path, "question_id,image_id,image_id,seq_len\n"))
    for part in ("no column question or text", "2 columns are named 'image_id'", "column 'seq_len'"):
        assert part in message


def test_malformed_header(tmp_path):
    message = refusal(table(tmp_path, 'question_id,"image"_id,question\n1,a,b\n'))
    assert message.startswith(": the line that names the columns cannot be read\n  line 1: the quotes do not match (")


# What is refused: the rows


def test_every_faulty_line_is_listed(tmp_path):
    rows = 'ok,a.jpg,What?,x\n,a.jpg,What?,x\n"m\nl",a.jpg, ,x\nok,,3,x\n4,a.jpg,What?\n5,a.jpg,"What"?,x\n'
    assert rows_refusal(tmp_path, rows) == (
        ": 5 faulty lines\n"
        "  line 3: question_id is blank: give each row an id of its own\n"
        "  line 4: the question is blank: write it or remove the row\n"
        "  line 6: question_id 'ok' is that of line 2 too: give each row an id of its own; "
        "question_not_text: the question is '3': export the table again with its words, or remove the row\n"
        "  line 7: 3 fields where the first line has 4: write a comma for each empty field too\n"
        "  line 8: the quotes do not match (',' expected after '\"'): "
        'write a quote inside a quoted text twice, as in "a ""word"" in quotes"'
    )


def test_long_list_is_cut(tmp_path):
    message = rows_refusal(tmp_path, ",a.jpg,What?,x\n" * 1234)
    assert message.startswith(": 1,234 faulty lines\n  line 2: ")
    assert message.endswith("\n  line 21: question_id is blank: give each row an id of its own\n  … and 1,214 more")
    assert message.count("line ") == 20
    assert "more" not in rows_refusal(tmp_path, ",a.jpg,What?,x\n" * 20)


def test_too_many_fields(tmp_path):
    assert rows_refusal(tmp_path, "1,a.jpg,What, then?,x\n") == (
        ": 1 faulty line\n  line 2: 5 fields where the first line has 4: put a text that holds commas in quotes"
    )


def test_quote_never_closed(tmp_path):
    message = rows_refusal(tmp_path, '1,a.jpg,What?,x\n2,a.jpg,"What?,x\n3,a.jpg,What?,x\n')
    assert message.startswith(": 1 faulty line\n  line 3: the quotes do not match (unexpected end of data)")
    assert message.endswith(" (the record runs on to line 4)")


def test_quote_never_closed_in_a_long_file(tmp_path):
    rows = '1,a.jpg,"What?,x\n' + "".join(f"q{i},a.jpg,{'w' * 900}?,x\n" for i in range(1500))
    assert rows_refusal(tmp_path, rows).startswith(
        ": 1 faulty line\n  line 2: a field has more than 1,048,576 characters: close its quote or shorten the text"
        " (the record runs on to line "
    )


@pytest.mark.parametrize("row", [",a.jpg,What?,x", '" ",a.jpg,What?,x', "\u3000,a.jpg,What?,x"])
def test_blank_id(tmp_path, row):
    expected = ": 2 faulty lines\n  line 2: question_id is blank: give each row an id of its own\n  line 3: "
    assert rows_refusal(tmp_path, f"{row}\n{row}\n").startswith(expected)


def test_overlong_id(tmp_path):
    read_questions(table(tmp_path, f"{HEADER}{'é' * 512},a.jpg,What?,x\n"))
    expected = ": 1 faulty line\n  line 2: question_id has 513 characters: use at most 512"
    assert rows_refusal(tmp_path, f"{'é' * 513},a.jpg,What?,x\n") == expected


def test_duplicate_id_names_both_lines(tmp_path):
    rows = '7,a.jpg,"two\nlines?",x\n07,a.jpg,What?,x\n7,b.jpg,What?,x\n7,c.jpg,What?,x\n'
    assert rows_refusal(tmp_path, rows) == (
        ": 2 faulty lines\n"
        "  line 5: question_id '7' is that of line 2 too: give each row an id of its own\n"
        "  line 6: question_id '7' is that of line 2 too: give each row an id of its own"
    )


@pytest.mark.parametrize("image_id", [" ", "\t", '"[""a.png"", """"]"'])
def test_blank_image_id(tmp_path, image_id):
    expected = (
        ": 1 faulty line\n  line 2: the image id is blank: name the image's file, or leave the cell empty for a question "
        "without one"
    )
    assert rows_refusal(tmp_path, f"1,{image_id},What?,x\n") == expected


@pytest.mark.parametrize("question", ["", "  ", '" \n "'])
def test_blank_question(tmp_path, question):
    expected = ": 1 faulty line\n  line 2: the question is blank: write it or remove the row"
    assert rows_refusal(tmp_path, f"1,a.jpg,{question},x\n") == expected


@pytest.mark.parametrize(
    "question", ["nan", "NaN", "None", "null", "NULL", "0", "3", "-3", "+3", "3.5", "3.", ".5", "1e5", "1.5E-7"]
)
def test_question_that_is_no_text(tmp_path, question):
    assert rows_refusal(tmp_path, f"1,a.jpg, {question},x\n") == (
        f": 1 faulty line\n  line 2: question_not_text: the question is ' {question}': "
        "export the table again with its words, or remove the row"
    )


@pytest.mark.parametrize("column", range(5))
def test_nul_and_bytes_that_are_not_utf8(tmp_path, column):
    for bad, problem in (
        (b"\0", "the row holds a NUL character: remove it"),
        (b"\xe9", "byte 0xe9 is not UTF-8: save the table as CSV in UTF-8"),
        (b"\xed\xa0\x80", "byte 0xed is not UTF-8: save the table as CSV in UTF-8"),  # a lone surrogate
    ):
        row = [b"2", b"a.jpg", b"What?", b"x", b"extra"]
        row[column] += bad
        content = HEADER.strip().encode() + b",kind\n1,a.jpg,What?,x,y\n" + b",".join(row) + b"\n"
        assert refusal(table(tmp_path, content)) == f": 1 faulty line\n  line 3: {problem}"


def test_latin1_names_each_line(tmp_path):
    message = rows_refusal(tmp_path, "1,a.jpg,Où?,x\n2,a.jpg,What?,x\n3,a.jpg,Qué?,x\n".encode("latin-1"))
    assert "  line 2: byte 0xf9 is not UTF-8" in message
    assert "  line 4: byte 0xe9 is not UTF-8" in message


# Properties

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
filled = text.filter(str.strip)
rows = st.lists(
    st.tuples(filled, filled, filled.map(lambda s: f"{s}?"), text, text),
    min_size=1,
    unique_by=lambda row: row[0],
    max_size=15,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=rows, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), bom=st.booleans())
def test_what_csv_writes_reads_back_equal(tmp_path, rows, quoting, bom):
    path = tmp_path / "vqa.csv"
    with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        writer = csv.writer(file, quoting=quoting)
        writer.writerow(["question_id", "image_id", "question", "answer", "kind"])
        writer.writerows(rows)
    expected = [Question(i, image, q, a, n, {"kind": k}) for n, (i, image, q, a, k) in enumerate(rows, start=1)]
    assert read_questions(path) == expected


def questions_of(images: str) -> list[Question]:
    return [Question(f"q{i}", image, "What?", "", i, {}) for i, image in enumerate(images, start=1)]


@given(st.text("abcdef", max_size=60))
def test_order_keeps_images_together_and_is_stable(images):
    questions = questions_of(images)
    ordered = order_by_image(questions)
    first = list(dict.fromkeys(images))
    assert ordered == sorted(questions, key=lambda q: (first.index(q.image_id), q.csv_row))


@given(st.text("ab", max_size=60), st.integers(1, 70))
def test_slices_are_full_but_the_last_and_lose_nothing(images, size):
    questions = questions_of(images)
    slices = list(cut(questions, size))
    assert [q for piece in slices for q in piece] == questions
    assert all(len(piece) == size for piece in slices[:-1])
    assert all(1 <= len(piece) <= size for piece in slices)


@pytest.mark.parametrize("size", [0, -1])
def test_slice_of_nothing_is_refused(size):
    with pytest.raises(ValueError, match="at least one question"):
        list(cut(questions_of("ab"), size))


def test_limit_takes_the_first_rows():
    questions = questions_of("abcdef")
    assert select(questions, limit=None, test=False) == questions
    assert select(questions, limit=2, test=False) == questions[:2]
    assert select(questions, limit=99, test=False) == questions


@given(st.integers(0, 200), st.one_of(st.none(), st.integers(0, 200)))
def test_test_takes_the_same_three_in_order(number, limit):
    questions = questions_of("a" * number)
    chosen = select(questions, limit=limit, test=True)
    pool = questions if limit is None else questions[:limit]
    assert len(chosen) == min(3, len(pool))
    assert chosen == [q for q in pool if q in chosen]
    assert chosen == select(questions, limit=limit, test=True)


def test_test_is_a_known_three():
    assert [q.csv_row for q in select(questions_of("a" * 100), limit=None, test=True)] == [50, 54, 98]


@pytest.mark.parametrize("name", ["vqa.csv", "vqa.csv.gz"])
def test_the_digest_is_of_the_bytes_that_were_read(tmp_path, name):
    data = (HEADER + "".join(f"{i},a.jpg,OLD {i}?,x\n" for i in range(20_000))).encode()
    if name.endswith(".gz"):
        data = gzip.compress(data) + b"\0" * 100_000  # padding, as tapes have it
    path = table(tmp_path, data, name)
    other = table(tmp_path, data[: len(data) // 2], "other")
    swapped = []

    def swap(done: int) -> None:  # while it is read, somebody puts another file in its place
        if not swapped:
            swapped.append(done)
            other.replace(path)

    found = read_table(path, lambda name, whole: swap)
    assert swapped and path.read_bytes() != data
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert [q.question for q in found.questions] == [f"OLD {i}?" for i in range(20_000)]


@pytest.mark.parametrize("name", ["vqa.csv", "vqa.csv.gz"])
def test_a_git_lfs_pointer_is_called_that(tmp_path: Path, name: str) -> None:
    pointer = tmp_path / name
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        read_table(pointer)
    with pytest.raises(UserError, match=r"--labels .* is a Git LFS pointer"):
        read_labels(pointer, {"q": "yes"})
