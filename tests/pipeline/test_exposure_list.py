from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.errors import NothingToDoError, UsageError
from sgclassify.stages.read.exposure_list import parse_list


def stem(k: int) -> str:
    return f"CSST_MSC_MS_WIDE_20280610030351_20280610030621_{10160000001 + k}_08_L1_V01"


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def write(folder: Path, text: str | bytes, name: str = "list.txt") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_files_and_folders(tmp_path):
    touch(tmp_path / "a", f"{stem(2)}_IMG.fits", f"{stem(2)}_WHT.fits", f"{stem(2)}_CAT.fits.gz")
    touch(
        tmp_path / "night" / "deep",
        f"{stem(1)}_IMG.fits.fz",
        "notes.txt",
        "._x_IMG.fits",
        f"{stem(1)}_IMG.txt",
    )
    touch(tmp_path / "night", "MSC_MS_210525121500_100000001_06_img_L1.fits", f"{stem(9)}_CAT.fits")
    text = f"# a comment\n\n   \na/{stem(2)}_IMG.fits\n\tnight/  \n"
    found = parse_list(write(tmp_path, text))
    assert [files.image.name for files in found.files] == [
        f"{stem(1)}_IMG.fits.fz",
        f"{stem(2)}_IMG.fits",
        "MSC_MS_210525121500_100000001_06_img_L1.fits",
    ]
    second = found.files[1]
    assert second.weight == tmp_path / "a" / f"{stem(2)}_WHT.fits"
    assert second.flag is None
    assert second.catalog == tmp_path / "a" / f"{stem(2)}_CAT.fits.gz"
    assert (found.notes, found.problems) == ((), ())
    assert all(files.image.is_absolute() for files in found.files)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark(tmp_path, end, bom):
    touch(tmp_path, "a_IMG.fits", "b_IMG.fits")
    path = write(tmp_path, bom + end.join(["a_IMG.fits", "# x", "b_IMG.fits "]).encode())
    assert [files.image.name for files in parse_list(path).files] == ["a_IMG.fits", "b_IMG.fits"]


def test_relative_to_the_list_and_not_to_the_working_folder(tmp_path, monkeypatch):
    (image,) = touch(tmp_path / "lists" / "data", "a_IMG.fits")
    path = write(tmp_path / "lists", "data/a_IMG.fits")
    monkeypatch.chdir(tmp_path)
    assert parse_list("lists/list.txt").files[0].image == image
    assert parse_list(path).files[0].image == image


NAMES = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"), min_size=1, max_size=12
).filter(lambda name: name.strip() == name and not name.startswith(("#", ".")) and len(name.encode()) < 60)


@settings(max_examples=40, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=6, unique_by=str.casefold), seed=st.integers(0, 99))
def test_any_path_is_found_and_the_order_does_not_matter(names, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("list")
    images = touch(folder / "über den Wolken", *(f"{name}_IMG.fits" for name in names))
    lines = [f"über den Wolken/{image.name}" for image in images]
    first = parse_list(write(folder, "\n".join(lines)))
    assert {files.image for files in first.files} == set(images)
    assert first.problems == first.notes == ()
    lines += [*random.Random(seed).choices(lines, k=3), "über den Wolken"]
    random.Random(seed).shuffle(lines)
    again = parse_list(write(folder, "\r\n".join(lines)))
    assert again.files == first.files
    assert len(again.notes) == 3 + len(names)


def test_same_exposure_twice(tmp_path):
    name = f"{stem(1)}_IMG.fits"
    first, second = touch(tmp_path / "a", name)[0], touch(tmp_path / "b", f"{name}.fz")[0]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "y_IMG.fits").symlink_to(first)
    lines = [f"b/{name}.fz", "c/y_IMG.fits", f"a/../a/{name}", f"a/{name}", "b"]
    results = []
    for k in range(3):
        random.Random(k).shuffle(lines)
        results.append(parse_list(write(tmp_path, "\n".join(lines))))
    assert results[0] == results[1] == results[2]
    assert [files.image for files in results[0].files] == [tmp_path / "a" / ".." / "a" / name]
    assert len(results[0].notes) == 4
    assert sum(str(second) in note for note in results[0].notes) == 2


def test_names_that_are_not_official_tell_exposures_apart_by_folder(tmp_path):
    touch(tmp_path / "a", "img.fits", "img.fits.fz"), touch(tmp_path / "b", "img.fits")
    found = parse_list(write(tmp_path, "a/img.fits\nb/img.fits\na/img.fits.fz\n"))
    assert [files.image.parent.name for files in found.files] == ["a", "b"]
    assert len(found.notes) == 1


def test_links_to_folders_are_followed_once(tmp_path):
    (image,) = touch(tmp_path / "data", "x_IMG.fits")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    touch(tmp_path / "other", "y_IMG.fits")
    (tmp_path / "data" / "out").symlink_to(tmp_path / "other")
    found = parse_list(write(tmp_path, "data"))
    assert [files.image for files in found.files] == [image, tmp_path / "data" / "out" / "y_IMG.fits"]
    assert found.notes == ()


