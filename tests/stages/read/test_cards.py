"""What the cards of a header say: numbers in every form, strings that go on in CONTINUE cards."""

from __future__ import annotations

import math
import string

import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.cards import as_number, parse_cards, parse_value
from sgclassify.stages.read.catalog import read_table
from sgclassify.stages.read.header import read_header


def header(*cards: str) -> bytes:
    return b"".join(card.encode().ljust(80) for card in (*cards, "END"))


def value_of(*cards: str) -> object:
    return parse_cards(header(*cards))[0].get("KEY")


@pytest.mark.parametrize(
    ("cards", "value"),
    [
        (
            [
                "KEY     = 'i       &'          / what it is,",
                "CONTINUE  ''                   / and more of it",
            ],
            "i",
        ),
        (["KEY     = 'abc&'", "CONTINUE  'def'"], "abcdef"),
        (["KEY     = 'abc &'", "CONTINUE  'def &'", "CONTINUE     'ghi   '  / end"], "abc def ghi"),
        (["KEY     = 'abc&   '", "CONTINUE  'def'"], "abcdef"),
        (["KEY     = 'it''&'", "CONTINUE  's '' /& / not a comment'"], "it's ' /& / not a comment"),
        (["KEY     = '&'", "CONTINUE  '&'", "CONTINUE  'x'"], "x"),
        (["KEY     = 'abc&'"], "abc&"),
        (["KEY     = 'abc&'", "OTHER   = 'x'", "CONTINUE  'def'"], "abc&"),
        (["KEY     = 'abc&'", "COMMENT   'x'", "CONTINUE  'def'"], "abc&"),
        (["KEY     = 'abc&'", "CONTINUE  'def&'", "COMMENT"], "abcdef&"),
        (["KEY     = 'abc&'", "CONTINUE  no string"], "abc&"),
        (["KEY     = 'abc&'", "CONTINUE= 'def'"], "abc&"),
        (["KEY     = 'abc'", "CONTINUE  'def'"], "abc"),
        (["KEY     = abc&", "CONTINUE  'def'"], "abc&"),
        (["KEY     = 'abc'", "KEY     = 'def&'", "CONTINUE  'ghi'"], "abc"),
        (["HIERARCH KEY = 'abc&'", "CONTINUE  'def'", "KEY     = 'x'"], "x"),
    ],
    ids=str,
)
def test_strings_go_on_where_the_standard_says(cards, value):
    assert value_of(*cards) == value


@settings(deadline=None)
@given(st.text(string.ascii_letters + string.digits + " '&/=", max_size=300))
def test_long_strings_as_astropy_writes_them(text):
    card = fits.Card("KEY", text + "x", "a comment").image
    assert parse_cards((card + "END".ljust(80)).encode())[0]["KEY"] == text + "x"


@settings(deadline=None)
@given(st.lists(st.text(string.ascii_letters + " '&/", max_size=30), min_size=1, max_size=5))
def test_a_string_may_be_cut_anywhere(pieces):
    quoted = [piece.replace("'", "''") for piece in pieces]
    cards = [f"CONTINUE  '{piece}&'" for piece in quoted]
    cards[0] = f"KEY     = '{quoted[0]}&'"
    cards[-1] = cards[-1][:-2] + "'"
    assert value_of(*cards) == "".join(pieces).rstrip()


@pytest.mark.parametrize("word", ["1.", "+1", "1", "1.0", "1E0", "1.D0", ".1E+01", "10.d-1", "01", "1.0/comment"])
@pytest.mark.parametrize("blanks", ["", "   "])
def test_numbers_in_every_form(word, blanks):
    assert as_number(parse_value(f"{blanks}{word}{blanks} / comment")) == 1.0
    if "/" not in word:
        assert as_number(parse_value(f"'{blanks}{word}{blanks}'")) == 1.0


@pytest.mark.parametrize("word", ["", "1.0.0", "1_0", "T", "'T'", "'26/2'", "++inf", "1 0", "0x1", "NaN", "'nan'", "١"])
def test_what_is_no_number(word):
    assert math.isnan(as_number(parse_value(word)))


def test_the_first_of_repeated_keywords_counts():
    values, repeated = parse_cards(header("A       = 1", "B       = 2", "A       = 1.0", "B       = 3", "B       = 2"))
    assert values == {"A": 1, "B": 2}
    assert repeated == {"B"}


def rewrite(path, **replaced: list[str]) -> None:
    """Write the header of the first extension again, with other cards in the place of some."""
    data = path.read_bytes()
    start = data.index(b"XTENSION")
    end = data.index(b"END".ljust(80), start)
    cards: list[str] = []
    for k in range(start, end, 80):
        card = data[k : k + 80].decode()
        cards += replaced.get(card[:8].rstrip(), [card])
    text, old = header(*cards), end + 80 - start
    rest = data[start + -(-old // 2880) * 2880 :]
    path.write_bytes(data[:start] + text.ljust(-(-len(text) // 2880) * 2880) + rest)


@pytest.mark.parametrize("text", [["'g       &'", "'' / wheel"], ["'&'", "'g'"], ["'&'", "''"]], ids=str)
def test_the_filter_may_go_on(make_exposure, text):
    files = make_exposure(checksum=False)
    rewrite(files.image, FILTER=[f"FILTER  = {text[0]:20} / in the beam, of the", f"CONTINUE  {text[1]}"])
    if text == ["'&'", "''"]:
        with pytest.raises(UnusableInputError, match="no FILTER"):
            read_header(files)
    else:
        found = read_header(files)
        assert (found.band, found.notes) == ("g", ())


def test_names_and_units_of_columns_may_go_on(make_exposure, make_columns):
    files = make_exposure(checksum=False)
    rewrite(
        files.catalog,
        TTYPE4=["TTYPE4  = 'R&'", "CONTINUE  'A' / right ascension", "TUNIT4  = 'd&'", "CONTINUE  'eg'"],
        TFORM4=["TFORM4  = '&'", "CONTINUE  'D'"],
    )
    table = read_table(files.catalog)
    assert table.schema.field("RA").metadata == {b"unit": b"deg"}
    assert table["RA"].to_pylist() == make_columns()["RA"].tolist()


def test_a_unit_that_is_not_ascii(make_exposure):
    files = make_exposure(checksum=False)
    rewrite(files.catalog, TTYPE4=["TTYPE4  = 'RA'", "TUNIT4  = 'µm'"])
    assert read_table(files.catalog).schema.field("RA").metadata == {b"unit": "µm".encode()}


def test_a_keyword_that_comes_again_with_another_value_is_noted(make_exposure):
    files = make_exposure(checksum=False)
    rewrite(
        files.image,
        CRVAL1=["CRVAL1  = 150.0", "CRVAL1  = 15D1"],
        CRVAL2=["CRVAL2  = 2.0", "CRVAL2  = 3.0"],
        ZP=["ZP      = 26", "ZP      = 25.9", "UNUSED  = 1", "UNUSED  = 2"],
    )
    found = read_header(files)
    assert found.zero_point == 26.0
    assert found.wcs().wcs.crval.tolist() == [150.0, 2.0]
    text = "occurs more than once, with different values: the first counts"
    assert sorted(found.notes) == [f"CRVAL2 {text}", f"ZP {text}"]
