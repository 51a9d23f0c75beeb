"""MMBench scoring and data: the parsing rule, circular accuracy, published answers, and what is refused in a TSV."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from eval.__main__ import main
from eval.lmm.tasks.dataset import task_source
from eval.lmm.tasks.mmbench import read_questions
from eval.mmbench import TAXONOMY, parse_answer
from lift.common.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "mmbench"
OPTIONS = {"A": "red cube", "B": "blue sphere", "C": "green cone"}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is B.", "B"),
        ("A or B", None),  # two letters
        ("Because of the light", None),  # a letter inside a word is none
        ("D", None),  # no such option
        ("Blue Sphere", "B"),
        ("a red cube and a blue sphere", None),  # two options
        ("it is the green cone, I think", "C"),
        ("A man stands next to the green cone", "C"),  # "A" is not among the last five words
        ("Z. It is no red cube", None),  # as VLMEvalKit reads it: none of the options
        ("", None),
        ("I do not know", None),
        ("green cone " * 10, None),  # much longer than the options together
    ],
)
def test_parse_answer(response: str, letter: str | None) -> None:
    assert parse_answer(response, OPTIONS) == letter


def test_taxonomy_has_the_names_of_the_real_sample() -> None:
    file = SHARED / "mmbench_sample_en.tsv"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    l2_of_l3 = {l3: l2 for l2_names in TAXONOMY.values() for l2, l3_names in l2_names.items() for l3 in l3_names}
    rows = read_questions(file)
    assert len(rows) == 20 and all(l2_of_l3[row["category"]] == row["l2_category"] for row in rows)


def test_questions_keep_none_as_text_and_leave_empty_cells_out(questions_tsv: Path) -> None:
    rows = {row["index"]: row for row in read_questions(questions_tsv)}
    assert rows[4]["options"] == {"A": "None", "B": "two"} and rows[4]["hint"] is None
    assert rows[3]["hint"] == "Look closely." and rows[1_000_001]["image_sha256"] == rows[1]["image_sha256"]


def test_image_cell_may_name_the_row_that_holds_the_image(mmbench: SimpleNamespace, tmp_path: Path) -> None:
    rows = mmbench.rows()
    rows[1]["image"] = "1"
    read = read_questions(mmbench.write(rows, tmp_path / "t.tsv"))
    assert read[1]["image"] == read[0]["image"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("index", 1, r"row 3: index 1 occurs twice"),
        ("index", "x", r"row 3: expected a number as index"),
        ("index", 7_000_099, r"row 3: index 7000099 is a rotation of 99"),
        ("image", "iVBORw0KGgoAAAANSUhEUgAAACgAAAAoCAIAAAAD", r"row 3 \(index 1000001\).*cannot be decoded"),
        ("image", "no base64!", r"row 3 \(index 1000001\).*cannot be decoded"),
        ("answer", "E", r"row 3 \(index 1000001\): answer 'E' names no option"),
        ("B", "", r"row 5 \(index 3000001\): answer 'B' names no option"),
    ],
)
def test_faulty_rows_are_named(mmbench: SimpleNamespace, tmp_path: Path, column: str, value: object, message: str) -> None:
    rows = mmbench.rows()
    rows[3 if column == "B" else 1][column] = value
    file = mmbench.write(rows, tmp_path / "questions.tsv")
    with pytest.raises(UserError, match=rf"questions\.tsv: {message}"):
        read_questions(file)


def test_missing_column_and_no_rows(mmbench: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="column 'l2-category'"):
        read_questions(
            mmbench.write([{k: v for k, v in row.items() if k != "l2-category"} for row in mmbench.rows()], tmp_path / "a.tsv")
        )
    pd.DataFrame(mmbench.rows()).iloc[:0].to_csv(tmp_path / "b.tsv", sep="\t", index=False)
    with pytest.raises(UserError, match="found none"):
        read_questions(tmp_path / "b.tsv")


def test_data_command_never_replaces_a_foreign_folder(
    tmp_path: Path, questions_tsv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("keep me")
    assert main(["data", str(questions_tsv), "--out", str(tmp_path)]) == 2
    assert "Choose another --out" in capsys.readouterr().err and (tmp_path / "thesis.txt").is_file()


def test_data_folder_is_what_datasets_loads(mmbench: SimpleNamespace, tmp_path: Path, questions_tsv: Path) -> None:
    import pyarrow.parquet

    assert main(["data", str(questions_tsv), "--out", str(tmp_path / "data")]) == 0
    source = task_source("mmbench_en_dev_static")
    assert source.repository == "lmms-lab-encoder/MMBench"
    table = pyarrow.parquet.read_table(next((tmp_path / "data" / source.repository).rglob("*.parquet")))
    rows = table.to_pylist()
    assert [row["index"] for row in rows] == [row["index"] for row in mmbench.rows()]
    assert rows[-1]["C"] is None and rows[-1]["hint"] is None and rows[-1]["A"] == "two" and rows[-1]["image"]["bytes"]


def test_help_needs_no_heavy_import() -> None:
    code = "import sys; from eval.__main__ import main; main(['--help']); assert not {'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], capture_output=True)
