"""Directions: planted truth, sign, rank, and what is refused."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mechguard as mg
from mechguard.directions import METHODS, held_out_projections


def planted(*, n: int = 60, d_model: int = 24, layers: int = 3, strength: float = 6.0, seed: int = 0):
    """Pairs whose harmful states are shifted along a known unit vector of each layer."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(layers, d_model, generator=random), dim=-1)
    base = torch.randn(layers, n, d_model, generator=random)
    harmful = base + 0.3 * torch.randn(layers, n, d_model, generator=random) + strength * truth[:, None]
    data = torch.cat([harmful, base], dim=1)
    labels = ["harmful"] * n + ["harmless"] * n
    return mg.Activations.from_tensor(data, labels=labels, pairs=[*range(n), *range(n)]), truth


@pytest.mark.parametrize("method", ["svd", "mean_difference", "logistic", "lda"])
def test_the_direction_of_planted_data_is_the_planted_one_and_harmful_is_positive(method):
    activations, truth = planted()
    directions = mg.fit_directions(activations, method=method)
    cosines = (directions.data[:, 0] * truth).sum(-1)
    assert (cosines > 0.9).all(), cosines


def test_pca_of_the_differences_finds_the_planted_axis_of_variation():
    random = torch.Generator().manual_seed(0)
    axis = torch.eye(12)[3]
    harmless = torch.randn(1, 80, 12, generator=random)
    differences = 5 * torch.randn(80, 1, generator=random) * axis + 2.0
    data = torch.cat([harmless + differences, harmless], dim=1)
    activations = mg.Activations.from_tensor(data, labels=[1] * 80 + [0] * 80, pairs=[*range(80)] * 2)
    fitted = mg.fit_directions(activations, method="pca").data[0, 0]
    assert abs(float(fitted @ axis)) > 0.99


def test_swapping_the_labels_turns_the_direction_round():
    activations, _ = planted()
    other = mg.Activations.from_tensor(
        activations.data,
        labels=[int(label == "harmless") for label in activations.labels],
        pairs=activations.pairs,
    )
    assert_close(mg.fit_directions(other).data, -mg.fit_directions(activations).data, atol=1e-4, rtol=0)


def test_rows_are_orthonormal_and_of_the_rank_asked_for():
    directions = mg.fit_directions(planted()[0], rank=5)
    assert directions.data.shape == (3, 5, 24)
    identity = torch.eye(5).expand(3, 5, 5)
    assert_close(directions.data @ directions.data.transpose(1, 2), identity, atol=1e-5, rtol=0)


def test_the_svd_is_that_of_the_uncentred_paired_differences():
    activations, _ = planted()
    expected = np.linalg.svd(activations.differences()[1].numpy())[2][:2]
    fitted = mg.fit_directions(activations, rank=2).at(1).numpy()
    assert_close(np.abs((expected * fitted).sum(1)), np.ones(2, dtype=np.float32), atol=1e-4, rtol=0)


def test_a_random_subspace_has_the_same_shape_and_another_span():
    directions = mg.fit_directions(planted()[0], rank=2)
    control = directions.randomised(seed=1)
    assert control.data.shape == directions.data.shape
    assert (control.data[:, 0] * directions.data[:, 0]).sum(-1).abs().max() < 0.9
    assert torch.equal(control.data, directions.randomised(seed=1).data)


def test_no_prompt_is_scored_by_a_direction_it_took_part_in():
    """Pure noise with more dimensions than prompts: in-sample it separates, held out it does not."""
    noise = torch.randn(1, 40, 400, generator=torch.Generator().manual_seed(3))
    activations = mg.Activations.from_tensor(noise, labels=[1] * 20 + [0] * 20, pairs=[*range(20)] * 2)
    harmful, harmless, _ = activations.groups()
    in_sample = (activations.data @ (harmful.mean(1) - harmless.mean(1))[0])[0]
    held_out = held_out_projections(activations)[0]
    assert in_sample[:20].mean() - in_sample[20:].mean() > 5
    assert (held_out[:20] > held_out[20:]).float().mean() < 0.8


def test_directions_survive_a_round_trip(tmp_path):
    directions = mg.fit_directions(planted()[0], rank=2)
    directions.save(tmp_path / "ssd")
    loaded = mg.Directions.load(tmp_path / "ssd")
    assert torch.equal(loaded.data, directions.data)
    assert torch.equal(loaded.midpoints, directions.midpoints)
    assert (loaded.layers, loaded.method, loaded.name) == (directions.layers, "svd", directions.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="nonsense"), "method 'nonsense' is not known; use one of svd"),
        (dict(rank=0), "rank 0 does not exist"),
        (dict(rank=25), "use 1 to 24"),
        (dict(method="lda", rank=2), "use 1 to 1"),
    ],
)
def test_a_fit_that_does_not_exist_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mg.fit_directions(planted()[0], **change)


def test_prompts_without_pairs_are_refused_where_pairs_are_needed():
    activations = mg.Activations.from_tensor(torch.randn(2, 6, 4), labels=[1, 1, 1, 0, 0, 0])
    with pytest.raises(ValueError, match="has no pair, but pairs .* are needed"):
        mg.fit_directions(activations)
    assert mg.fit_directions(activations, method="mean_difference").rank == 1


def test_one_label_alone_is_refused():
    activations = mg.Activations.from_tensor(torch.randn(2, 6, 4), labels=[1] * 6)
    with pytest.raises(ValueError, match="only harmful prompts"):
        mg.fit_directions(activations, method="mean_difference")


def test_every_method_is_named_in_the_error():
    with pytest.raises(ValueError, match=", ".join(METHODS)):
        mg.fit_directions(planted()[0], method="x")  # type: ignore[arg-type]


def test_nan_in_a_direction_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        mg.Directions.from_tensor(torch.full((1, 4), float("nan")))


def test_dependent_directions_are_refused():
    with pytest.raises(ValueError, match="linearly dependent"):
        mg.Directions.from_tensor(torch.ones(1, 2, 4))
