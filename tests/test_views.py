"""The numbers drawn for the views: laws, independence of everything but (seed, step, view, row), refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from sdmp_kernels import ViewDraws, ViewRecipe, byol_views, dino_views, draw_views
from sdmp_kernels.views import EvalView, eval_geometry, eval_view
from sdmp_train.data.schedule import epoch_order

FULL = byol_views(224)[1]


class Drawn:
    """The tensors of draws as arrays."""

    def __init__(self, draws: ViewDraws) -> None:
        self.draws = draws

    def __getattr__(self, name: str) -> np.ndarray:
        return getattr(self.draws, name).numpy()


def draw(recipe: ViewRecipe, n: int = 4000, size: tuple[int, int] = (375, 500), **where: int) -> Drawn:
    heights, widths = np.full(n, size[0]), np.full(n, size[1])
    return Drawn(draw_views(recipe, heights, widths, **{"seed": 1, "step": 2, "view": 0, **where}))


def test_rows_of_a_rank_are_rows_of_the_global_batch() -> None:
    whole = draw(FULL, 64)
    heights, widths = np.full(16, 375), np.full(16, 500)
    for rank in range(4):
        part = draw_views(FULL, heights, widths, seed=1, step=2, view=0, first_row=16 * rank)
        for mine, same in zip(part.tensors(), whole.draws[16 * rank : 16 * (rank + 1)].tensors(), strict=True):
            assert torch.equal(mine, same)


@pytest.mark.parametrize("where", [{"seed": 2}, {"step": 3}, {"view": 1}])
def test_every_key_gives_other_numbers(where: dict[str, int]) -> None:
    assert not np.array_equal(draw(FULL).box, draw(FULL, **where).box)


def test_streams_do_not_meet_those_of_mixing_plans() -> None:
    """Same key (seed, step): the blocks of uniforms must have nothing in common."""
    from sdmp_kernels.views import _uniforms

    views = np.concatenate([_uniforms(100, seed=1, step=2, view=v, first_row=0).ravel() for v in range(3)])
    plan = np.concatenate(
        [np.random.Generator(np.random.Philox(key=[1, 2], counter=[0, 0, 0, c])).random(4000) for c in range(4)]
    )
    order = np.random.Philox(key=[1, 2], counter=[0, 0, 0, 0x4F524452]).random_raw(4000)
    assert len(np.unique(views)) == len(views)
    assert not np.isin(plan, views).any()
    assert not np.isin((order >> np.uint64(11)).astype(np.float64) * 2.0**-53, views).any()


def test_golden_draws() -> None:
    """A run must be resumable after an upgrade of numpy: these numbers may not move."""
    drawn = draw(FULL, 3)
    assert drawn.box.tolist() == GOLDEN_BOXES
    assert epoch_order(8, seed=1, epoch=2).tolist() == GOLDEN_ORDER
    np.testing.assert_allclose(drawn.brightness, GOLDEN_BRIGHTNESS, rtol=1e-6)


GOLDEN_BOXES = [[74, 63, 279, 286], [7, 128, 365, 352], [74, 145, 229, 280]]
GOLDEN_ORDER = [1, 6, 5, 2, 7, 4, 0, 3]
GOLDEN_BRIGHTNESS = [1.0, 1.0, 1.3882468]


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (64, 64), (1, 1), (1, 4000), (4000, 1), (30, 2)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (1.0, 1.0), (1e-4, 1e-3)])
def test_boxes_lie_inside_the_image(size: tuple[int, int], scale: tuple[float, float]) -> None:
    top, left, height, width = draw(ViewRecipe(32, scale), size=size).box.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()


@pytest.mark.parametrize("size", [(375, 500), (300, 100)])
def test_boxes_follow_the_law_of_torchvision(size: tuple[int, int]) -> None:
    """Two samples of the same law: compare quantiles of every coordinate against torchvision's own draws."""
    n = 4000
    ours = draw(ViewRecipe(32, (0.2, 1.0)), n, size).box
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop = v2.RandomResizedCrop(32, (0.2, 1.0))
        image = torch.empty(3, *size)
        drawn = [crop.make_params([image]) for _ in range(n)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn])
    quantiles = np.linspace(0.02, 0.98, 25)
    # Kolmogorov-Smirnov distance of two samples of 4000: above 0.043 with chance 1e-3 under the same law.
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        at = np.quantile(b, quantiles)
        distance = np.abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max() / n
        assert distance < 0.043


