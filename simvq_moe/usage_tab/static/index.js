// The page of the tab: which run, which step, and everything that is shown of them.

import { Arms } from './arms.js';
import { ask, askWindow } from './ask.js';
import { SortedCurve } from './curve.js';
import { element, plural } from './dom.js';
import { HeatMap } from './heatmap.js';
import { byKind, countsTable, MEASURES, overSteps, sick, tiles, titleOf } from './measures.js';
import { slotPanel } from './slot.js';
import { followTheme } from './theme.js';
import { Timeline } from './timeline.js';

const SECONDS_BETWEEN_LOOKS = 5;
const NAMES = { training: 'training', held_out: 'held-out set' };

export async function render() {
  document.documentElement.lang = 'en';
  document.title = 'Usage of experts and codes';
  if (window.frameElement) window.frameElement.title = document.title;
  document.head.append(element('link', { rel: 'stylesheet', href: './style.css' }));
  followTheme();
  const page = new Page();
  document.body.append(page.node);
  await page.look();
  setInterval(() => { if (!document.hidden) page.look(); }, 1000 * SECONDS_BETWEEN_LOOKS);
  let width = window.innerWidth;
  window.addEventListener('resize', () => {
    if (width !== window.innerWidth) page.draw();
    width = window.innerWidth;
  });
}

class Page {
  constructor() {
    this.runs = [];
    this.counted = 'training';
    this.build();
  }

  build() {
    this.select = element('select', { id: 'run', onchange: () => this.open(this.select.value) });
    this.counts = element('span', { class: 'choices', role: 'group', 'aria-label': 'Counts of' });
    this.status = element('span', { class: 'status' });
    this.message = element('p', { class: 'message', role: 'status' }, 'Looking for runs…');
    this.timeline = new Timeline((index) => this.showWindow(index));
    this.sortBox = element('input', { type: 'checkbox', onchange: () => this.sort() });
    this.kinds = element('div', {});
    this.slot = element('section', { class: 'card slot', hidden: true, 'aria-live': 'polite' });
    this.sick = element('div', {});
    this.table = element('details', { ontoggle: () => this.drawTable() },
      element('summary', {}, 'Counts of this step as a table'), element('div', {}));
    this.over = element('div', {});
    this.grid = element('div', { class: 'arms' });
    this.arms = new Arms(this.grid, (name) => this.open(name));
    this.measure = element('select', { onchange: () => this.compare() },
      ...MEASURES.map((one) => element('option', { value: one.name }, one.label)));
    this.kindSelect = element('select', { onchange: () => this.compare(), 'aria-label': 'Of' });
    this.armsCard = card('Arms side by side', element('p', { class: 'hint' },
      'Line: mean of the seeds. Band: from the least to the most of them. Dashed: perfectly even '
      + 'chance. All on one scale, means over layers; a name shows its run.'),
    element('div', { class: 'controls' },
      element('label', {}, 'measure ', this.measure), this.kindSelect), this.grid);
    this.content = element(
      'div', { hidden: true },
      element('div', { class: 'sticky' }, this.timeline.node),
      this.kinds, this.slot,
      card('Dead and starved', element('p', { class: 'hint' },
        'Dead: not drawn in this window. Starved: drawn, but less than a tenth of the fair share. '
        + 'Since: the last step at which a dead one was drawn, or a starved one had its tenth.'),
      this.sick, this.table),
      card('Over steps', element('p', { class: 'hint' },
        'Blue: the mean of layers. Grey: each layer. Dashed: what perfectly even chance would '
        + 'score with as many draws. The upright line is the step above.'), this.over),
      this.armsCard,
    );
    this.node = element(
      'main', {},
      element(
        'header', {}, element('h1', {}, 'Usage'),
        element('label', { class: 'run', for: 'run' }, 'run'), this.select, this.counts, this.status,
      ),
      this.message, this.content,
    );
  }

  // See which runs there are; what has changed of those that are shown is asked for again.
  async look() {
    try {
      const found = await ask('runs');
      const shown = this.runs.find((run) => run.name === this.name);
      const changed = JSON.stringify(found.runs) !== JSON.stringify(this.runs);
      this.runs = found.runs;
      if (!this.runs.length) {
        this.say(`No run in ${found.folder} has counted anything yet. A run appears here as soon as `
          + 'it has a usage.npz.');
        return;
      }
      if (changed) this.list(found.left_out);
      const now = this.runs.find((run) => run.name === this.name);
      if (!now) {
        const going = this.runs.find((run) => run.status === 'running');
        await this.open((going || this.runs[0]).name);
      } else if (!this.run || now.version !== shown.version) await this.open(now.name);
      else if (changed) await this.loadArms();
    } catch (error) {
      this.say(`TensorBoard does not answer: ${error.message}`);
    }
  }

