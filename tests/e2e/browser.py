"A headless Chromium, driven over its DevTools protocol, and a JupyterLab of its own to look at."
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars "
         "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900 "
         "--remote-debugging-port=0 --remote-allow-origins=*")
NAMED = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}


def until(found, seconds=60, what="it"):
    "The first result of `found` that is not false; an error that names `what` after so many seconds."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s for {what}")


class Tab:
    "The first tab of a browser."

    def __init__(self, port):
        import websocket
        def pages():
            with contextlib.suppress(OSError):
                found = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10))
                return [p for p in found if p["type"] == "page"]
        self.socket = websocket.create_connection(until(pages, what="a tab")[0]["webSocketDebuggerUrl"], timeout=60)
        self.count = 0
        self.call("Page.enable")

    def send(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        return self.count

    def wait(self, is_it):
        "The next message that `is_it`; others come between."
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") == "Page.javascriptDialogOpening":  # "leave this page?" holds everything up
                self.send("Page.handleJavaScriptDialog", accept=True)
            if is_it(message):
                return message

    def call(self, method, **params):
        sent = self.send(method, **params)
        answer = self.wait(lambda message: message.get("id") == sent)
        assert "error" not in answer, answer
        return answer["result"]

    def reload(self):
        self.send("Page.reload")
        self.wait(lambda message: message.get("method") == "Page.loadEventFired")

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def go(self, url):
        self.send("Page.navigate", url=url)
        self.wait(lambda message: message.get("method") == "Page.loadEventFired")

    def press(self, key, modifiers=0):
        code = NAMED.get(key) or ord(key.upper())
        text = "" if modifiers else "\r" if key == "Enter" else key if len(key) == 1 else ""
        press = {"key": key, "code": key if len(key) > 1 else f"Key{key.upper()}", "windowsVirtualKeyCode": code,
                 "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **press)
        self.call("Input.dispatchKeyEvent", type="keyUp", **press)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def click(self, selector):
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = self.js(f"(r => [r.x + r.width / 2, r.y + 8])(document.querySelector({selector!r}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def process(*command, **more):
    "A process and all that it starts, ended with the block."
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          **more) as started:
        try:
            yield started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, 15)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, 9)


@contextlib.contextmanager
def chromium(folder):
    "A `Tab` of a new browser whose profile lies in `folder`."
    with process(CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}", "about:blank"):
        port = folder / "DevToolsActivePort"
        yield Tab(until(lambda: port.is_file() and port.read_text().split(), what="chromium")[0])


@contextlib.contextmanager
def jupyterlab(folder, **env):
    "(address, token) of a JupyterLab on `folder` that knows none of its user's settings."
    private = {f"JUPYTER_{k}_DIR": str(folder / f".jupyter/{k}") for k in ("CONFIG", "DATA", "RUNTIME")}
    private |= {f"JUPYTERLAB_{k}_DIR": str(folder / f".jupyter/{k}") for k in ("SETTINGS", "WORKSPACES")}
    private |= {"IPYTHONDIR": str(folder / ".jupyter/ipython")}
    token = "reviewing"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    news = folder / ".jupyter/SETTINGS/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')
    with process(*command, cwd=folder, env=os.environ | private | env) as server:
        told = folder / f".jupyter/RUNTIME/jpserver-{server.pid}.json"
        yield until(lambda: told.is_file() and told.read_text() and json.loads(told.read_text()), what="jupyterlab")["url"], token