def test_no_try_fits_then_the_central_crop_is_taken() -> None:
    tall = draw(ViewRecipe(32, (1.0, 1.0)), 5, size=(400, 100)).box
    wide = draw(ViewRecipe(32, (1.0, 1.0)), 5, size=(100, 400)).box
    assert tall.tolist() == [[133, 0, 133, 100]] * 5
    assert wide.tolist() == [[0, 133, 100, 133]] * 5


def test_rates_and_ranges() -> None:
    n = 20000
    recipe = replace(FULL, blur_prob=0.3)
    drawn = draw(recipe, n)
    jittered = drawn.brightness != 1
    # Four standard deviations of a frequency at n = 20000 are at most 0.0142.
    for rate, expected in (
        (jittered, 0.8),
        (drawn.gray, 0.2),
        (drawn.sigma > 0, 0.3),
        (drawn.solarize, 0.2),
        (drawn.flip, 0.5),
    ):
        assert abs(rate.mean() - expected) < 0.0142
    for values, strength in (
        (drawn.brightness - 1, 0.4),
        (drawn.contrast - 1, 0.4),
        (drawn.saturation - 1, 0.2),
        (drawn.hue, 0.1),
    ):
        assert ((values != 0) == jittered).mean() > 0.9999
        assert np.abs(values).max() <= strength + 1e-6
        # A uniform's standard deviation is strength / sqrt(3); that of 16000 draws is within 2 percent of it.
        assert abs(values[jittered].std() / (strength / 3**0.5) - 1) < 0.02
        assert abs(values[jittered].mean()) < 0.02 * strength
    sigma = drawn.sigma[drawn.sigma > 0]
    assert sigma.min() >= 0.1
    assert sigma.max() <= 2
    assert abs(sigma.mean() - 1.05) < 0.03


COLUMNS = ("brightness", "contrast", "saturation", "hue", "sigma", "gray", "solarize", "flip")


def test_columns_are_independent() -> None:
    drawn = draw(replace(FULL, jitter_prob=1.0, blur_prob=1.0), 20000)
    columns = np.stack(
        [*drawn.box.T, *(getattr(drawn, name) for name in COLUMNS)],
    ).astype(float)
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    # Of the box's own coordinates height and width go together, and a large box starts near the edge.
    correlation[:4, :4] = 0
    assert np.abs(correlation).max() < 0.03


def test_byol_views_are_the_recipe_of_moco_v3() -> None:
    first, second = byol_views(224, crop_min=0.08)
    assert first.jitter == (0.4, 0.4, 0.2, 0.1)
    assert (first.jitter_prob, first.gray_prob, first.blur_prob, first.solarize_prob) == (0.8, 0.2, 1.0, 0.0)
    assert replace(first, blur_prob=0.1, solarize_prob=0.2) == second
    assert first.blur_sigma_px == (0.1, 2.0)


def test_blur_is_scaled_and_off_for_small_images() -> None:
    assert byol_views(112)[0].blur_sigma_px == (0.05, 1.0)
    assert [view.blur_prob for view in byol_views(32)] == [0, 0]
    assert [view.blur_prob for view in byol_views(224, blur=False)] == [0, 0]


def test_dino_views() -> None:
    views = dino_views(224, 96, 8)
    assert [view.size_px for view in views] == [224] * 2 + [96] * 8
    assert [view.blur_prob for view in views] == [1.0, 0.1] + [0.5] * 8
    assert [view.solarize_prob for view in views] == [0.0, 0.2] + [0.0] * 8
    assert views[0].scale == (0.4, 1.0)
    assert views[2].scale == (0.05, 0.4)
    assert views[2].blur_sigma_px == (0.1, 2.0)
    assert [view.scale for view in dino_views(224, locals=0)] == [(0.14, 1.0)] * 2


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (32, 32), (47, 33), (1001, 17)])
def test_eval_geometry_is_that_of_torchvision(size: tuple[int, int]) -> None:
    view = EvalView(32, 37)
    sizes, corners = eval_geometry(view, np.array([size[0]]), np.array([size[1]]))
    image = torch.zeros(1, *size)
    resized = v2.functional.resize(image, [37], antialias=True)
    assert sizes[0].tolist() == list(resized.shape[1:])
    marked = torch.arange(resized[0].numel()).reshape(resized.shape)
    top, left = corners[0].tolist()
    assert torch.equal(marked[:, top : top + 32, left : left + 32], v2.functional.center_crop(marked, [32, 32]))