def test_problems_do_not_stop_the_rest(tmp_path):
    touch(tmp_path, "a_IMG.fits", "a_WHT.fits", "b_cat.fits")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe_IMG.fits")
    lines = [
        "a_IMG.fits",
        "missing_IMG.fits",
        "a_WHT.fits",
        "b_cat.fits",
        "empty",
        "pipe_IMG.fits",
        "missing_IMG.fits",
    ]
    found = parse_list(write(tmp_path, "\n".join(lines)))
    assert [files.image.name for files in found.files] == ["a_IMG.fits"]
    assert [(Path(e.path).name, e.fault) for e in found.problems] == [
        ("a_WHT.fits", "is a WHT file"),
        ("b_cat.fits", "is a CAT file"),
        ("empty", "no IMG file in this folder or below it"),
        ("missing_IMG.fits", "the file does not exist"),
        ("pipe_IMG.fits", "not a regular file"),
    ]
    assert all(e.advice for e in found.problems)


@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_a_name_that_is_too_long_costs_itself_alone(tmp_path, kind):
    touch(tmp_path, "a_IMG.fits")
    lines = ["image,weight"] * (kind == "csv") + ["a_IMG.fits", "x" * 300 + "_IMG.fits"]
    if kind == "csv":
        touch(tmp_path, "b_IMG.fits")
        lines.append("b_IMG.fits," + "y" * 300)
    found = parse_list(write(tmp_path, "\n".join(lines), f"list.{kind}"))
    assert [files.image.name for files in found.files] == ["a_IMG.fits"]
    assert len(found.problems) == (2 if kind == "csv" else 1)
    assert all("too long" in e.fault and e.advice for e in found.problems)


def test_the_longest_name_that_a_file_may_have(tmp_path):
    name = "x" * (255 - len("_i.fits")) + "_i.fits"
    touch(tmp_path, name)
    found = parse_list(write(tmp_path, name))
    assert [files.image.name for files in found.files] == [name]
    assert found.problems == ()


def test_what_the_system_refuses_costs_itself_alone(tmp_path, monkeypatch):
    touch(tmp_path, "a_IMG.fits", "b_IMG.fits", "b_WHT.fits")
    real = Path.stat

    def stat(self, **options):
        if self.name in ("b_WHT.fits", "far"):
            raise OSError(errno.ESTALE, "Stale file handle", str(self))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    found = parse_list(write(tmp_path, "a_IMG.fits\nb_IMG.fits\nfar"))
    assert [files.image.name for files in found.files] == ["a_IMG.fits"]
    faults = [(Path(e.path).name, e.fault) for e in found.problems]
    fault = "cannot be read: Stale file handle"
    assert faults == [("b_WHT.fits", fault), ("far", fault)]


def test_nothing_but_problems_is_for_the_caller_to_report(tmp_path):
    found = parse_list(write(tmp_path, "missing_IMG.fits"))
    assert found.files == ()
    assert len(found.problems) == 1


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "\ufeff \r\n"])
@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_nothing_to_do(tmp_path, text, name):
    with pytest.raises(NothingToDoError):
        parse_list(write(tmp_path, text, name))


def test_csv_header_alone(tmp_path):
    with pytest.raises(NothingToDoError):
        parse_list(write(tmp_path, "image,weight\n", "list.csv"))


@pytest.mark.parametrize("content", [b"\x00\x01", b"SIMPLE  =  T", "a\n\xe9".encode("latin-1"), "a".encode("utf-16")])
def test_no_text(tmp_path, content):
    with pytest.raises(UsageError, match=r"text|UTF-8"):
        parse_list(write(tmp_path, content))


def test_missing_list_and_folder(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        parse_list(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="folder"):
        parse_list(tmp_path)


def test_csv_names_the_companions(tmp_path):
    touch(tmp_path, "a_IMG.fits", "a_FLG.fits", "b_IMG.fits", "b_WHT.fits", "b_CAT.fits")
    touch(tmp_path / "w", "any thing, really.fits", "c.fits")
    text = '# list\nImage, weight ,catalog\na_IMG.fits,"w/any thing, really.fits",w/c.fits\n\nb_IMG.fits,,\n,,\n'
    first, second = parse_list(write(tmp_path, text, "list.CSV")).files
    assert first.weight == tmp_path / "w" / "any thing, really.fits"
    assert first.flag == tmp_path / "a_FLG.fits"
    assert first.catalog == tmp_path / "w" / "c.fits"
    assert second.weight == tmp_path / "b_WHT.fits"
    assert second.flag is None
    assert second.catalog == tmp_path / "b_CAT.fits"


def test_csv_problems(tmp_path):
    touch(tmp_path, "a_IMG.fits", "b_WHT.fits")
    text = "image,weight\na_IMG.fits,none.fits\nb_WHT.fits,\nmissing.fits\n.,\n"
    found = parse_list(write(tmp_path, text, "list.csv"))
    assert found.files == ()
    assert [e.fault for e in sorted(found.problems, key=lambda e: e.fault)] == [
        "is a WHT file",
        "is a folder, where an image is expected",
        "the file does not exist",
        "the weight file does not exist",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "weight,flag\na,b\n",
        "image,colour\na,b\n",
        "image,image\na,b\n",
        "a_IMG.fits\n",
        "image\na,b\n",
        "image,weight\n,b\n",
        'image\n"a\n',
    ],
)
def test_malformed_csv(tmp_path, text):
    with pytest.raises(UsageError, match="exposure list"):
        parse_list(write(tmp_path, text, "list.csv"))


def test_name_that_is_not_utf8(tmp_path):
    touch(tmp_path, "a_IMG.fits", os.fsdecode(b"Sternw\xe4rte_IMG.fits"))
    found = parse_list(write(tmp_path, ".\n"))
    assert [files.image.name for files in found.files] == ["a_IMG.fits"]
    (problem,) = found.problems
    assert problem.fault == "the name of the file is not UTF-8"
