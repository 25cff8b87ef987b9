"""What a reader of the page does, for the tests in a real browser: press, type, look, wait until it is saved."""

import json
import os
import time
from pathlib import Path
from typing import Any

from fasttc.report import PageServer

PICTURES = os.environ.get("FASTTC_PICTURES")  # a folder: screenshots of what was tested are kept there


def js(driver: Any, script: str, *arguments: Any) -> Any:
    return driver.execute_script(script, *arguments)


def element(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def texts(driver: Any, selector: str) -> list[str]:
    return js(
        driver, "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def click_node(driver: Any, key: str, shift: bool = False) -> None:
    """A real click of the pointer on a node."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    node = js(
        driver, "return document.querySelector(`g.node[data-id=${CSS.escape(arguments[0])}] .shape`)", key
    )
    actions = ActionChains(driver, duration=0)
    if shift:
        actions = actions.key_down(Keys.SHIFT)
    actions = actions.move_to_element(node).click()
    (actions.key_up(Keys.SHIFT) if shift else actions).perform()


def features(driver: Any, count: int = 3) -> list[str]:
    """Keys of the most influential features in the scene."""
    script = (
        "return d3.sort(fasttc.app.scene.nodes.filter((n) => n.kind === 'feature'), (n) => -n.influence)"
        ".slice(0, arguments[0]).map((n) => n.key)"
    )
    return js(driver, script, count)


def type_into(driver: Any, selector: str, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    element(driver, selector).send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, text, Keys.ENTER)


def press(driver: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver, duration=0).send_keys(*keys).perform()


def chord(driver: Any, modifier: str, key: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver, duration=0).key_down(modifier).send_keys(key).key_up(modifier).perform()


def saved(driver: Any, server: PageServer) -> dict[str, Any]:
    """The state file once the page has saved everything."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not js(driver, "return fasttc.state.pending") and server.state_file.exists():
            content = json.loads(server.state_file.read_text())
            if content["labels"] == js(driver, "return fasttc.state.current.labels") and [
                group["name"] for group in content["groups"]
            ] == js(driver, "return fasttc.state.current.groups.map((g) => g.name)"):
                return content
        time.sleep(0.02)
    raise AssertionError("the page did not save its state in 5 s")


def picture(driver: Any, name: str) -> None:
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(Path(PICTURES) / f"{name}.png"))
