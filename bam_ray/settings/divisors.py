"""What a number can be shared by alike: for messages that say which settings would do."""


def divisors(number: int) -> list[int]:
    """All that divide `number`, from 1 to itself."""
    return [size for size in range(1, number + 1) if number % size == 0]
