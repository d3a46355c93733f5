"""Demo data that cannot be made is an error of one line."""

from pathlib import Path

import pytest

from pipelines.files.demo_images import demo_folder
from pipelines.spec import DataError


def test_a_cache_that_cannot_be_written_is_named():
    with pytest.raises(
        DataError, match=r"^/proc/cache: cannot be written: .*; set data.cache_dir to another$"
    ):
        demo_folder("digits", Path("/proc/cache"))
