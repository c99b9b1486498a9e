"""Requests of the page, drawn without the page."""

import jax
import pytest

from sedd_jax.sampling import trajectories
from sedd_jax.serving import requests


@pytest.mark.slow
def test_fifty_patterns_share_a_few_programs(code_run):
    """A program takes seconds and tens of megabytes, and while it is compiled nobody else is served."""
    opened = requests.open_run(code_run, None)
    trajectories.make_programs.cache_clear()
    events, counts = [], []
    for number in range(1, 26):
        for letters in ("ab", "12"):
            template = f"{{{number}:[{letters}]{{{number}}}}}"
            request = requests.parse(opened.checkpoint.run, f"num_steps=2&template={template}")
            requests.draw(opened, request, lambda kind, content: events.append((kind, content)))
            assert set(events[-1][1]["texts"][0]) <= set(letters)
            counts.append(len(jax.devices()[0].client.live_executables()))
    assert counts[-1] == counts[1]
    assert [content["is_first"] for kind, content in events if kind == "started"] == [True] + 49 * [False]
    trajectories.make_programs.cache_clear()
