"""What the browser tests ask JupyterLab's own page, in its own language."""

# The path of the notebook whose kernel is idle and has answered, else what is still missing. The
# application is asked, not the page: the toolbar says "idle" before any kernel exists. Nothing is
# awaited for ever: a dialog may be open.
READY = """async () => {
  const app = window.jupyterapp;
  if (!app) return 'no application';
  const soon = promise => Promise.race([promise.then(() => true), new Promise(done => setTimeout(done, 500))]);
  if (!await soon(app.restored)) return 'not restored';
  const panel = app.shell.currentWidget;
  if (!panel || !panel.sessionContext) return 'no notebook';
  if (!await soon(Promise.all([panel.context.ready, panel.revealed]))) return 'notebook not loaded';
  const dialog = document.querySelector('.jp-Dialog');
  if (dialog) return 'dialog: ' + dialog.innerText;
  if (!await soon(panel.sessionContext.ready)) return 'no session';
  const kernel = panel.sessionContext.session?.kernel;
  if (!kernel || !await soon(kernel.info)) return 'no kernel';
  return kernel.status === 'idle' ? panel.context.path : 'kernel ' + kernel.status;
}"""

# One entry per cell, in order; an error counts unless the cell is tagged raises-exception.
CELLS = """() => {
  const panel = window.jupyterapp.shell.currentWidget;
  return {
    idle: panel.sessionContext.session?.kernel?.status === 'idle',
    cells: [...panel.content.model.cells].map(cell => {
      const code = cell.type === 'code' && cell.sharedModel.getSource().trim() !== '';
      const tags = cell.getMetadata('tags') || [];
      const error = code && !tags.includes('raises-exception')
        ? cell.outputs.toJSON().find(o => o.output_type === 'error') : undefined;
      return {
        code, tags,
        done: code && cell.executionCount !== null && cell.executionState !== 'running',
        error: error ? `${error.ename}: ${error.evalue}` : null,
      };
    }),
  };
}"""

# Watches one cell, so that the end of its next run can be awaited: its number goes away when a run
# begins, and comes when it has ended. The number alone does not tell: after a restart of the kernel
# a cell may get the one that it had.
WATCH_RUN = """index => {
  const model = window.jupyterapp.shell.currentWidget.content.model.cells.get(index);
  window.ended = new Promise(done => {
    const look = (_, change) => {
      if (change.name !== 'executionCount' || !change.newValue) return;
      model.stateChanged.disconnect(look);
      done();
    };
    model.stateChanged.connect(look);
  });
}"""
ENDED = """timeout_s => Promise.race([
  window.ended.then(() => true), new Promise(done => setTimeout(done, 1000 * timeout_s, false)),
])"""

SOURCE = "index => window.jupyterapp.shell.currentWidget.content.model.cells.get(index).sharedModel.getSource()"
SAVED = "() => !window.jupyterapp.shell.currentWidget.context.model.dirty"

IDLE = (
    "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
)

UNNAMED = """() => [...document.querySelectorAll('.jp-OutputArea img, .jp-OutputArea canvas')]
  .filter(picture => !(picture.getAttribute('alt') || picture.getAttribute('aria-label')))
  .map(picture => picture.outerHTML.slice(0, 200))"""

LABEL = """e => {
  const words = [...(e.closest('.jupyter-widgets')?.querySelectorAll('label, span') ?? [])].map(w => w.innerText);
  return [e.getAttribute('aria-label'), e.title, ...words, e.innerText, e.tagName].find(text => text?.trim()).trim();
}"""

# What the picture shows, not where it comes from: an image widget gets a new blob address with
# every update.
PIXELS = """async e => {
  if (e.tagName === 'CANVAS') return e.toDataURL();
  await e.decode();
  const bytes = new Uint8Array(await (await fetch(e.src)).arrayBuffer());
  return bytes.length + ':' + bytes.reduce((hash, byte) => (Math.imul(hash, 31) + byte) | 0, 7);
}"""
