"""The page in a real browser, given markup and script for tokens, labels and names: none of it may ever act."""

import base64
import xml.etree.ElementTree as ET

from fasttc.benchmarks.page.browser import complaints, ready

from .conftest import HOSTILE
from .reader import click_node, features, js, saved, texts, type_into


def test_hostile_tokens_labels_and_names_stay_text(driver, show, hostile):
    server = show(hostile)
    elements = js(driver, "return document.querySelectorAll('script, img, iframe, object, embed').length")
    first, second, third = features(driver)
    click_node(driver, first)
    for text in HOSTILE[:3]:
        type_into(driver, "#label", text)
        assert js(driver, "return fasttc.app.scene.byKey.get(arguments[0]).name", first) == text
    js(driver, "fasttc.state.group(arguments[0], arguments[1])", [second, third], HOSTILE[1])
    js(
        driver,
        "fasttc.app.select('group:' + arguments[0]); fasttc.app.toggleGroup({group: arguments[0]})",
        HOSTILE[1],
    )
    js(driver, "fasttc.app.setFound(fasttc.app.scene.nodes)")
    saved(driver, server)
    driver.refresh()
    ready(driver)
    svg = js(driver, "return fasttc.export.markup(fasttc.app)")
    ET.fromstring(svg)  # well-formed whatever the strings are
    data = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    assert (
        js(driver, "return document.querySelectorAll('script, img, iframe, object, embed').length")
        == elements
    )
    assert js(driver, "return window.pwned ?? null") is None
    assert HOSTILE[0] in texts(driver, "#prompt")[0]
    assert complaints(driver) == []
    driver.get(data)
    assert js(driver, "return window.pwned ?? null") is None


def test_the_browser_itself_refuses_markup_and_scripts(driver, show, small):
    """Should a script of ours ever parse data as markup, Trusted Types and the policy are there."""
    show(small)
    refused = """
    try { document.body.innerHTML = '<img src=x onerror=window.pwned=1>'; return false }
    catch (error) { return error.name }
    """
    assert js(driver, refused) == "TypeError"
    try_script = """
    const done = arguments[0], script = document.createElement('script');
    document.addEventListener('securitypolicyviolation', (event) => done(event.violatedDirective), { once: true });
    try { script.text = 'window.pwned = 1'; document.body.append(script) } catch (error) { done(error.name) }
    """
    assert driver.execute_async_script(try_script) in (
        "TypeError",
        "require-trusted-types-for",
        "script-src-elem",
    )
    elsewhere = "const done = arguments[0]; fetch('http://127.0.0.1:1/').then(() => done('sent'), (e) => done(e.name))"
    assert driver.execute_async_script(elsewhere) == "TypeError"
    assert js(driver, "return window.pwned ?? null") is None
    complaints(driver)
