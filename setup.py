"All that setuptools needs to know stands in settings.ini: this file hands it over."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages,setup

here = Path(__file__).parent
ini = ConfigParser(delimiters='=')
ini.read_string((here/'settings.ini').read_text('utf-8'))
cfg = ini['DEFAULT']

def rows(key): return cfg[key].strip().splitlines()

def described(md, url):
    "`md` for PyPI, where relative addresses lead nowhere: they begin with `url`; without one, links become words, and pictures go"
    def to(m):
        picture,words,path = m.groups()
        if not url: return '' if picture else words
        return f"{picture}[{words}]({url}/{'raw' if picture else 'blob'}/main/{path})"
    return re.sub(r'(?<![\w\]])(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)', to, md)

if __name__=='__main__': setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    license_expression=cfg['license'], license_files=['LICENSE'],
    keywords=cfg['keywords'].split(), classifiers=rows('classifiers'),
    long_description=described((here/'README.md').read_text('utf-8'), cfg['git_url']), long_description_content_type='text/markdown',
    url=cfg['git_url'] or None,
    packages=find_packages(here, include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]),
    package_data={cfg['lib_path']: ['py.typed']},
    python_requires=f">={cfg['min_python']}", install_requires=rows('requirements'),
    extras_require={o: rows(f'{o}_requirements') for o in ('app', 'demo', 'distrib', 'explore', 'dev')},
    entry_points={'console_scripts': rows('console_scripts'), 'nbdev': [f"{cfg['lib_name']} = {cfg['lib_path']}._modidx:d"]},
)
