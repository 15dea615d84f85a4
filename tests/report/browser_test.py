"""The report in a real browser: no error, everything in place on a phone, pictures enlarge, tables sort and filter."""

import shutil

import pytest

from tools.measure_report import open_browser

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
)
MOST = 10e6  # bytes of a report


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = open_browser(str(tmp_path_factory.mktemp("browser")))
    yield driver
    driver.quit()


@pytest.fixture(params=["aether", pytest.param("aether_resnet", marks=pytest.mark.slow)])
def opened(request, browser, explained):
    path = explained(request.param)[2] / "report.html"
    assert path.stat().st_size < MOST
    browser.set_window_size(1200, 900)
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def test_it_opens_without_an_error_and_with_every_picture(opened):
    assert "Aether" in opened.title
    script = "return [...document.images].filter(i => i.src && !(i.complete && i.naturalWidth)).length"
    assert opened.execute_script(script) == 0
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_on_a_phone_nothing_is_wider_than_the_screen(opened):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", dict(width=390, height=844, deviceScaleFactor=2, mobile=True)
    )
    width = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width == [390, 390]


def test_pictures_enlarge(opened):
    from selenium.webdriver.common.by import By

    opened.execute_script("document.querySelector('figure img').click()")
    assert opened.execute_script("return document.querySelector('dialog').open")
    opened.find_element(By.CSS_SELECTOR, "dialog").click()
    assert not opened.execute_script("return document.querySelector('dialog').open")


def test_tables_sort_by_number_and_rows_are_filtered(opened):
    column = """
        const table = document.querySelector('#capacity table');
        const k = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === 'mean');
        table.tHead.rows[0].cells[k].click();
        return [...table.tBodies[0].rows].map(row => parseFloat(row.cells[k].dataset.value));
    """
    up, down = (opened.execute_script(column) for _ in range(2))
    assert len(up) > 1 and up == sorted(up) and down == sorted(up, reverse=True)
    filtered = """
        const input = document.querySelector('#config input');
        input.value = 'optim.RKHS';
        input.dispatchEvent(new Event('input'));
        const rows = [...document.querySelectorAll('#config tbody tr')];
        return rows.filter(row => !row.hidden && row.textContent.includes('optim.')).length;
    """
    assert opened.execute_script(filtered) == 1
