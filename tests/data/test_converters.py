"""Public annotation formats: samples of each, damaged ones, and mutations of all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from vtts_rt import cli
from vtts_rt.data.converters import CONVERTERS, convert, encode_sequence
from vtts_rt.data.rows import BadRow, Row, check_evidence, read_rows, sift, write_rows
from vtts_rt.types import Box, TimeSpan
from vtts_rt.video import open_video

CAPTIONS = {
    "v_Qq1": {
        "duration": 82.73,
        "timestamps": [[0.83, 19.86], [17.37, 60.81]],
        "sentences": ["A woman walks.", " She sits down. "],
    }
}
QVH = (
    '{"qid": 9769, "query": "some military patriots", "duration": 150, "vid": "j7rJ_210.0_360.0",'
    ' "relevant_clip_ids": [36, 37], "saliency_scores": [[2, 1, 2], [2, 2, 2]],'
    ' "relevant_windows": [[72, 82], [84, 94]]}\n'
)
NEXT_CSV = (
    "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    '4010069381,369,640,480,"how do the two men play, then",roll it,6,CH,tap,roll it,clap,dig,3\n'
)
NEXT_SPANS = {"4010069381": {"duration": 12.3, "location": {"6": [[0.0, 4.2], [6, 7]]}, "fps": 30}}
LMMS = {
    "question_id": "1",
    "file_name": "COCO_train2014_000000581857_0.jpg",
    "image": {"bytes": None},
    "answer": ["lady in blue", "the lady", "lady in blue"],
    "bbox": [103.5, 299.25, 134.0, 177.5],
}
VIDEOCHAT_BOX = {"img_path": "a.jpg", "expression": "left man", "bbox": [10, 20, 110, 220.5]}
TRACK = {
    "path": "GOT-10k/train/GOT-10k_Train_008002",
    "object": "wheel",
    "gt": [[k / 20, 0.5, k / 20 + 0.1, 0.6] for k in range(8)],
}


def write_samples(folder: Path) -> dict[str, tuple[str, Path]]:
    """name of a sample -> (format, its path); each of the formats' files, made by hand."""
    files = {
        "charades-sta": (
            "charades-sta",
            "charades_sta_train.txt",
            "AO8RW 0.0 6.9##a person ran.\n",
        ),
        "charades-json": ("charades-sta", "charades.json", json.dumps(CAPTIONS)),
        "activitynet": ("activitynet", "val_1.json", json.dumps(CAPTIONS)),
        "qvhighlights": ("qvhighlights", "highlight_val_release.jsonl", QVH),
        "nextgqa": ("nextgqa", "val.csv", NEXT_CSV),
        "refcoco": ("refcoco", "refcoco.jsonl", json.dumps(LMMS) + "\n"),
        "refcoco-videochat": ("refcoco", "rec.json", json.dumps([VIDEOCHAT_BOX])),
        "got10k-videochat": ("got10k", "got_train.json", json.dumps([TRACK])),
    }
    for _, name, text in files.values():
        (folder / name).write_text(text)
    (folder / "Charades_v1_train.csv").write_text("id,subject,length\nAO8RW,HR43,33.67\n")
    (folder / "gsub_val.json").write_text(json.dumps(NEXT_SPANS))
    (folder / "map_vid_vidorID.json").write_text('{"4010069381": "1164/4010069381"}')
    write_sequence(folder / "got", "GOT-10k_Train_000001")
    samples = {key: (kind, folder / name) for key, (kind, name, _) in files.items()}
    return {**samples, "got10k": ("got10k", folder / "got")}


def write_sequence(folder: Path, name: str, num_frames: int = 31) -> None:
    """A sequence of GOT-10k's layout: absent in frames 1 to 9, cut off at the right in the last."""
    (folder / name).mkdir(parents=True)
    (folder / "list.txt").write_text(f"{name}\n")
    boxes = [f"{10 * k}.0000,20.0000,50.0000,40.0000" for k in range(num_frames)]
    (folder / name / "groundtruth.txt").write_text("\n".join(boxes) + "\n")
    gone = [int(1 <= k <= 9) for k in range(num_frames)]
    (folder / name / "absence.label").write_text("\n".join(map(str, gone)) + "\n")
    (folder / name / "meta_info.ini").write_text(
        "[METAINFO]\nurl: x%20y\nanno_fps: 10Hz\nobject_class: bear\nresolution: (320, 240)\n"
    )


