"""Sizes as people write them."""

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.sizes import Size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("2.5MB", 2_500_000), ("6GiB", 6 * 2**30), ("1 kb", 1000), (7, 7), ("12", 12), (".5KiB", 512), ("3b", 3)],
)
def test_a_size_is_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "1.2.3MB", "-1MB", "1MiBs", "nan", "0", 0, -5, "1e3", "0.1B"])
def test_what_is_no_size_says_what_one_looks_like(text):
    with pytest.raises(ValueError, match=r"2\.5MB or 6GiB"):
        parse_size(text)


def test_a_whole_number_of_bytes_may_be_written_with_an_exponent():
    size = TypeAdapter(Size)
    assert parse_size(size.validate_python(2.5e6)) == 2_500_000
    for wrong in (2.5, float("inf"), float("nan"), True):
        with pytest.raises(ValidationError):
            size.validate_python(wrong)


def test_a_unit_cut_short_is_understood_and_not_taken():
    with pytest.raises(ValueError, match=r"did you mean 6GB or 6GiB\?$"):
        parse_size("6G")
