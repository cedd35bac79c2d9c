"""Units: byte sizes, and numbers and durations formatted for people."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MINUTE, HOUR, DAY = 60, 3600, 86400  # seconds
SI_PREFIXES = ("", "k", "M", "G", "T", "P")
COUNT_SUFFIXES = ("", "k", "M", "B", "T", "P")


def format_duration(seconds: float | None) -> str:
    """Format a duration with its two largest units: `42s`, `3m 10s`, `2h 05m`, `4d 3h`; None gives an empty string."""
    if seconds is None:
        return ""
    whole = int(seconds)
    if whole < MINUTE:
        return f"{whole}s"
    if whole < HOUR:
        return f"{whole // MINUTE}m {whole % MINUTE:02d}s"
    if whole < DAY:
        return f"{whole // HOUR}h {whole % HOUR // MINUTE:02d}m"
    return f"{whole // DAY}d {whole % DAY // HOUR}h"


def format_amount(number: float) -> str:
    """Format a number with an SI prefix and at most three digits: `950`, `1.2k`, `34M`, `5.6G`."""
    return _scaled(number, SI_PREFIXES)


def format_bytes(number: float) -> str:
    """Format a size in decimal bytes: `950B`, `1.2kB`, `34MB`, `5.6GB`."""
    return f"{format_amount(number)}B"


def format_count(number: float) -> str:
    """Format a number of parameters or tokens the way model sizes are written: `1.2k`, `34M`, `7B`, `1.5T`."""
    return _scaled(number, COUNT_SUFFIXES)


def _scaled(number: float, suffixes: tuple[str, ...]) -> str:
    """Divide `number` by 1000 until at most three digits are left of the point, and append the matching suffix."""
    for suffix in suffixes:
        if number < 999.5 or suffix == suffixes[-1]:
            break
        number /= 1000.0
    digits = f"{number:.3g}" if suffix else f"{number:.0f}"
    return f"{digits}{suffix}"
