"""Every test here that takes `recording` runs once for each recording that has the files its module names."""

from typing import Any

import pytest

from .recordings import SHARED, recorded, recording


def pytest_generate_tests(metafunc: Any) -> None:
    wanted = getattr(metafunc.module, "NEEDS", ())
    found = [recording(folder) for folder in recorded("facts.json")]
    found = [one for one in found if all((one.folder / file).exists() for file in wanted)]
    if "run" in metafunc.fixturenames:
        cases = [pytest.param(one, run, id=f"{one.name} {run}") for one in found for run in one.runs]
        absent = pytest.param(None, None, id="beside the checkout", marks=_absent)
        metafunc.parametrize(("recording", "run"), cases if SHARED.is_dir() else [*cases, absent])
    elif "recording" in metafunc.fixturenames:
        cases = [pytest.param(one, id=one.name) for one in found]
        absent = pytest.param(None, id="beside the checkout", marks=_absent)
        metafunc.parametrize("recording", cases if SHARED.is_dir() else [*cases, absent])


_absent = pytest.mark.skip(reason="needs ../shared/fixtures, which is not here")
