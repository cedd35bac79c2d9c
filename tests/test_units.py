import pytest

from bam_ray.units import format_amount, format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0s"), (42.9, "42s"), (190, "3m 10s"), (7500, "2h 05m"), (356400, "4d 3h")],
)
def test_durations_show_their_two_largest_units(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "amount", "count"),
    [
        (0, "0", "0"),
        (950, "950", "950"),
        (999.7, "1k", "1k"),
        (1234, "1.23k", "1.23k"),
        (34_000_000, "34M", "34M"),
        (5.6e9, "5.6G", "5.6B"),
        (1.5e12, "1.5T", "1.5T"),
    ],
)
def test_numbers_have_a_prefix_and_at_most_three_digits(number: float, amount: str, count: str) -> None:
    assert format_amount(number) == amount
    assert format_count(number) == count
    assert format_bytes(number) == f"{amount}B"