EXPECTED = {
    "charades-sta": [
        Row("AO8RW.mp4", "a person ran.", spans=(TimeSpan(0, 6.9),), duration_seconds=33.67)
    ],
    "activitynet": [
        Row("v_Qq1.mp4", "A woman walks.", spans=(TimeSpan(0.83, 19.86),), duration_seconds=82.73),
        Row("v_Qq1.mp4", "She sits down.", spans=(TimeSpan(17.37, 60.81),), duration_seconds=82.73),
    ],
    "qvhighlights": [
        Row(
            "j7rJ_210.0_360.0.mp4",
            "some military patriots",
            spans=(TimeSpan(72, 82), TimeSpan(84, 94)),
            duration_seconds=150.0,
        )
    ],
    "nextgqa": [
        Row(
            "1164/4010069381.mp4",
            "how do the two men play, then",
            options=("tap", "roll it", "clap", "dig", "3"),
            answer="B",
            spans=(TimeSpan(0, 4.2), TimeSpan(6, 7)),
            duration_seconds=12.3,
        )
    ],
    "refcoco": [
        Row(LMMS["file_name"], said, "image", pixel_boxes=((103.5, 299.25, 237.5, 476.75),))
        for said in ("lady in blue", "the lady")
    ],
    "refcoco-videochat": [
        Row("a.jpg", "left man", "image", pixel_boxes=((10.0, 20.0, 110.0, 220.5),))
    ],
    "got10k-videochat": [
        Row(
            "GOT-10k/train/GOT-10k_Train_008002.mp4",
            "wheel",
            boxes=tuple(Box(*box) for box in TRACK["gt"]),
        )
    ],
}
EXPECTED["charades-json"] = EXPECTED["activitynet"]


def test_samples_of_each_format(tmp_path: Path) -> None:
    samples = write_samples(tmp_path)
    assert {kind for kind, _ in samples.values()} == set(CONVERTERS)
    for name, (kind, path) in samples.items():
        rows, bad = sift(convert(kind, path))
        assert not bad and (name == "got10k" or rows == EXPECTED[name]), name
        for row in rows:
            check_evidence(row, CONVERTERS[kind].task_type)
            assert row.media_type == CONVERTERS[kind].media_type
        write_rows(tmp_path / "out.jsonl", rows)
        assert read_rows(tmp_path / "out.jsonl") == rows


def test_a_sequence_gives_eight_boxes_with_times(tmp_path: Path) -> None:
    write_sequence(tmp_path, "a")
    ((row,), _) = sift(convert("got10k", tmp_path, "train/{id}.webm"))
    # Of frames 0 and 10..30, evenly: their ranks are 0, 3, 6, 9, 12, 15, 18, 21.
    frames = [0, 12, 15, 18, 21, 24, 27, 30]
    assert row.box_times == tuple(frame / 10 for frame in frames)
    assert row.pixel_boxes[:2] == ((0.0, 20.0, 50.0, 60.0), (120.0, 20.0, 170.0, 60.0))
    assert row.pixel_boxes[-1] == (300.0, 20.0, 320.0, 60.0)
    assert (row.media, row.question, row.duration_seconds) == ("train/a.webm", "bear", 3.1)


def test_a_sequence_becomes_a_clip(tmp_path: Path) -> None:
    for number in range(3):
        pixels = np.full((33, 48, 3), 80 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:08d}.png")
    assert encode_sequence(tmp_path, tmp_path / "clip.mp4") == 3
    with open_video(tmp_path / "clip.mp4") as source:
        meta = source.metadata
        assert (meta.num_frames, meta.height, meta.width, meta.source_fps) == (3, 32, 48, 10.0)
        levels = [float(np.asarray(frame).mean()) for _, frame in source.read([0, 1, 2])]
    assert np.allclose(levels, [0, 80, 160], atol=3)
    with pytest.raises(ValueError, match="folder must be a folder of pictures"):
        (tmp_path / "empty").mkdir()
        encode_sequence(tmp_path / "empty", tmp_path / "no.mp4")


