"""Data sets of the Hub's formats on small files of the same schema, streamed and not."""

from __future__ import annotations

import io
import itertools
import json

import pytest

from nanovlm.data import hub
from nanovlm.errors import DataError
from tests.data.helpers import built, ids_of, picture, same

datasets = pytest.importorskip("datasets", reason="data sets of the Hub need the extra train")


def image(colour="red", broken=False):
    buffer = io.BytesIO()
    picture(colour=colour).save(buffer, "PNG")
    return {"bytes": b"broken" if broken else buffer.getvalue(), "path": None}


def made(count, first=0, broken=()):
    """Rows of FineVision: pictures, turns, ratings."""
    return datasets.Dataset.from_dict(
        {
            "images": [[image(broken=n in broken)] * (n % 3) for n in range(first, first + count)],
            "texts": [[{"user": f"q {n}", "assistant": f"a {n}"}] for n in range(first, first + count)],
            "source": [f"set {first}"] * count,
            "relevance_ratings": [[1 + n % 5] for n in range(first, first + count)],
        },
        features=datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
                "source": datasets.Value("string"),
                "relevance_ratings": datasets.List(datasets.Value("int64")),
            }
        ),
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Two parts of 40 and 20 rows as parquet files, and two shards of save_to_disk."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, rows in {"one": made(40, broken={1, 4}), "two": made(20, 100)}.items():
        (tmp_path / "parts" / name).mkdir(parents=True)
        half = len(rows) // 2
        rows.select(range(half)).to_parquet(tmp_path / "parts" / name / "train-00000-of-00002.parquet")
        rows.select(range(half, len(rows))).to_parquet(tmp_path / "parts" / name / "train-00001-of-00002.parquet")
    for number in range(2):
        made(10, 10 * number).save_to_disk(tmp_path / "disk" / f"shard_{number}")
    return tmp_path


def answers(loader, count):
    """What the rows of the next batches teach."""
    tokenizer = loader.reading.encoder.tokenizer
    found = []
    for batch in itertools.islice(loader, count):
        for labels in batch["labels"]:
            found.append(tokenizer.decode(labels[labels != -100]).removesuffix("<|im_end|>"))
    return found


def options(home, names="one", folder="parts", **changes):
    values = {"train_dataset_path": str(home / folder), "train_dataset_name": tuple(names.split(",")), "batch_size": 1}
    return {**values, "val_ratio": 0.1, **changes}


@pytest.mark.parametrize("stream_dataset", [True, False])
@pytest.mark.parametrize(
    ("folder", "names", "count"),
    [("parts", "one", 38), ("parts", "one,two", 58), ("parts", "all", 58), ("disk", "shards", 20)],
)
def test_parts_are_read_whole_and_each_row_is_on_one_side(home, folder, names, count, stream_dataset):
    training, validation = built(**options(home, names, folder, stream_dataset=stream_dataset))
    held_out = [name for batch in validation for name in batch["ids"]]
    kept = answers(training, count - len(held_out))
    assert 1 <= len(held_out) <= 14
    assert len(set(kept)) == len(kept) == count - len(held_out)
    texts = {
        training.reading.encoder.tokenizer.decode(labels[labels != -100]).removesuffix("<|im_end|>")
        for batch in validation
        for labels in batch["labels"]
    }
    assert not texts & set(kept)
    next(training)  # round the corner: every row of the first epoch was met
    if names != "shards":
        assert training.stats["skipped"].get("unreadable picture", 0) <= 4
        assert sum(training.stats["skipped"].values()) + len(held_out) >= 2


@pytest.mark.parametrize("stream_dataset", [True, False])
def test_ratings_of_the_files_filter(home, stream_dataset):
    training, _ = built(**options(home, "two", stream_dataset=stream_dataset, relevance_min_rating=4))
    kept = {int(answer.split()[1]) for answer in answers(training, 12)}
    assert kept <= {n for n in range(100, 120) if 1 + n % 5 >= 4}
    assert training.stats["skipped"]["rating"] > 0


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("pack", [False, True])
def test_a_stream_is_resumed_bit_by_bit(home, num_workers, pack):
    chosen = options(home, "all", num_workers=num_workers, pack=pack)
    whole, first, second = (built(**chosen)[0] for _ in range(3))
    want = list(itertools.islice(whole, 9))
    list(itertools.islice(first, 4))
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert all(map(same, itertools.islice(second, 5), want[4:]))
    for loader in (whole, first, second):
        loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("names", ["all", "two"], ids=["files for all", "fewer files than readers"])
def test_ranks_and_workers_read_disjoint_rows_of_a_stream(home, names, num_workers):
    ranks = [built(rank=rank, world_size=2, **options(home, names, num_workers=num_workers))[0] for rank in (0, 1)]
    seen = [set(answers(rank, 4)) for rank in ranks]
    assert not seen[0] & seen[1] and all(len(texts) >= 3 for texts in seen)
    for rank in ranks:
        rank.close()


def test_a_data_set_that_does_not_exist_is_named_with_the_way_out(home):
    with pytest.raises(DataError, match="does not exist; name a folder with a JSONL file or parquet files"):
        built(train_dataset_path=str(home / "nowhere"))
    with pytest.raises(DataError, match="has no part 'three'; its folders: one, two"):
        built(**options(home, "three"))
    (home / "empty").mkdir()
    with pytest.raises(DataError, match="neither parquet nor arrow files"):
        built(**options(home, "default", "empty"))
    with pytest.raises(DataError, match="no folders shard_0"):
        built(**options(home, "shards"))
    (home / "file").write_text("x")
    with pytest.raises(DataError, match="is a file, not a folder"):
        built(train_dataset_path=str(home / "file"))


@pytest.mark.parametrize("stream_dataset", [True, False])
def test_a_repository_that_cannot_be_reached_is_named(monkeypatch, stream_dataset):
    def refuse(*arguments, **named):
        raise ConnectionError("no way through\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="data set someone/something, part 'x' cannot be read: ConnectionError: no way"):
        built(train_dataset_path="someone/something", train_dataset_name=("x",), stream_dataset=stream_dataset)


def test_the_parts_of_a_repository_are_asked_for(monkeypatch):
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: [f"{path}/a", f"{path}/b"])
    assert hub.parts("someone/something", ("all",)) == ["someone/something/a", "someone/something/b"]
    assert hub.parts("someone/something", ("a", "b")) == ["a", "b"]


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(DataError, match=r"pip install 'nanovlm\[train\]'"):
        built(train_dataset_path=str(tmp_path))


def test_a_broken_parquet_file_stops_with_its_name(home):
    (home / "parts" / "one" / "train-00001-of-00002.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="part 'one' cannot be read"):
        built(**options(home, stream_dataset=False))
    assert ids_of([next(built(**options(home, "two"))[0])])
