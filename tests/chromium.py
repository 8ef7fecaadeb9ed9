"A headless Chromium for the tests: a small client of its DevTools protocol, by a pipe."
import json, os, select, shutil, subprocess, time
from base64 import b64decode

binary = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


class Chromium:
    "One page in a browser of its own; what it reports is kept: `errors`, and the `requests` that leave the file"
    def __init__(self, folder):
        (ours_in,theirs_out),(theirs_in,ours_out) = os.pipe(),os.pipe()
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars', f'--user-data-dir={folder}', '--remote-debugging-pipe']
        def number_pipes(): # the browser reads commands from 3 and writes answers to 4
            a,b = os.dup(theirs_in),os.dup(theirs_out)
            os.dup2(a, 3); os.dup2(b, 4)
            os.set_inheritable(3, True); os.set_inheritable(4, True)
        self.process = subprocess.Popen([binary, *flags, 'about:blank'], preexec_fn=number_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in); os.close(theirs_out)
        self.ours_in,self.ours_out,self.buffer,self.n,self.session,self.events = ours_in,ours_out,b'',0,None,[]
        target = self('Target.createTarget', url='about:blank')['targetId']
        self.session = self('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network', 'Log'): self(f'{domain}.enable')

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours_in); os.close(self.ours_out)

    def read(self, seconds=30):
        "Read one message of the browser"
        end = time.time()+seconds
        while b'\0' not in self.buffer:
            if not select.select([self.ours_in], [], [], max(0, end-time.time()))[0]: raise TimeoutError('the browser does not answer')
            self.buffer += os.read(self.ours_in, 2**20)
        text,self.buffer = self.buffer.split(b'\0', 1)
        return json.loads(text)

    def __call__(self, method, **params):
        "Send a command and wait for its result"
        self.n += 1
        session = {'sessionId': self.session} if self.session else {}
        os.write(self.ours_out, json.dumps(dict(id=self.n, method=method, params=params, **session)).encode()+b'\0')
        while True:
            got = self.read()
            if got.get('id')==self.n: break
            self.events.append(got)
        if 'error' in got: raise RuntimeError(got['error']['message'])
        return got['result']

    def open(self, path, width=1280, height=900, dark=False, script=True):
        "Load the file `path`, or an address"
        self.events.clear()
        self('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])
        self('Emulation.setScriptExecutionDisabled', value=not script)
        self('Page.navigate', url=path if isinstance(path, str) else path.absolute().as_uri())
        while not any(o['method']=='Page.loadEventFired' for o in self.events): self.events.append(self.read())
        return self

    def js(self, code):
        "The value of an expression, a promise too"
        got = self('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in got: raise RuntimeError(got['exceptionDetails'].get('exception', {}).get('description'))
        return got['result'].get('value')

    def key(self, key):
        "Press a key and let it go"
        text = {'text': key} if len(key)==1 else {}
        codes = dict(ArrowLeft=37, ArrowRight=39, ArrowUp=38, ArrowDown=40, Tab=9, Enter=13)
        for type in ('keyDown', 'keyUp'): self('Input.dispatchKeyEvent', type=type, key=key, code=key, windowsVirtualKeyCode=codes.get(key, ord(key[0])), **(text if type=='keyDown' else {}))

    def click(self, selector):
        "Click into the middle of an element"
        x,y = self.js(f'(() => {{ const o = document.querySelector({json.dumps(selector)}); o.scrollIntoView({{block: "center"}}); const b = o.getBoundingClientRect(); return [b.x+b.width/2, b.y+b.height/2] }})()')
        for type in ('mousePressed', 'mouseReleased'): self('Input.dispatchMouseEvent', type=type, x=x, y=y, button='left', clickCount=1)

    def put(self, selector, file):
        "Put a file into a field for files"
        field = self('Runtime.evaluate', expression=f'document.querySelector({json.dumps(selector)})')['result']['objectId']
        self('DOM.setFileInputFiles', files=[str(file)], objectId=field)

    def wait(self, code, seconds=30):
        "Wait until an expression is true"
        end = time.time()+seconds
        while not self.js(f"!!({code})"):
            if time.time()>end: raise TimeoutError(f'never true: {code}')
            time.sleep(.05)

    def settle(self):
        "Wait until two frames are painted"
        self.js('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))')

    def screenshot(self, path, height=900):
        "Store the upper part of the page"
        self('Emulation.setDeviceMetricsOverride', width=self.js('innerWidth'), height=height, deviceScaleFactor=1, mobile=False)
        self.settle()
        path.write_bytes(b64decode(self('Page.captureScreenshot')['data']))

    def pdf(self, path): path.write_bytes(b64decode(self('Page.printToPDF', printBackground=False)['data']))

    @property
    def errors(self):
        "What the console shows of errors and warnings"
        said = [o['params'] for o in self.events if o['method'] in ('Runtime.exceptionThrown', 'Log.entryAdded', 'Runtime.consoleAPICalled')]
        return [json.dumps(o)[:500] for o in said]

    @property
    def requests(self):
        "Addresses that were asked for, without the file itself and data in it"
        urls = [o['params']['request']['url'] for o in self.events if o['method']=='Network.requestWillBeSent']
        return [o for o in urls if not o.startswith(('file:', 'data:', 'about:'))]