  list(leftOut) {
    const groups = new Map();
    for (const run of this.runs) {
      if (!groups.has(run.group)) groups.set(run.group, []);
      groups.get(run.group).push(element('option', { value: run.name }, run.name));
    }
    this.select.replaceChildren(...[...groups].map(
      ([group, options]) => (groups.size === 1 ? options : [element('optgroup', { label: group }, ...options)]),
    ).flat());
    if (leftOut) {
      this.select.append(element('option', { disabled: true }, `and ${plural(leftOut, 'run')} more`));
    }
    this.select.value = this.name;
  }

  get entry() {
    return this.runs.find((run) => run.name === this.name);
  }

  async open(name) {
    const other = name !== this.name;
    this.name = name;
    this.select.value = name;
    if (other) {
      this.closeSlot();
      this.window = null;
      delete this.node.dataset.run;
    }
    try {
      const run = await this.askRun();
      if (name !== this.name) return;
      const again = !other && this.run && sameLayers(run, this.run);
      this.run = run;
      this.say('');
      this.buildCounts();
      if (again) this.takeLayers();
      else this.buildKinds();
      await this.timeline.take(run.steps, { follow: other });
      await this.loadArms();
    } catch (error) {
      this.run = null;
      this.say(error.message);
    }
  }

  // A run may have only one kind of counts.
  async askRun() {
    try {
      return await ask('run', { run: this.name, counted: this.counted });
    } catch (error) {
      const other = this.counted === 'training' ? 'held_out' : 'training';
      const run = await ask('run', { run: this.name, counted: other }).catch(() => { throw error; });
      this.counted = other;
      return run;
    }
  }

  say(text) {
    this.message.textContent = text;
    this.message.hidden = !text;
    this.content.hidden = Boolean(text);
    if (text) return;
    const { status, error } = this.entry;
    this.status.textContent = error || status;
    this.status.className = `status ${status}`;
  }

  buildCounts() {
    this.counts.replaceChildren(...Object.entries(NAMES).map(([value, text]) => element(
      'label', {},
      element('input', {
        type: 'radio', name: 'counted', value, checked: value === this.counted,
        disabled: !this.run.counted.includes(value),
        onchange: () => { this.counted = value; this.closeSlot(); this.open(this.name); },
      }), text,
    )));
  }

  buildKinds() {
    this.built = this.name;
    this.window = null;
    this.closeSlot();
    const onSlot = (layer, slot) => this.openSlot(layer, slot);
    this.views = [...byKind(this.run.layers)].map(([kind, layers]) => {
      const cells = layers.filter((layer) => layer.cells);
      const curves = layers.filter((layer) => !layer.cells);
      const view = { kind, layers, cells, curves, tiles: element('div', { class: 'tiles' }) };
      if (cells.length) view.heat = new HeatMap(cells, onSlot);
      if (curves.length) view.curve = new SortedCurve(curves, onSlot);
      return view;
    });
    this.sortBox.checked = false;
    for (const below of [this.sick, this.over]) below.replaceChildren(); // of the run before
    this.kinds.replaceChildren(...this.views.map((view, i) => card(
      titleOf(view.kind), view.tiles,
      view.heat && i === this.views.findIndex((one) => one.heat)
        ? element('label', { class: 'sort' }, this.sortBox, ' sort each layer by load') : null,
      view.heat && view.heat.node, view.curve && view.curve.node,
    )));
  }

  // The same layers with new measures.
  takeLayers() {
    const layers = byKind(this.run.layers);
    for (const view of this.views) view.layers = layers.get(view.kind);
  }

  async showWindow(index) {
    const { name } = this;
    const answer = await askWindow(this.entry, this.counted, index).catch((error) => {
      this.timeline.stop();
      this.message.textContent = error.message;
      this.message.hidden = false;
    });
    // meanwhile another run may have been chosen, whose views may still be those of this one
    if (!answer || name !== this.name || name !== this.built) return;
    if (answer.window !== this.timeline.index) return;
    this.window = answer;
    this.drawWindow();
  }