def test_eval_view_defaults() -> None:
    assert eval_view(224).resize_px == 256
    assert eval_view(32).resize_px == 32


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"size_px": 0}, "size_px"),
        ({"size_px": 32.0}, "size_px"),
        ({"size_px": (32, 0)}, "size_px"),
        ({"size_px": (1, 2, 3)}, "size_px"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "jitter"),
        ({"jitter": (0.4, 0.4)}, "jitter"),
        ({"flip_prob": 1.5}, "flip_prob"),
        ({"blur_prob": float("nan")}, "blur_prob"),
        ({"interpolation": "nearest"}, "interpolation"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ViewRecipe(**{"size_px": 32, **arguments})


def test_an_eval_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="resize_px"):
        EvalView(64, 32)


def test_negative_number_of_local_views_is_refused() -> None:
    with pytest.raises(ValueError, match="locals"):
        dino_views(locals=-1)


def test_rectangular_views() -> None:
    first, _ = byol_views((112, 224))
    assert first.size_px == (112, 224)
    assert first.blur_sigma_px == byol_views(112)[0].blur_sigma_px
    assert [v.blur_prob for v in byol_views((32, 224))] == [0, 0]
    assert eval_view((112, 224)).resize_px == 128
    assert draw(first, 5).box.shape == (5, 4)


def test_channels_without_colour() -> None:
    with pytest.warns(UserWarning, match="images of 12 channels have no saturation, hue or grey"):
        views = byol_views(224, channels=12)
    for view in views:
        drawn = draw(view)
        assert (drawn.saturation == 1).all()
        assert (drawn.hue == 0).all()
        assert not drawn.gray.any()
        assert (drawn.brightness != 1).any()
    assert byol_views(224, channels=1) == byol_views(224)


def test_draws_take_tensors_and_arrays_alike() -> None:
    a = draw_views(FULL, np.array([30, 40]), np.array([50, 60]), step=1)
    b = draw_views(FULL, torch.tensor([30, 40]), torch.tensor([50, 60]), step=1)
    assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_whole_is_the_same_numbers_for_images_already_cut() -> None:
    drawn = draw(FULL, 7).draws
    whole = drawn.whole((20, 30))
    assert whole.box.tolist() == [[0, 0, 20, 30]] * 7
    assert all(torch.equal(x, y) for x, y in zip(whole.tensors()[1:], drawn.tensors()[1:], strict=True))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"step": -1}, ValueError, "step must be"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"step": 1.5}, TypeError, "step must be"),
        ({"heights": np.array([0, 4])}, ValueError, "heights must hold sizes of 1 or more"),
        ({"heights": np.array([4])}, ValueError, "heights has 1 rows but widths has 2"),
        ({"widths": np.array([4.0, 5.0])}, TypeError, "widths must be"),
    ],
)
def test_wrong_sizes_and_keys_are_refused(changes: dict[str, object], kind: type[Exception], message: str) -> None:
    arguments = {"heights": np.array([4, 4]), "widths": np.array([4, 4]), "step": 0, **changes}
    with pytest.raises(kind, match=message):
        draw_views(FULL, arguments.pop("heights"), arguments.pop("widths"), **arguments)


def test_a_step_must_be_given() -> None:
    with pytest.raises(TypeError, match="step"):
        draw_views(FULL, np.array([4]), np.array([4]))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("box", torch.tensor([[-1, 0, 4, 4]], dtype=torch.int32), "box must hold"),
        ("box", torch.tensor([[0, 0, 0, 4]], dtype=torch.int32), "box must hold"),
        ("box", torch.zeros(1, 3, dtype=torch.int32), r"box must have shape \(N, 4\)"),
        ("contrast", torch.tensor([-1.0]), "contrast must hold"),
        ("contrast", torch.tensor([float("nan")]), "contrast must hold"),
        ("hue", torch.tensor([0.7]), "hue must hold"),
        ("sigma", torch.tensor([float("inf")]), "sigma must hold"),
        ("flip", torch.tensor([True, False]), "flip has 2 rows but box has 1"),
        ("max_sigma", -1.0, "above max_sigma"),
    ],
)
def test_draws_made_by_hand_are_checked(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(draw(FULL, 1).draws, **{name: value})


def test_draws_are_a_pytree_and_move_by_one_copy() -> None:
    from torch.utils import _pytree as pytree

    drawn = draw(FULL, 3).draws
    leaves, spec = pytree.tree_flatten(drawn)
    again = pytree.tree_unflatten(leaves, spec)
    assert len(leaves) == 9
    assert isinstance(again, ViewDraws)
    assert again.max_sigma == drawn.max_sigma
    moved = drawn.to("meta")
    assert {t.device.type for t in moved.tensors()} == {"meta"}
    assert [t.shape for t in moved.tensors()] == [t.shape for t in drawn.tensors()]
    assert drawn.to("cpu") is drawn
