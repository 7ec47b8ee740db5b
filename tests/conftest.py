"""What every test shares: a fixed seed, the folder of real images, and networks whose norms are not the identity."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

# Commands would follow the load of the machine, and runs with other numbers of threads differ in their last bits.
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
# Shells start background jobs, as which tests may run, with Ctrl-C ignored, and then so would the commands.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def data() -> Path:
    """The folder of real images that the machine's owner names."""
    folder = os.environ.get("RESBACKBONE_TEST_DATA")
    if not folder:
        pytest.skip("RESBACKBONE_TEST_DATA is unset: it names a folder of real images")
    return Path(folder)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory) -> Iterator[Path]:
    """As `tmp_path`, for what the tests of a module share; runs are large, so it goes when the module is done."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Puts numbers into every batch norm, so that a statistic or an affine parameter left out shows; in eval mode."""

    def randomise(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.2)
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
        return model.eval()

    return randomise


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium; without one, or without playwright, its tests are skipped."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium; Debian has it: apt-get install chromium")
    with api.sync_playwright() as playwright:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """Shows a page: HTML to a playwright page, whose `said` lists what was logged, raised, asked of the network."""
    contexts = []

    def open_page(html: str, *, width: int = 1280, dark: bool = False):
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        scheme = "dark" if dark else "light"
        contexts.append(chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: (page.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        url = (tmp_path / "page.html").as_uri()
        page.on("request", lambda request: request.url.startswith(("data:", url)) or page.said.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
