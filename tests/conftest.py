"""Fixtures: a tiny real LLaVA with random weights, its folder on disk, and the built-in organism."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a broken test

import pytest
import tiny

import mechguard as mg


@pytest.fixture(scope="session")
def vlm() -> mg.VLM:
    return mg.load(tiny.llava(), processor=tiny.processor())


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def organism() -> mg.VLM:
    return mg.load("organism")


@pytest.fixture(scope="session")
def prompts() -> mg.Prompts:
    """Twelve pairs of unequal length in the toy vocabulary."""
    return tiny.prompts(pairs=12)