  drawWindow() {
    if (!this.window) return;
    this.node.dataset.run = this.name;
    const { step, layers } = this.window;
    for (const view of this.views) {
      view.tiles.replaceChildren(...tiles(view.kind, view.layers, layers));
      if (view.heat) view.heat.show(step, view.cells.map((layer) => layers[layer.index].counts));
      if (view.curve) view.curve.show(step, view.curves.map((layer) => layers[layer.index]));
    }
    this.sick.replaceChildren(sick(this.run.layers, layers, step));
    this.table.hidden = !this.run.layers.some((layer) => layer.cells);
    this.drawTable();
    if (this.timeline.playing) return;
    this.drawOver();
    if (this.shownSlot) this.askSlot();
  }

  drawTable() {
    const layers = this.run.layers.map((layer, index) => ({ ...layer, index }));
    if (this.table.open && this.window) this.table.lastChild.replaceChildren(countsTable(layers, this.window.layers));
  }

  sort() {
    for (const view of this.views.filter((one) => one.heat)) view.heat.sorted = this.sortBox.checked;
    this.drawWindow();
  }

  drawOver() {
    const room = this.over.clientWidth;
    const columns = Math.max(1, Math.min(3, Math.floor(room / 260)));
    const width = Math.floor((room - 12 * (columns - 1)) / columns);
    this.over.replaceChildren(...this.views.map((view) => element(
      'div', {},
      this.views.length > 1 ? element('h3', {}, titleOf(view.kind)) : null,
      element('div', { class: 'over', style: `grid-template-columns:repeat(${columns},minmax(0,1fr))` },
        ...overSteps(this.run, view.layers, { width, marker: this.timeline.step })),
    )));
  }

  // The arms beside the shown run: of its folder and its task.
  async loadArms() {
    const { group, task, kinds } = this.entry;
    const beside = this.runs.filter((run) => run.group === group && run.task === task
      && run.kinds.join() === kinds.join());
    this.armsCard.hidden = beside.length < 2;
    const names = this.views.map((view) => view.kind);
    if (!names.includes(this.kindSelect.value)) {
      this.kindSelect.replaceChildren(...names.map(
        (kind) => element('option', { value: kind }, titleOf(kind)),
      ));
    }
    this.kindSelect.hidden = names.length < 2;
    if (beside.length > 1) {
      this.compare();
      await this.arms.load(beside, this.counted);
    }
  }

  compare() {
    const measure = MEASURES.find((one) => one.name === this.measure.value);
    this.arms.show(measure, this.kindSelect.value);
  }

  async openSlot(layer, slot) {
    this.shownSlot = { layer, slot };
    await this.askSlot();
    this.slot.scrollIntoView({ block: 'nearest' });
  }

  async askSlot() {
    const { layer, slot } = this.shownSlot;
    const window = this.timeline.index;
    const answer = await ask('slot', {
      run: this.name, counted: this.counted, layer, slot, window,
    }).catch((error) => ({ error: error.message }));
    const asked = this.shownSlot && this.shownSlot.layer === layer && this.shownSlot.slot === slot;
    if (!asked || window !== this.timeline.index) return;
    this.shownSlot.answer = answer;
    this.drawSlot();
  }

  drawSlot() {
    if (!this.shownSlot || !this.shownSlot.answer) return;
    const { answer, layer } = this.shownSlot;
    this.slot.hidden = false;
    if (answer.error) {
      this.slot.replaceChildren(element('p', {}, answer.error));
      return;
    }
    this.slot.replaceChildren(...slotPanel(answer, this.run.layers[layer], {
      marker: this.window.step, width: this.slot.clientWidth - 32, onClose: () => this.closeSlot(),
    }));
  }

  closeSlot() {
    this.shownSlot = null;
    this.slot.hidden = true;
    for (const view of this.views || []) if (view.heat) view.heat.unchoose();
  }

  draw() {
    if (!this.run || !this.window) return;
    this.drawWindow();
    this.drawSlot();
    this.arms.draw();
  }
}

function sameLayers(run, other) {
  const layers = ({ layers: all }) => all.map(({ name, kind, slots }) => [name, kind, slots].join());
  return layers(run).join(';') === layers(other).join(';');
}

function card(title, ...children) {
  return element('section', { class: 'card' }, element('h2', {}, title), ...children);
}
