"""The dashboard as a browser shows it, with a real gateway, broker and workers. Skipped where there is no browser.

Screenshots are left in run/artifacts, to be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness.browser import Page, browser_page, find_browser
from tests.harness.cluster import ROOT, Cluster
from tests.harness.gateway import gateway

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

KEY = "a-key-of-the-test"
ARTIFACTS = ROOT / "run" / "artifacts"
SIZES = {"light": (1280, 900, "light"), "dark": (1280, 900, "dark"), "phone": (390, 844, "light")}
BOTH_READY = "document.querySelectorAll('.worker[data-status=ready]').length === 2"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium is here: apt-get install chromium-headless-shell, or name one in KVCACHE_BROWSER")
    with browser_page(path, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def url(harmed_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log: Path = tmp_path_factory.mktemp("gateway") / "log"
    with gateway(harmed_cluster.url, log, "--api-key", KEY) as url:
        yield url


def give_key(page: Page, key: str) -> None:
    page.wait_for("!document.getElementById('key').hidden")
    page.evaluate(f"document.getElementById('secret').value = '{key}'")
    page.evaluate("document.querySelector('#key button').click()")


def open_board(page: Page, url: str) -> None:
    """The dashboard, with the key given, showing both workers."""
    page.open(f"{url}/dashboard")
    page.wait_for("location.pathname === '/dashboard' && document.readyState === 'complete'")
    page.evaluate(f"sessionStorage.setItem('kvcache-api-key', '{KEY}')")
    page.open(f"{url}/dashboard?again")
    page.wait_for("location.search === '?again' && document.readyState === 'complete'")
    page.wait_for(BOTH_READY)


@pytest.mark.usefixtures("cluster")
def test_the_page_asks_for_a_key_and_then_shows_the_cluster_in_any_shape(page: Page, url: str) -> None:
    page.shape(*SIZES["light"])
    page.open(f"{url}/dashboard")
    page.wait_for("document.getElementById('key') !== null")
    page.evaluate("sessionStorage.clear()")
    page.open(f"{url}/dashboard?new")
    page.wait_for("location.search === '?new' && document.readyState === 'complete'")
    give_key(page, "a-wrong-key")
    page.wait_for("document.getElementById('refusal').textContent === 'This key is not known.'")
    assert page.evaluate("document.getElementById('board').hidden")
    give_key(page, KEY)
    page.wait_for(BOTH_READY)
    body = {"model": "tiny", "prompt": "hello " * 40, "max_tokens": 4}
    httpx.post(f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    page.wait_for("document.querySelectorAll('#slowest details').length >= 1")
    page.evaluate("document.querySelector('#slowest details').open = true")
    page.wait_for("document.querySelector('.reason').textContent.includes('policy')")
    for name, size in SIZES.items():
        page.shape(*size)
        page.wait_for(f"innerWidth === {size[0]} && document.querySelectorAll('.area').length >= 2")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        page.screenshot(ARTIFACTS / f"dashboard-{name}.png")
    assert [text for text in page.complaints if "401" not in text] == []  # the first, without a key, and the wrong one


def test_a_worker_that_falls_silent_is_shown_as_lost_and_as_ready_when_it_is_back(
    page: Page, url: str, cluster: Cluster
) -> None:
    page.shape(*SIZES["light"])
    open_board(page, url)
    cluster.workers["worker-2"].stop()
    page.wait_for("document.querySelector('[data-worker=worker-2]').dataset.status === 'lost'")
    page.wait_for("document.getElementById('state').textContent.startsWith('Lost worker-2')")
    assert page.evaluate("document.querySelectorAll('.sector').length") == 1
    page.screenshot(ARTIFACTS / "dashboard-lost.png")
    cluster.workers["worker-2"].cont()
    page.wait_for(BOTH_READY)
    assert [text for text in page.complaints if "401" not in text] == []
