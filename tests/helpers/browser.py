"""A real browser for the tests of pages, where there is Chromium."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from conftest import wait_until

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Headless Chromium over its DevTools pipe: JSON with a zero byte after each, so no package is needed."""

    def __init__(self, profile: Path) -> None:
        to_read, out = os.pipe()
        into, to_write = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "about:blank"]
        shell = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'  # where Chromium expects the two ends
        self._process = subprocess.Popen(
            ["bash", "-c", shell, PROGRAM, f"--user-data-dir={profile}", *flags],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._out, self._into = os.fdopen(out, "wb", 0), os.fdopen(into, "rb", 0)
        self._held, self._session, self._count = b"", {}, 0
        self.problems: list[Any] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = {
            "sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a DevTools command and return its result."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": params, **self._session}
        self._out.write(json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(message["params"])
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            part = self._into.read(1 << 16)
            assert part, "Chromium has ended"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)

    def js(self, code: str) -> Any:
        """Return what the page's own JavaScript says."""
        answer = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, code: str) -> None:
        wait_until(lambda: self.js(code))

    def open(self, server: Any, width: int = 1280, scheme: str = "light") -> None:
        """Show the server's page in a window of this width and colour scheme."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **size)
        scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
        self("Emulation.setEmulatedMedia", features=[scheme_feature])
        self.open_url(f"http://127.0.0.1:{server.port}/")

    def open_url(self, url: str) -> None:
        """Show the page of the tiny model at this address, in a session without stories."""
        self("Page.navigate", url=url)
        self.wait("typeof $ === 'function' && document.readyState === 'complete'")
        self.js("removeEventListener('pagehide', keep); sessionStorage.clear()")
        self.problems.clear()
        self("Page.reload")
        self.wait("typeof $ === 'function' && $('model').textContent.includes('MoE-tiny')")

    def fill(self, **values: Any) -> None:
        for name, value in values.items():
            self.js(f"field({name!r}).value = {json.dumps(value)}")

    def press(self, key: str, modifiers: int = 0) -> None:
        code = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers
            )

    def click(self, what: str, press: bool = True) -> None:
        """Move the mouse to the middle of the element that `what` gives, and press the button there."""
        place = self.js(
            f"(() => {{ const e = {what}; e.scrollIntoView({{block: 'center'}});"
            "const r = e.getClientRects()[0]; return {x: r.x + r.width / 2, y: r.y + r.height / 2}; })()"
        )
        self("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased") if press else ():
            self("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def close(self) -> None:
        self("Browser.close")
        self._process.wait(timeout=30)
        self._out.close()
        self._into.close()
