"Try the oldest versions that the bounds in settings.ini allow: install them with the oldest Python into a virtual environment of their own, run tests there, and remove it."
import os,re,shutil,subprocess,sys,tempfile
from argparse import ArgumentParser
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).absolute().parents[1]
users = 'requirements','app_requirements','demo_requirements','distrib_requirements','explore_requirements'
# Developers' packages need newer ones of some of the users', so the users' are tried first, by tests that need pytest alone
user_tests = 'formulas core models files exif explore app samples'.split()
dev_tests = 'peers cli contributing'.split()

def settings():
    "What settings.ini says"
    ini = ConfigParser(delimiters='=')
    ini.read(root/'settings.ini', 'utf-8')
    return ini['DEFAULT']

def bounds(cfg, *keys):
    "Package -> the oldest version that it may have, for each requirement under `keys`; None for one without a lower bound"
    rows = [r for k in keys for r in cfg[k].strip().splitlines() if not r.startswith(cfg['lib_name'])]
    return {re.match(r'[\w.-]+', r)[0]: (re.findall(r'>=\s*([\w.]+)', r) or [None])[0] for r in rows}

def find_python(version):
    "Find Python `version`, of pyenv or on the path"
    found = sorted(Path(os.environ.get('PYENV_ROOT', Path.home()/'.pyenv')).glob(f'versions/{version}.*/bin/python'))
    python = found[-1] if found else shutil.which(f'python{version}')
    return python or sys.exit(f'Python {version} is not installed: install it, by pyenv for instance, or name another by --python')

def pins(file, oldest):
    "Write `file`, which keeps pip to the `oldest` versions; returns the option for it"
    file.write_text(''.join(f'{k}=={v}\n' for k,v in oldest.items()))
    return ['-c', file]

def run(*args):
    "Run a command in the checkout, and return its exit code"
    print('+', *args, flush=True)
    return subprocess.run(list(map(str, args)), cwd=root, env={**os.environ, 'PYTHONPATH': str(root)}).returncode

def try_oldest(venv, cfg):
    "Install the oldest versions into `venv`, and test them; returns what failed"
    python = venv/'bin'/'python'
    pip = python,'-m','pip'
    of_users,of_devs = bounds(cfg, *users),bounds(cfg, 'dev_requirements')
    pytest = [f'{o}=={of_devs[o]}' for o in ('pytest', 'pytest-xdist')]
    def test(names): return run(python, '-m', 'pytest', '-m', 'not slow', *[f'tests/test_{o}.py' for o in names])
    steps = [('install for users', lambda: run(*pip, 'install', '-q', *pins(venv/'users.txt', of_users), *pytest, '.[app,demo,distrib,explore]')),
             ('list', lambda: run(*pip, 'list')), ('test', lambda: test(user_tests)),
             ('install for developers', lambda: run(*pip, 'install', '-q', *pins(venv/'devs.txt', of_devs), '-e', '.[dev]')),
             ('list', lambda: run(*pip, 'list')), ('test', lambda: test(dev_tests))]
    return [name for name,step in steps if step()]

def main():
    cfg = settings()
    p = ArgumentParser(description=__doc__)
    p.add_argument('--python', help=f"another Python than {cfg['min_python']}")
    p.add_argument('--dir', help='where the virtual environment of about 6 GB lies meanwhile (default: where temporary files do)')
    a = p.parse_args()
    with tempfile.TemporaryDirectory(prefix='oldest-', dir=a.dir) as d:
        subprocess.run([a.python or find_python(cfg['min_python']), '-m', 'venv', d], check=True)
        failed = try_oldest(Path(d), cfg)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)

if __name__=='__main__': main()
