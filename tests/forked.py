"Runs notebooks, by nbdev-test's own code, and scripts, each in a process of its own, forked from one that has imported fastai: that takes longer than most of them."
import gc, os, runpy, sys, traceback
import fastai.vision.all # and nothing of this package: each imports what it needs
from nbdev.test import nbdev_test

def run(fn, *args):
    if fn.endswith('.ipynb'): return nbdev_test(fn, flags=args[0])
    sys.argv = [fn, *args]
    runpy.run_path(fn, run_name='__main__')

def rc(fn, *args):
    "Run `fn` and give the exit code that Python would end with"
    try: return run(fn, *args) or 0
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int): return e.code or 0
        print(e.code, file=sys.stderr)
    except BaseException: traceback.print_exc()
    return 1

def serve(asked, answers):
    "Run each line of `asked`, a log and what `run` takes, and write its exit code to `answers`"
    gc.freeze() # no child goes over what is here already, which would copy it
    for line in asked:
        log,*args = line.rstrip('\n').split('\t')
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for o in (1, 2): os.dup2(os.open(log, os.O_WRONLY|os.O_CREAT|os.O_APPEND), o)
            code = rc(*args)
            for o in (sys.stdout, sys.stderr): o.flush()
            os._exit(code) # to take all of fastai apart takes seconds
        print(os.waitpid(pid, 0)[1], file=answers, flush=True)

def start():
    "Fork a server, and give the pipes to it and from it; it ends with this process"
    (asked,ask),(answers,answer) = os.pipe(),os.pipe()
    if os.fork():
        for o in (asked, answer): os.close(o)
        return os.fdopen(ask, 'w'),os.fdopen(answers)
    for o in (ask, answers): os.close(o)
    sys.stdout,sys.stderr = sys.__stdout__,sys.__stderr__ # pytest's own would keep what is printed
    serve(os.fdopen(asked), os.fdopen(answer, 'w'))
    os._exit(0)
