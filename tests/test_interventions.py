"""The mathematics of steering: identities and limits."""

import pytest
import torch
from torch.testing import assert_close

from mechguard.directions import Directions
from mechguard.guards import Guard, Scope, vlm_guard
from mechguard.interventions import apply_where, gate_score, project_out, realign


@pytest.fixture
def basis() -> torch.Tensor:
    return Directions.from_tensor(torch.randn(1, 3, 16, generator=seeded(0))).data[0]


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(4, 5, 16, generator=seeded(1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everywhere(hidden: torch.Tensor) -> torch.Tensor:
    return torch.ones(hidden.shape[:2], dtype=torch.bool)


def guard(basis: torch.Tensor, **options: object) -> Guard:
    return vlm_guard(Directions.from_tensor(basis.unsqueeze(0)), layers=[0], **options)


def test_projection_leaves_nothing_in_the_subspace(basis, hidden):
    assert_close(project_out(hidden, basis) @ basis.T, torch.zeros(4, 5, 3), atol=1e-5, rtol=0)


def test_projection_leaves_everything_else(basis, hidden):
    outside = project_out(hidden, basis)
    assert_close(project_out(outside, basis), outside)
    assert_close(hidden - outside, (hidden @ basis.T) @ basis)


def test_a_projection_of_strength_two_reflects_and_is_its_own_inverse(basis, hidden):
    assert_close(project_out(project_out(hidden, basis, 2.0), basis, 2.0), hidden)


def test_alpha_minus_one_ungated_on_its_own_state_is_the_projection(basis, hidden):
    realigned = guard(basis, alpha=-1.0, project=False, gate="always", source="own")
    steered = realigned.steer(0, hidden, hidden, everywhere(hidden))
    assert_close(steered, project_out(hidden, basis))


def test_projecting_first_exchanges_the_component_for_that_of_the_query(basis, hidden):
    query = torch.randn(4, 1, 16, generator=seeded(2))
    changed = realign(hidden, query, basis, alpha=1.0, project=True)
    assert_close(changed @ basis.T, (query @ basis.T).expand(4, 5, 3))
    assert_close(project_out(changed, basis), project_out(hidden, basis))


def test_alpha_zero_without_projection_changes_nothing(basis, hidden):
    assert torch.equal(realign(hidden, hidden, basis, alpha=0.0, project=False), hidden)


def test_rows_outside_the_mask_stay_bit_for_bit(basis, hidden):
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[2, 3] = True
    changed = apply_where(mask, project_out(hidden, basis), hidden)
    assert torch.equal(changed[~mask], hidden[~mask])
    assert not torch.equal(changed[mask], hidden[mask])


def test_the_gate_opens_on_the_harmful_side_only():
    direction = torch.tensor([1.0, 0.0])
    states = torch.tensor([[0.5, 9.0], [-0.5, 9.0], [1.5, 0.0]])
    assert (gate_score(states, direction) > 0).tolist() == [True, False, True]
    assert (gate_score(states, direction, torch.tensor([1.0, 0.0])) > 0).tolist() == [False, False, True]


def test_half_precision_states_are_steered_in_single_precision(basis, hidden):
    narrow = hidden.to(torch.bfloat16)
    changed = realign(narrow, narrow, basis, alpha=-1.0, project=False)
    assert changed.dtype == torch.bfloat16
    assert_close(changed, project_out(narrow.float(), basis).to(torch.bfloat16))


def test_a_scope_of_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match="positions='middle' is not known; use one of last, last_text"):
        Scope(positions="middle")  # type: ignore[arg-type]
