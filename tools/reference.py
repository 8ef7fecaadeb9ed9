"The reference for users: each public name with its parameters, an example out of the notebooks, and its source."
import inspect,re,sys,textwrap

import fastai.vision.all as fastai
import fastai_heatmaps.all as ours
from fastcore.docments import docments
from fastcore.nbio import mk_cell
from fastai_heatmaps._modidx import d
from nbdev.doclinks import NbdevLookup

def methods(cls): return {f'{cls.__name__}.{n}': f for n in vars(cls) if n[0]!='_' and
    inspect.isroutine(f := getattr(cls, n)) and f.__module__.startswith('fastai_heatmaps.')}

names = {n:o for n,o in vars(ours).items() if n[0]!='_' and o is not getattr(fastai, n, None)}
PUBLIC = dict(learner=methods(ours.Learner), interpretation=methods(ours.Interpretation),
    heatmaps=dict(Heatmaps=names.pop('Heatmaps'), **methods(ours.Heatmaps)), functions=dict(sorted(names.items())))
titles = dict(learner=('Learner', 'What every Learner can do once the package is imported.'),
    interpretation=('Interpretation', "What fastai's `Interpretation` and `ClassificationInterpretation` can do besides."),
    heatmaps=('Heatmaps', 'What `get_heatmaps` gives: maps, with what the model said of each image.'),
    functions=('Functions', 'The other names that `from fastai_heatmaps.all import *` gives.'))
tables = {n: NbdevLookup().linkify(o._repr_markdown_()) for n,o in names.items() if hasattr(o, '_repr_markdown_')} # before notebooks add methods
receivers = dict(Learner='learn', Interpretation='interp', Heatmaps='hm')

def tidy(s):
    "Types in `s` as people write them"
    s = re.sub(r"<class '([\w.]+)'>", r'\1', s)
    s = re.sub(r'<(?:built-in )?function (\w+)[^>]*>', r'\1', s)
    s = re.sub(r'\btorch\.nn\.modules\.\w+\.(?=[A-Z])', 'nn.', s)
    return re.sub(r'\b(?:torch|pathlib|collections\.abc|fast(?:ai|core)(?:_heatmaps)?(?:\.\w+)*)\.(?=[A-Z])', '', s)

def cell(s): return s.replace('|', r'\|') # of a table

def module_of(name, o):
    "Name of the module that defines `o`"
    return next(m for m in d['syms'] if m==getattr(o, '__module__', '') or name in getattr(sys.modules.get(m), '__all__', ()))

def says(name, o):
    "The first line of the docstring of a function or class; of a value, whose type would speak, the comment beside it"
    if callable(o): return inspect.getdoc(o).partition('\n')[0]
    said = re.search(rf'^{name} = .*# (.+)', inspect.getsource(sys.modules[module_of(name, o)]), re.M)[1]
    return said[0].upper() + said[1:]

def returned(f):
    "What comes back of `f`: its type, and what the comment beside it says"
    typ,said = inspect.signature(f).return_annotation,re.search(r'^ *\)[^#\n]*: *# (.+)', inspect.getsource(f), re.M)
    typ = '' if typ in (inspect.Signature.empty, None) else f'`{tidy(inspect.formatannotation(typ))}`'
    return '**Returns** ' + ': '.join(filter(None, [typ, said[1] if said else ''])) if typ or said else ''

def params(f):
    "Table of the parameters of `f`; what `f` passes on is explained in its docstring only"
    said,rows = {n: o for n,o in docments(f).items() if o},[]
    said.update(re.findall(r'^  (\w+) +(.+)', (f.__doc__ or '').partition('\nParameters:\n')[2], re.M))
    for n,p in inspect.signature(f).parameters.items():
        if n in ('self', 'kwargs'): continue
        typ = '' if p.annotation is p.empty else tidy(inspect.formatannotation(p.annotation))
        if p.default is not p.empty: typ += f' = {tidy(repr(p.default))}'
        rows.append(f"| `{n}` | {cell(f'`{typ.strip()}`') if typ else ''} | {cell(said.get(n, ''))} |")
    return '\n'.join(['| parameter | type = default | what it means |', '| --- | --- | --- |', *rows]) if rows else ''

def signature(name, f):
    "How `f` is called, a method on the variable that the notebooks have for it"
    cls,_,n = name.rpartition('.')
    sig = inspect.signature(f)
    if 'self' in sig.parameters: name = f'{receivers[cls]}.{n}'
    return name + tidy(re.sub(r'\(self[^,)]*(, )?', '(', str(sig), count=1))

def example(name, home, books):
    "The cell that shows `name` best, and its page: one with a picture, of the page `home`, short; tests are no examples"
    cls,_,n = name.rpartition('.')
    call,like = (rf'\b{receivers[cls]}\w*(\[[^\]]*\])?\.{n}\(', rf'\.{n}\(') if cls else (rf'(?<![\w.]){n}\b(?!\.)',)*2
    def has_picture(c): return any('image/' in str(list(o.get('data', {}))) for o in c.outputs)
    def rank(pc):
        p,c = pc
        return not has_picture(c), not re.search(call, c.source), p!=home, c.source.count('\n')>11
    cells = [(p,c) for p,b in books.items() for c in b.cells if c.cell_type=='code' and re.search(like, c.source)]
    cells = [(p,c) for p,c in cells if has_picture(c) or not re.search(r'\bassert|\btest_', c.source)]
    return min(cells, key=rank, default=(home, None))

def home_of(name, o):
    "Page of the notebook that defines `o`"
    return next(iter(d['syms'][module_of(name, o)].values()))[0].partition('.html')[0]

def entry(name, o, books):
    "Cells about `o`: a function, a class, or something else that has a name"
    home,md = home_of(name, o),[f'## `{name}`']
    f = o.__init__ if isinstance(o, type) else o
    own = getattr(f, '__module__', '').startswith('fastai_heatmaps.') and callable(f) # not what an exception inherits
    if own: md += [f'```python\n{signature(name, o)}\n```']
    md += [says(name, o) + '.']
    if own: md += [params(f), returned(f)]
    if name in tables: md += [tables[name]]
    page,shown = example(name, home, books)
    heads = [c.source for c in books[home].cells if c.cell_type=='markdown']
    there = f'#{name.lower()}' if any(re.match(rf'#+ `{re.escape(name)}`', h) for h in heads) else ''
    also = f' ([example](/{page}.ipynb))' if shown and page!=home else ''
    more = [f"More in [{heads[0].partition(chr(10))[0].strip('# ')}](/{home}.ipynb{there}){also}"]
    if inspect.isroutine(o) or isinstance(o, type):
        source = textwrap.dedent(inspect.getsource(o)).rstrip()
        more += [f'<details><summary>Source</summary>\n\n```python\n{source}\n```\n\n</details>']
    cells = [mk_cell('\n\n'.join(filter(None, o)), 'markdown') for o in (md, more)]
    if shown: cells.insert(1, mk_cell(shown.source, outputs=shown.outputs))
    return cells

def reference(books):
    "Page -> its cells; examples are taken from `books`, page -> prepared notebook"
    res = {}
    for p,group in PUBLIC.items():
        title,what = titles[p]
        rows = [f"| [`{n.partition('.')[2] or n}`](#{n.lower()}) | {cell(says(n, o))} |" for n,o in group.items()]
        md = '\n'.join([f'# {title}', '', f'> {what}', '', '| name | what it does |', '| --- | --- |', *rows])
        res[p] = [mk_cell(md, 'markdown'), *[c for n,o in group.items() for c in entry(n, o, books)]]
    return res
