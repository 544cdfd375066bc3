"""Every format against its definition in plain float64, number by number."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from retrace.analyze.caches.formats import Format
from retrace.analyze.methods.options.cache import Cache
from retrace.traces import RetraceError

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
TOKENS, CHANNELS = 70, 64


def of_keys(name: str) -> Format:
    return Cache.parse(name).keys


def of_values(name: str) -> Format:
    return Cache.parse(name).values


def some_vectors(scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Vectors with a channel that sticks out, a zero, a constant and a very large one."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(TOKENS, CHANNELS, generator=generator) * scale
    vectors[:, 3] *= 30
    vectors[1] = 0.0
    vectors[2] = -0.75
    vectors[4] *= 100
    return vectors


def float16(number: float) -> float:
    return float(np.float16(number))


def grid_of(exponent_bits: int, mantissa_bits: int, bias: int, most: float) -> list[float]:
    """Every magnitude of a small floating-point format, subnormal ones too, in order of its code:
    so that the even of two neighbours is the one at an even place."""
    found = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            part = mantissa / 2**mantissa_bits
            number = (
                part * 2.0 ** (1 - bias) if not exponent else (1 + part) * 2.0 ** (exponent - bias)
            )
            if number <= most:
                found.append(number)
    return found


E4M3 = grid_of(4, 3, 7, 448.0)
E2M1 = grid_of(2, 1, 1, 6.0)


def nearest(number: float, grid: list[float]) -> float:
    """Of a grid, ties to the even place, the last for what is larger."""
    apart = [abs(abs(number) - level) for level in grid]
    ties = [i for i, distance in enumerate(apart) if distance == min(apart)]
    place = next((i for i in ties if i % 2 == 0), ties[0])
    return math.copysign(grid[place], number)


def fp8(vectors: Array) -> Array:
    return np.vectorize(lambda x: nearest(x, E4M3))(vectors)


def nvfp4(vectors: Array) -> Array:
    found = np.zeros_like(vectors)
    for at in np.ndindex(len(vectors), CHANNELS // 16):
        block = vectors[at[0], at[1] * 16 : at[1] * 16 + 16]
        scale = nearest(float(np.float32(np.abs(block).max()) / np.float32(6)), E4M3)
        codes = [
            nearest(float(np.float32(x) / np.float32(scale)), E2M1) if scale else 0 for x in block
        ]
        found[at[0], at[1] * 16 : at[1] * 16 + 16] = np.array(codes) * scale
    return found


def q8_0(vectors: Array) -> Array:
    found = np.zeros_like(vectors)
    for token, block in np.ndindex(len(vectors), CHANNELS // 32):
        own = np.float32(vectors[token, block * 32 : block * 32 + 32])
        d = np.float32(np.abs(own).max()) / np.float32(127)
        inverse = np.float32(1) / d if d else np.float32(0)
        for i, x in enumerate(own):
            ratio = float(np.float32(x * inverse))
            code = math.copysign(math.floor(abs(ratio) + 0.5), ratio)
            found[token, block * 32 + i] = code * float16(float(d))
    return found


def q4_0(vectors: Array) -> Array:
    found = np.zeros_like(vectors)
    for token, block in np.ndindex(len(vectors), CHANNELS // 32):
        own = np.float32(vectors[token, block * 32 : block * 32 + 32])
        largest = max(own, key=abs)  # the first of several
        d = largest / np.float32(-8)
        inverse = np.float32(1) / d if d else np.float32(0)
        for i, x in enumerate(own):
            code = min(15, int(np.float32(x * inverse + np.float32(8.5))))
            found[token, block * 32 + i] = (code - 8) * float16(float(d))
    return found


def evenly(numbers: Array, bits: int) -> Array:
    """Of one group, with its scale and its offset."""
    offset = float16(numbers.min())
    scale = float16(float(np.float32(numbers.max() - numbers.min()) / np.float32(2**bits - 1)))
    codes = np.clip(np.rint((numbers - offset) / scale) if scale else numbers * 0, 0, 2**bits - 1)
    return offset + codes * scale


def by_token(bits: int) -> Callable[[Array], Array]:
    return lambda vectors: np.stack([evenly(v, bits) for v in vectors])


def by_channel(bits: int) -> Callable[[Array], Array]:
    def rounded(vectors: Array) -> Array:
        found = []
        for start in range(0, TOKENS // 32 * 32, 32):
            group = vectors[start : start + 32]
            found.append(np.stack([evenly(c, bits) for c in group.T], axis=1))
        return np.concatenate(found)

    return rounded


def by_channel_block(bits: int) -> Callable[[Array], Array]:
    def rounded(vectors: Array) -> Array:
        halves = [by_token(bits)(vectors[:, a : a + 32]) for a in range(0, CHANNELS, 32)]
        return np.concatenate(halves, axis=1)

    return rounded


ORACLES: dict[str, tuple[Format, Callable[[Array], Array], float]] = {
    "fp8": (of_keys("fp8"), fp8, 8.0),
    "nvfp4": (of_keys("nvfp4"), nvfp4, 4.5),
    "int8:32": (of_keys("int8:32"), q8_0, 8.5),
    "int4:32": (of_keys("int4:32"), q4_0, 4.5),
    "int8:token": (of_keys("int8:token"), by_token(8), 8.5),
    "int4:token": (of_keys("int4:token"), by_token(4), 4.5),
    "int8:channel": (of_keys("int8:channel"), by_channel(8), 9.0),
    "int4:channel": (of_keys("int4:channel"), by_channel(4), 5.0),
    "keys of kivi:2": (of_keys("kivi:2"), by_channel(2), 3.0),
    "values of kivi:2": (of_values("kivi:2"), by_channel_block(2), 3.0),
    "keys of kivi:4": (of_keys("kivi:4"), by_channel(4), 5.0),
    "values of kivi:4": (of_values("kivi:4"), by_channel_block(4), 5.0),
}
"""What holds 64 channels, what it should give back, and its bits for each channel."""


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 40.0])
def test_rounding(name: str, scale: float) -> None:
    held, oracle, _ = ORACLES[name]
    vectors = some_vectors(scale)
    found, expected = held.rounded(vectors), oracle(vectors.double().numpy())
    assert found.shape == expected.shape
    # Where float64 and float32 fall on two sides of a half, a code differs by one: next to never.
    apart = np.abs(found.double().numpy() - expected)
    near = 2e-6 * np.abs(expected).max(axis=-1, keepdims=True)
    assert (apart > near).mean() < 5e-4


@pytest.mark.parametrize("name", ORACLES)
def test_bits(name: str) -> None:
    held, _, bits = ORACLES[name]
    assert held.bytes(CHANNELS) * 8 / CHANNELS == bits


@pytest.mark.parametrize("name", ORACLES)
def test_what_is_rounded_stays(name: str) -> None:
    held, oracle, _ = ORACLES[name]
    if oracle in (fp8, nvfp4) or "32" in name:  # others round their scales and offsets
        once = held.rounded(some_vectors())
        torch.testing.assert_close(held.rounded(once), once, rtol=2e-3, atol=0)


def test_tokens_are_rounded_alone_or_with_their_group() -> None:
    vectors, changed = some_vectors(), some_vectors()
    changed[64:] = -3.0
    for held, _, _ in ORACLES.values():
        assert torch.equal(held.rounded(vectors)[:64], held.rounded(changed)[:64])
        assert torch.equal(held.rounded(vectors[:64]), held.rounded(vectors)[:64])


def test_larger_numbers_are_held_as_the_largest() -> None:
    vectors = torch.full((1, 32), 1e6)
    vectors[0, 1] = -500.0
    assert of_keys("fp8").rounded(vectors)[0, :2].tolist() == [448.0, -448.0]
    assert of_keys("nvfp4").rounded(vectors)[0, 0] == 448.0 * 6
    assert of_keys("int4:token").rounded(vectors).isfinite().all()


@pytest.mark.parametrize(
    ("name", "position", "first"),
    [
        ("fp8", 40, 41),
        ("int4:channel", 31, 0),
        ("int4:channel", 32, 32),
        ("int4:channel", 95, 64),
        ("k:kivi:2+v:fp8", 127, 0),
        ("k:kivi:2+v:fp8", 128, 128),
    ],
)
def test_newest_keys_are_in_full(name: str, position: int, first: int) -> None:
    assert of_keys(name).first_full(torch.tensor([position])).tolist() == [first]


def test_newest_values_of_kivi_are_in_full() -> None:
    found = of_values("kivi:2").first_full(torch.tensor([5, 128, 129, 400]))
    assert found.tolist() == [0, 0, 1, 272]


@pytest.mark.parametrize(
    ("name", "step"),
    [("fp8", None), ("int4:channel", 32), ("kivi:2", 128), ("k:int4:channel+v:kivi:4", 32)],
)
def test_step(name: str, step: int | None) -> None:
    assert Cache.parse(name).step == step


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("int4:32", 80, "int4:32 holds channels by 32, and there are 80 of them."),
        ("nvfp4", 24, "nvfp4 holds channels by 16, and there are 24 of them."),
        ("turboquant:2", 2, "turboquant:2 needs 3 channels, and there are 2."),
    ],
)
def test_refused_sizes(name: str, channels: int, message: str) -> None:
    with pytest.raises(RetraceError) as caught:
        of_keys(name).check(channels)
    assert str(caught.value) == message
