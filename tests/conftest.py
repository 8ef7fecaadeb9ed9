"What pytest does around the tests; what they share lies in `shared.py`, which takes longer to import than a process that only hands out tests should."
import os
os.environ['OMP_NUM_THREADS'] = '1' # the tests run in one process a core; so do the processes that they start, which would wait for each other else
os.environ |= {f'MALLOC_{o}_THRESHOLD_': str(2**30) for o in ('TRIM', 'MMAP')} # glibc gives memory back after each pass of a model else
import ctypes, gc, sys, pytest
from collections import Counter


def pytest_addoption(parser):
    parser.addoption('--nb-flags', default='', help='nbdev test flags to run that are left out otherwise, such as "slow"')
    parser.addoption('--all-lines', action='store_true', help='interrupt calls at all of their lines, rather than a sample of them')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Of the cases of a test, the quick way round takes the first and each fourth after it; the docs and notebooks run first, so that no process has a long one left when the others are done"
    items.sort(key=lambda o: not o.name.startswith(('test_docs', 'test_notebook[')))
    cases = Counter()
    for o in items:
        if not hasattr(o, 'callspec') or o.get_closest_marker('slow'): continue
        test = o.nodeid.split('[')[0]
        if cases[test]%4: o.add_marker(pytest.mark.slow)
        cases[test] += 1


def pytest_sessionstart(session):
    "Where tests run, fork the server of `forked` before this package is imported"
    global ask,answers
    if session.config.getvalue('dist')!='no' and not hasattr(session.config, 'workerinput'): return # it hands out tests
    import forked
    if sys.platform=='linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        for o in (-1, -3): libc.mallopt(o, 2**30) # MALLOC_* for this process, which has begun, and those forked from it
    ask,answers = forked.start()


def pytest_collection_finish(): gc.freeze() # all that the tests import is not looked at again


@pytest.fixture(autouse=True)
def clean_up():
    "Learners and their callbacks know each other, so that without this hundreds of models would wait to be collected"
    yield
    if plt := sys.modules.get('matplotlib.pyplot'): plt.close('all')
    gc.collect()
    gc.freeze() # what is still there belongs to other tests too: the next look need not go over it


@pytest.fixture(scope='session')
def forked(tmp_path_factory):
    "Runs a notebook, as `nbdev-test` does, or a script, or code, in a process of its own where fastai is imported already: gives its exit code, and what it prints"
    def run(what, *args):
        path = tmp_path_factory.mktemp('forked')
        if '\n' in str(what): (path/'script.py').write_text(what, 'utf-8')
        print(path/'log', path/'script.py' if '\n' in str(what) else what, *args, sep='\t', file=ask, flush=True)
        return int(answers.readline()), (path/'log').read_text('utf-8')
    return run
