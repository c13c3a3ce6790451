import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.codec import beyond_rounding, max_relative_error


@settings(deadline=None)
@given(st.floats(-60000, 60000, width=32))
def test_what_rounds_to_the_stored_number_is_no_error(value):
    now = torch.tensor([value])
    assert beyond_rounding(now.half(), now).item() == 0


@settings(deadline=None)
@given(st.floats(-30000, 30000, width=16))
def test_a_whole_spacing_further_is_an_error_of_half_a_spacing(value):
    stored = torch.tensor([value], dtype=torch.float16)
    away = torch.nextafter(stored.float().abs().half(), torch.tensor([65504.0], dtype=torch.float16)).float()
    spacing = away - stored.float().abs()
    now = stored.float() + torch.where(stored < 0, -spacing, spacing)
    torch.testing.assert_close(beyond_rounding(stored, now), spacing / 2)


def test_the_worst_element_counts_in_sizes_of_its_row():
    stored = torch.zeros(2, 3).half()
    now = torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(
        max_relative_error(stored, now, torch.tensor([2.0, 2.0])), torch.tensor([0.25, 0.0]), atol=1e-7, rtol=0
    )


def test_no_number_is_no_small_error():
    now = torch.tensor([[float("nan"), 0.0]])
    assert max_relative_error(torch.zeros(1, 2).half(), now, torch.ones(1)).isnan().all()
