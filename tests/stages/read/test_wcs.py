"""The WCS of a header: every way to write it gives one sky, and what may be read in two ways is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS, Wcsprm
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.cards import parse_cards
from sgclassify.stages.read.catalog import separation_arcsec
from sgclassify.stages.read.wcs import build_wcs, check_wcs, right_ascension, transform, wcs_cards

SCALE = 0.074 / 3600
SHAPE = (40, 50)
X, Y = (grid.ravel() for grid in np.meshgrid([0.0, 17.25, 49.0], [0.0, 20.5, 39.0]))
PATH = Path("a_IMG.fits")

PLAIN = {
    "CTYPE1": "'RA---TAN'",
    "CTYPE2": "'DEC--TAN'",
    "CRVAL1": 150.0,
    "CRVAL2": 2.0,
    "CRPIX1": 25.5,
    "CRPIX2": 20.5,
}
PLAIN |= {"CD1_1": -SCALE, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": SCALE}


def text_of(*cards: tuple[str, object]) -> bytes:
    return b"".join(f"{key:8}= {value}".ljust(80).encode() for key, value in cards) + b"END".ljust(80)


def cards_of(*cards: tuple[str, object]) -> str:
    return wcs_cards(parse_cards(text_of(*cards))[0], PATH)


def sky(cards: str) -> tuple[np.ndarray, np.ndarray]:
    return transform(build_wcs(cards), X, Y, forward=True)


def assert_same_sky(cards: str, reference: WCS, limit_arcsec: float = 1e-7) -> None:
    """The limit is some hundred times what the rounding of degrees near 360 makes, 2e-10 arcsec."""
    ra, dec = sky(cards)
    assert separation_arcsec(ra, dec, *reference.all_pix2world(X, Y, 0)).max() < limit_arcsec
    back = transform(build_wcs(cards), ra, dec, forward=False)
    np.testing.assert_allclose(back, (X, Y), rtol=0, atol=1e-3)


def plain(**changed: object) -> list[tuple[str, object]]:
    return [(key, value) for key, value in (PLAIN | changed).items() if value is not None]


def named(kind: str) -> dict[str, str]:
    return {"CTYPE1": f"'RA---{kind}'", "CTYPE2": f"'DEC--{kind}'"}


TAN = WCS(fits.Header.fromstring(cards_of(*plain())))


@st.composite
def spelled(draw, value: float) -> str:
    """One number, in a form that FITS allows or that programs write: always the same double."""
    forms = [repr(value), f"{value:.17E}", f"{value:.17e}", f"{value:.17E}".replace("E", "D")]
    if value == int(value) and abs(value) < 1e6:
        forms += [f"{int(value)}", f"{int(value)}.", f"{int(value):+05d}"]
    if abs(value) < 1:
        forms.append(repr(value).replace("0.", ".", 1) if repr(value).lstrip("-").startswith("0.") else repr(value))
    form = draw(st.sampled_from(forms))
    if not form.startswith("-"):
        form = draw(st.sampled_from(["", "+"])) + form.lstrip("+")
    blanks = draw(st.sampled_from(["", " ", "   "]))
    form = draw(st.sampled_from([form, form, f"{blanks}{form}", f"'{form}'", f"'{blanks}{form}  '"]))
    return form + draw(st.sampled_from(["", " / comment", "/ = 7 '"]))


@st.composite
def linear(draw) -> tuple[list[tuple[str, float]], dict[str, float]]:
    """The linear part in one of its forms, and the CD matrix that it means."""
    east, north = draw(st.sampled_from([-1, 1])) * SCALE, SCALE * draw(st.sampled_from([1.0, 1.01]))
    angle = draw(st.one_of(st.sampled_from([0.0, 30.0, 90.0, 180.0, 270.0]), st.floats(-360, 360)))
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # Calabretta & Greisen 2002, section 6.1: CROTA2 turns the axes after they have been scaled
    cd = {"CD1_1": east * cos, "CD1_2": -north * sin, "CD2_1": east * sin, "CD2_2": north * cos}
    delta = [("CDELT1", east), ("CDELT2", north)]
    pc = [("PC1_1", cos), ("PC1_2", -sin * north / east), ("PC2_1", sin * east / north), ("PC2_2", cos)]
    form = draw(st.sampled_from(["CD", "CD and others", "PC", "CD and PC", "CROTA2"]))
    if form == "CROTA2":
        # CROTA1 has no meaning
        return [*delta, ("CROTA2", angle), ("CROTA1", draw(st.sampled_from([0.0, angle, 5.0])))], cd
    if "PC" in form:
        cards = [(key, value) for key, value in pc if value != float(key in ("PC1_1", "PC2_2")) or draw(st.booleans())]
        # without any PC the header means CDELT alone, which is the same
        return [*delta, *cards, *(cd.items() if form != "PC" else [])], cd
    cards = [(key, value) for key, value in cd.items() if value or draw(st.booleans())]
    if form != "CD":
        cards += [("CDELT1", 1.0), ("CDELT2", 0.0), ("CROTA2", 77.0)]
    return cards, cd


@st.composite
def distortion(draw) -> tuple[list[tuple[str, float]], dict[str, float], str, str]:
    """Cards of a distortion, the same complete, its name in the header, and its right name."""
    kind = draw(st.sampled_from(["TAN", "TPV", "SIP"]))
    small = st.floats(-1e-4, 1e-4)
    if kind == "TAN":
        native = [[], [("PV1_1", 0.0), ("PV1_2", 90.0), ("PV1_0", 1.0)], [("PV2_1", 0.0)]]
        return draw(st.sampled_from(native)), {}, "TAN", "TAN"
    if kind == "TPV":
        complete = {"PV1_1": 1.0, "PV2_1": 1.0}
        for axis in (1, 2):
            for m in draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 11]), max_size=4, unique=True)):
                complete[f"PV{axis}_{m}"] = float(m == 1) + draw(small)
        standard = {"PV1_1": 1.0, "PV2_1": 1.0}
        cards = [item for item in complete.items() if item not in standard.items() or draw(st.booleans())]
        cards += [(f"PV{axis}_8", 0.0) for axis in (1, 2) if draw(st.booleans())]
        polynomial = any(int(key[4:]) >= 5 or (key[2] == "2" and value) for key, value in cards)
        name = draw(st.sampled_from(["TPV", "TAN"])) if polynomial else "TPV"
        if name == "TPV" and draw(st.booleans()):
            cards += [("A_ORDER", 2), ("B_ORDER", 2), ("A_2_0", 1e-4)]
        return cards, complete, name, "TPV"
    order = draw(st.integers(1, 3))
    complete = {"A_1_0": draw(small), "B_0_1": draw(small)}
    for key in ("B_1_1", "B_0_2", *(["A_2_0"] if order > 1 else [])):
        complete[key] = 1e-4 * draw(small)
    orders = {"A_ORDER": order, "B_ORDER": draw(st.integers(2, 3))}
    cards = [
        *orders.items(),
        *((key, value) for key, value in complete.items() if value or draw(st.booleans())),
    ]
    # coefficients beyond the order have no meaning, and the inverse polynomial is not needed
    cards += draw(st.sampled_from([[], [("A_4_4", 1.0)], [("AP_ORDER", 2), ("AP_1_0", 0.5)]]))
    name = draw(st.sampled_from(["TAN-SIP", "TAN"]))
    # what a polynomial of TPV beside it says is the same, or less
    beside = [("PV1_1", 1.0), ("PV2_1", 1.0), *([("PV1_7", 1e-3)] if name == "TAN-SIP" else [])]
    cards += draw(st.sampled_from([[], beside]))
    return cards, complete | orders | {"A_ORDER": max(order, 2)}, name, "TAN-SIP"


FRAMES = [
    [],
    ["RADESYS = 'ICRS'"],
    ["RADESYS = 'icrs    '", "EQUINOX =                      / no meaning here"],
    ["RADESYS = 'ICRS'", "EQUINOX = 'unknown'"],
    ["RADESYS = 'ICRS'", "EQUINOX = 2028.5", "EPOCH   = 1950.0"],
    ["RADECSYS= 'ICRS'", "EQUINOX = 'J2000'"],
    ["RADESYS = 'FK5'", "EQUINOX = 'J2000.0'"],
    ["RADESYS =", "EQUINOX = 2.D3"],
    ["EQUINOX = '2000'", "EPOCH   = 2028.5"],
    ["EQUINOX =", "EPOCH   = 2000"],
]
UNITS = [[], ["CUNIT1  = 'deg'", "CUNIT2  = 'DEG     '"], ["CUNIT1  =", "CUNIT2  = 'degrees' / of arc"]]
JUNK = [
    "WCSAXES = 4",
    "CTYPE3  = 'FREQ'",
    "CRVAL1A = 7.0",
    "CD1_1A  = 7.0",
    "PV1_01  = 7.0",
    "PV2_1A  = 7.0",
    "PV1_40x = 7.0",
    "cd1_1   = 7.0",
    "HIERARCH CRVAL1 = 7.0",
    "COMMENT = CRVAL1 = 7",
    "LATPOLE =",
    "PV2_9   =",
    "A_2_2   = / nothing",
    "CROTA1  = 'x'",
    "PC1_1x  = 7.0",
    "CRVAL1  7.0",
    "",
]
AGAIN = ["CRVAL1  = 7.0", "CRPIX2  = 'x'", "CTYPE1  = 'GLON-CAR'", "CRVAL2  ="]


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_every_way_to_write_a_header_gives_one_sky(data):
    draw = data.draw
    given_linear, cd = draw(linear())
    given_terms, terms, name, right_name = draw(distortion())
    ra = draw(st.one_of(st.sampled_from([0.0, 150.0, 277.79271523695]), st.floats(0, 360, exclude_max=True)))
    dec = draw(st.one_of(st.sampled_from([0.0, 24.3, -89.9995, 90.0, -90.0]), st.floats(-90, 90)))
    crpix = {f"CRPIX{k}": draw(st.one_of(st.sampled_from([1.0, 25.5]), st.floats(-3e4, 3e4))) for k in (1, 2)}
    pole = draw(st.sampled_from([{}, {}, {"LONPOLE": 180.0}, {"LONPOLE": 170.0}, {"LONPOLE": 180.0, "LATPOLE": 0.0}]))

    clean = fits.Header()
    clean["CTYPE1"], clean["CTYPE2"] = f"RA---{right_name}", f"DEC--{right_name}"
    clean.update({"CRVAL1": ra, "CRVAL2": dec, **crpix, **cd, **pole, **terms})
    reference = WCS(clean, fix=False)

    turned = ra + draw(st.sampled_from([0.0, 0.0, 360.0, -360.0, -720.0]))
    numbers = [
        ("CRVAL1", turned),
        ("CRVAL2", dec),
        *crpix.items(),
        *pole.items(),
        *given_linear,
        *given_terms,
    ]
    cards = [f"{key:8}= {draw(spelled(float(value)))}" for key, value in numbers]
    case = draw(st.sampled_from([str, str.lower]))
    cards += [f"CTYPE1  = '{case('RA---' + name)}'", f"CTYPE2  =      '{case('DEC--' + name)}   '/ the axes"]
    for choices in (FRAMES, UNITS):
        cards += draw(st.sampled_from(choices))
    cards += draw(st.lists(st.sampled_from(JUNK), max_size=4, unique=True))
    cards = draw(st.permutations(cards))
    # what comes again counts no more
    cards += draw(st.lists(st.sampled_from(AGAIN), max_size=2, unique=True))
    values, _ = parse_cards(b"".join(card.ljust(80).encode() for card in [*cards, "END"]))

    found = wcs_cards(values, PATH)
    assert_same_sky(found, reference)
    assert wcs_cards(parse_cards(found.encode() + b"END".ljust(80))[0], PATH) == found
    check_wcs(found, SHAPE, PATH)
    # the plan of a run asks wcslib itself
    if "A_ORDER" not in found:
        world = Wcsprm(header=found.encode()).p2s(np.stack([X, Y], axis=-1), 0)["world"].T
        assert separation_arcsec(*world, *sky(found)).max() < 1e-7


@settings(deadline=None, max_examples=300)
@given(
    st.floats(-360, 360),
    st.floats(-90, 90),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=4, max_size=4),
)
def test_wcslib_gets_the_very_numbers(ra, dec, numbers):
    keys = ("CRPIX1", "CRPIX2", "CD1_1", "CD2_2")
    cards = cards_of(*plain(CRVAL1=ra, CRVAL2=dec, CD1_2=None, CD2_1=None, **dict(zip(keys, numbers, strict=True))))
    found = Wcsprm(header=cards.encode())
    assert found.crval.tolist() == [right_ascension(ra), dec]
    assert [*found.crpix, found.cd[0, 0], found.cd[1, 1]] == numbers
    assert all(len(cards[k : k + 80].rstrip()) <= 40 for k in range(0, len(cards), 80))


@pytest.mark.parametrize(
    "changed",
    [
        named("TPV"),
        named("TPV") | {"PV1_1": 1.0},
        named("TPV") | {"PV2_1": "1"},
        named("TPV") | {"PV1_2": 0.0, "PV2_4": 0.0},
        {"PV1_0": 0.0, "PV1_1": 1.0, "PV1_2": 0.0, "PV2_0": 0.0, "PV2_1": 1.0, "PV2_2": 0.0},
        {"PV2_1": 1},
        {"PV1_5": 0.0},
        {"PV2_0": 0.0, "PV2_1": 0.0},
        {"PV1_3": 180.0},
        {"PV1_0": 0.0, "PV1_1": 0.0, "PV1_2": 90.0, "PV1_3": 180.0, "PV1_4": 0.0},
        named("TAN-SIP"),
        named("TAN-SIP") | {"A_ORDER": 0, "B_ORDER": 0},
        {"CRVAL1": 510.0},
        {"CRVAL1": -210},
        {"CRVAL1": "'150'"},
    ],
    ids=str,
)
def test_what_is_tan_by_another_name(changed):
    assert_same_sky(cards_of(*plain(**changed)), TAN)


def test_a_polynomial_without_the_sip_that_ctype_promises():
    pv = {"PV1_1": 1.001, "PV1_7": 0.5, "PV2_2": 1e-4}
    expected = cards_of(*plain(**named("TPV"), **pv))
    assert cards_of(*plain(**named("TAN-SIP"), **pv)) == expected
    assert separation_arcsec(*sky(expected), *TAN.all_pix2world(X, Y, 0)).max() > 1e-3


def test_the_native_longitude_of_the_pole_may_be_a_pv_card():
    turned = WCS(fits.Header.fromstring(cards_of(*plain(LONPOLE=170.0))))
    assert separation_arcsec(*sky(cards_of(*plain())), *turned.all_pix2world(X, Y, 0)).max() > 0.1
    assert_same_sky(cards_of(*plain(PV1_3=170.0)), turned)
    assert_same_sky(cards_of(*plain(PV1_3=170.0, LONPOLE=180.0)), turned)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"PV1_1": 1.0}, "PV1_1 = 1 beside TAN: if they are a polynomial"),
        ({"PV1_0": 0.0, "PV1_1": 1.0, "PV1_2": 0.0}, "PV1_0 = 0, PV1_1 = 1, PV1_2 = 0 beside TAN"),
        ({"PV1_0": 1e-3}, "PV1_0 = 0.001 beside TAN"),
        ({"PV1_1": 0.0, "PV1_2": 45.0}, "beside TAN"),
        ({"PV2_1": "'x'"}, "PV2_1 is 'x'"),
        (named("TPV") | {"PV1_7": "1.0.0"}, "PV1_7 is '1.0.0'"),
        ({"CRVAL1": "'150 deg'"}, "CRVAL1 is '150 deg'"),
        ({"CRVAL1": ""}, "CRVAL1 is missing"),
        ({"CRVAL1": 721.0}, "no right ascension"),
        ({"CRVAL1": -1e5}, "no right ascension"),
        ({"CRVAL2": 90.1}, "no declination"),
        ({"CRPIX1": "T"}, "CRPIX1 is True"),
        ({"LONPOLE": "'x'"}, "LONPOLE is 'x'"),
        (named("TNX"), "no projection that is known"),
        (named("TAN-TPD"), "no projection that is known"),
        (named("TPU"), "no projection that is known"),
        ({"CTYPE2": "'DEC--TPV'"}, "CTYPE is RA---TAN, DEC--TPV"),
        ({"PC1_1": 1.0, "PC2_2": 1.0}, "CD and PC are both there, and differ"),
        (named("TAN-SIP") | {"A_2_0": 1e-5}, "A_ORDER is missing"),
        (named("TAN-SIP") | {"A_ORDER": 2, "A_2_0": 1e-5}, "B_ORDER is missing"),
        (named("TAN-SIP") | {"A_ORDER": 2.5, "B_ORDER": 2}, "A_ORDER is 2.5"),
        ({"EQUINOX": 1950}, "ICRS is needed"),
        ({"EQUINOX": "'B1950'"}, "EQUINOX 'B1950'; ICRS is needed"),
        ({"EPOCH": 1950.0}, "EQUINOX 1950; ICRS is needed"),
        ({"RADESYS": "'FK5'", "EQUINOX": "'unknown'"}, "ICRS is needed"),
    ],
    ids=str,
)
def test_what_is_wrong_or_may_be_read_in_two_ways_is_refused(changed, fault):
    with pytest.raises(UnusableInputError) as caught:
        cards_of(*plain(**changed))
    assert fault in caught.value.fault
    assert caught.value.fault.startswith("unusable WCS: ")


def test_a_declination_that_rounding_puts_beyond_the_pole():
    assert_same_sky(
        cards_of(*plain(CRVAL2="90.00000000000001")), WCS(fits.Header.fromstring(cards_of(*plain(CRVAL2=90))))
    )


@given(st.floats(-1e4, 1e4))
def test_right_ascensions_lie_within_a_turn(ra):
    found = right_ascension(ra)
    assert 0 <= found < 360
    assert math.cos(math.radians(found)) == pytest.approx(math.cos(math.radians(ra)), abs=1e-11)
    if 0 <= ra < 360:
        assert found == ra


def test_a_tiny_negative_right_ascension_is_zero():
    assert right_ascension([-1e-20, 360.0, -360.0, 540.0]).tolist() == [0.0, 0.0, 0.0, 180.0]
