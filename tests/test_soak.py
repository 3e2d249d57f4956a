"""Many guarded answers in one process leave nothing behind; `soak.py` runs two thousand."""

import soak


def test_guarded_answers_leave_neither_hooks_nor_objects_behind(vlm):
    found = soak.run(40, vlm)
    before, after = found["hooks before and after"]
    assert before == after
    early, late = found["objects early and late"]
    assert late < 1.005 * early
