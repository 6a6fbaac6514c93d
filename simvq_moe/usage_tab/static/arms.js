// Arms side by side: one small chart each, its seeds as a band, all on one scale.

import { ask } from './ask.js';
import { chart } from './chart.js';
import { colourOfLine } from './colours.js';
import { element, plural } from './dom.js';

const AT_ONCE = 40;

export class Arms {
  // onRun(name): a run is to be shown
  constructor(node, onRun) {
    this.node = node;
    this.onRun = onRun;
    this.answers = new Map();
  }

  // Ask for what is new of the runs beside the shown one.
  async load(runs, counted) {
    this.runs = runs;
    this.counted = counted;
    const key = (run) => JSON.stringify([run.name, run.version, counted]);
    const missing = runs.filter((run) => !this.answers.has(key(run)));
    for (let i = 0; i < missing.length; i += AT_ONCE) {
      const part = missing.slice(i, i + AT_ONCE);
      const found = await ask('series', { run: part.map((run) => run.name), counted });
      part.forEach((run, j) => this.answers.set(key(run), found.runs[j]));
      if (this.runs !== runs) return;
      this.draw();
    }
    this.draw();
  }

  answer(run) {
    return this.answers.get(JSON.stringify([run.name, run.version, this.counted]));
  }

  show(measure, kind) {
    this.measure = measure;
    this.kind = kind;
    this.draw();
  }

  draw() {
    if (!this.runs || !this.measure) return;
    const arms = new Map();
    for (const run of this.runs) {
      const answer = this.answer(run);
      if (!answer || answer.error || !answer.kinds[this.kind]) continue;
      if (!arms.has(run.arm)) arms.set(run.arm, []);
      arms.get(run.arm).push({ run, answer });
    }
    const found = [...arms].map(([arm, seeds]) => this.banded(arm, seeds));
    const { range, format, label } = this.measure;
    const ends = found.flatMap((one) => one.x);
    const values = found.flatMap((one) => [...one.high, ...one.low]).filter((v) => v !== null);
    const plan = {
      x: { label: 'step', range: [Math.min(...ends), Math.max(...ends)] },
      y: { label: '', range: range(values), format },
    };
    const room = this.node.clientWidth;
    const columns = Math.max(1, Math.min(found.length, 4, Math.floor(room / 250)));
    const width = Math.floor((room - 12 * (columns - 1)) / columns);
    this.node.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    this.node.replaceChildren(...found.map((one) => this.card(one, plan, label, width)));
  }

  // Mean, least and most of an arm's seeds at each step that all of them have.
  banded(arm, seeds) {
    const rows = seeds.map(({ answer }) => new Map(
      answer.points.map((x, i) => [x, answer.kinds[this.kind][this.measure.name][i]]),
    ));
    const x = [...rows[0].keys()].filter((at) => rows.every((row) => row.has(at)));
    const all = x.map((at) => rows.map((row) => row.get(at)).filter((value) => value !== null));
    const over = (fold) => all.map((values) => (values.length ? fold(values) : null));
    return {
      arm,
      seeds,
      x,
      mean: over((values) => values.reduce((sum, value) => sum + value, 0) / values.length),
      low: over((values) => Math.min(...values)),
      high: over((values) => Math.max(...values)),
      chance: seeds[0].answer.chance[this.kind],
    };
  }

  card(one, plan, label, width) {
    const lines = [{
      name: 'mean of seeds', x: one.x, y: one.mean, colour: colourOfLine(0), strong: true,
    }];
    const bands = one.seeds.length > 1
      ? [{ x: one.x, low: one.low, high: one.high, colour: colourOfLine(0) }] : [];
    const levels = one.chance ? [{ name: 'chance', value: one.chance[this.measure.name] }] : [];
    const title = `${label} of ${one.arm}, ${plural(one.seeds.length, 'seed')}`;
    const open = element(
      'button', {
        type: 'button', title: one.arm, onclick: () => this.onRun(one.seeds[0].run.name),
        'aria-label': `Show ${one.seeds[0].run.name}`,
      }, one.arm,
    );
    return element(
      'figure', {},
      element('figcaption', {}, open, element('span', {}, plural(one.seeds.length, 'seed'))),
      chart({ ...plan, title, lines, bands, levels }, { width, height: 150 }),
    );
  }
}
