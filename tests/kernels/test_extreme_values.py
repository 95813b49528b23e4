# SPDX-License-Identifier: MIT
"""Extreme but finite inputs and settings of every operator: a finite result, or an error that names the setting."""

from itertools import product

import pytest
import torch

import namedmask_kernels as nk

BACKENDS = ["cpu", "cuda", "reference"]
H, W = 4, 9
LARGEST = torch.finfo(torch.float32).max
NUMBERS = (5e-324, 1e-300, 1e-38, 1e-9, 0.99, 88.0, 1e9, 1e28, 1e300, 1.7e308)
_generator = torch.Generator().manual_seed(1)
SOFT = torch.rand(H, W, 3, generator=_generator)
NOISE = torch.randn(H, W, 8, generator=_generator)
IMAGE = torch.randint(0, 256, (H, W, 3), dtype=torch.uint8, generator=_generator)
FLAT = torch.full((H, W, 3), 77, dtype=torch.uint8)


def mixed_features():
    """Rows of zeros, denormals, huge values, and equal and opposite rows."""
    rows = NOISE.clone()
    rows[0, 0], rows[0, 1], rows[0, 2], rows[0, 3], rows[1, 0] = 0, rows[1, 1], -rows[1, 1], 1e-41, LARGEST
    return rows


FEATURES = (mixed_features(), NOISE * 0, NOISE * 1e-38, NOISE * 1e37, torch.full((H, W, 8), LARGEST))
SIGNS = SOFT.sub(0.5).sign()
MASKS = (SOFT, SOFT * 1e-38, SOFT * 1e28, SIGNS * LARGEST, torch.full((H, W, 3), LARGEST), torch.full((H, W, 3), 1e-45))


def cases(operator):
    """Arguments, settings, and the mask whose range the result stays in, or None."""
    if operator is nk.random_walk:
        for mask, tokens in product(MASKS, FEATURES):
            yield (mask, tokens), {}, mask
        for sharpness, tokens in product(NUMBERS, FEATURES):
            yield (SOFT, tokens), {"sharpness": sharpness}, SOFT
    elif operator is nk.pamr:
        for mask, image in product(MASKS, (IMAGE, FLAT)):
            yield (mask, image), {"iterations": 2}, mask
    elif operator is nk.bilateral_solver:
        for mask, image in product(MASKS, (IMAGE, FLAT)):
            yield (mask[..., 0], image), {"sigma_spatial": 2}, None
        for number, name in product(NUMBERS, ("sigma_spatial", "sigma_luma", "sigma_chroma", "tolerance")):
            yield (SOFT[..., 0], IMAGE), {name: number}, None
        for confidence, smoothness in product((5e-324, 1e-300, 1e-38, 1.0), NUMBERS):
            settings = {"confidence": confidence, "smoothness": smoothness, "sigma_spatial": 2}
            yield (SIGNS[..., 0] * LARGEST, IMAGE), settings, None
    elif operator is nk.dense_crf:
        for mask, image in product(MASKS, (IMAGE, FLAT)):
            yield (mask, image), {"iterations": 1}, None
        for number, sign, labels in product(NUMBERS, (1, -1), (2, 3)):
            few = {"iterations": 1}
            yield (SOFT[..., :labels], IMAGE), {**few, "gaussian": (number, 3 * sign)}, None
            yield (SOFT[..., :labels], IMAGE), {**few, "gaussian": (3, number * sign)}, None
            yield (SOFT[..., :labels], IMAGE), {**few, "bilateral": (number, 13, 10 * sign)}, None
            yield (SOFT[..., :labels], IMAGE), {**few, "bilateral": (80, number, 10 * sign)}, None
            yield (SOFT[..., :labels], IMAGE), {**few, "bilateral": (80, 13, number * sign)}, None
    elif operator is nk.normalized_cut:
        for number, tokens in product(NUMBERS, FEATURES):
            for settings in ({"tau": number}, {"tau": -number}, {"eps": number}, {"tolerance": number}):
                yield (tokens,), settings, None
    else:
        for tokens in FEATURES:
            yield (tokens, [2, 3, 5]), {}, None


CHECKED = (
    nk.bilateral_solver,
    nk.dense_crf,
    nk.normalized_cut,
    nk.pamr,
    nk.random_walk,
    nk.spectral_clusters,
)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the tolerance, in the reference
@pytest.mark.parametrize("operator", CHECKED, ids=lambda operator: operator.__name__)
def test_results_are_finite_or_the_setting_is_rejected(operator, backend, run):
    if backend not in nk.backends.IMPLEMENTATIONS[operator.__name__]:
        pytest.skip(f"{operator.__name__} has no {backend} implementation")
    every = 1 if backend == "cpu" else 7  # the others are slow
    finished = 0
    for arguments, settings, mask in list(cases(operator))[::every]:
        try:
            result = run(operator, *arguments, **settings)
        except ValueError as error:
            ((name, _),) = ((n, v) for n, v in settings.items() if n in str(error))
            assert name != "iterations" and str(error).startswith(f"{operator.__name__}: ")
            continue
        finished += 1
        for field in result if isinstance(result, tuple) else (result,):
            assert field.isfinite().all(), settings
        if mask is not None:
            slack = 1e-5 * mask.abs().max().double()
            assert mask.min() - slack <= result.double().min(), settings
            assert mask.max() + slack >= result.double().max(), settings
    assert finished > 0


def test_extreme_settings_of_one_image_do_not_change_another(backend, run):
    images, soft = nk.Ragged.pack([IMAGE, IMAGE]), nk.Ragged.pack([SOFT] * 2)

    def check(operator, mask, name, of):
        """of(number): the setting `name` with that number for the first image."""
        alone = run(operator, mask.grids()[1], IMAGE, **{name: of(2)})
        for number in (1, 1e9, 1e28, 1.7e308) if operator is not nk.pamr else (1, 2**63 - 1):
            first, second = run(operator, mask, images, **{name: of([number, 2])}).grids()
            assert first.isfinite().all() and torch.equal(second, alone)

    check(nk.bilateral_solver, soft.with_rows(soft.rows[:, 0]), "sigma_spatial", lambda sigma: sigma)
    check(nk.dense_crf, soft, "gaussian", lambda sigma: (sigma, 3))
    check(nk.dense_crf, soft, "bilateral", lambda sigma: (sigma, 13, 10))
    if backend != "cuda":
        check(nk.pamr, soft, "dilations", lambda d: [[d[0]], [d[1]]] if isinstance(d, list) else [d])


def test_attention_rejects_a_scale_beyond_float32():
    qkv, offsets = torch.randn(4, 3, 1, 8), torch.tensor([0, 4], dtype=torch.int32)
    for scale in (1e300, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="attention_features: scale must be finite in float32"):
            nk.attention_features(qkv, offsets, scale=scale)
    assert all(x.isfinite().all() for x in nk.attention_features(qkv, offsets, scale=1e-300))
