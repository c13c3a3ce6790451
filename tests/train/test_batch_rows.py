"""Laws of the rows of a batch of each picture size."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.values import PictureSize
from stages.train.setup import batch_rows, batch_split_error, next_batch_pixels, rows_of, rows_text

SIZES = [PictureSize.parse(text) for text in ("512x512", "512x768", "768x512")]
SMALL = st.lists(st.builds(PictureSize, st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3, unique=True)


def works(sizes: list[PictureSize], pixels: int, parts: int) -> bool:
    return all(rows_of(size, 0, pixels) % parts == 0 for size in sizes)


@settings(deadline=None)
@given(SMALL, st.integers(1, 200), st.integers(1, 4))
def test_the_number_of_pixels_that_is_named_is_the_next_that_works(
    sizes: list[PictureSize], pixels: int, parts: int
) -> None:
    named = next_batch_pixels(sizes, pixels, parts)
    assert named is not None
    assert works(sizes, named, parts)
    assert not any(works(sizes, fewer, parts) for fewer in range(pixels, named))
    assert batch_split_error(1, 1, parts, named, sizes) is None


@given(SMALL, st.integers(1, 500))
def test_no_batch_has_more_pixels_than_it_may_unless_it_is_a_single_row(sizes: list[PictureSize], pixels: int) -> None:
    for size, rows in batch_rows(sizes, 99, pixels).items():
        assert rows * size.pixels <= pixels or rows == 1
        assert (rows + 1) * size.pixels > pixels


def test_a_refusal_names_the_rows_and_the_next_number_of_pixels() -> None:
    assert batch_split_error(16, 2, 2, 4194304, SIZES) == (
        "train.batch_pixels = 4194304: gives 16 rows of 512x512, 10 of 512x768, 10 of 768x512, and each of these "
        "numbers should divide among 2 processes x train.accumulate = 2 micro-batches - take 6291456"
    )
    assert batch_split_error(16, 1, 2, 4194304, SIZES) is None
    assert batch_split_error(16, 3, 1, 4194304) is None, "no size is known yet"


@pytest.mark.parametrize(("world", "accumulate", "splits"), [(1, 1, True), (2, 4, True), (3, 1, False), (1, 32, False)])
def test_without_pixels_the_batch_size_counts_at_every_size(world: int, accumulate: int, splits: bool) -> None:
    error = batch_split_error(16, world, accumulate, None, SIZES)
    assert (error is None) == splits
    assert error is None or f"train.batch_size = 16: does not divide among {world} processes" in error
    assert set(batch_rows(SIZES, 16, None).values()) == {16}


def test_rows_read_as_a_list() -> None:
    assert rows_text({SIZES[0]: 1, SIZES[1]: 3}) == "1 row of 512x512, 3 of 512x768"
