"""Laws of tables, hub datasets, mixtures, reports and the command that shows them."""

import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.prompts import FileSource, GrammarSource, Prompt, SymbolicSource, source_report
from stages.prompts.__main__ import load_tokenizer, main
from stages.prompts.hub import HubSource
from stages.prompts.source import MixtureSource, WeightedSource
from stages.prompts.table import TableSource
from stages.system.refusal import Refused

TEXTS = ["a cat", "a dog, asleep", "an owl"]
MODEL = Path("stages/tiny/model")


@pytest.fixture(params=["csv", "tsv", "jsonl", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same three sentences, and an empty one, in each kind of table."""
    file = tmp_path / f"table.{request.param}"
    texts = [*TEXTS[:2], "", TEXTS[2]]
    if request.param == "parquet":
        pq.write_table(pa.table({"id": [1, 2, 3, 4], "caption": texts}), file)
    elif request.param == "jsonl":
        file.write_text("".join(json.dumps({"id": 1, "caption": text or None}) + "\n" for text in texts))
    else:
        mark = "," if request.param == "csv" else "\t"
        file.write_text(f"id{mark}caption\n" + "".join(f'1{mark}"{text}"\n' for text in texts))
    return file


def texts_of(source: TableSource | HubSource | FileSource, count: int) -> list[str]:
    return [prompt.text for prompt in islice(source.iter_prompts(0), count)]


def test_a_column_gives_its_sentences_and_counts_the_empty_ones(table: Path) -> None:
    source = TableSource(path=table, column="caption")
    assert texts_of(source, 4) == [*TEXTS, TEXTS[0]]
    assert [len(places) for places in source.unusable_rows(100).values()] == [1]
    assert next(source.iter_prompts(0, 4)) == list(islice(source.iter_prompts(0), 5))[4]


def test_a_column_that_is_not_there_is_refused_with_the_nearest(table: Path) -> None:
    with pytest.raises(Refused, match="no column 'captain' - did you mean caption"):
        texts_of(TableSource(path=table, column="captain"), 1)


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": 5}\n')
    with pytest.raises(Refused, match=r"t\.jsonl:1: text = 5: should be text"):
        texts_of(TableSource(path=file), 1)


def test_classes_come_from_their_column(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("text,kind\na cat,animal/cat\na thing,\n")
    listed = list(islice(TableSource(path=file, class_column="kind").iter_prompts(0), 2))
    assert [prompt.class_name for prompt in listed] == ["animal/cat", "prompt"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("t.xlsx", b"", "unknown kind of table"),
        ("t.jsonl", b"{no}\n", r"t\.jsonl:1: not good JSON"),
        ("t.jsonl", b"[1]\n", "should be a JSON object"),
        ("t.parquet", b"nonsense nonsense", "not a good parquet file"),
        ("t.csv", b"text\n\n", "holds no prompt"),
    ],
)
def test_bad_tables_are_refused_by_name(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(Refused, match=problem):
        texts_of(TableSource(path=file), 1)


def test_tables_that_are_missing_are_refused(tmp_path: Path) -> None:
    for kind in ("csv", "jsonl", "parquet"):
        with pytest.raises(Refused, match="does not exist"):
            texts_of(TableSource(path=tmp_path / f"gone.{kind}"), 1)


@pytest.mark.parametrize("name", ["bytes.txt", "bytes.csv", "bytes.jsonl"])
def test_bytes_that_are_not_utf8_are_counted_with_their_place(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    lines = {
        "txt": b"a cat\na \xff\n\n",
        "csv": b"text\na cat\na \xff\n",
        "jsonl": b'{"text":"a cat"}\n{"text":"a \xff"}\n',
    }
    file.write_bytes(lines[name[6:]])
    source = FileSource(path=file) if name.endswith("txt") else TableSource(path=file)
    assert texts_of(source, 2) == ["a cat", "a cat"]
    assert source.unusable_rows(100)["not UTF-8"][0].startswith(f"{file}:")


def test_a_local_dataset_folder_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pq.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), folder / "train.parquet")
    source = HubSource(dataset=str(folder))
    assert texts_of(source, 4) == [*TEXTS, TEXTS[0]]
    before = source.identity()
    pq.write_table(pa.table({"n": [1], "text": ["another"]}), folder / "train.parquet")
    assert source.identity() != before


def test_a_missing_extra_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(Refused, match=r"needs the package datasets - pip install 'sollune\[datasets\]'"):
        texts_of(HubSource(dataset=str(tmp_path)), 1)


def test_a_hub_dataset_out_of_reach_is_refused() -> None:
    with pytest.raises(Refused, match="'no-such-owner/none' is neither a folder nor a hub dataset"):
        HubSource(dataset="no-such-owner/none").identity()


def mixture(tmp_path: Path) -> MixtureSource:
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"line {i}" for i in range(7)))
    grammar = GrammarSource(grammar=Path("stages/tiny/grammar.yaml"))
    return MixtureSource(
        parts=(
            WeightedSource(weight=3, prompts=FileSource(path=file)),
            WeightedSource(weight=2, prompts=grammar),
            WeightedSource(prompts=SymbolicSource()),
        )
    )


def test_a_mixture_keeps_its_proportions_and_skips_nothing(tmp_path: Path) -> None:
    listed = list(islice(mixture(tmp_path).iter_prompts(5), 60))
    parts = [dict(prompt.derivation)["part"][0] for prompt in listed]
    assert [parts.count(part) for part in "123"] == [30, 20, 10]
    assert [p.text for p in listed if p.text.startswith("line")][:8] == [f"line {i % 7}" for i in range(8)]


def test_prompt_i_of_a_mixture_is_a_function_of_seed_and_i(tmp_path: Path) -> None:
    source = mixture(tmp_path)
    listed = list(islice(source.iter_prompts(5), 60))
    for start in (0, 1, 7, 31, 59):
        assert next(source.iter_prompts(5, start)) == listed[start]
    assert next(source.iter_prompts(6, 31)) != listed[31]


def test_a_report_names_what_was_left_out_repeated_and_cut(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes(b"a small red star\n\na small red star\n\xff\n" + b"star " * 90)
    source = FileSource(path=file)
    report = source_report(source, list(islice(source.iter_prompts(0), 3)), load_tokenizer(MODEL))
    assert {fault: len(places) for fault, places in report.omitted.items()} == {"empty": 1, "not UTF-8": 1}
    assert (len(report.repeated), len(report.truncated)) == (1, 1)
    assert f"the first: {file}:2" in "\n".join(report.lines())


def test_a_report_on_good_prompts_is_one_line() -> None:
    grammar = GrammarSource(grammar=Path("stages/tiny/grammar.yaml"))
    assert source_report(grammar, [Prompt("a red star", "star/red", 0)], load_tokenizer(MODEL)).lines() == [
        "prompts: 1"
    ]


def test_the_command_shows_a_tree_a_sample_and_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "17", "--tree", "--seed", "42"]) == 0
    output = capsys.readouterr().out
    assert next(SymbolicSource().iter_prompts(42, 17)).text in output
    assert "family: " in output
    assert main(["sample", "--count", "3", "--config", "configs/tiny.yaml"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["stats", "--count", "50", "--config", "configs/tiny.yaml", "--tokenizer", str(MODEL)]) == 0
    assert "tokens" in capsys.readouterr().out


def test_the_command_refuses_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--sead: unknown option - did you mean --seed"):
        main(["show", "3", "--sead", "4"])
    with pytest.raises(Refused, match="holds no tokenizer"):
        main(["stats", "--count", "1", "--tokenizer", str(tmp_path)])
    with pytest.raises(Refused, match=r"complexity.*one of them positive"):
        main(["show", "3", "--prompts.source", "symbolic", "--prompts.complexity", "0"])


GOLDEN = {
    "l.txt": (
        b"star/red\ta red star \r\n\r\n  a heart\n\tan owl\nring \t a  ring\t\n",
        "86d09f3e7836c2adb31df40b981ff135e3f478306126dc1b574d47c69c402304",
        [("a red star", "star/red"), ("a heart", "prompt"), ("an owl", "prompt"), ("a  ring", "ring ")],
    ),
    "t.csv": (
        b'text,kind\r\n a star ,star/red\r\n"a heart, or ""two""\r\nof them",heart\r\n,x\r\n\r\n',
        "44fd9e347d8391ae9a9eee4039b7a0576f5adafce01547742ff9f6b7ca39fc5c",
        [("a star", "star/red"), ('a heart, or "two"\nof them', "heart")],
    ),
    "t.tsv": (
        b'kind\ttext\nx\t"a star"\n',
        "ecba05459b4afa8a4ba40cf1cfd8e9ebf791c59284d1ebded5039124b2c4d058",
        [("a star", "x")],
    ),
    "t.jsonl": (
        b'{"text": " a st\\u00e9r", "kind": null}\n\n{"text": null, "kind": "x"}\n{"text": "b", "kind": ""}\n',
        "10351adf92695d045c2784d60b5e13b4809c6662e51ad6c45933207516256601",
        [("a stér", "prompt"), ("b", "prompt")],
    ),
}


def source_of(path: Path, content: bytes) -> FileSource | TableSource:
    path.write_bytes(content)
    return FileSource(path=path) if path.suffix == ".txt" else TableSource(path=path, class_column="kind")


@pytest.mark.parametrize("name", GOLDEN)
def test_well_formed_files_keep_their_prompts_and_the_identity_that_caches_carry(name: str, tmp_path: Path) -> None:
    content, identity, expected = GOLDEN[name]
    for mark in (b"", b"\xef\xbb\xbf"):
        source = source_of(tmp_path / name, mark + content)
        assert source.identity() == identity
        listed = islice(source.iter_prompts(0), len(expected))
        assert [(prompt.text, prompt.class_name) for prompt in listed] == expected


UNUSABLE = {
    "l.txt": (
        "good\na\x0cb\nc\u202e\nd\ufeff\nstar\t\nstar \t \nx\ty\tz\n\t\nx\tgood\n",
        {
            "with control characters": [2],
            "with bidirectional controls": [3],
            "with a byte-order mark inside": [4],
            "with a class and no sentence": [5, 6],
            "with two tabs": [7],
            "empty": [8],
        },
    ),
    "t.csv": (
        'text,kind\ngood,x\na,b,c\nfew\n"\n",x\na\x07,x\na,k\x85\n',
        {"with more cells than the head": [3], "with fewer cells than the head": [4], "empty": [5],
         "with control characters": [7, 8]},
    ),
    "t.TSV": ("text\tkind\ngood\tx\na\tb\tc\n", {"with more cells than the head": [3]}),
    "t.jsonl": (
        '{"text": "good", "kind": "x"}\n{"text": "a\\u0000", "kind": ""}\n{"text": "\\ud800", "kind": ""}\n',
        {"with control characters": [2], "with lone surrogates": [3]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_row_is_counted_by_reason_and_place_and_makes_no_prompt(name: str, tmp_path: Path) -> None:
    content, expected = UNUSABLE[name]
    source = source_of(tmp_path / name, content.encode())
    assert set(texts_of(source, 9)) == {"good"}
    faults = source.unusable_rows(100)
    assert {reason: len(places) for reason, places in faults.items()} == {
        reason: len(lines) for reason, lines in expected.items()
    }
    for reason, lines in expected.items():
        numbers = [place.removeprefix(f"{tmp_path / name}:").split()[0] for place in faults[reason]]
        assert numbers == list(map(str, lines))


def test_a_line_separator_stays_inside_its_sentence(tmp_path: Path) -> None:
    for name, content in {"l.txt": "a\u2028b\n", "t.csv": "text,kind\na\u2028b,x\n"}.items():
        assert texts_of(source_of(tmp_path / name, content.encode()), 1) == ["a\u2028b"]


def test_a_far_number_is_counted_and_not_read_up_to(tmp_path: Path) -> None:
    source = source_of(tmp_path / "l.txt", b"a\nb\nc\n")
    near, far = list(islice(source.iter_prompts(0), 40)), next(source.iter_prompts(0, 10**15 + 1))
    for start in (0, 1, 3, 17, 39):
        assert next(source.iter_prompts(0, start)) == near[start]
    assert (far.text, dict(far.derivation)["reading"]) == ("c", str((10**15 + 1) // 3 + 1))


def test_a_report_names_how_each_file_was_read(tmp_path: Path) -> None:
    table = source_of(tmp_path / "t.TSV", b'\xef\xbb\xbftext\tkind\n"a\nb"\tx\n')
    lines = source_report(table, list(islice(table.iter_prompts(0), 1))).lines()
    how = "read as rows of cells parted by tabs in UTF-8 without its byte-order mark, sentences from column 'text'"
    assert lines[1] == f"prompts: {tmp_path / 't.TSV'} {how}, classes from column 'kind'"
    assert lines[2] == f"prompts: 1 rows over several lines, kept (the first: {tmp_path / 't.TSV'}:2)"


def test_the_command_prints_what_it_left_out_of_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "l.txt").write_bytes(b"good\nbad \x07\n")
    source = ["--prompts.source", "file", "--prompts.path", str(tmp_path / "l.txt")]
    assert main(["sample", "--count", "2", *source]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert shown.err == f"prompts: 1 with control characters, left out (the first: {tmp_path / 'l.txt'}:2 (U+0007))\n"


@pytest.mark.parametrize(
    "values", [pa.array(["a", None, "b"]).dictionary_encode(), pa.array(["a", "", "b"], pa.large_string())]
)
def test_every_kind_of_text_column_is_text(values: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": values}), tmp_path / "t.parquet")
    assert texts_of(TableSource(path=tmp_path / "t.parquet"), 3) == ["a", "b", "a"]


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((MODEL / "tokenizer" / name).read_bytes())
    load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(Refused, match="--tokenizer: "):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Refused, match="--tokenizer: "):
        load_tokenizer(tmp_path)
