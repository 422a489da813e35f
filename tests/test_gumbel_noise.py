"""The noise: known answers of its generator, its range, and kernels that make the same."""

import pytest
import torch

from medground_kernels.backend import jit, tl
from medground_kernels.gumbel_noise import _philox, _uniform, gumbel_block, gumbel_noise

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    # the known-answer file of Random123 (Salmon et al. 2011)
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, want):
    words = _philox(*(torch.tensor([[c]]) for c in counter), torch.tensor([[key]]))
    assert " ".join(f"{int(word):08x}" for word in words) == want


def test_noise_is_finite_at_both_ends():
    bits = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    u = _uniform(bits)
    assert ((u > 0) & (u < 1)).all()
    noise = -(-u.log()).log()
    assert torch.isfinite(noise).all()
    assert noise[0] > -2.9 and noise[-1] < 16.7


def test_columns_rows_and_steps_have_noise_of_their_own():
    seeds = torch.tensor([0, 1, 2**32, 2**62 + 1])
    noise = torch.cat([gumbel_noise(seeds, step, 9) for step in (0, 1, 2**32 - 1)])
    assert noise.shape == (12, 9) and noise.unique().numel() == 12 * 9
    torch.testing.assert_close(gumbel_noise(seeds[2:3], 0, 5), noise[2:3, :5], rtol=0, atol=0)


def write_noise(out_ptr, seeds_ptr, start, step, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    noise = gumbel_block(start, step, tl.load(seeds_ptr + row), WIDTH, BLOCK)
    tl.store(out_ptr + row * BLOCK + tl.arange(0, BLOCK), tl.reshape(noise, [BLOCK]))


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize(("start", "step"), [(0, 3), (8192, 2**31 - 2), (4096 * 37, 2**32 - 1)])
def test_kernels_make_the_same_noise(path, width, start, step):
    if path == "torch":
        pytest.skip("the torch path calls gumbel_noise itself")
    kernel = jit(write_noise, do_not_specialize=["step"])
    seeds = torch.tensor([5, 2**62 + 2**33 + 7])
    noise = torch.full((2, 4096), torch.nan)
    kernel[(2,)](noise, seeds, start, step, WIDTH=width, BLOCK=4096)
    truth = gumbel_noise(seeds, step, start + 4096, torch.float64)[:, start:]
    # a wrong last bit of u would show in the largest of 4096
    assert ((noise - truth).abs() < 4e-7 + 2e-7 * truth.abs()).all()
