import re
from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from fastai_heatmaps import __version__

project = 'fastai_heatmaps'
html_title = f'{project} {__version__}'
extensions = ['myst_nb', 'sphinx_copybutton']
html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['wide.css']
html_copy_source = False
html_show_copyright = False
nitpicky = True
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'gfm'  # with tables
myst_enable_extensions = ['dollarmath', 'html_image']  # an <img> in the text is checked and copied too
myst_heading_anchors = 4
myst_heading_slug_func = 'docs.slug'
suppress_warnings = ['myst.header']  # a page may go from its title straight to show_doc's third level
html_math_renderer = 'mathml'
copybutton_selector = ':not(.output) > div.highlight pre'  # code, not what it printed

def setup(app):
    "Formulas as MathML, which browsers set without any script"
    def formula(display):
        def visit(self, node):
            self.body.append(convert(node.astext(), display=display))
            raise SkipNode
        return visit,None
    app.add_html_math_renderer('mathml', formula('inline'), formula('block'))

    def mark_first(app, page, template, context, doctree):
        "Mark the first word of a comment, with its sign"
        context['body'] = re.sub(r'(?<=<span class="c1">)# [^\s<]+', r'<span class="first">\g<0></span>', context.get('body', ''))
    app.connect('html-page-context', mark_first)
