"Runs notebooks, by nbdev-test's own code, and scripts, each in a process of its own, forked from this one, which has imported fastai: that takes longer than most of them."
import os, runpy, sys
import fastai.vision.all # and nothing of this package: each imports what it needs
from nbdev.test import nbdev_test

def run(fn, *args):
    if fn.endswith('.ipynb'): sys.exit(nbdev_test(fn, flags=args[0]))
    sys.argv = [fn, *args]
    runpy.run_path(fn, run_name='__main__')

for line in sys.stdin:
    log,*args = line.rstrip('\n').split('\t')
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for o in (1, 2): os.dup2(os.open(log, os.O_WRONLY|os.O_CREAT|os.O_APPEND), o)
        run(*args)
        sys.exit()
    print(os.waitpid(pid, 0)[1], flush=True)