def test_clips_lie_where_rows_look_for_them(tmp_path: Path) -> None:
    write_sequence(tmp_path / "got", "S_1", 12)
    for number in range(12):
        pixels = np.full((160, 320, 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "got" / "S_1" / f"{number:08d}.png")
    rows, manifest = tmp_path / "got.jsonl", tmp_path / "m.json"
    argv = ["convert", "got10k", tmp_path / "got", rows, "--clips", tmp_path]
    argv += ["--media-name", "clips/{id}_10.mp4", "--manifest", manifest, "--media", tmp_path]
    assert cli.main(["data", *map(str, argv)]) == 0
    assert (tmp_path / "clips" / "S_1_10.mp4").is_file()
    assert cli.main(["data", "check", str(manifest)]) == 0


# (format, file) -> (what stands in it, what is said of that)
DAMAGED: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("charades-sta", "charades_sta_train.txt"): [
        ("AO8RW 0.0##a\n", "line 1: row: line must be `ID"),
        ("A 9 2##x\n", "span must be 0 <= start <= end"),
    ],
    ("activitynet", "val_1.json"): [
        ('{"v": 3}', "entry v: row: annotation must be a JSON object"),
        (
            '{"v": {"duration": 9, "timestamps": [[0, 1]], "sentences": []}}',
            "entry v: row: sentences must be one a timestamp",
        ),
        (
            '{"v": {"duration": 9, "timestamps": [[0, "1"]], "sentences": ["a"]}}',
            "entry v, sentence 1: row: timestamps must be 2 numbers",
        ),
    ],
    ("qvhighlights", "highlight_val_release.jsonl"): [
        ("nonsense\n", "line 1: row must be valid JSON"),
        (QVH.replace("[[72, 82], [84, 94]]", "[]"), "relevant_windows must be at least one"),
    ],
    ("nextgqa", "val.csv"): [
        (NEXT_CSV.replace(",roll it,6", ",fly,6"), "line 2: row: answer must be"),
        (NEXT_CSV.replace(",6,CH", ",7,CH"), "location of 7 must be a list"),
    ],
    ("refcoco", "refcoco.jsonl"): [
        (json.dumps({**LMMS, "bbox": [1, 2, 0, 3]}), "box must be 0 <= x0"),
        (json.dumps({**LMMS, "answer": []}), "at least one expression"),
    ],
    ("got10k", "got_train.json"): [
        (json.dumps([{**TRACK, "gt": TRACK["gt"][:7]}]), "row 1: row: gt must be 8 boxes"),
    ],
    ("got10k", "got/list.txt"): [
        ("../got\n", "sequence must be the name of a folder"),
        ("nowhere\n", "must be a file that can be read"),
    ],
    ("got10k", "got/GOT-10k_Train_000001/groundtruth.txt"): [
        ("1,2,3,4\n", "absence.label must be 1 l"),
        ("1,2,x,4\n", "line 1 must be 4 numbers"),
    ],
    ("got10k", "got/GOT-10k_Train_000001/meta_info.ini"): [
        ("object\n", "no section headers"),
        ("[X]\n", "object_class must be"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [(*file, *case) for file, cases in DAMAGED.items() for case in cases],
)
def test_damaged_annotations(kind: str, name: str, text: str, message: str, tmp_path: Path) -> None:
    write_samples(tmp_path)
    (tmp_path / name).write_text(text)
    path = tmp_path / name.split("/")[0]
    ((found,),) = (list(convert(kind, path)),)
    assert isinstance(found, BadRow) and message in str(found) and "\n" not in str(found)
    assert str(tmp_path) in str(found)


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        ("activitynet", "val_1.json", "[]", "val_1.json must be a JSON object, got 'list'"),
        ("nextgqa", "gsub_val.json", "{", "gsub_val.json must be valid JSON"),
        ("nextgqa", "val.csv", '"' + "x" * 200_000, "val.csv must be CSV"),
        ("refcoco", "rec.json", "{}", "rec.json must be a JSON array"),
        ("coco", "rec.json", "{}", "format must be one of charades-sta"),
    ],
)
def test_files_that_are_no_annotations(
    kind: str, name: str, text: str, message: str, tmp_path: Path
) -> None:
    write_samples(tmp_path)
    (tmp_path / name).write_text(text)
    path = tmp_path / ("val.csv" if kind == "nextgqa" else name)
    with pytest.raises(ValueError, match=message):
        list(convert(kind, path))


def mutated(data: bytes, random: Random) -> bytes:
    pieces = [b"\xff", b"\\ud800", b"1e999", b"NaN", b"[[", b"null", b"-", b'"', b"{}", b"\n", b","]
    pieces += [b"[" * 5000, b"9" * 5000, b"\0", b"[]", b"##", b"%(x)s"]
    out = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(out) + 1)
        out[at : at + random.randint(0, 4)] = random.choice(pieces)
    return bytes(out)


def cases(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """(format, its path, the file that is to be damaged)."""
    for kind, path in write_samples(folder).values():
        if path.is_dir():
            yield from ((kind, path, file) for file in path.rglob("*") if file.is_file())
        else:
            yield kind, path, path
    yield "nextgqa", folder / "val.csv", folder / "gsub_val.json"
    yield "nextgqa", folder / "val.csv", folder / "map_vid_vidorID.json"
    yield "charades-sta", folder / "charades_sta_train.txt", folder / "Charades_v1_train.csv"


def check_mutations(folder: Path, num: int) -> int:
    random, refused = Random(0), 0
    for kind, path, file in list(cases(folder)):
        whole = file.read_bytes()
        for _ in range(num):
            file.write_bytes(mutated(whole, random))
            try:
                found = list(convert(kind, path))
            except ValueError as error:
                found = [BadRow(path, "whole", str(error))]
            for item in found:
                if isinstance(item, BadRow):
                    refused += 1
                    assert "\n" not in item.error and len(item.error) < 1000, item
                else:
                    write_rows(folder / "out.jsonl", [item])
                    assert read_rows(folder / "out.jsonl") == [item]
        file.write_bytes(whole)
    return refused


def test_any_bytes_give_rows_or_a_sentence(tmp_path: Path) -> None:
    assert check_mutations(tmp_path, 40) > 100


@pytest.mark.slow
def test_many_bytes_give_rows_or_a_sentence(tmp_path: Path) -> None:
    check_mutations(tmp_path, 1000)
